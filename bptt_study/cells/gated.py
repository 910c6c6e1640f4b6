"""Cells with gates and a matrix from state to state: gru and lstm.

Gates leave `project` and `recur` as arrays of their own: split in the update, XLA runs them unvectorised.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from bptt_study.cells.parts import init_weights, of_form, project_inputs, zeros_of
from bptt_study.types import Affine, Cell, Derivative, Params, State


def gru(inputs: int, hidden: int, spectral_radius: float | None = None) -> Cell:
    """Make the gated recurrent unit, whose reset gate multiplies the product with the state.

        r, z = σ(X W_xh + b_h + H W_hh + b_hh);  n = tanh((X W_xh + b_h) + r ⊙ (H W_hh + b_hh));
        H_t = (1 - z) ⊙ n + z ⊙ H_{t-1}.

    Args:
      inputs: D, the number of input features or of symbols.
      hidden: H, the number of units.
      spectral_radius: The exact spectral radius of each H×H block of `W_hh` at the start. None: as drawn.

    Returns:
      The cell, with parameters `W_xh` [D, 3H], `W_hh` [H, 3H], `b_h` and `b_hh` [3H], in the order r, z, n.

    Raises:
      SettingError: For a size that is no whole number of at least 1, and a negative radius.

    References:
      Cho et al. 2014; with the reset after the product as in PyTorch.
    """

    weights = init_weights(inputs, hidden, 3, spectral_radius)

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
        project=lambda params, x: jnp.split(project_inputs(params, x), 3, axis=-1),
        recur=lambda params, h: jnp.split(h @ params["W_hh"] + params["b_hh"], 3, axis=-1),
        update=lambda *arguments: forward(*arguments)[0],
        derivative=Derivative(forward, vjp),
    )
    return of_form(
        lambda key: weights(key) | {"b_hh": jnp.zeros(3 * hidden)}, zeros_of(hidden), affine
    )


def lstm(inputs: int, hidden: int, spectral_radius: float | None = None) -> Cell:
    """Make the long short-term memory.

        i, f, o = σ(·), g = tanh(·) of X W_xh + H W_hh + b_h;  C_t = f ⊙ C_{t-1} + i ⊙ g;
        H_t = o ⊙ tanh(C_t).

    The state is the pair (H, C), and so is its adjoint.

    Args:
      inputs: D, the number of input features or of symbols.
      hidden: H, the number of units.
      spectral_radius: The exact spectral radius of each H×H block of `W_hh` at the start. None: as drawn.

    Returns:
      The cell, with parameters `W_xh` [D, 4H], `W_hh` [H, 4H] and `b_h` [4H], gates in the order i, f, g, o.

    Raises:
      SettingError: For a size that is no whole number of at least 1, and a negative radius.

    References:
      Hochreiter & Schmidhuber 1997.
    """

    weights = init_weights(inputs, hidden, 4, spectral_radius)

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

    zeros = zeros_of(hidden)
    affine = Affine(
        project=lambda params, x: jnp.split(project_inputs(params, x), 4, axis=-1),
        recur=lambda params, state: jnp.split(state[0] @ params["W_hh"], 4, axis=-1),
        update=lambda *arguments: forward(*arguments)[0],
        derivative=Derivative(forward, vjp),
    )
    return of_form(
        init,
        lambda batch_size: (zeros(batch_size), zeros(batch_size)),
        affine,
        read=lambda state: state[0],
    )
