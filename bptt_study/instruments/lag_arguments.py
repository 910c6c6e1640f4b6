"""The arguments of the lag tables: what they must fulfil, and h_0 if none is given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bptt_study.backprop.arguments import arguments, arrays, as_batch
from bptt_study.backprop.pytrees import floats, with_floats
from bptt_study.backprop.shapes import check_call
from bptt_study.types import Batch, Params, Problem, State
from bptt_study.validation import SettingError, whole


def checked(
    problem: Problem, params: Params, batch: Batch, lags: int, state: State | None
) -> tuple[Params, State, Batch]:
    """Check the arguments of a table, and complete them with h_0 = 0.

    Args:
      problem: Cell, readout and loss.
      params: The parameters.
      batch: One batch of T steps.
      lags: K.
      state: h_0, leaves [B, H]. None: zeros.

    Returns:
      The parameters, h_0 and the batch, as JAX's arrays.

    Raises:
      SettingError: For lags > T, parameters that are not finite, and shapes that do not fit.
    """
    params, batch = arguments(problem, params, batch)
    steps, size = batch.mask.shape
    if whole("lags", lags) > steps:
        raise SettingError("lags", lags, f"between 1 and T ({steps})")
    finite(params)
    state = _zeros(problem, params, size) if state is None else arrays("state", state)
    check_call(problem, params, state, batch)
    return params, state, batch


def _zeros(problem: Problem, params: Params, size: int) -> State:
    """Make h_0 = 0, for a cell with an affine form in the precision of its parameters."""
    zeros, theta = problem.cell.zeros(size), jax.tree.leaves(floats(params["cell"]))
    if problem.cell.affine is None or not theta:
        return zeros
    kind = jnp.finfo(jnp.result_type(*theta)).dtype

    def cast(a: Array) -> Array:
        return a.astype(jnp.promote_types(kind, "c8") if jnp.iscomplexobj(a) else kind)

    return with_floats(zeros, jax.tree.map(cast, floats(zeros)))


def fitting(weights: Any, batch: Batch, *shapes: str) -> Array:
    """Check that weights have one of the shapes, such as "TK", and return them as an array."""
    weights, mask = jnp.asarray(weights), as_batch(batch).mask
    known = dict(zip("TB", mask.shape, strict=True))
    for shape in shapes:
        sizes = tuple(known.get(axis, n) for axis, n in zip(shape, weights.shape, strict=False))
        if sizes == weights.shape and len(shape) == weights.ndim:
            return weights
    allowed = " or ".join(f"[{', '.join(shape)}]" for shape in shapes)
    found = f"shape {list(weights.shape)}"
    raise SettingError("weights", found, f"of shape {allowed} with T = {len(mask)}")


def finite(params: Params) -> None:
    """Check that parameters are finite; within jit, where values are unknown, check nothing.

    Args:
      params: A tree of arrays.

    Raises:
      SettingError: For a nan or inf, with the name of the first array that holds one.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not isinstance(leaf, jax.core.Tracer) and not np.isfinite(leaf).all():
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            raise SettingError(f"params.{where}", "nan or inf", "finite")
