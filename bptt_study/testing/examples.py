"""Cells and tiny problems on which a strategy is checked, and their gradients by a plain Python loop."""

import warnings
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bptt_study as bs
from bptt_study.backprop.compare import said
from bptt_study.backprop.pytrees import floats
from bptt_study.testing.errors import close, require, vector
from bptt_study.testing.loops import adjoint_norms, looped_loss, scanned_loss
from bptt_study.types import Batch, Cell, Problem

__all__ = ["close", "vector"]  # from `errors`, because comparisons with an example need them

T, B, D, H, Q = 7, 2, 3, 3, 3

MakeCell = Callable[[int, int], Cell]  # (inputs, hidden) -> the cell
CELLS: dict[str, MakeCell] = {
    "mlp": bs.cells.mlp,
    "linear": bs.cells.linear,
    "elman_tanh": bs.cells.elman,
    "elman_relu": lambda inputs, hidden: bs.cells.elman(inputs, hidden, activation="relu"),
    "gru": bs.cells.gru,
    "lstm": bs.cells.lstm,
}
LOSSES = dict.fromkeys(("linear", "lstm"), "squared_error")  # the others: cross_entropy
INTEGER_INPUTS = ("elman_tanh", "gru")


class Example(NamedTuple):
    """A problem, with the data on which a strategy is checked."""

    problem: Problem
    params: Any
    earlier: Batch  # the batch before, which makes the state non-zero
    batch: Batch
    state: Any  # hidden state after `earlier`


def problem_of(cell: str | MakeCell, inputs: int = D, hidden: int = H, outputs: int = Q) -> Problem:
    """Make the problem of a cell.

    Args:
      cell: A name among `CELLS`, or a function (inputs, hidden) -> Cell.
      inputs: D.
      hidden: H.
      outputs: Q.

    Returns:
      The problem.
    """
    made = (CELLS[cell] if isinstance(cell, str) else cell)(inputs, hidden)
    read = jax.eval_shape(lambda: made.read(made.zeros(1)))
    readout = bs.readouts.linear(hidden=read.shape[-1], outputs=outputs)
    return Problem(made, readout, getattr(bs.losses, LOSSES.get(str(cell), "cross_entropy")))


@cache
def example(
    cell: str | MakeCell,
    steps: int = T,
    sequences: int = B,
    seed: int = 0,
    inputs: int = D,
    hidden: int = H,
    outputs: int = Q,
) -> Example:
    """Make a problem with random parameters (biases too), a mask with zeros and fractions, and h_0 ≠ 0.

    Args:
      cell: A name among `CELLS`, or a function (inputs, hidden) -> Cell.
      steps: T.
      sequences: B.
      seed: The seed of all random numbers.
      inputs: D.
      hidden: H.
      outputs: Q.

    Returns:
      The example.

    Raises:
      CheckError: For a cell whose state stays near 0.
    """
    rng = np.random.default_rng(seed)
    problem = problem_of(cell, inputs, hidden, outputs)
    params = jax.tree.map(
        lambda p: jnp.asarray(p + 0.3 * rng.standard_normal(p.shape)),
        jax.device_get(jax.jit(problem.init)(jax.random.key(seed))),
    )
    by_ids = cell in INTEGER_INPUTS or not _takes(problem, jnp.zeros((1, inputs)))

    def batch() -> Batch:
        shape = (steps, sequences)
        features = rng.standard_normal((*shape, inputs))
        classes = rng.integers(outputs, size=shape)
        symbols = rng.integers(inputs, size=shape) if by_ids else features
        targets = rng.standard_normal((*shape, outputs)) if cell in LOSSES else classes
        return Batch(jnp.asarray(symbols), jnp.asarray(targets), jnp.asarray(_mask(*shape)))

    earlier, now = batch(), batch()
    state = _loop(steps)(problem, params, problem.cell.zeros(sequences), earlier)[1]
    for leaf in jax.tree.leaves(floats(state)):
        largest = float(jnp.abs(leaf).max())
        require(largest > 0.01, f"{cell}: a state of at most {largest:.2g} tests nothing")
    return Example(problem, params, earlier, now, state)


def _takes(problem: Problem, x: Any) -> bool:
    """Return False if the cell takes no floats [B, D], but ids [B]."""

    def runs(x: Any) -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of floats in place of ids
                after = jax.eval_shape(cell.step, params, state, x)
        except (TypeError, ValueError, IndexError):
            return False
        return said(after) == said(state)

    cell = problem.cell
    params, state = jax.eval_shape(lambda: (cell.init(jax.random.key(0)), cell.zeros(1)))
    return runs(x) or not runs(jnp.zeros(1, int))


def _mask(steps: int, sequences: int) -> np.ndarray:
    """Make a mask of zeros, ones, fractions and, from ten steps on, more; then the last step is empty."""
    mask = np.ones((steps, sequences))
    mask[:, 3:-1], mask[-1, 0] = 0, 0.25  # the fourth of five sequences is empty
    if steps > 2:
        mask[0, 0], mask[steps // 2, -1], mask[1, -1] = 0, 0, 0.5
    if steps >= 10:
        mask[2, 0], mask[-1] = 2.5, 0
    return mask


SHORT = {np.dtype("float64"): np.float32, np.dtype("complex128"): np.complex64}


def narrow(tree: Any, kinds: Mapping[Any, Any] = SHORT) -> Any:
    """Return the shapes of arrays, with other dtypes in place of those that `kinds` names.

    Args:
      tree: A tree of arrays or shapes.
      kinds: dtype -> dtype. By default, floats of 64 bits become those of 32.

    Returns:
      The tree of shapes.
    """
    kind = lambda a: kinds.get(a.dtype, a.dtype)  # noqa: E731
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, kind(a)), tree)


def _loop(steps: int) -> Callable[..., Any]:
    return looped_loss if steps == T else scanned_loss


@partial(jax.jit, static_argnames=("loss", "problem"))
def _slope(loss: Any, problem: Problem, params: Any, state: Any, batch: Batch) -> Any:
    return jax.value_and_grad(lambda p: loss(problem, p, state, batch)[0])(params)


def stream(earlier: Batch, batch: Batch) -> Batch:
    """Join two batches in time; only the tokens of the second count.

    Args:
      earlier: The first batch.
      batch: The second batch.

    Returns:
      One batch of all their steps.
    """
    earlier = earlier._replace(mask=jnp.zeros_like(earlier.mask))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), earlier, batch)


def steps_of(batch: Batch, part: slice) -> Batch:
    """Select some steps of a batch.

    Args:
      batch: The batch.
      part: The steps.

    Returns:
      A batch of these steps.
    """
    return jax.tree.map(lambda a: a[part], batch)


def gradient(example: Example, reach: str = "call") -> tuple[Any, Any]:
    """Compute the loss and the gradient of an example by JAX through a loop.

    Args:
      example: The problem and its data.
      reach: "call", from the detached state on; "stream", through the earlier batch too.

    Returns:
      The loss, and the gradient as a tree like the parameters.
    """
    problem, params, earlier, batch, state = example
    if reach == "stream":
        batch, state = stream(earlier, batch), problem.cell.zeros(batch.mask.shape[1])
    return _slope(_loop(len(example.batch.mask)), problem, params, state, batch)


@cache
def reference(cell: str | MakeCell, reach: str = "call", **size: int) -> tuple[float, Any]:
    """Compute the loss and the gradient of `example(cell, **size)`, and check that the model is not dead.

    Args:
      cell: A name among `CELLS`, or a function (inputs, hidden) -> Cell.
      reach: As in `gradient`.
      **size: The sizes, as in `example`.

    Returns:
      The loss, and the gradient as a tree like the parameters.

    Raises:
      CheckError: If a parameter has almost no gradient, so that a check of it would test nothing.
    """
    loss, grads = gradient(example(cell, **size), reach)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    largest = {jax.tree_util.keystr(path): float(jnp.abs(leaf).max()) for path, leaf in leaves}
    least = min(largest, key=lambda where: largest[where])
    # with one step, some parameters have no effect yet: they act only on states that later steps read
    live = max(largest.values()) if size.get("steps") == 1 else largest[least]
    said = f"{least} has a gradient of {largest[least]:.2g}"
    require(live > 1e-3, f"a dead model tests nothing: {said}")
    return float(loss), grads


@cache
def reference_norms(cell: str | MakeCell, **size: int) -> np.ndarray:
    """Compute ‖∂L/∂h_t‖ of each sequence by the plain loop, from the state after the earlier batch.

    Args:
      cell: A name among `CELLS`, or a function (inputs, hidden) -> Cell.
      **size: The sizes, as in `example`.

    Returns:
      The norms [T, B].
    """
    problem, params, _, batch, state = example(cell, **size)
    return np.asarray(adjoint_norms(problem, params, state, batch))
