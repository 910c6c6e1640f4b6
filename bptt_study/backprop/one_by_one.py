"""LAPACK, one matrix after the other: under `jax.vmap`, each function here is a loop.

On a whole batch, LAPACK blocks a thread of XLA's pool until other threads have done parts of the batch. With as
many such calls at once as the pool has threads, all wait for ever (jaxlib 0.10 on two cores).

LAPACK knows no floats of 16 bits.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

from bptt_study.backprop.pytrees import wide

Matrix = Float[Array, "N N"]


def _eigenvectors(matrix: Matrix) -> Matrix:
    """Compute the eigenvectors of a symmetric matrix as rows, by rising eigenvalues.

    The largest number of each is above 0. LAPACK's own signs depend on rounding, and so on the program around.
    """
    rows = jnp.linalg.eigh(wide(matrix))[1].T
    largest = jnp.take_along_axis(rows, jnp.argmax(jnp.abs(rows), axis=1)[:, None], axis=1)
    return jnp.where(largest < 0, -rows, rows).astype(matrix.dtype)


def _qr(matrix: Float[Array, "N M"]) -> tuple[Array, Array]:
    """Compute Q and R."""
    Q, R = jnp.linalg.qr(wide(matrix))
    return Q.astype(matrix.dtype), R.astype(matrix.dtype)


eigenvectors: Callable[[Matrix], Matrix] = sequential_vmap(_eigenvectors)
qr: Callable[[Float[Array, "N M"]], tuple[Array, Array]] = sequential_vmap(_qr)
solve: Callable[[Matrix, Float[Array, "N"]], Float[Array, "N"]] = sequential_vmap(jnp.linalg.solve)
