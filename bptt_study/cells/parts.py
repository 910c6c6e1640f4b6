"""The parts that the cells share: initial weights, the product with the inputs, a cell from its affine form."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, Num

from bptt_study.backprop.promises import vouch
from bptt_study.backprop.pytrees import wide
from bptt_study.types import Affine, Cell, Params, State
from bptt_study.validation import number, whole


def of_form(
    init: Callable[[Key[Array, ""]], Params],
    zeros: Callable[[int], State],
    affine: Affine,
    read: Callable[[State], Array] = lambda h: h,
) -> Cell:
    """Make the cell whose step is its affine form.

    Args:
      init: key -> parameters.
      zeros: batch size -> h_0 = 0.
      affine: The form.
      read: The part of the state that the readout sees. By default it is all of it.

    Returns:
      The cell.
    """
    return vouch(Cell(init, zeros, affine.step, read, affine))


def zeros_of(hidden: int) -> Callable[[int], Array]:
    """Make the function that returns a zero state.

    Args:
      hidden: H.

    Returns:
      batch size B -> zeros [B, H].
    """
    return lambda batch_size: jnp.zeros((batch_size, hidden))


def project_inputs(params: Params, x: Array) -> Array:
    """Compute X W_xh + b_h.

    Args:
      params: `W_xh` [D, K] and `b_h` [K].
      x: X, features [..., D] or integers [...].

    Returns:
      The sum [..., K].
    """
    return times(x, params["W_xh"]) + params["b_h"]


def times(x: Array, W: Float[Array, "D H"]) -> Array:
    """Compute X W; if X holds integers, they index the rows of W, as one-hot vectors would select them.

    Args:
      x: Features [..., D], or integers [...].
      W: The matrix [D, H].

    Returns:
      The product [..., H]. An integer that is not a row's index gives nan, because any other row would give a
      wrong number silently.
    """
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return x @ W
    # the gradient adds up all tokens of a symbol, in the type of the rows
    rows = wide(W).at[x].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
    return rows.astype(W.dtype)


def init_inputs(
    inputs: int, hidden: int, gates: int, scale: float | None = None
) -> Callable[[Key[Array, ""]], dict[str, Any]]:
    """Check the settings, and make the function that draws the input's weights.

    Args:
      inputs: D.
      hidden: H.
      gates: The number of gates, K = gates × H.
      scale: The standard deviation of W_xh. None: 1/√D.

    Returns:
      key -> {W_xh [D, K], b_h [K]}.

    Raises:
      SettingError: For a size that is no whole number of at least 1, and a negative scale.
    """
    width, drawn = gates * whole("hidden", hidden), whole("inputs", inputs) ** -0.5
    scale = drawn if scale is None else number("input_scale", scale, least=0)
    return lambda key: {
        "W_xh": scale * jax.random.normal(key, (inputs, width)),
        "b_h": jnp.zeros(width),
    }


def init_weights(
    inputs: int, hidden: int, gates: int, radius: float | None, scale: float | None = None
) -> Callable[[Key[Array, ""]], dict[str, Any]]:
    """Check the settings, and make the function that draws all weights.

    Args:
      inputs: D.
      hidden: H.
      gates: The number of gates, K = gates × H.
      radius: The exact spectral radius of each H×H block of W_hh. None: as drawn.
      scale: The standard deviation of W_xh. None: 1/√D.

    Returns:
      key -> {W_xh [D, K], b_h [K], W_hh [H, K]}.

    Raises:
      SettingError: For a size that is no whole number of at least 1, and a negative radius or scale.
    """
    input_weights = init_inputs(inputs, hidden, gates, scale)
    if radius is not None:
        number("spectral_radius", radius, least=0)

    def init(key: Key[Array, ""]) -> dict[str, Any]:
        key_xh, key_hh = jax.random.split(key)
        W_hh = hidden**-0.5 * jax.random.normal(key_hh, (gates, hidden, hidden))
        if radius is not None:
            W_hh *= radius / jax.vmap(_radius_of_a_draw)(W_hh)[:, None, None]
        stacked = jnp.moveaxis(W_hh, 0, 1).reshape(hidden, gates * hidden)
        return input_weights(key_xh) | {"W_hh": stacked}

    return init


def spectral_radius(matrix: Num[Array, "H H"]) -> Float[Array, ""]:
    """Compute the largest modulus of the eigenvalues.

    They are the eigenvalues of a matrix that rounding may have changed in its last digits. If n of them are
    equal in one Jordan block, only a share 1/n of their digits is right, except in a triangular matrix.

    Args:
      matrix: A [H, H], real or complex. 16 bits are widened to 32.

    Returns:
      ρ, a scalar.
    """
    wide = jnp.asarray(matrix, jnp.promote_types(jnp.result_type(matrix), jnp.float32))
    # the routine scales a matrix of small numbers, and returns the eigenvalues of the scaled one
    largest = jnp.abs(wide).max()
    scale = jnp.where(largest > 0, largest, 1)
    return scale * jnp.abs(jnp.linalg.eigvals(wide / scale)).max()


def _radius_of_a_draw(matrix: Float[Array, "H H"]) -> Float[Array, ""]:
    """Compute the same by Gelfand's formula, ρ = lim ‖A^k‖^(1/k), at k = 2^24.

    Repeated squaring runs on every device, and for a random draw it is more exact than a routine for
    eigenvalues. Powers of a defective matrix lose their digits. The logarithms of the norms are summed
    separately, so nothing overflows.
    """

    def square(carry: tuple[Array, Array], power: Array) -> tuple[tuple[Array, Array], None]:
        a, log_norm = carry
        norm = jnp.linalg.norm(a)
        a = a / jnp.where(norm > 0, norm, 1.0)
        return (a @ a, log_norm + jnp.log(norm) / power), None

    powers = 2.0 ** jnp.arange(25)
    (_, log_radius), _ = jax.lax.scan(square, (matrix, jnp.zeros((), matrix.dtype)), powers)
    return jnp.exp(log_radius)
