"""Random trees, and the distance between two trees of arrays."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr
from jax.tree_util import tree_leaves_with_path, tree_map_with_path
from jaxtyping import Array

from bptt_study.backprop.closed import equations
from bptt_study.backprop.pytrees import floats
from bptt_study.validation import SettingError

# of random arguments, as a promise may hold near 0 alone
SIZES = (0.5, 5.0, 50.0, 500.0)


def equal(
    name: str,
    actual: Any,
    expected: Any,
    must: str,
    what: str = "a function whose numbers differ",
    way_out: str = "",
    least: float = 0,
    *,
    allowed: float,
) -> None:
    """Check that the floats of two trees agree.

    Args:
      name: The setting that the error names.
      actual: The tree to check.
      expected: The tree that it must equal.
      must: The phrase after "must be" in the error.
      what: The start of the value in the error, which ends with the size of the difference.
      way_out: The second sentence of the error.
      least: As in `distance`.
      allowed: The largest difference.

    Raises:
      SettingError: If the trees differ.
    """
    found, wanted = said(actual), said(expected)
    if found != wanted:
        raise SettingError(name, f"one with the result {found} instead of {wanted}", must)
    difference = distance(actual, expected, least)
    if not difference <= allowed:
        raise SettingError(name, f"{what} by {difference:.1e}", must, way_out)


def distance(actual: Any, expected: Any, least: float = 0) -> float:
    """Compute the largest difference of two trees' floats, relative to the largest number of the leaf.

    Args:
      actual: A tree.
      expected: A tree of the same structure.
      least: What counts as the largest number of a leaf with smaller ones. A saturated function's derivative is
        no more exact than that.

    Returns:
      The difference.
    """
    pairs = zip(jax.tree.leaves(floats(actual)), jax.tree.leaves(floats(expected)), strict=True)
    worst = 0.0
    for a, e in ((np.asarray(a, complex), np.asarray(e, complex)) for a, e in pairs):
        # random numbers may lie outside a function's domain, so nan in both trees is no difference
        same = (np.isnan(a) & np.isnan(e)) | (a == e)  # infinities, too
        a, e = np.where(same, 0, a), np.where(same, 0, e)
        worst = max(worst, np.abs(a - e).max(initial=0) / (np.abs(e).max(initial=least) or 1.0))
    return float(worst)


@contextmanager
def at_random_numbers() -> Iterator[None]:
    """Compute at once, even within jit, with products as exact as the device can make them.

    Random numbers may overflow where a user's do not, which is no error.
    """
    exact = jax.default_matmul_precision("highest")
    with jax.ensure_compile_time_eval(), exact, jax.debug_nans(False), jax.debug_infs(False):
        yield


def drawn(
    rng: np.random.Generator,
    tree: Any,
    scaled: bool = False,
    size: float = 0.5,
    ids: int | Sequence[int] = 1,
) -> Any:
    """Draw a tree of these shapes and dtypes: normal floats, random keys, and integers below `ids`.

    Each integer is below one of several `ids`. The floats are of order `size`. In place of floats of 16 bits
    come longer ones, which show a difference better. If `scaled`, matrices are scaled by 1/√rows, so that
    products with them are no larger than what they are multiplied with.
    """

    def draw(a: Any) -> Array:
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            words, kind = jax.eval_shape(jax.random.key_data, a).shape, list[Any]()
            # a shape does not have it
            jax.eval_shape(lambda key: kind.append(jax.random.key_impl(key)), a)
            bits = rng.integers(2**32, size=words, dtype=np.uint32)
            return jax.random.wrap_key_data(jnp.asarray(bits), impl=kind[0])
        if not jnp.issubdtype(a.dtype, jnp.inexact):
            bounds = ids if isinstance(ids, int) else rng.choice(ids, size=a.shape)
            return jnp.asarray(rng.integers(bounds, size=a.shape), a.dtype)
        scale = size / np.sqrt(a.shape[0]) if scaled and len(a.shape) > 1 else size
        dtype = a.dtype
        if jnp.finfo(dtype).bits < 32:
            dtype = jnp.promote_types(dtype, jnp.result_type(float))
        return jnp.asarray(scale * rng.standard_normal(a.shape), dtype)

    return jax.tree.map(draw, tree)


def tried(
    f: Callable[..., Any],
    draw: Callable[[float], Any],
    others: Callable[[float], Sequence[Any]],
    init: Callable[[Any], Any],
    sizes: Sequence[float] = SIZES,
) -> Iterator[tuple[float, Any, float]]:
    """Run a function at random parameters and those that `init` makes, with other arguments of several sizes.

    Random parameters may show nothing: a root or a Cholesky factor of theirs may be nan, and weights that are
    pruned below a threshold may all be 0. At the parameters of `init` the other arguments have all sizes if a
    number was nan, else the first.

    Args:
      f: (parameters, *others) -> a tree of arrays.
      draw: size -> random parameters.
      others: size -> the other arguments.
      init: key -> the parameters that training starts from; those that it does not make, or makes 0, are drawn.
      sizes: The sizes.

    Yields:
      Each size, the result, and the difference that rounding may make.
    """
    first = draw(sizes[0])
    allowed = rounding(jax.make_jaxpr(f)(first, *others(sizes[0])).jaxpr)
    unknown = False
    for size in sizes:
        found = f(draw(size), *others(size))
        unknown |= has_nan(found)
        yield size, found, allowed
    theta = made(init, first)
    # at steep weights, the rounding of large numbers would look like a fault
    for size in sizes if unknown else sizes[:1]:
        yield size, f(theta, *others(size)), allowed


def made(init: Callable[[Any], Any], others: Any) -> Any:
    """Make the parameters that training starts from; in place of zeros, which hide a fault, come others."""
    leaves = tree_leaves_with_path(init(jax.random.key(0)))
    own = {path: leaf for path, leaf in leaves if np.any(leaf)}
    return tree_map_with_path(lambda path, a: jnp.asarray(own.get(path, a), a.dtype), others)


def has_nan(tree: Any) -> bool:
    """Return whether a number of a tree is nan."""
    return any(np.isnan(a).any() for a in jax.tree.leaves(floats(tree)))


def rounding(program: Jaxpr) -> float:
    """Compute the relative difference that rounding may make, by the shortest float within a program.

    Floats of 16 bits would allow any difference; those that a cell computes in may make one of 5 %.
    """
    dtypes = {v.aval.dtype for equation in equations(program) for v in equation.outvars}
    kinds = [jnp.finfo(kind) for kind in dtypes if jnp.issubdtype(kind, jnp.inexact)]
    return min(0.05, 1e4 * max((float(kind.eps) for kind in kinds), default=0))


def as_floats(tree: Any) -> Any:
    """Return a tree's numbers as long floats: integers, flags and the words of random keys, too."""

    def wide(leaf: Any) -> np.ndarray:
        key = jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.prng_key)
        found = np.asarray(jax.random.key_data(leaf) if key else leaf)
        return found.astype(np.promote_types(found.dtype, float))

    return jax.tree.map(wide, tree)


def shapes(tree: Any) -> Any:
    """Return the shapes and dtypes of a tree of arrays or numbers."""
    return jax.eval_shape(lambda: tree)


def said(tree: Any) -> str:
    """Describe a tree's shapes and dtypes in words, with its structure if it has several leaves."""
    leaves, structure = jax.tree.flatten(tree)
    words = ", ".join(f"{jnp.result_type(a)}{list(jnp.shape(a))}" for a in leaves)
    return words if jax.tree_util.treedef_is_leaf(structure) else f"{structure} of {words}"
