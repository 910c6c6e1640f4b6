"""The error of a failed check, with the size of the failure."""

from typing import Any

import jax
import numpy as np

from bptt_study.backprop.compare import as_floats

ALLOWED = 4  # standard errors
TOLERANCE = 1e-12  # rounding in float64, relative to the largest number expected


class CheckError(AssertionError):
    """A promise does not hold. Unlike a bare `assert`, this error survives `python -O`."""


def require(holds: Any, message: str) -> None:
    """Raise CheckError unless a condition holds.

    Args:
      holds: The condition.
      message: The message of the error.

    Raises:
      CheckError: If the condition is false.
    """
    if not holds:
        raise CheckError(message)


def vector(tree: Any) -> np.ndarray:
    """Put all numbers of a tree into one vector.

    Args:
      tree: A tree of arrays.

    Returns:
      The vector, in the order of the tree's leaves.
    """
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def rows(tree: Any) -> np.ndarray:
    """All numbers of each entry of the leading axis, [N, P]."""
    leaves = map(np.asarray, jax.tree.leaves(tree))  # by NumPy: JAX would compile each reshape
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def close(actual: Any, expected: Any, tolerance: float = TOLERANCE, name: str = "result") -> None:
    """Check that two trees of arrays are equal, up to `tolerance` times each leaf's largest number.

    Args:
      actual: A tree of arrays.
      expected: A tree of the same structure.
      tolerance: The largest error, relative to the largest number expected, or to 1e-3 if all are smaller.
      name: The name of the trees in the message.

    Raises:
      CheckError: With the name of the leaf, its largest error and the allowed one.
    """
    structures = [jax.tree.structure(tree) for tree in (actual, expected)]
    require(
        str(structures[0]) == str(structures[1]), f"{name}: {structures[0]}, not {structures[1]}"
    )
    paths = jax.tree_util.tree_leaves_with_path(expected)
    for a, (path, e) in zip(map(as_floats, jax.tree.leaves(actual)), paths, strict=True):
        where, e = name + jax.tree_util.keystr(path), as_floats(e)
        require(a.shape == e.shape, f"{where} has the shape {a.shape}, not {e.shape}")
        allowed = tolerance * max(1e-3, np.abs(e).max(initial=0))
        off = np.abs(a - e).max(initial=0)
        require(off <= allowed, f"{where} is off by {off:.3g}; allowed {allowed:.3g}")
