"""Arithmetic of trees of arrays, and reshaping of their two leading axes, time and batch."""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def add(a: Any, b: Any) -> Any:
    """Add two trees, leaf by leaf."""
    return jax.tree.map(jnp.add, a, b)


def zeros_like(tree: Any) -> Any:
    """Make a tree of zeros with the shapes and dtypes of `tree`."""
    return jax.tree.map(jnp.zeros_like, tree)


def as_types_of(like: Any, tree: Any) -> Any:
    """Cast a tree to the dtypes of `like`, leaf by leaf."""
    return jax.tree.map(lambda a, b: b.astype(a.dtype), like, tree)


def wide(tree: Any) -> Any:
    """Cast floats of 16 bits to float32: their squares may overflow, and their long sums soon stop growing."""
    return jax.tree.map(lambda a: a.astype(jnp.promote_types(a.dtype, jnp.float32)), tree)


def last(tree: Any) -> Any:
    """Take the last entry of each leaf: h_T of h_1 … h_T."""
    return jax.tree.map(lambda a: a[-1], tree)


def shifted(first: Any, tree: Any) -> Any:
    """Shift the leaves by one step: h_0 … h_{T-1} from h_0 = `first` and h_1 … h_T."""
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b[:-1]]), first, tree)


def merge_time_and_batch(tree: Any) -> Any:
    """Reshape [T, B, …] to [T·B, …]: products over one axis of tokens are faster than over two."""
    return jax.tree.map(lambda a: a.reshape(a.shape[0] * a.shape[1], *a.shape[2:]), tree)


def in_one_row(parts: Any) -> Array:
    """Concatenate [n, S, …], [S', …], … in time: [n·S + S' + …, …]."""
    return jnp.concatenate([a.reshape(-1, a.shape[-1]) for a in parts])


def floats(tree: Any) -> Any:
    """Replace leaves without a derivative (integers, flags and keys) by None, which has no leaves."""
    return jax.tree.map(lambda a: a if jnp.issubdtype(a.dtype, jnp.inexact) else None, tree)


def with_floats(tree: Any, changed: Any) -> Any:
    """Merge trees: floats come from `changed`, all other leaves from `tree`."""
    return jax.tree.map(
        lambda new, old: old if new is None else new, changed, tree, is_leaf=lambda a: a is None
    )


def norm(tree: Any, keep: int = 0) -> Array:
    """Compute the Frobenius norm of all leaves together, over all axes but the first `keep`.

    Squares leave the range of floats long before their numbers do. So all are divided by a power of two that is
    near the largest number: it changes no digit.
    """

    def over(f: Callable[..., Array], a: Array) -> Array:
        return f(a, axis=tuple(range(keep, a.ndim)))

    leaves = jax.tree.leaves(tree)
    sizes = (over(partial(jnp.max, initial=0), jnp.abs(a)) for a in leaves)
    largest = lax.stop_gradient(reduce(jnp.maximum, sizes, jnp.asarray(0.0)))
    most = jnp.finfo(largest.dtype).maxexp * 3 // 4  # the power itself is a float, too
    power = jnp.clip(jnp.frexp(largest)[1], -most, most)
    up, down = (jnp.ldexp(jnp.ones_like(largest), e) for e in (power, -power))
    scaled = (a * jnp.expand_dims(down, tuple(range(keep, a.ndim))) for a in leaves)
    return up * jnp.sqrt(sum(over(jnp.sum, jnp.real(a * jnp.conj(a))) for a in scaled))


def adjoint_norms(adjoints: Any) -> Float[Array, "T B"]:
    """Compute ‖λ_t‖ of each sequence, without a derivative: the square root has none at zero."""
    return norm(lax.stop_gradient(wide(adjoints)), keep=2)


def as_arrays(tree: Any) -> Any:
    """Replace NumPy's arrays, which cannot take traced indices, by JAX's."""
    return jax.tree.map(lambda a: a if isinstance(a, jax.Array) else jnp.asarray(a), tree)


def rows(tree: Any) -> Float[Array, "B n"]:
    """Put all numbers of a tree of floats into one row for each sequence; a complex number becomes two."""
    return jnp.concatenate([p.reshape(len(p), -1) for p in real_parts(tree)], axis=1)


def numbers(tree: Any) -> Float[Array, "n"]:
    """Put all numbers of a tree of floats into one row; a complex number becomes two."""
    return jnp.concatenate([p.ravel() for p in real_parts(tree)] or [jnp.zeros(0)])


def real_parts(tree: Any) -> list[Array]:
    """List the leaves of a tree; a complex one becomes its real and its imaginary part."""
    return [part for leaf in jax.tree.leaves(tree) for part in _real(leaf)]


def _real(leaf: Array) -> list[Array]:
    return [leaf.real, leaf.imag] if jnp.iscomplexobj(leaf) else [leaf]


def like(numbers: Float[Array, "B n"], tree: Any) -> Any:
    """Make the tree like `tree` whose `rows` are these numbers."""
    leaves, found, begin = jax.tree.leaves(tree), [], 0
    for leaf in leaves:
        parts = []
        for part in _real(leaf):
            width = part[0].size
            own = numbers[:, begin : begin + width].reshape(part.shape)
            parts.append(own.astype(part.dtype))
            begin += width
        found.append(parts[0] if len(parts) == 1 else lax.complex(*parts))
    return jax.tree.unflatten(jax.tree.structure(tree), found)
