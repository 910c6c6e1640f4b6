"""Eigenvectors of symmetric matrices, one matrix after the other."""

from collections.abc import Callable

import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float


def _of_one(matrix: Float[Array, "R R"]) -> Float[Array, "R R"]:
    """Compute the eigenvectors as rows, by rising eigenvalues."""
    return jnp.linalg.eigh(matrix)[1].T


# Under vmap it is a loop. LAPACK on a whole batch blocks a thread of XLA's pool until others have done parts of
# it. With as many such calls at once as the pool has threads, all wait for ever (jaxlib 0.10 on two cores).
eigenvectors: Callable[[Float[Array, "R R"]], Float[Array, "R R"]] = sequential_vmap(_of_one)
