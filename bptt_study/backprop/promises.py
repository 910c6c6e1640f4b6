"""Checks of a cell's promises: a broken promise is an error, never a wrong gradient.

The fast path assumes that the derivative of `recur` is the same everywhere, and that the update uses no
parameters; a schedule may run each sequence in its own time. If a cell broke this, JAX would not notice: the
loss would be right and the gradient wrong.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from bptt_study.backprop.agreement import check_agreement
from bptt_study.backprop.closed import check_constants, check_keys, closes_over, makes_keys
from bptt_study.backprop.compare import SIZES, at_random_numbers, distance, drawn, said, shapes
from bptt_study.backprop.pytrees import floats
from bptt_study.known import is_known, remember
from bptt_study.types import Affine, Cell, Layers, Params, State
from bptt_study.validation import SettingError

ROWS = 4  # sequences of the random arguments, each of which is also run alone
WITHOUT = "Without `affine` the cell runs by its `step` alone."


def vouch(cell: Cell) -> Cell:
    """Register that a cell's promises hold, and return it. The package's tests check the cells it ships."""
    remember((cell.step, cell.affine, cell.read))
    return cell


def check_promises(cell: Cell, params: Params, state: State, inputs: Any) -> None:
    """Check a cell and its layers, each only once for each type of state and input.

    Only structures, shapes and dtypes of the arguments matter, and the number of sequences does not.

    Args:
      cell: The cell.
      params: The cell's parameters.
      state: A state, leaves [B, …].
      inputs: Inputs [T, B] or [T, B, D].

    Raises:
      SettingError: For a promise that does not hold, with its name and the size of the error.
    """
    for one, theta, own, x in _each(cell, shapes(params), shapes(state), _one_step(inputs)):
        of_one = jax.tree.map(lambda a: (a.shape[1:], a.dtype), (own, x))
        of_params = jax.tree.map(lambda a: (a.shape, a.dtype), theta)
        key = (one.step, one.affine, one.read, str((of_one, of_params)))
        if not (is_known(key[:3]) or is_known(key)):
            _prove(one, theta, own, x)
            remember(key)


def prove(cell: Cell, params: Params, state: State, inputs: Any) -> None:
    """Run `check_promises` even if the cell is already known."""
    for one, theta, own, x in _each(cell, shapes(params), shapes(state), _one_step(inputs)):
        _prove(one, theta, own, x)


def _each(cell: Cell, params: Params, state: State, x: Any) -> Iterable[tuple[Cell, Any, Any, Any]]:
    """Yield the layers of a cell from the bottom up, each before its stack, and then the cell itself."""
    if isinstance(cell.affine, Layers):
        layers, below = cell.affine.cells, x
        for name, tree in (("params", params), ("state", state)):
            if not isinstance(tree, list | tuple) or len(tree) != len(layers):
                shown = f"{name} of type {type(tree).__name__}"
                raise SettingError(
                    "cell.affine", shown, f"Layers of {len(layers)}, with {name} each"
                )
        for layer, theta, own in zip(layers, params, state, strict=True):
            yield from _each(layer, theta, own, below)
            below = jax.eval_shape(layer.read, own)
    yield cell, params, state, x


def _prove(cell: Cell, params: Params, state: State, x: Any) -> None:
    size = x.shape[0]
    if any(leaf.shape[:1] != (size,) for leaf in jax.tree.leaves(state)):
        allowed = f"a function whose leaves have the leading axis B = {size}"
        way_out = "A random cell carries a key for each sequence."
        raise SettingError("cell.zeros", f"one that returns {said(state)}", allowed, way_out)
    state, x = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((ROWS, *a.shape[1:]), a.dtype), (state, x)
    )
    unused = idle(cell, params, state, x)
    if isinstance(cell.affine, Affine):
        _check_affine(cell.affine, params, state, x, unused)
    after = _trace("cell.step", unused, cell.step, params, state, x)
    if said(state) != said(after):
        allowed = f"a function whose state is like the one before, {said(state)}"
        raise SettingError("cell.step", f"one that returns {said(after)}", allowed)
    _trace("cell.read", {}, cell.read, state)
    words = any(leaf.dtype == jnp.uint32 for leaf in jax.tree.leaves(state))
    if words and makes_keys(jax.make_jaxpr(cell.step)(params, state, x).jaxpr):
        allowed = "a function whose random keys are those of `jax.random.key`"
        way_out = "Training renews no others."
        raise SettingError("cell.zeros", "one with keys as numbers", allowed, way_out)
    with at_random_numbers():
        check_agreement(cell, params, state, x)


# Checks by tracing, which hold for all values of the arguments; those by numbers are in agreement.py


def idle(cell: Cell, params: Params, state: State, x: Any) -> dict[str, Any]:
    """Find the floats among the parameters that act on no state, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    jaxpr = jax.make_jaxpr(cell.step)(params, state, x).jaxpr
    used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1][: len(leaves)]
    return {
        jax.tree_util.keystr(path): leaf
        for (path, leaf), acts in zip(leaves, used, strict=True)
        if not acts and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }


def _trace(name: str, unused: dict[str, Any], f: Callable[..., Any], *arguments: Any) -> Any:
    """Return the shapes of f's result; raise SettingError if f closes over a trained or traced array."""
    closed, result = jax.make_jaxpr(f, return_shape=True)(*arguments)
    check_keys(name, closed.jaxpr)
    check_constants(name, closed.consts)
    for const in closed.consts:
        for path, leaf in unused.items():
            if leaf.shape == jnp.shape(const):
                raise closes_over(name, f"an array like params{path}, which is unused")
    return result


def _check_affine(
    affine: Affine, params: Params, state: State, x: Any, unused: dict[str, Any]
) -> None:
    if jax.tree.leaves(floats(state)) != jax.tree.leaves(state):
        allowed = "None where the state has integers, flags or keys"
        raise SettingError("cell.affine", "a form", allowed, WITHOUT)
    trace = lambda name, *call: _trace(f"cell.affine.{name}", unused, *call)  # noqa: E731
    projected = trace("project", affine.project, params, x)
    recurred = trace("recur", affine.recur, params, state)
    after = trace("update", affine.update, projected, recurred, state)
    if affine.derivative is not None:
        forward, vjp = affine.derivative
        _, kept = trace("derivative.forward", forward, projected, recurred, state)
        trace("derivative.vjp", vjp, (kept, state, after), after)

    def vjp_of_recur(h: State, params: Params, cotangent: Any) -> Any:
        return jax.vjp(partial(affine.recur, params), h)[1](cotangent)

    jaxpr = jax.make_jaxpr(vjp_of_recur)(state, params, recurred).jaxpr
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    if any(used[: len(jax.tree.leaves(state))]):
        with at_random_numbers():
            change = _change(vjp_of_recur, state, params, recurred)
        shown = f"a function whose derivative changes by {change:.0%} from one h to another"
        raise SettingError("cell.affine.recur", shown, "affine in h", WITHOUT)


def _change(vjp: Callable[..., Any], state: State, params: Params, cotangent: Any) -> float:
    """Compute the difference of a VJP between random states of several sizes, relative to its largest."""
    rng = np.random.default_rng(0)
    theta, sent = drawn(rng, params, scaled=True), drawn(rng, cotangent)
    at = [jax.jit(vjp)(drawn(rng, state, size=size), theta, sent) for size in SIZES]
    return max(distance(a, at[0]) for a in at)


def _one_step(inputs: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(inputs.shape[1:], inputs.dtype)
