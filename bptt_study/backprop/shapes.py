"""Checks of one call's shapes, types and ids: JAX silently cuts, clamps or broadcasts arrays that misfit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_leaves_with_path as leaves_with_path
from jaxtyping import Array

from bptt_study.backprop.promises import check_promises
from bptt_study.backprop.pytrees import floats
from bptt_study.backprop.tokens import check_mask, check_tokens
from bptt_study.known import is_known, remember
from bptt_study.types import Affine, Batch, Cell, Layers, Params, Problem, State
from bptt_study.validation import SettingError, one_line


def check_call(
    problem: Problem, params: Params, state: State, batch: Batch, link_weights: Any = None
) -> None:
    """Check the arguments of an estimate: their shapes and types, the promises of the cell, and all ids.

    Within jit, where values are unknown, ids are not checked, and the loss of an id that does not exist is nan.

    Args:
      problem: Cell, readout and loss.
      params: {"cell": …, "readout": …}.
      state: h_0.
      batch: The batch.
      link_weights: ξ_t, or None.

    Raises:
      SettingError: For the first argument that does not fit, with its name.
    """
    check_params(problem, params)
    check_shapes(problem.cell, state, batch, link_weights)
    check_types(problem.cell, params["cell"], state, batch.inputs)
    check_step(problem.cell, params["cell"], state, batch.inputs)
    check_promises(problem.cell, params["cell"], state, batch.inputs)
    check_tokens(problem, params, batch)
    # nan shows an id that does not exist
    with jax.ensure_compile_time_eval(), jax.debug_nans(False):
        check_ids(problem, params, batch)
        check_mask(batch.mask)


def _check_promotion() -> None:
    for what, usual in (("dtype", "standard"), ("rank", "allow")):
        kind = getattr(jax.config, name := f"jax_numpy_{what}_promotion")
        if kind in ("strict", "raise"):
            way_out = f'Call it within `with jax.numpy_{what}_promotion("{usual}"):`.'
            raise SettingError(name, kind, usual, way_out)


def check_params(problem: Problem, params: Params) -> None:
    """Check that parameters are floats of the shapes that `problem.init` makes: another network's may run, too.

    Parameters that `init` does not make may have any shape. An `init` that needs the value of its key cannot be
    asked for shapes; then nothing else is checked. The same shapes are checked only once.

    Raises:
      SettingError: For the first parameter that is missing, of another shape, or no float.
    """
    _check_promotion()
    if type(params) is not dict or set(params) != {"cell", "readout"}:
        names = ", ".join(map(str, getattr(params, "keys", tuple)()))
        said = f"a {type(params).__name__} of {names}"
        raise SettingError("params", said, 'a dict {"cell": …, "readout": …}')
    found = {jax.tree_util.keystr(path): leaf for path, leaf in leaves_with_path(params)}
    types = tuple((name, leaf.shape, leaf.dtype) for name, leaf in found.items())
    if is_known(key := (problem.cell.init, problem.readout.init, types)):
        return
    for name, leaf in found.items():
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            way_out = "Close over numbers that are not trained, or keep them in the state."
            raise SettingError(f"params{name}", f"of type {leaf.dtype}", "floats", way_out)
    try:
        made = jax.eval_shape(problem.init, jax.random.key(0))
    except jax.errors.JAXTypeError:
        return
    for path, like in leaves_with_path(made):
        name = jax.tree_util.keystr(path)
        allowed = f"of shape {list(like.shape)}, as problem.init makes it"
        if name not in found:
            raise SettingError(f"params{name}", "none", allowed)
        if found[name].shape != like.shape:
            raise SettingError(f"params{name}", _said(found[name]), allowed)
        if jnp.iscomplexobj(found[name]) != jnp.iscomplexobj(like):
            way_out = f"problem.init makes {like.dtype}."
            raise SettingError(f"params{name}", found[name].dtype, "of the same kind", way_out)
    remember(key)


def check_real(cell: Cell, name: str) -> None:
    """Check that parameters and states are real numbers, for an estimator that perturbs or stores each of them.

    Args:
      cell: The cell.
      name: The name of the estimator, for the error.

    Raises:
      SettingError: For a cell with complex numbers.
    """
    made = jax.eval_shape(lambda: (cell.init(jax.random.key(0)), cell.zeros(1)))
    for leaf in jax.tree.leaves(made):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            allowed = f"one whose parameters and states are real, for {name}"
            way_out = "Use full, or hold real and imaginary parts apart, as bs.cells.lru does."
            raise SettingError("cell", f"one with {leaf.dtype} numbers", allowed, way_out)


def check_shapes(cell: Cell, state: State, batch: Batch, link_weights: Any = None) -> None:
    """Compare a batch, a state and link weights with the mask, which is [T, B].

    Raises:
      SettingError: For the first array that does not fit, with its shape.
    """
    shape = jnp.shape(batch.mask)
    if len(shape) != 2 or 0 in shape:
        raise SettingError("batch.mask", _said(batch.mask), "of shape [T, B], neither of them 0")
    steps, size = shape
    both = f"the mask's T = {steps} and B = {size}"
    for name, array in (("inputs", batch.inputs), ("targets", batch.targets)):
        if jnp.shape(array)[:2] != shape:
            raise SettingError(f"batch.{name}", _said(array), f"of shape [T, B, …] with {both}")
    if link_weights is not None and (
        jnp.shape(link_weights)[-2:] != shape or jnp.ndim(link_weights) > 3
    ):
        raise SettingError(
            "link_weights", _said(link_weights), f"of shape [T, B] or [N, T, B] with {both}"
        )
    like = jax.eval_shape(lambda: cell.zeros(size))
    same: Any = jax.tree.structure(like)
    if same != jax.tree.structure(state) or any(
        jnp.shape(a) != b.shape
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(like), strict=True)
    ):
        raise SettingError("state", _said(state), f"like that of cell.zeros({size}), {_said(like)}")


def check_types(cell: Cell, params: Params, state: State, inputs: Array) -> None:
    """Check that the arguments of an affine form have the precision of the parameters.

    Raises:
      SettingError: For a state of another precision, and for inputs of a higher one.
    """
    if cell.affine is None or not (theta := jax.tree.leaves(floats(params))):
        return
    kind = jnp.finfo(jnp.result_type(*theta)).dtype
    like = f"of the parameters' type, {kind}"
    for leaf in jax.tree.leaves(floats(state)):
        if jnp.finfo(leaf.dtype).dtype != kind:
            raise other_precision("state", leaf, kind)
    if jnp.promote_types(inputs.dtype, kind) != kind:
        raise SettingError("batch.inputs", inputs.dtype, f"{like}, or integers")


def other_precision(name: str, leaf: Array, kind: Any) -> SettingError:
    """Make the error for a leaf of the state of another precision than the parameters."""
    way_out = f"Cast it with `jax.tree.map(lambda a: a.astype({str(kind)!r}), state)`."
    return SettingError(name, leaf.dtype, f"of the parameters' type, {kind}", way_out)


def check_step(cell: Cell, params: Params, state: State, inputs: Array) -> None:
    """Check that the cell takes inputs of these shapes and types, each only once.

    Raises:
      SettingError: If its step raises an error.
    """
    now = jax.ShapeDtypeStruct(inputs.shape[1:], inputs.dtype)
    types = str(jax.tree.map(lambda a: (a.shape, a.dtype), (params, state, now)))
    if is_known(key := (cell.step, types)):
        return
    found, allowed = f"{_said(inputs)} of {inputs.dtype}", "inputs that the cell takes"
    try:
        after = jax.eval_shape(cell.step, params, state, now)
    except SettingError:
        raise
    except (TypeError, ValueError) as error:
        why = f"Its step raises: {one_line(error)}"
        raise SettingError("batch.inputs", found, allowed, why) from error
    both = zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=False)
    if any(jnp.ndim(a) != jnp.ndim(h) for a, h in both):  # rows of ids would be broadcast
        why = f"Its step makes {_said(after)} of a state of {_said(state)}."
        raise SettingError("batch.inputs", found, allowed, why)
    remember(key)


def check_ids(problem: Problem, params: Params, batch: Batch) -> None:
    """Check that symbols and classes exist: the smallest and the largest id must not give nan.

    Raises:
      SettingError: For an id that does not exist. Masked targets may be anything.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, batch))):
        return
    if jnp.issubdtype(batch.inputs.dtype, jnp.integer):
        bottom, theta = problem.cell, params["cell"]
        while isinstance(bottom.affine, Layers):
            bottom, theta = bottom.affine.cells[0], theta[0]
        if isinstance(affine := bottom.affine, Affine):
            _exist("inputs", batch.inputs, lambda ids: affine.project(theta, ids))
    counted = batch.targets[batch.mask != 0]
    if jnp.issubdtype(counted.dtype, jnp.integer) and counted.ndim == 1 and counted.size:
        outputs = jax.eval_shape(lambda: _first_outputs(problem, params))
        zeros = jnp.zeros((1, 2, *outputs.shape[1:]), outputs.dtype)
        losses = lambda ids: problem.loss(zeros, ids[None])  # noqa: E731
        if jax.eval_shape(losses, counted[:1].repeat(2)).shape == (1, 2):
            _exist("targets", counted, lambda ids: losses(ids)[0])


def _first_outputs(problem: Problem, params: Params) -> Array:
    return problem.readout.apply(params["readout"], problem.cell.read(problem.cell.zeros(1)))


def _exist(name: str, ids: Array, numbers: Callable[[Array], Any]) -> None:
    if ids.ndim > 2 or not ids.size:  # features that happen to be whole numbers
        return
    ends = jnp.stack([ids.min(), ids.max()])
    for end, good in zip(ends, _finite(numbers(ends)), strict=True):
        # if the parameters are not finite, a nan does not mean that the id is wrong
        if not good and _finite(numbers(jnp.zeros_like(ends))).all():
            allowed = "ids of the network's own symbols and classes, which count from 0"
            raise SettingError(f"batch.{name}", f"the id {end}", allowed)


def _finite(tree: Any) -> np.ndarray:
    """Return, for each of two ids, whether all its numbers are finite; leaves [2, …], or none."""
    leaves = [np.asarray(leaf).reshape(2, -1) for leaf in jax.tree.leaves(tree)]
    return np.isfinite(np.concatenate([np.zeros((2, 1)), *leaves], axis=1)).all(axis=1)


def _said(tree: Any) -> str:
    return ", ".join(f"shape {list(jnp.shape(leaf))}" for leaf in jax.tree.leaves(tree)) or "empty"
