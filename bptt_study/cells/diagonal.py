"""Cells whose units are independent recurrences without a matrix from state to state: min_gru and lru."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from bptt_study.cells.parts import init_inputs, of_form, project_inputs, times, zeros_of
from bptt_study.types import Affine, Cell, Derivative, Params, State
from bptt_study.validation import SettingError, number, whole


def min_gru(inputs: int, hidden: int) -> Cell:
    """Make the minimal GRU, whose gate sees the input alone, with z, h̃ in the last axis of `W_xh` and `b_h`.

        z = σ(X W_z + b_z),    h̃ = X W_h̃ + b_h̃,    H_t = (1 - z) ⊙ H_{t-1} + z ⊙ h̃.

    No matrix multiplies the state: each unit is an independent recurrence.

    Args:
      inputs: D, the number of input features or of symbols.
      hidden: H, the number of units.

    Returns:
      The cell, with parameters `W_xh` [D, 2H] and `b_h` [2H].

    Raises:
      SettingError: For a size that is no whole number of at least 1.

    References:
      Feng, Tung, Ahmed, Bengio & Hajimirsadeghi 2024, "Were RNNs all we needed?", section 3.1.
    """

    def forward(x: list[Array], _: tuple[()], state: Array) -> tuple[Array, list[Array]]:
        z, n = jax.nn.sigmoid(x[0]), x[1]
        return state + z * (n - state), [z, n]

    def vjp(residuals: tuple[list[Array], Array, Array], adjoint: Array) -> tuple[Any, Any, Array]:
        (z, n), state, _ = residuals
        to_z = adjoint * (n - state) * z * (1 - z)
        return [to_z, adjoint * z], (), adjoint * (1 - z)

    affine = Affine(
        project=lambda params, x: jnp.split(project_inputs(params, x), 2, axis=-1),
        recur=lambda params, h: (),
        update=lambda *arguments: forward(*arguments)[0],
        derivative=Derivative(forward, vjp),
    )
    return of_form(init_inputs(inputs, hidden, gates=2), zeros_of(hidden), affine)


def lru(
    inputs: int,
    hidden: int,
    r_min: float = 0.0,
    r_max: float = 1.0,
    max_phase: float = 2 * math.pi,
) -> Cell:
    """Make the linear recurrent unit: H complex numbers, each with its own rates of turning and shrinking.

        h_t = λ ⊙ h_{t-1} + γ ⊙ (X_t B),    λ = exp(-exp(ν) + i exp(θ)),

    with the parameters `nu_log` = ν, `theta_log` = θ, `gamma_log` = log γ, and B in `B_re` and `B_im`. |λ| < 1
    for all their values. At the start, λ is uniform on the ring r_min ≤ |λ| ≤ r_max with phases up to
    `max_phase`, γ = √(1 - |λ|²), and B ~ N(0, 1/D).

    The state is the pair (Re h, Im h), and `read` gives Re h. The paper reads Re(C h) with a complex C;
    a readout of real weights on Re h is less: B alone turns a unit's phase, the same for all outputs.
    The states are computed one after the other: on a CPU that is faster than `lax.associative_scan`.
    Use float32 or longer: in 16 bits, exp, cos and sin of the parameters lose much of the gradient.

    Args:
      inputs: D, the number of input features or of symbols.
      hidden: H, the number of complex units.
      r_min: The inner radius of the ring, at least 0 and below `r_max`.
      r_max: The outer radius of the ring, at most 1.
      max_phase: The largest phase of λ at the start, in radians.

    Returns:
      The cell, with parameters `nu_log`, `theta_log`, `gamma_log` [H], `B_re` and `B_im` [D, H].

    Raises:
      SettingError: For a setting outside its range.

    References:
      Orvieto, Smith, Gu, Fernando, Gulcehre, Pascanu & De 2023, "Resurrecting recurrent neural networks for
      long sequences", lemma 3.2 and appendix A.
    """
    whole("inputs", inputs), whole("hidden", hidden)
    if not 0 < number("r_max", r_max) <= 1:
        raise SettingError("r_max", r_max, "a number above 0 and at most 1")
    if not 0 <= number("r_min", r_min) < r_max:
        raise SettingError("r_min", r_min, f"a number of at least 0 and below r_max ({r_max:g})")
    number("max_phase", max_phase, above=0)

    def init(key: Key[Array, ""]) -> Params:
        for_radius, for_phase, *for_B = jax.random.split(key, 4)
        # the draw stays above 0: the logarithms of λ = r_max and of the phase 0 do not exist
        least = jnp.finfo(jnp.result_type(float)).eps
        draw = lambda key: jax.random.uniform(key, (hidden,), minval=least)  # noqa: E731
        # |λ|² = r_max² - u (r_max² - r_min²)
        log_square = 2 * math.log(r_max) + jnp.log1p(-draw(for_radius) * (1 - (r_min / r_max) ** 2))
        B_re, B_im = (jax.random.normal(k, (inputs, hidden)) / math.sqrt(2 * inputs) for k in for_B)
        return {
            "nu_log": jnp.log(-log_square / 2),
            "theta_log": jnp.log(max_phase * draw(for_phase)),
            "gamma_log": jnp.log(-jnp.expm1(log_square)) / 2,
            "B_re": B_re,
            "B_im": B_im,
        }

    def project(params: Params, x: Array) -> State:
        gamma = jnp.exp(params["gamma_log"])
        return gamma * times(x, params["B_re"]), gamma * times(x, params["B_im"])

    def recur(params: Params, state: State) -> State:
        (re, im), phase = state, jnp.exp(params["theta_log"])
        radius = jnp.exp(-jnp.exp(params["nu_log"]))
        a, b = radius * jnp.cos(phase), radius * jnp.sin(phase)
        return a * re - b * im, b * re + a * im

    def update(x: State, h: State, _: State) -> State:
        return x[0] + h[0], x[1] + h[1]

    zeros = zeros_of(hidden)
    return of_form(
        init,
        lambda batch_size: (zeros(batch_size), zeros(batch_size)),
        Affine(project, recur, update, Derivative(lambda *a: (update(*a), ()), _vjp_of_sum)),
        read=lambda state: state[0],
    )


def _vjp_of_sum(residuals: Any, adjoint: State) -> tuple[State, State, State]:
    return adjoint, adjoint, jax.tree.map(jnp.zeros_like, adjoint)
