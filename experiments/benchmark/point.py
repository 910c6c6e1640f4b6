"""The parts that contenders share: a place of the grid, its problem, parameters and batch, and compilation."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

SYMBOLS = 28
GATES = {"elman": 1, "gru": 3, "lstm": 4}


class Point(NamedTuple):
    """One place of the grid."""

    cell: str  # elman, gru, lstm, or stacked: a two-layer LSTM
    hidden: int
    batch_size: int
    steps: int
    window: int | None = None  # None: full BPTT

    def __str__(self) -> str:
        window = "" if self.window is None else f", w {self.window:g}"
        return f"{self.cell}, H {self.hidden}, B {self.batch_size}, T {self.steps}{window}"


# (once, about): `once()` computes loss and gradient and waits for them; `about` holds facts known without a run
Contender = tuple[Callable[[], Any], dict[str, Any]]


def data(point: Point) -> tuple[np.ndarray, np.ndarray]:
    """Draw symbols; return them and the symbols that follow, each [T, B]."""
    rng = np.random.default_rng(0)
    text = rng.integers(SYMBOLS, size=(point.steps + 1, point.batch_size))
    return text[:-1], text[1:]


def make_cell(name: str, hidden: int) -> Any:
    """Make the cell of a point."""
    import bptt_study as bs

    if name == "stacked":
        sizes = ((SYMBOLS, hidden), (hidden, hidden))
        return bs.cells.stack([bs.cells.lstm(*size) for size in sizes])
    return getattr(bs.cells, name)(SYMBOLS, hidden)


def setting(point: Point) -> tuple[Any, Any, Any, Any]:
    """Make problem, parameters, state and batch; all contenders start from these weights."""
    import jax
    import jax.numpy as jnp

    import bptt_study as bs

    cell = make_cell(point.cell, point.hidden)
    readout = bs.readouts.linear(point.hidden, SYMBOLS)
    problem = bs.Problem(cell, readout, bs.losses.cross_entropy)
    inputs, targets = (jnp.asarray(a, jnp.int32) for a in data(point))
    batch = bs.Batch(inputs, targets, jnp.ones(inputs.shape))
    return problem, problem.init(jax.random.key(0)), cell.zeros(point.batch_size), batch


def compiled(f: Callable[..., Any], *arguments: Any, operations: int | None = None) -> Contender:
    """Compile f; `about` has its cost, summed over the devices that f runs on."""
    import jax

    run, about = program(f, *arguments, operations=operations)
    return lambda: jax.block_until_ready(run(*arguments)), about


def program(
    f: Callable[..., Any], *arguments: Any, operations: float | None = None
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """As `compiled`, of which other arguments of the same shapes can be asked, too."""
    import jax

    import bptt_study as bs

    begun = time.perf_counter()
    run = jax.jit(f).lower(*arguments).compile()
    seconds = time.perf_counter() - begun
    devices = len(jax.tree.leaves(arguments)[0].sharding.device_set)
    about = {
        "compile_seconds": seconds,
        "temporary_bytes": run.memory_analysis().temp_size_in_bytes * devices,
        "operations": operations or bs.measure.arithmetic(f, *arguments),
    }
    return run, about
