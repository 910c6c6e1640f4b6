"""Eigenvectors of symmetric matrices, one matrix after the other."""

import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float


# LAPACK on a whole batch blocks a thread of XLA's pool until others have done parts of it. With as many such
# calls at once as the pool has threads, all wait for ever (jaxlib 0.10 on two cores). One matrix blocks none.
@sequential_vmap
def eigenvectors(matrix: Float[Array, "R R"]) -> Float[Array, "R R"]:
    """Compute the eigenvectors as rows, by rising eigenvalues; under vmap in a loop."""
    return jnp.linalg.eigh(matrix)[1].T
