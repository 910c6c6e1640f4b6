"""The arguments of an estimate or an instrument as arrays: what is none is refused by its name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_map_with_path
from jax.tree_util import tree_leaves_with_path as leaves_with_path
from jaxtyping import Array

from bptt_study.backprop.compare import said
from bptt_study.backprop.pytrees import floats
from bptt_study.backprop.shapes import check_params, other_precision
from bptt_study.types import Batch, Params, Problem
from bptt_study.validation import SettingError, instance


def arguments(problem: Problem, params: Params, batch: Batch) -> tuple[Params, Batch]:
    """Check the kinds of the arguments that all estimates and instruments share, and make them arrays.

    Args:
      problem: Cell, readout and loss.
      params: {"cell": …, "readout": …}.
      batch: The batch; its fields may be lists.

    Returns:
      The parameters and the batch, as JAX's arrays.

    Raises:
      SettingError: For the first argument of another kind, parameters that are missing, and a mask that is
        not [T, B].
    """
    instance("problem", problem, Problem)
    params = arrays("params", params)
    check_params(problem, params)
    return params, as_batch(batch)


def as_batch(batch: Any) -> Batch:
    """Make the fields of a batch JAX's arrays.

    Raises:
      SettingError: For another object, a field that is no array, and a mask that is not [T, B].
    """
    batch = instance("batch", batch, Batch)
    inputs, targets, mask = (_array(f"batch.{name}", a) for name, a in batch._asdict().items())
    if jnp.ndim(mask) != 2 or 0 in mask.shape:
        found = f"shape {list(jnp.shape(mask))}"
        raise SettingError("batch.mask", found, "of shape [T, B], neither of them 0")
    return Batch(inputs, targets, mask)


def arrays(name: str, tree: Any) -> Any:
    """Make the leaves of a tree JAX's arrays.

    Raises:
      SettingError: For the first leaf that is none, with its name.
    """
    return tree_map_with_path(lambda path, leaf: _array(name + keystr(path), leaf), tree)


def _array(name: str, value: Any) -> Array:
    if isinstance(value, jax.Array):
        _check_layout(name, str(jax.typeof(value)))
        return value
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise SettingError(name, f"a {type(value).__name__}", "an array") from error


def _check_layout(name: str, kind: str) -> None:
    """Refuse float32[5,4@data] of an Explicit mesh, and float32[5,4]{V:data} of a checking shard_map."""
    if "@" in kind:
        way_out = "Make the mesh with axis_types=(jax.sharding.AxisType.Auto,)."
        raise SettingError(name, kind, "an array without Explicit mesh axes", way_out)
    if "{" in kind:
        way_out = (
            "Give jax.shard_map check_vma=False, and average the gradients with jax.lax.pmean."
        )
        raise SettingError(name, kind, "an array without axes that shard_map checks", way_out)


def check_state(init: Callable[[Params, int], Any], params: Params, state: Any, size: int) -> None:
    """Check that a state is like the one that a strategy's `init` makes.

    A leaf of floats may also have the parameters' precision, as states of a cell may be cast to it.

    Args:
      init: The strategy's function.
      params: The parameters.
      state: The state.
      size: B.

    Raises:
      SettingError: For a state of another strategy or network, with the first leaf that differs.
    """
    expected = jax.eval_shape(lambda theta: init(theta, size), params)
    structure: Any = jax.tree.structure(expected)
    if structure != jax.tree.structure(state):
        allowed = f"like that of the strategy's init, {_kind(expected)}"
        raise SettingError("state", _kind(state), allowed)
    theta = jax.tree.leaves(floats(params))
    own = jnp.finfo(jnp.result_type(*theta)).dtype if theta else None
    for (path, like), leaf in zip(leaves_with_path(expected), jax.tree.leaves(state), strict=True):
        name, (kind, precision) = f"state{keystr(path)}", _type(leaf)
        if like.shape != leaf.shape or kind != _type(like)[0]:
            allowed = f"{said(like)}, as the strategy's init makes it"
            raise SettingError(name, said(leaf), allowed)
        if precision not in (_type(like)[1], own):
            raise other_precision(name, leaf, own or _type(like)[1])


def _kind(tree: Any) -> str:
    return f"a {type(tree).__name__} of {said(tree) or 'no arrays'}"


def _type(leaf: Any) -> tuple[str, Any]:
    """Return whether numbers are real, complex or neither, and the precision of floats."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return getattr(leaf.dtype, "kind", "key"), None
    return "c" if jnp.iscomplexobj(leaf) else "f", jnp.finfo(leaf.dtype).dtype
