"""Cells without gates: mlp, elman, linear, leaky, and the system of one parameter."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bptt_study.cells.parts import init_inputs, init_weights, of_form, project_inputs, zeros_of
from bptt_study.types import Affine, Cell, Derivative
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
    affine = Affine(project_inputs, recur=lambda params, h: (), update=lambda x, _, h: phi(x))
    return of_form(init_inputs(inputs, hidden, gates=1), zeros_of(hidden), affine)


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
    return of_form(lambda key: {"theta": jnp.zeros(())}, zeros_of(states), affine)


def leaky(inputs: int, hidden: int, alpha: float = 0.1, activation: str = "tanh") -> Cell:
    """Make leaky units, H_t = (1 - α) H_{t-1} + α φ(X_t W_xh + H_{t-1} W_hh + b_h).

    Args:
      inputs: D, the number of input features or of symbols.
      hidden: H, the number of units.
      alpha: α in (0, 1], how far a step moves; 1/α time steps is the units' time constant, and 1 is `elman`.
      activation: φ, tanh or relu.

    Returns:
      The cell, with parameters `W_xh` [D, H], `W_hh` [H, H] and `b_h` [H].

    Raises:
      SettingError: For α outside (0, 1], another activation, and a size that is no whole number of at least 1.

    References:
      Murray 2019, "Local online learning in recurrent networks with random feedback".
    """
    phi, _ = ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)]
    if number("alpha", alpha, above=0) > 1:
        raise SettingError("alpha", alpha, "a number above 0 and at most 1")

    def update(x: Array, recurred: Array, state: Array) -> Array:
        return (1 - alpha) * state + alpha * phi(x + recurred)

    return _recurrent(inputs, hidden, None, update)


def _recurrent(
    inputs: int,
    hidden: int,
    radius: float | None,
    update: Callable[[Array, Array, Array], Array],
    derivative: Derivative | None = None,
) -> Cell:
    affine = Affine(project_inputs, lambda params, h: h @ params["W_hh"], update, derivative)
    return of_form(init_weights(inputs, hidden, 1, radius), zeros_of(hidden), affine)
