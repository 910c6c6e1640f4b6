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
    """An activation φ, and its derivative as a function of its value."""

    phi: Callable[[Array], Array]
    slope: Callable[[Array], Array]


ACTIVATIONS = {
    "tanh": Activation(jnp.tanh, lambda y: 1 - y * y),
    "relu": Activation(jax.nn.relu, lambda y: (y > 0).astype(y.dtype)),
}


def mlp(inputs: int, hidden: int, activation: str = "tanh") -> Cell:
    """Make the multilayer perceptron, H = φ(X W_xh + b_h), a baseline without memory.

    Args:
      inputs: D, the number of input features or of symbols.
      hidden: H, the number of units.
      activation: φ, tanh or relu.

    Returns:
      The cell, with parameters `W_xh` [D, H] and `b_h` [H].

    Raises:
      SettingError: For another activation, and a size that is no whole number of at least 1.
    """
    phi, _ = ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)]
    affine = Affine(project_inputs, recur=lambda params, h: (), update=lambda x, _, h: phi(x))
    return of_form(init_inputs(inputs, hidden, gates=1), zeros_of(hidden), affine)


def elman(
    inputs: int,
    hidden: int,
    activation: str = "tanh",
    spectral_radius: float | None = None,
    input_scale: float | None = None,
) -> Cell:
    """Make Elman's network, H_t = φ(X_t W_xh + H_{t-1} W_hh + b_h).

    Args:
      inputs: D, the number of input features or of symbols.
      hidden: H, the number of units.
      activation: φ, tanh or relu.
      spectral_radius: The exact spectral radius of `W_hh` at the start. None: as drawn.
      input_scale: The standard deviation of `W_xh` at the start. None: 1/√D.

    Returns:
      The cell, with parameters `W_xh` [D, H], `W_hh` [H, H] and `b_h` [H].

    Raises:
      SettingError: For another activation, a size that is no whole number of at least 1, and a negative radius
        or scale.

    References:
      Elman 1990.
    """
    phi, slope = ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)]

    def update(x: Array, h: Array, _: Array) -> Array:
        return phi(x + h)

    def vjp(residuals: tuple[Any, Array, Array], adjoint: Array) -> tuple[Array, Array, Array]:
        delta = slope(residuals[2]) * adjoint
        return delta, delta, jnp.zeros_like(delta)

    derivative = Derivative(lambda *arguments: (update(*arguments), ()), vjp)
    return _recurrent(inputs, hidden, spectral_radius, update, derivative, input_scale)


def linear(inputs: int, hidden: int, spectral_radius: float | None = None) -> Cell:
    """Make the linear network, H_t = X_t W_xh + H_{t-1} W_hh + b_h, whose gradients have closed forms.

    Args:
      inputs: D, the number of input features or of symbols.
      hidden: H, the number of units.
      spectral_radius: The exact spectral radius of `W_hh` at the start. None: as drawn.

    Returns:
      The cell, with parameters `W_xh` [D, H], `W_hh` [H, H] and `b_h` [H].

    Raises:
      SettingError: For a size that is no whole number of at least 1, and a negative radius.
    """
    return _recurrent(inputs, hidden, spectral_radius, lambda x, h, _: x + h)


def influence(inputs: int, states: int, positive: int, theta: float = 0.0) -> Cell:
    """Make the linear system S_t = S_{t-1} Aᵀ + θ x_t v with A = ½ I + ½ superdiagonal, and one parameter θ.

    v is +1 for the first `positive` variables and -1 for the others. So the early effects of θ on the first
    variable are positive, and the late ones negative.

    Args:
      inputs: 1, the only input being a constant.
      states: The number of variables.
      positive: The number of variables on which θ acts as +1.
      theta: θ before training.

    Returns:
      The cell, with the parameter `theta`, a scalar.

    Raises:
      SettingError: For other inputs, `positive` outside 1 … states, and a theta that is not finite.

    References:
      Tallec & Ollivier 2017, section 5.1.
    """
    number("theta", theta)
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
    return of_form(lambda key: {"theta": jnp.full((), float(theta))}, zeros_of(states), affine)


def leaky(inputs: int, hidden: int, alpha: float = 0.1, activation: str = "tanh") -> Cell:
    """Make leaky units, H_t = (1 - α) H_{t-1} + α φ(X_t W_xh + H_{t-1} W_hh + b_h).

    Args:
      inputs: D, the number of input features or of symbols.
      hidden: H, the number of units.
      alpha: α in (0, 1]. The time constant of a unit is 1/α time steps; α = 1 is `elman`.
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
    scale: float | None = None,
) -> Cell:
    affine = Affine(project_inputs, lambda params, h: h @ params["W_hh"], update, derivative)
    return of_form(init_weights(inputs, hidden, 1, radius, scale), zeros_of(hidden), affine)
