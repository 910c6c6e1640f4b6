"""Recurrent cells: one time step each. No loop over time, no readout, no loss.

Gates leave `project` and `recur` as arrays of their own: split in the update, XLA runs them unvectorised
(the GRU's forward pass took 2.7 times as long at H = 64 and 128).

Initialisation, stated once: `W_xh ~ N(0, 1/D)`; every H×H block of `W_hh ~ N(0, 1/H)`, whose
spectral radius is near 1 (circular law), or that draw rescaled to have `spectral_radius` exactly;
biases 0, except the LSTM's forget gate at 1 (Jozefowicz, Zaremba & Sutskever 2015).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from bptt_study.backprop.promises import vouch
from bptt_study.types import Affine, Cell, Derivative, Params, State
from bptt_study.validation import SettingError, number, one_of, whole


class Activation(NamedTuple):
    """φ, and its derivative as a function of its value."""

    phi: Callable[[Array], Array]
    slope: Callable[[Array], Array]


ACTIVATIONS = {
    "tanh": Activation(jnp.tanh, lambda y: 1 - y * y),
    "relu": Activation(jax.nn.relu, lambda y: (y > 0).astype(y.dtype)),
}


def mlp(inputs: int, hidden: int, activation: str = "tanh") -> Cell:
    """H = φ(X W_xh + b_h): no hidden state, the baseline that knows no past."""
    phi, _ = ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)]
    affine = Affine(_project, recur=lambda params, h: (), update=lambda x, _, h: phi(x))
    return _cell(_inputs(inputs, hidden, gates=1), _zeros(hidden), affine)


def elman(
    inputs: int, hidden: int, activation: str = "tanh", spectral_radius: float | None = None
) -> Cell:
    """H_t = φ(X_t W_xh + H_{t-1} W_hh + b_h) (Elman 1990); φ is tanh or relu."""
    phi, slope = ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)]

    def update(x: Array, h: Array, _: Array) -> Array:
        return phi(x + h)

    def vjp(residuals: tuple[Any, Array, Array], adjoint: Array) -> tuple[Array, Array, Array]:
        delta = slope(residuals[2]) * adjoint
        return delta, delta, jnp.zeros_like(delta)

    derivative = Derivative(lambda *arguments: (update(*arguments), ()), vjp)
    return _recurrent(inputs, hidden, spectral_radius, update, derivative)


def linear(inputs: int, hidden: int, spectral_radius: float | None = None) -> Cell:
    """H_t = X_t W_xh + H_{t-1} W_hh + b_h: the cell whose gradients have closed forms."""
    return _recurrent(inputs, hidden, spectral_radius, lambda x, h, _: x + h)


def gru(inputs: int, hidden: int, spectral_radius: float | None = None) -> Cell:
    """Gated recurrent unit (Cho et al. 2014), gates r, z, n in the last axis, reset after the product.

    r, z = σ(X W_xh + b_h + H W_hh + b_hh);  n = tanh((X W_xh + b_h) + r ⊙ (H W_hh + b_hh));
    H_t = (1 - z) ⊙ n + z ⊙ H_{t-1}.
    """

    weights = _weights(inputs, hidden, 3, spectral_radius)

    def forward(x: list[Array], h: list[Array], state: Array) -> tuple[Array, list[Array]]:
        (x_r, x_z, x_n), (h_r, h_z, h_n) = x, h
        r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * h_n)
        return n + z * (state - n), [r, z, n, h_n]

    def vjp(residuals: tuple[list[Array], Array, Array], adjoint: Array) -> tuple[Any, Any, Array]:
        (r, z, n, h_n), state, _ = residuals
        to_n = adjoint * (1 - z) * (1 - n * n)
        to_z = adjoint * (state - n) * z * (1 - z)
        to_r = to_n * h_n * r * (1 - r)
        return [to_r, to_z, to_n], [to_r, to_z, to_n * r], adjoint * z

    affine = Affine(
        project=lambda params, x: jnp.split(_project(params, x), 3, axis=-1),
        recur=lambda params, h: jnp.split(h @ params["W_hh"] + params["b_hh"], 3, axis=-1),
        update=lambda *arguments: forward(*arguments)[0],
        derivative=Derivative(forward, vjp),
    )
    return _cell(lambda key: weights(key) | {"b_hh": jnp.zeros(3 * hidden)}, _zeros(hidden), affine)


def lstm(inputs: int, hidden: int, spectral_radius: float | None = None) -> Cell:
    """Long short-term memory (Hochreiter & Schmidhuber 1997), gates i, f, g, o in the last axis.

    i, f, o = σ(·), g = tanh(·) of X W_xh + H W_hh + b_h;  C_t = f ⊙ C_{t-1} + i ⊙ g;
    H_t = o ⊙ tanh(C_t). The state is the pair (H, C), and so is its adjoint.
    """

    weights = _weights(inputs, hidden, 4, spectral_radius)

    def init(key: Key[Array, ""]) -> Params:
        return weights(key) | {"b_h": jnp.zeros(4 * hidden).at[hidden : 2 * hidden].set(1.0)}

    def forward(x: list[Array], h: list[Array], state: State) -> tuple[State, list[Array]]:
        i, f, g, o = map(jnp.add, x, h)
        i, f, o, g = *map(jax.nn.sigmoid, (i, f, o)), jnp.tanh(g)
        c = f * state[1] + i * g
        return (o * jnp.tanh(c), c), [i, f, g, o]

    def vjp(residuals: tuple[list[Array], State, State], adjoint: State) -> tuple[Any, Any, State]:
        (i, f, g, o), (_, before), (_, c) = residuals
        tanh_c = jnp.tanh(c)
        to_c = adjoint[1] + adjoint[0] * o * (1 - tanh_c * tanh_c)
        to_i, to_f = to_c * g * i * (1 - i), to_c * before * f * (1 - f)
        to_g, to_o = to_c * i * (1 - g * g), adjoint[0] * tanh_c * o * (1 - o)
        sent = [to_i, to_f, to_g, to_o]
        return sent, sent, (jnp.zeros_like(to_c), to_c * f)

    zeros = _zeros(hidden)
    affine = Affine(
        project=lambda params, x: jnp.split(_project(params, x), 4, axis=-1),
        recur=lambda params, state: jnp.split(state[0] @ params["W_hh"], 4, axis=-1),
        update=lambda *arguments: forward(*arguments)[0],
        derivative=Derivative(forward, vjp),
    )
    return _cell(
        init,
        lambda batch_size: (zeros(batch_size), zeros(batch_size)),
        affine,
        read=lambda state: state[0],
    )


def influence(inputs: int, states: int, positive: int) -> Cell:
    """S_t = S_{t-1} Aᵀ + θ x_t v, A = ½ I + ½ superdiagonal: a system of `states` variables, one parameter θ.

    v is +1 for the first `positive` variables and -1 for the others, so that the parameter's early effects
    on the first variable are positive and the late ones negative (Tallec & Ollivier 2017, section 5.1).
    """
    if whole("inputs", inputs) != 1:
        raise SettingError("inputs", inputs, "1", "The only input of this cell is the constant.")
    if whole("positive", positive) > whole("states", states):
        raise SettingError("positive", positive, f"between 1 and states ({states})")
    v = jnp.where(jnp.arange(states) < positive, 1.0, -1.0)
    affine = Affine(
        project=lambda params, x: params["theta"] * x * v,
        recur=lambda params, s: (s + jnp.pad(s[..., 1:], [(0, 0)] * (s.ndim - 1) + [(0, 1)])) / 2,
        update=lambda x, s, _: x + s,
    )
    return _cell(lambda key: {"theta": jnp.zeros(())}, _zeros(states), affine)


def spectral_radius(matrix: Float[Array, "H H"]) -> Float[Array, ""]:
    """Largest modulus of the eigenvalues, by Gelfand's formula ρ = lim ‖A^k‖^(1/k), k = 2^24.

    Repeated squaring runs under jit, vmap and on a GPU, where no eigenvalue routine does; the
    logarithms of the norms are kept apart, so nothing overflows.
    """

    def square(carry: tuple[Array, Array], power: Array) -> tuple[tuple[Array, Array], None]:
        a, log_norm = carry
        norm = jnp.linalg.norm(a)
        a = a / jnp.where(norm > 0, norm, 1.0)
        return (a @ a, log_norm + jnp.log(norm) / power), None

    powers = 2.0 ** jnp.arange(25)
    (_, log_radius), _ = jax.lax.scan(square, (matrix, jnp.zeros((), matrix.dtype)), powers)
    return jnp.exp(log_radius)


def _cell(
    init: Callable[[Key[Array, ""]], Params],
    zeros: Callable[[int], State],
    affine: Affine,
    read: Callable[[State], Array] = lambda h: h,
) -> Cell:
    """A cell that is its affine form."""
    return vouch(Cell(init, zeros, affine.step, read, affine))


def _recurrent(
    inputs: int,
    hidden: int,
    radius: float | None,
    update: Callable[[Array, Array, Array], Array],
    derivative: Derivative | None = None,
) -> Cell:
    affine = Affine(_project, lambda params, h: h @ params["W_hh"], update, derivative)
    return _cell(_weights(inputs, hidden, 1, radius), _zeros(hidden), affine)


def _zeros(hidden: int) -> Callable[[int], Array]:
    return lambda batch_size: jnp.zeros((batch_size, hidden))


def _project(params: Params, x: Array) -> Array:
    """X W_xh + b_h; integers pick the rows of W_xh, a one-hot product without the one-hot."""
    rows = jnp.issubdtype(x.dtype, jnp.integer)
    return (params["W_xh"][x] if rows else x @ params["W_xh"]) + params["b_h"]


def _inputs(inputs: int, hidden: int, gates: int) -> Callable[[Key[Array, ""]], dict[str, Any]]:
    """Checks the sizes; returns key -> {W_xh, b_h}."""
    scale, width = whole("inputs", inputs) ** -0.5, gates * whole("hidden", hidden)
    return lambda key: {
        "W_xh": scale * jax.random.normal(key, (inputs, width)),
        "b_h": jnp.zeros(width),
    }


def _weights(
    inputs: int, hidden: int, gates: int, radius: float | None
) -> Callable[[Key[Array, ""]], dict[str, Any]]:
    """Checks the settings; returns key -> {W_xh, b_h, W_hh}."""
    input_weights = _inputs(inputs, hidden, gates)
    if radius is not None:
        number("spectral_radius", radius, least=0)

    def init(key: Key[Array, ""]) -> dict[str, Any]:
        key_xh, key_hh = jax.random.split(key)
        W_hh = hidden**-0.5 * jax.random.normal(key_hh, (gates, hidden, hidden))
        if radius is not None:
            W_hh *= radius / jax.vmap(spectral_radius)(W_hh)[:, None, None]
        stacked = jnp.moveaxis(W_hh, 0, 1).reshape(hidden, gates * hidden)
        return input_weights(key_xh) | {"W_hh": stacked}

    return init
