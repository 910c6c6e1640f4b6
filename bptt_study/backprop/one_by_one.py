"""LAPACK, one matrix after the other: under `jax.vmap`, each function here is a loop.

On a whole batch, LAPACK blocks a thread of XLA's pool until other threads have done parts of the batch. With as
many such calls at once as the pool has threads, all wait for ever (jaxlib 0.10 on two cores).
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

Matrix = Float[Array, "N N"]


def _eigenvectors(matrix: Matrix) -> Matrix:
    """Compute the eigenvectors of a symmetric matrix as rows, by rising eigenvalues."""
    return jnp.linalg.eigh(matrix)[1].T


def _qr(matrix: Float[Array, "N M"]) -> tuple[Array, Array]:
    """Compute Q and R."""
    Q, R = jnp.linalg.qr(matrix)
    return Q, R


eigenvectors: Callable[[Matrix], Matrix] = sequential_vmap(_eigenvectors)
qr: Callable[[Float[Array, "N M"]], tuple[Array, Array]] = sequential_vmap(_qr)
solve: Callable[[Matrix, Float[Array, "N"]], Float[Array, "N"]] = sequential_vmap(jnp.linalg.solve)
