"""Check the promises of a cell: its four functions, and the affine form if it has one."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import bptt_study as bs
from bptt_study.backprop.compare import drawn, equal, has_nan, said, tried
from bptt_study.backprop.promises import idle, prove
from bptt_study.backprop.pytrees import floats
from bptt_study.backprop.repeats import check_draws_of
from bptt_study.backprop.twice import twice
from bptt_study.testing.errors import CheckError, close, require
from bptt_study.testing.examples import SHORT, narrow
from bptt_study.testing.loops import plain_loss
from bptt_study.types import Affine, Batch, Cell, Layers, Problem, Readout
from bptt_study.validation import SettingError

T, B = 4, 3
LONG = {np.dtype(short): np.dtype(long) for long, short in SHORT.items()}


def check_cell(cell: Cell, inputs: int | Array | None = None) -> None:
    """Check the promises of a cell, in float64, to which parameters and states of float32 are widened.

    A cell that computes in float32 all the same has a gradient that may be off by 1e-4.

    - `init` and `zeros` are functions of their arguments alone. A line says if `init` ignores its key.
    - The states of B sequences have the leading axis B, and `read` returns floats [B, H]. The floats of `zeros`
      are the same for each sequence, however many there are.
    - `step` maps states to states of the same shapes and dtypes, in float32 too, and sees each sequence alone.
    - All parameters act on the states, and no function closes over an array that JAX traces.
    - If the cell has the affine form: `step` and its VJP are those of its parts, `recur` is affine in h,
      `project`, `recur` and `update` take any leading axes, and the written-out derivative is the VJP of
      `update`.
    - The gradient of full BPTT is the one that JAX computes through a Python loop.

    Args:
      cell: The cell; its layers are checked too.
      inputs: An example of x_t, [B, D] floats or [B] integers, or the number D of features. None: the smallest
        size of a parameter that `step` accepts as D, or integers if it accepts none.

    Raises:
      CheckError: For the first promise that does not hold, with its name and numbers.
    """
    require(isinstance(cell, Cell), f"a cell is a bptt_study.Cell; got a {type(cell).__name__}")
    with jax.enable_x64(True):
        with _tried("init"):
            params = jax.eval_shape(cell.init, jax.random.key(0))
            check_draws_of(cell)
        with _tried("zeros and read"):
            _check_zeros(cell)
        x = _example(cell, params, inputs)
        state = jax.eval_shape(partial(cell.zeros, x.shape[0]))
        with _tried(f"step with inputs {said(x)}"):
            params, state, x = _widened(cell, params, state, x)
            prove(cell, params, state, jax.ShapeDtypeStruct((1, *x.shape), x.dtype))
            _check_parameters_act(cell, params, state, x)
        with _tried("step in float32"):
            _check_float32(cell, params, state, x)
        with _tried("cell.affine on [T, B, …] or on one sequence […]"):
            _check_leading_axes(cell, params, state, x)
        with _tried("full BPTT"):
            _check_gradient(cell, params, state, x)


@contextmanager
def _tried(what: str) -> Iterator[None]:
    """Turn every error within the block into a CheckError."""
    try:
        yield
    except CheckError:
        raise
    except SettingError as error:
        raise CheckError(str(error)) from error
    except Exception as error:  # the cell's functions may raise anything
        reason = " ".join(str(error).split())
        raise CheckError(f"{what}: {type(error).__name__}: {reason}") from error


def _example(cell: Cell, params: Any, inputs: int | Array | None) -> jax.ShapeDtypeStruct:
    """Find the shape of x_t."""
    if isinstance(inputs, int):
        return jax.ShapeDtypeStruct((B, inputs), float)
    if inputs is not None:
        require(jnp.ndim(inputs) in (1, 2), f"inputs are [B, D] or [B]; got {jnp.shape(inputs)}")
        return jax.ShapeDtypeStruct(jnp.shape(inputs), jnp.asarray(inputs).dtype)
    state = jax.eval_shape(partial(cell.zeros, B))
    sizes = sorted({1, *(size for leaf in jax.tree.leaves(params) for size in leaf.shape)})
    features = [jax.ShapeDtypeStruct((B, size), float) for size in sizes]
    reason = ""
    for x in (*features, jax.ShapeDtypeStruct((B,), int)):
        try:
            jax.eval_shape(cell.step, params, state, x)
        except Exception as error:  # the cell's function may raise anything; shown if no size fits
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split())}"
            continue
        return x
    tried = ", ".join(map(str, sizes))
    line = f"step takes no inputs of {tried} features; give an example as `inputs`"
    raise CheckError(f"{line}. The first size failed with {reason}")


def _widened(cell: Cell, *given: Any) -> Any:
    """Widen parameters, state and x_t to float64, unless `step` computes in float32 all the same."""
    wide = narrow(given, LONG)
    after = jax.eval_shape(cell.step, *wide)
    return wide if said(after) == said(wide[1]) else given


def _check_parameters_act(cell: Cell, params: Any, state: Any, x: Any) -> None:
    """Check that every float among the parameters acts on the next state."""
    found = idle(cell, params, state, x)
    unused = ", ".join(f"params{path} {said(leaf)}" for path, leaf in found.items())
    act, is_0 = ("acts", "its gradient is") if len(found) == 1 else ("act", "their gradients are")
    way_out = "a function that closes over parameters does not see those that are trained"
    require(not unused, f"{unused}: {act} on no state, so that {is_0} 0; {way_out}")


def _check_zeros(cell: Cell, size: int = B) -> None:
    """Check that `zeros` has one row for each sequence, and that `read` makes H floats of each row."""
    one, many = (jax.eval_shape(partial(cell.zeros, n)) for n in (1, size))
    rows = jax.tree.map(lambda a: jax.ShapeDtypeStruct((size, *a.shape[1:]), a.dtype), one)
    require(said(rows) == said(many), f"zeros({size}) is {said(many)}; zeros(1) is {said(one)}")
    each = jax.tree.map(lambda a: jnp.repeat(a, size, axis=0), floats(cell.zeros(1)))
    equal("cell.zeros", floats(cell.zeros(size)), each, "the same for each sequence", allowed=0)
    read = jax.eval_shape(cell.read, many)
    good = len(read.shape) == 2 and len(read) == size and jnp.issubdtype(read.dtype, jnp.floating)
    require(good, f"read returns {said(read)}; a readout takes floats [{size}, H]")


def _check_float32(cell: Cell, params: Any, state: Any, x: Any) -> None:
    """Check that float32 stays float32 while x64 is on, and that `init` and `zeros` follow `jax_enable_x64`."""
    params, state, x = narrow((params, state, x))
    after = jax.eval_shape(cell.step, params, state, x)
    require(said(after) == said(state), f"step maps a state of {said(state)} to {said(after)}")
    with jax.enable_x64(False):
        made = jax.eval_shape(lambda: (cell.init(jax.random.key(0)), cell.zeros(1)))
    wide = [leaf for leaf in jax.tree.leaves(made) if leaf.dtype in (np.float64, np.complex128)]
    require(not wide, f"init and zeros make {said(wide)} without jax_enable_x64")


def _check_leading_axes(cell: Cell, params: Any, state: Any, x: Any) -> None:
    """Check that the parts of the form map [T, B, …] and […] as they map [B, …]."""
    if isinstance(cell.affine, Layers):
        for n, layer in enumerate(cell.affine.cells):
            _check_leading_axes(layer, params[n], state[n], x)
            x = jax.eval_shape(layer.read, state[n])
    if not isinstance(affine := cell.affine, Affine):
        return
    rng = np.random.default_rng(1)
    over_time = jax.tree.map(lambda a: jax.ShapeDtypeStruct((T, *a.shape), a.dtype), (state, x))

    def parts(theta: Any, h: Any, x: Any) -> Any:
        projected, recurred = affine.project(theta, x), affine.recur(theta, h)
        update = affine.update(projected, recurred, h)
        return {"project": projected, "recur": recurred, "update": update}

    each = partial(jax.vmap, in_axes=(None, 0, 0))
    both = {
        "[T, B, …]": partial(twice, parts, each(parts)),
        "one sequence […]": partial(twice, each(each(parts)), each(parts)),
    }
    run = jax.jit(lambda *given: {on: f(*given) for on, f in both.items()})
    draw, others = lambda _: drawn(rng, params, scaled=True), lambda _: drawn(rng, over_time)
    for _, found, _ in tried(run, draw, others, cell.init, (0.5,)):
        for on, ((actual, expected), (sent, by_each)) in found.items():
            if not has_nan(expected):
                close(actual, expected, name=f"cell.affine on {on}: ")
                close(sent, by_each, name=f"the derivative of cell.affine on {on}: ")


def _check_gradient(cell: Cell, params: Any, state: Any, x: Any) -> None:
    """Check that full BPTT's loss and gradient are those that JAX computes through a Python loop."""
    rng = np.random.default_rng(2)
    read = Readout(init=lambda key: {}, apply=lambda params, h: h)
    problem = Problem(cell, read, lambda outputs, targets: 0.5 * jnp.sum(outputs**2 * targets, -1))
    of_network = lambda cell: {"cell": cell, "readout": {}}  # noqa: E731
    size = x.shape[0]
    outputs = jax.eval_shape(cell.read, state).shape
    steps = jax.ShapeDtypeStruct((T, *x.shape), x.dtype)
    targets = jnp.asarray(rng.uniform(size=(T, *outputs)))
    key = jax.random.key(0)

    @jax.jit
    def both(theta: Any, start: Any, inputs: Any) -> Any:
        batch = Batch(inputs, targets, jnp.ones((T, size)))
        estimate, _ = bs.strategies.full(problem).estimate(theta, start, batch, key)
        by_loop = jax.value_and_grad(lambda p: plain_loss(problem, p, start, batch)[0])(theta)
        return (estimate.loss, estimate.grads), by_loop

    draw = lambda _: of_network(drawn(rng, params, scaled=True))  # noqa: E731
    others = lambda _: drawn(rng, (state, steps))  # noqa: E731
    losses, kinds = [], [leaf.dtype for leaf in jax.tree.leaves(floats((params, state)))]
    allowed = 1e-9 if all(jnp.finfo(kind).bits == 64 for kind in kinds) else 1e-4
    init = lambda key: of_network(cell.init(key))  # noqa: E731
    for _, (actual, expected), _ in tried(both, draw, others, init, sizes=(0.5,)):
        losses.append(expected[0])
        if np.isfinite(expected[0]):
            close(actual, expected, allowed, "full BPTT's (loss, gradient)")
    require(np.isfinite(losses).any(), f"the loss of {T} steps is {losses[0]}")
