"""The error of a failed check, and how it says by how much the check failed."""

from typing import Any

import jax
import numpy as np

TOLERANCE = 1e-12  # of rounding in float64, relative to the largest number expected


class CheckError(AssertionError):
    """A promise that does not hold. Unlike a bare `assert` it survives `python -O`."""


def require(holds: Any, message: str) -> None:
    """Raise CheckError with `message` unless `holds`."""
    if not holds:
        raise CheckError(message)


def vector(tree: Any) -> np.ndarray:
    """All numbers of a tree in one vector."""
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def rows(tree: Any) -> np.ndarray:
    """All numbers of each entry of the leading axis, [N, P]."""
    leaves = map(np.asarray, jax.tree.leaves(tree))  # by NumPy: JAX would compile each reshape
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def close(actual: Any, expected: Any, tolerance: float = TOLERANCE, name: str = "result") -> None:
    """Hold two trees of arrays equal up to `tolerance` times the largest number expected of each leaf.

    Args:
      actual: A tree of arrays.
      expected: A tree of the same structure.
      tolerance: Relative to the largest number expected, or to 1e-3 where all are smaller.
      name: What the trees are, for the message.

    Raises:
      CheckError: With the name of the leaf, its largest error and what is allowed.
    """
    structures = [jax.tree.structure(tree) for tree in (actual, expected)]
    require(
        str(structures[0]) == str(structures[1]), f"{name}: {structures[0]}, not {structures[1]}"
    )
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for a, (path, e) in zip(map(np.asarray, jax.tree.leaves(actual)), paths, strict=True):
        where, e = name + jax.tree_util.keystr(path), np.asarray(e)
        require(a.shape == e.shape, f"{where} has the shape {a.shape}, not {e.shape}")
        allowed = tolerance * max(1e-3, np.abs(e).max(initial=0))
        off = np.abs(a.astype(float) - e.astype(float)).max(initial=0)
        require(off <= allowed, f"{where} is off by {off:.3g}; allowed {allowed:.3g}")
