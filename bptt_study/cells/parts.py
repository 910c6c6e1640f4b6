"""The parts that the cells share: initial weights, the product with the inputs, a cell from its affine form."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from bptt_study.backprop.promises import vouch
from bptt_study.types import Affine, Cell, Params, State
from bptt_study.validation import number, whole


def of_form(
    init: Callable[[Key[Array, ""]], Params],
    zeros: Callable[[int], State],
    affine: Affine,
    read: Callable[[State], Array] = lambda h: h,
) -> Cell:
    """A cell that is its affine form."""
    return vouch(Cell(init, zeros, affine.step, read, affine))


def zeros_of(hidden: int) -> Callable[[int], Array]:
    return lambda batch_size: jnp.zeros((batch_size, hidden))


def project_inputs(params: Params, x: Array) -> Array:
    """X W_xh + b_h."""
    return times(x, params["W_xh"]) + params["b_h"]


def times(x: Array, W: Float[Array, "D H"]) -> Array:
    """X W; integers pick the rows of W, a one-hot product without the one-hot.

    An integer that is no row's gives nan: a row in its place would be a wrong number without a word, and its
    gradient would be lost.
    """
    if not jnp.issubdtype(x.dtype, jnp.integer):
        return x @ W
    return W.at[x].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)


def init_inputs(inputs: int, hidden: int, gates: int) -> Callable[[Key[Array, ""]], dict[str, Any]]:
    """Checks the sizes; returns key -> {W_xh, b_h}."""
    scale, width = whole("inputs", inputs) ** -0.5, gates * whole("hidden", hidden)
    return lambda key: {
        "W_xh": scale * jax.random.normal(key, (inputs, width)),
        "b_h": jnp.zeros(width),
    }


def init_weights(
    inputs: int, hidden: int, gates: int, radius: float | None
) -> Callable[[Key[Array, ""]], dict[str, Any]]:
    """Checks the settings; returns key -> {W_xh, b_h, W_hh}."""
    input_weights = init_inputs(inputs, hidden, gates)
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
