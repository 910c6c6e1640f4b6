"""How fast and how small? Our estimates beside what people write today, on one grid.

`python experiments/bench.py --measure` (`make bench`) measures, writes table.csv, memory.csv and machine.json,
and draws; `python experiments/bench.py [FOLDER]` draws them again. PyTorch and flax take part where they are
installed (`pip install -e '.[bench]'`). No Hydra.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from bptt_study import figures, sheets
from bptt_study.records import read_table, write_table

SYMBOLS = 28
REPEATS = 7


class Point(NamedTuple):
    """One place of the grid."""

    cell: str
    hidden: int
    batch_size: int
    steps: int
    window: int | None  # None: full BPTT

    def __str__(self) -> str:
        window = "" if self.window is None else f", window {self.window}"
        return f"{self.cell}, H {self.hidden}, B {self.batch_size}, T {self.steps}{window}"


def grid(small: bool) -> list[Point]:
    """Each axis from a middle point (H 128, B 32, T 512, window 32), full and truncated."""
    places = [(h, 32, 512) for h in (32, 64, 128, 256)] + [(512, 32, 128)]
    places += [(128, b, 512) for b in (8, 64)] + [(64, 32, 128), (64, 8, 4096)]
    windows = [(64, 32, 512, w) for w in (8, 128)]
    if small:
        places, windows = [(16, 4, 32)], []
    return [
        Point(cell, *place)
        for cell in ("elman", "gru", "lstm")
        for place in [*((*p, w) for p in places for w in (None, min(32, p[2] // 2))), *windows]
    ]


def data(point: Point) -> tuple[np.ndarray, np.ndarray]:
    """Symbols and the ones after them, [T, B]."""
    rng = np.random.default_rng(0)
    text = rng.integers(SYMBOLS, size=(point.steps + 1, point.batch_size))
    return text[:-1], text[1:]


# ---- contenders: point -> a function that computes loss and gradient of all parameters once


def _jax_setting(point: Point) -> tuple[Any, Any, Any, Any]:
    import jax
    import jax.numpy as jnp

    import bptt_study as bs

    cell = getattr(bs.cells, point.cell)(SYMBOLS, point.hidden)
    readout = bs.readouts.linear(point.hidden, SYMBOLS)
    problem = bs.Problem(cell, readout, bs.losses.cross_entropy)
    inputs, targets = (jnp.asarray(a, jnp.int32) for a in data(point))
    batch = bs.Batch(inputs, targets, jnp.ones(inputs.shape))
    return problem, problem.init(jax.random.key(0)), cell.zeros(point.batch_size), batch


def _compiled(f: Callable[..., Any], *arguments: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    """f as a thunk that waits for its result, with what the compiler tells."""
    import jax

    begun = time.perf_counter()
    program = jax.jit(f).lower(*arguments).compile()
    seconds = time.perf_counter() - begun
    memory = program.memory_analysis()
    about = {"compile_seconds": seconds, "temporary_bytes": memory.temp_size_in_bytes}
    return lambda: jax.block_until_ready(program(*arguments)), about


def _strategy(make: Callable[[Any, Point], Any], point: Point) -> Any:
    import jax

    import bptt_study as bs

    problem, params, state, batch = _jax_setting(point)
    strategy = make(problem, point)

    def trained(*arguments: Any) -> Any:
        estimate, state = strategy.estimate(*arguments)
        return estimate.loss, estimate.grads, state

    arguments = (params, state, batch, jax.random.key(1))
    once, about = _compiled(trained, *arguments)
    return once, about | {"operations": bs.measure.arithmetic(trained, *arguments)}


def ours(point: Point) -> Any:
    """bptt_study: full, or chunks."""
    import bptt_study as bs

    def make(problem: Any, point: Point) -> Any:
        if point.window is None:
            return bs.strategies.full(problem)
        return bs.strategies.fixed(problem, point.window)

    return _strategy(make, point)


def textbook(point: Point) -> Any:
    """`jax.value_and_grad` through a `lax.scan` of whole steps, `stop_gradient` at the cuts."""
    import jax
    import jax.numpy as jnp

    import bptt_study as bs

    problem, params, state, batch = _jax_setting(point)
    cell = problem.cell
    cuts = jnp.arange(point.steps) % (point.window or point.steps) == 0

    def loss(params: Any, state: Any, batch: Any) -> Any:
        def step(state: Any, now: Any) -> Any:
            x, cut = now
            if point.window is not None:
                state = jax.tree.map(lambda h: jnp.where(cut, jax.lax.stop_gradient(h), h), state)
            state = cell.step(params["cell"], state, x)
            return state, cell.read(state)

        state, h = jax.lax.scan(step, state, (batch.inputs, cuts))
        outputs = problem.readout.apply(params["readout"], h)
        return problem.loss(outputs, batch.targets).mean(), state

    gradient = jax.value_and_grad(loss, has_aux=True)
    once, about = _compiled(gradient, params, state, batch)
    return once, about | {"operations": bs.measure.arithmetic(gradient, params, state, batch)}


def flax(point: Point) -> Any:
    """`flax.linen.RNN`, one call for the sequence, or one a chunk with the carry detached."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    cells = {"elman": nn.SimpleCell, "gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}

    class Model(nn.Module):
        @nn.compact
        def __call__(self, carry: Any, x: Any) -> Any:
            rnn = nn.RNN(cells[point.cell](point.hidden), time_major=True, return_carry=True)
            carry, h = rnn(jax.nn.one_hot(x, SYMBOLS), initial_carry=carry)
            return carry, nn.Dense(SYMBOLS)(h)

    *_, batch = _jax_setting(point)
    model, width = Model(), point.window or point.steps
    shape = (point.batch_size, SYMBOLS)
    carry = cells[point.cell](point.hidden).initialize_carry(jax.random.key(0), shape)
    params = model.init(jax.random.key(0), carry, batch.inputs[:width])

    def loss(params: Any, carry: Any, x: Any, y: Any) -> Any:
        total = 0.0
        for begin in range(0, point.steps, width):
            carry = jax.lax.stop_gradient(carry)
            carry, outputs = model.apply(params, carry, x[begin : begin + width])
            chosen = jnp.take_along_axis(outputs, y[begin : begin + width, :, None], -1)[..., 0]
            total += (jax.nn.logsumexp(outputs, axis=-1) - chosen).sum()
        return total / y.size, carry

    return _compiled(
        jax.value_and_grad(loss, has_aux=True), params, carry, batch.inputs, batch.targets
    )


def torch(point: Point) -> Any:
    """`torch.nn.RNN`, `GRU`, `LSTM`: one call a chunk, the state detached between them."""
    import torch
    from torch import nn

    model = {"elman": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[point.cell](SYMBOLS, point.hidden)
    head, width = nn.Linear(point.hidden, SYMBOLS), point.window or point.steps
    x, y = (torch.from_numpy(a) for a in data(point))
    weights = [*model.parameters(), *head.parameters()]

    def once() -> None:
        for weight in weights:
            weight.grad = None
        state = None
        for begin in range(0, point.steps, width):
            if state is not None:
                detached = (
                    [h.detach() for h in state] if isinstance(state, tuple) else state.detach()
                )
                state = tuple(detached) if isinstance(state, tuple) else detached
            one_hot = nn.functional.one_hot(x[begin : begin + width], SYMBOLS).float()
            h, state = model(one_hot, state)
            outputs = head(h).flatten(0, 1)
            chosen = y[begin : begin + width].flatten()
            loss = nn.functional.cross_entropy(outputs, chosen, reduction="sum") / y.numel()
            loss.backward()

    return once, {}


def products(point: Point) -> Any:
    """The limit: the recurrent weights' three products for all tokens, 3·T·B·G·H² multiply-adds."""
    import jax.numpy as jnp

    gates = {"elman": 1, "gru": 3, "lstm": 4}[point.cell]
    tokens, H = point.steps * point.batch_size, point.hidden
    h, W = jnp.ones((tokens, H)), jnp.ones((H, gates * H))
    delta = jnp.ones((tokens, gates * H))
    return _compiled(lambda h, W, d: (h @ W, d @ W.T, h.T @ d), h, W, delta)


def sliding(point: Point) -> Any:
    """bptt_study: the sliding window."""
    import bptt_study as bs

    return _strategy(lambda problem, p: bs.strategies.fixed(problem, p.window, stride=1), point)


def one_pass_a_loss(point: Point) -> Any:
    """The sliding window as its definition says: for every loss one backward pass over its window."""
    import jax
    import jax.numpy as jnp

    problem, params, state, batch = _jax_setting(point)
    cell, window = problem.cell, point.window
    assert window is not None

    def gradient(params: Any, state: Any, batch: Any) -> Any:
        def step(state: Any, x: Any) -> Any:
            after = cell.step(params["cell"], state, x)
            return after, state

        _, before = jax.lax.scan(step, state, batch.inputs)

        def of_loss(total: Any, s: Any) -> Any:
            begin = jnp.maximum(s - window + 1, 0)
            first = jax.tree.map(lambda h: h[begin], before)
            inputs = jax.lax.dynamic_slice_in_dim(batch.inputs, begin, window)

            def loss(params: Any) -> Any:
                def step(state: Any, x: Any) -> Any:
                    state = cell.step(params["cell"], state, x)
                    return state, cell.read(state)

                _, h = jax.lax.scan(step, first, inputs)
                outputs = problem.readout.apply(params["readout"], h[s - begin])
                return problem.loss(outputs, batch.targets[s]).mean() / point.steps

            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params)), None

        nothing = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        return jax.lax.scan(of_loss, nothing, jnp.arange(point.steps))[0]

    return _compiled(gradient, params, state, batch)


CONTENDERS = {f.__name__: f for f in (ours, textbook, flax, torch, products)}
WINDOWS = {f.__name__: f for f in (sliding, one_pass_a_loss)}
NEEDS = {"flax": "flax", "torch": "torch"}


@cache
def _prepared(name: str, point: Point) -> tuple[Callable[[], Any], dict[str, Any]]:
    once, about = (CONTENDERS | WINDOWS)[name](point)
    once(), once()  # warm-up
    return once, about


def about(name: str, point: Point) -> dict[str, Any]:
    """Prepare a contender in this process, and tell of it."""
    _prepared.cache_clear()
    return _prepared(name, point)[1]


def seconds(name: str, point: Point) -> float:
    begun = time.perf_counter()
    _prepared(name, point)[0]()
    return time.perf_counter() - begun


def measure(folder: Path, small: bool) -> None:
    """Every contender in a process of its own, all of them in turn at every point."""
    missing = [name for name, package in NEEDS.items() if find_spec(package) is None]
    if missing:
        print(
            f"not installed, left out: {', '.join(missing)}; pip install -e '.[bench]'",
            file=sys.stderr,
        )
    named = {name: f for name, f in CONTENDERS.items() if name not in missing}
    pools = {name: ProcessPoolExecutor(1, get_context("spawn")) for name in (named | WINDOWS)}
    lengths = (64,) if small else (512, 2048)
    places = [(point, list(named)) for point in grid(small)]
    places += [(Point("elman", 64, 8, T, 16), list(WINDOWS)) for T in lengths]
    rows = []
    for number, (point, names) in enumerate(places):
        print(f"{number + 1}/{len(places)} {point}", file=sys.stderr, flush=True)
        told = {name: pools[name].submit(about, name, point).result() for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(2 if small else REPEATS):
            for name in names:
                times[name].append(pools[name].submit(seconds, name, point).result())
        first = times[names[0]]
        for name in names:
            ratios = [theirs / own for theirs, own in zip(times[name], first, strict=True)]
            rows.append(
                point._asdict()
                | {"contender": name, "seconds": statistics.median(times[name])}
                | {"seconds_min": min(times[name]), "seconds_max": max(times[name])}
                | {"ratio": statistics.median(ratios), "ratio_min": min(ratios)}
                | {"ratio_max": max(ratios), "n": len(ratios)}
                | told[name]
            )
    for pool in pools.values():
        pool.shutdown()
    table = pd.DataFrame(rows)
    table["tokens_per_second"] = table["steps"] * table["batch_size"] / table["seconds"]
    folder.mkdir(parents=True, exist_ok=True)
    write_table(table, folder / "table.csv")
    write_table(pd.DataFrame(memory(small)), folder / "memory.csv")
    versions = {p: __import__(p).__version__ for p in ("jax", "torch", "flax") if find_spec(p)}
    machine = {"cores": len(__import__("os").sched_getaffinity(0)), "processor": _processor()}
    text = json.dumps(machine | {"python": platform.python_version()} | versions, indent=1)
    (folder / "machine.json").write_text(text + "\n", encoding="utf-8")


def memory(small: bool) -> list[dict[str, Any]]:
    """Temporary bytes (the compiler's) and operations (counted) of each strategy as T grows."""
    import bptt_study as bs

    makers: dict[str, Any] = {
        "full": lambda problem, p: bs.strategies.full(problem),
        "fixed": lambda problem, p: bs.strategies.fixed(problem, 64),
        "checkpointed": lambda problem, p: bs.strategies.checkpointed(problem),
    }
    lengths = (64, 128) if small else (256, 1024, 4096, 16384, 65536)
    places = [(Point("elman", 64, 8, T, None), name) for T in lengths for name in makers]
    if not small:  # to a million steps
        places += [(Point("elman", 64, 1, 2**n, None), "fixed") for n in (10, 16, 18, 20)]
    rows = []
    for point, name in places:
        print(f"{point}: {name}", file=sys.stderr, flush=True)
        once, told = _strategy(makers[name], point)
        once()
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            once()
            times.append(time.perf_counter() - begun)
        rows.append(point._asdict() | {"strategy": name, "seconds": min(times)} | told)
    return rows


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


# ---- figures

NAMES = {
    "textbook": "textbook JAX",
    "flax": "flax RNN",
    "torch": "PyTorch",
    "products": "products alone",
}


def draw(folder: Path) -> list[Path]:
    """All figures, from the tables in the folder; returns their files."""
    table, held = read_table(folder / "table.csv"), read_table(folder / "memory.csv")
    machine = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    said = ", ".join(f"{name} {value}" for name, value in machine.items())
    with sheets.style():
        return [*_ratios(table, said, folder), *_memory(held, said, folder)]


def _ratios(table: pd.DataFrame, said: str, folder: Path) -> list[Path]:
    others = [name for name in NAMES if name in set(table["contender"])]
    cells = list(dict.fromkeys(table["cell"]))
    wanted = table[table["contender"].isin(others)]
    figure, axes = sheets.sheet(
        len(cells),
        2,
        (13, 4.2 * len(cells)),
        "How many times longer others take than bptt_study",
        "Left: full BPTT; right: chunks. A row of points is a place of the grid (hidden units H, sequences "
        "B, time steps T, window w); point and bar: median and range of "
        f"{table['n'].max()} ratios, each of two runs in turn. Right of the line bptt_study is faster. "
        f"Products alone: the recurrent matrix products and nothing else, the limit. {said}.",
        [
            figures.Line2D([], [], color=figures.COLORS[i], marker="o", label=NAMES[n])
            for i, n in enumerate(others)
        ],
    )
    for cell, row in zip(cells, axes, strict=True):
        for truncated, ax in zip((False, True), row, strict=True):
            part = wanted[(wanted["cell"] == cell) & (wanted["window"].notna() == truncated)]
            _panel(part, others, ax)
            ax.set_title(f"{cell}, {'chunks' if truncated else 'full'}")
    return sheets.save(figure, folder, "ratios")


def _panel(part: pd.DataFrame, others: list[str], ax: Axes) -> Axes:
    places = part.drop_duplicates(["hidden", "batch_size", "steps", "window"])
    labels = [
        f"H {r.hidden}, B {r.batch_size}, T {r.steps}"
        + (f", w {r.window:g}" if r.window > 0 else "")
        for r in places.itertuples()
    ]
    for i, name in enumerate(others):
        rows = part[part["contender"] == name]
        y = np.arange(len(rows)) + 0.15 * (i - (len(others) - 1) / 2)
        ax.hlines(y, rows["ratio_min"], rows["ratio_max"], color=figures.COLORS[i], linewidth=2)
        ax.plot(rows["ratio"], y, "o", color=figures.COLORS[i], markersize=6)
    ax.axvline(1, **figures.REFERENCE)
    ax.set_yticks(np.arange(len(labels)), labels, fontsize="x-small")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    ax.invert_yaxis()
    ax.set_xlabel("seconds ÷ seconds of bptt_study")
    return ax


def _memory(held: pd.DataFrame, said: str, folder: Path) -> list[Path]:
    row, million = held.iloc[0], held[held["batch_size"] == 1]
    held = held[held["batch_size"] == row["batch_size"]]
    looks = figures.looks(held["strategy"])
    figure, axes = sheets.sheet(
        1,
        2,
        (13, 5.6),
        "What a longer sequence costs",
        f"{row['cell']}, {row['hidden']} units, {row['batch_size']} sequences; chunks of 64 steps. Left: "
        "temporary bytes as the compiler planned them. Right: time of one estimate (least of 3) for each time "
        "step. "
        + "".join(
            f"With one sequence {r.steps:,} steps take {r.seconds:.2g} s and {r.temporary_bytes / 1e6:.2g} MB. "
            for r in million.tail(1).itertuples()
        )
        + f"{said}.",
        figures.handles(looks, markers=True),
    )
    for column, label, ax in (
        ("temporary_bytes", "temporary memory (MB)", axes[0, 0]),
        ("seconds", "microseconds for each time step", axes[0, 1]),
    ):
        for name, look in looks.items():
            rows = held[held["strategy"] == name]
            scale = rows["steps"] if column == "seconds" else 1
            marker = look.marker or "D"
            ax.plot(
                rows["steps"],
                1e6 ** (1 if column == "seconds" else -1) * rows[column] / scale,
                marker=marker,
                color=look.color,
            )
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set(xlabel="time steps T", ylabel=label)
        ax.set_xticks(
            sorted(held["steps"].unique()), [f"{t:g}" for t in sorted(held["steps"].unique())]
        )
    return sheets.save(figure, folder, "length")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = Path(__file__).resolve().parents[1] / "results" / "bench"
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="of the tables")
    parser.add_argument(
        "--measure", action="store_true", help="measure first: minutes, on a quiet machine"
    )
    parser.add_argument(
        "--small", action="store_true", help="a grid of seconds, to see that it works"
    )
    given = parser.parse_args()
    if given.measure:
        measure(given.folder, given.small)
    print(*draw(given.folder), sep="\n")
