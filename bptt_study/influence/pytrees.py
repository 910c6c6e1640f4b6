"""States as vectors: all numbers of one sequence's state in one axis, and the way back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bptt_study.backprop.pytrees import floats
from bptt_study.types import Cell, State


def like(cell: Cell) -> State:
    """Return the shapes [1, …] of the floats of one sequence's state."""
    return floats(jax.eval_shape(lambda: cell.zeros(1)))


def width(cell: Cell) -> int:
    """Count n, the numbers of one sequence's state."""
    return sum(leaf.size for leaf in jax.tree.leaves(like(cell)))


def joined(states: State, lead: int) -> Float[Array, "*lead n"]:
    """Join the leaves of a state to a vector, behind their first `lead` axes."""
    leaves = jax.tree.leaves(states)
    return jnp.concatenate([a.reshape(*a.shape[:lead], -1) for a in leaves], axis=-1)


def parted(vectors: Float[Array, "*lead n"], shapes: State) -> State:
    """Part vectors into states with leaves [*lead, …], according to `shapes` [1, …]."""
    leaves, structure = jax.tree.flatten(shapes)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = jnp.split(vectors, ends, axis=-1)
    return jax.tree.unflatten(
        structure,
        [p.reshape(*p.shape[:-1], *s.shape[1:]) for p, s in zip(parts, leaves, strict=True)],
    )


def units_of(cell: Cell, batch_size: int, dtype: Any) -> State:
    """Make all unit vectors of the state, leaves [n, B, …]."""
    n = width(cell)
    eye = jnp.broadcast_to(jnp.eye(n, dtype=dtype)[:, None], (n, batch_size, n))
    return parted(eye, like(cell))


def square_norm(tree: Any) -> Float[Array, "B"]:
    """Compute the squared Frobenius norm of each sequence's numbers; leaves are [B, …]."""
    leaves = jax.tree.leaves(tree)
    return sum((jnp.sum(a * a, axis=tuple(range(1, a.ndim))) for a in leaves), jnp.zeros(()))
