"""The shapes of one call, checked once at its door: JAX would cut, clamp or broadcast what does not fit."""

from typing import Any

import jax
import jax.numpy as jnp

from bptt_study.backprop.promises import check_promises
from bptt_study.types import Batch, Cell, Params, Problem, State
from bptt_study.validation import SettingError


def check_call(
    problem: Problem, params: Params, state: State, batch: Batch, link_weights: Any = None
) -> None:
    """Check the arguments of an estimate: their shapes, and the promises of the cell.

    Raises:
      SettingError: For the first that does not fit, by its name.
    """
    check_shapes(problem.cell, state, batch, link_weights)
    check_promises(problem.cell, params["cell"], state, batch.inputs)


def check_shapes(cell: Cell, state: State, batch: Batch, link_weights: Any = None) -> None:
    """Compare a batch, a state and link weights with the mask, which is [T, B].

    Raises:
      SettingError: For the first that does not fit, with its shape.
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


def _said(tree: Any) -> str:
    return ", ".join(f"shape {list(jnp.shape(leaf))}" for leaf in jax.tree.leaves(tree)) or "empty"
