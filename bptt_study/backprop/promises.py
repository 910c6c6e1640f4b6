"""What a cell's affine form promises, checked against its `step`: a broken promise is an error.

The fast path uses `recur`'s derivative as if it were the same everywhere, and the update's as if it knew no
parameters. Nothing in JAX would notice a cell for which that does not hold: the loss would be right.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bptt_study.backprop.forward import derivative
from bptt_study.types import Affine, Batch, Cell, Layers, Params, Problem, State
from bptt_study.validation import SettingError

_known: dict[tuple[Any, Any], None] = {}  # (step, affine) whose promises hold
MOST = 1024  # of them


def vouch(cell: Cell) -> Cell:
    """The cell, whose promises are known to hold: the tests of this package check those that it ships."""
    _known.pop(next(iter(_known)), None) if len(_known) >= MOST else None
    _known[cell.step, cell.affine] = None
    return cell


def checked(problem: Problem, params: Params, state: State, batch: Batch) -> Batch:
    """The batch of an estimate, whose mask counts in numbers even if it is of booleans.

    Raises:
      SettingError: For a cell that breaks a promise.
    """
    check_promises(problem.cell, params["cell"], state, batch.inputs)
    return batch._replace(mask=batch.mask.astype(jnp.result_type(*jax.tree.leaves(params))))


def check_promises(cell: Cell, params: Params, state: State, inputs: Any) -> None:
    """Check a cell once: of the arguments only shapes and dtypes matter.

    Args:
      cell: The cell.
      params: Its parameters.
      state: Leaves [B, …].
      inputs: [T, B] or [T, B, D].

    Raises:
      SettingError: For a promise that does not hold, by its name and with the size of the error.
    """
    if (cell.step, cell.affine) in _known:
        return
    x = jax.ShapeDtypeStruct(inputs.shape[1:], inputs.dtype)
    _check_step(cell, params, state, x)
    if isinstance(cell.affine, Layers):
        below = x
        for layer, theta, own in zip(cell.affine.cells, params, state, strict=True):
            check_promises(layer, theta, own, jax.ShapeDtypeStruct((1, *below.shape), below.dtype))
            below = jax.eval_shape(layer.read, own)
    if cell.affine is not None:
        with jax.ensure_compile_time_eval():
            _check_form(cell, params, state, x)
    vouch(cell)


def _check_step(cell: Cell, params: Params, state: State, x: Any) -> None:
    """The state is closed under `step`, and `step` closes over nothing that JAX traces."""
    jaxpr, after = jax.make_jaxpr(cell.step, return_shape=True)(*_shapes((params, state, x)))
    if any(isinstance(const, jax.core.Tracer) for const in jaxpr.consts):
        raise SettingError(
            "cell.step",
            "a function that closes over a traced value",
            "a function of (params, state, x) alone, or the gradient leaves that value out",
        )
    before = _shapes(state)
    like: Any = jax.tree.structure(before)
    if like != jax.tree.structure(after) or any(
        (a.shape, a.dtype) != (b.shape, b.dtype)
        for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True)
    ):
        raise SettingError(
            "cell.step", _said(after), f"a state like the one before, {_said(before)}"
        )


def _check_form(cell: Cell, params: Params, state: State, x: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(2):  # parameters: what a function closes over does not change with them
        theta, h, other, now = (_drawn(rng, tree) for tree in (params, state, state, x))
        if isinstance(cell.affine, Affine):
            _check_affine(cell.affine, theta, h, other, now, rng)
        _equal(
            "cell.step",
            cell.step(theta, h, now),
            _by_form(cell, theta, h, now),
            "equal to its parts",
        )


def _by_form(cell: Cell, params: Params, state: State, x: Array) -> State:
    if isinstance(cell.affine, Affine):
        return cell.affine.step(params, state, x)
    assert isinstance(cell.affine, Layers)
    found = []
    for layer, theta, own in zip(cell.affine.cells, params, state, strict=True):
        found.append(layer.step(theta, own, x))
        x = layer.read(found[-1])
    return tuple(found)


def _check_affine(
    affine: Affine, params: Params, h: State, other: State, x: Array, rng: np.random.Generator
) -> None:
    recur: Callable[[State], Any] = lambda state: affine.recur(params, state)  # noqa: E731
    mean = jax.tree.map(lambda a, b: a + 2 * (b - a), h, other)
    expected = jax.tree.map(lambda a, b: a + 2 * (b - a), recur(h), recur(other))
    _equal("cell.affine.recur", recur(mean), expected, "affine in h")
    if affine.derivative is None:
        return
    projected, recurred = affine.project(params, x), recur(h)
    after, vjp = jax.vjp(affine.update, projected, recurred, h)
    stepped, kept = affine.derivative.forward(projected, recurred, h)
    _equal("cell.affine.derivative.forward", stepped, after, "equal to `update`")
    adjoint = _drawn(rng, after)
    found = derivative(affine).vjp((kept, h, after), adjoint)
    _equal("cell.affine.derivative.vjp", found, vjp(adjoint), "equal to the VJP of `update`")


def _equal(name: str, actual: Any, expected: Any, must: str) -> None:
    """SettingError unless the trees agree to rounding."""
    pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    for a, e in ((np.asarray(a), np.asarray(e)) for a, e in pairs if _is_float(a)):
        a, e = a.astype(float), e.astype(float)
        scale = np.abs(e).max(initial=0) or 1.0
        off = np.abs(a - e).max(initial=0) / scale
        if not off <= 1e4 * float(jnp.finfo(pairs[0][1].dtype).eps):
            raise SettingError(name, f"a function that is off by {off:.1e}", must)


def _is_float(a: Any) -> bool:
    return bool(jnp.issubdtype(a.dtype, jnp.inexact))


def _drawn(rng: np.random.Generator, tree: Any) -> Any:
    """Random numbers for floats, and 0 for all else."""

    def draw(a: Any) -> Array:
        if not _is_float(a):
            return jnp.zeros(a.shape, a.dtype)
        return jnp.asarray(0.5 * rng.standard_normal(a.shape), a.dtype)

    return jax.tree.map(draw, _shapes(tree))


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)), tree)


def _said(tree: Any) -> str:
    return ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(tree))
