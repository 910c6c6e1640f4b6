"""How fast and how small are our estimates, beside the code that people write today, on one grid?

`make bench` measures (`bench.py --measure`, 25 minutes on two quiet cores) and then draws and judges;
`python experiments/benchmark/bench.py [FOLDER]` draws and judges again from the tables. The contenders are in
`ours.py`, `others.py`, `per_loss.py`, `phases.py`, `estimators.py` and `peers.py`; `sweep.py` times a sweep
against one process a run.

Tables: grid.csv, windows.csv (sliding window and lag table), memory.csv (length), phases.csv (the phases of
full BPTT, each alone), networks.csv (two layers, `bs.scan`, a cell that has only `step`, README's block),
estimators.csv (every estimator, all on one device), peers.csv (estimators as others write them), targets.csv
(what was to be reached), one row per place and contender; and online_memory.csv (bytes by the compiler's plan):

    seconds, …_min, …_max   seconds of a run: median and range of `n` turns, each a mean over 0.05 s or more
    ratio, …_min, …_max     seconds ÷ seconds of the first contender of the place, turn by turn
    scaled_by               the factor of the measured time: 1, or T ÷ the losses that were run
    tokens_per_second       T·B ÷ seconds
    share_of_limit          seconds of the recurrent matrix products alone ÷ seconds; in phases.csv of a phase's
                            own products, at the shapes at which it has them
    page_faults             of a run, median: pages of memory that the system had to give (minor faults)
    compile_seconds         tracing and compilation, nothing from a cache
    temporary_bytes         what the compiled program holds beside arguments and results, by its compiler
    predicted_bytes         what the strategy claims, see `ours._predicted`; `states` held at once
    operations              floating-point operations, counted from the program, with the branches that run. If
                            they depend on values, those in estimators.csv are a mean over 32 calls with their
                            own keys, or over whole periods of the claim (`adaptive`: 50, of which one measures)
    operations_ratio        operations ÷ operations of the first contender of the place
    numbers                 that an estimator keeps for each sequence beside the state, by its claim
    peak_bytes              the most memory that the process has had, Python, JAX and all before included
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import contenders
import estimators
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter
from point import Point

from bptt_study import files
from bptt_study.report import figure_layout, plots
from bptt_study.report.csv_tables import read_table, write_table
from bptt_study.training import devices

# name -> name in figures; the others are divided by the first
GRID = {
    "ours": "bptt_study",
    "textbook": "textbook JAX",
    "textbook_indexed": "textbook JAX, indexed",
    "flax": "flax RNN",
    "torch": "PyTorch",
    "products": "matrix products alone",
}
LIBRARIES = ("flax", "torch", "braintrace")  # these take part if they are installed
SLIDING = ("sliding", "one_pass_a_loss")
LAGS = ("lag_table", "lags_one_pass_a_loss", "lags_one_pass_a_loss_and_lag")
LENGTH = ("full", "chunks", "random_cuts", "checkpointed")
PHASES = ("full", *contenders.TOGETHER)
STACKED = ("ours", "textbook", "torch")  # two-layer LSTM
SCAN = ("lax_scan", "scan_full", "scan_chunks")  # the textbook's loss, its loop over time exchanged
STEP_ONLY = ("lax_scan", "step_only")  # a cell without the affine form
README = ("ours", "as_in_readme", "one_device", "textbook")
# ours, what others write of the same estimator, sequences, time steps
PEERS = (
    (("rtrl(64)", "numpy_rtrl"), 1, 64),
    (
        ("rtrl(64)", "braintrace_rtrl"),
        1,
        64,
    ),  # of a batch it would take the sequences for positions
    (("snap(1)", "braintrace_snap"), 16, 512),
    (("eprop()", "braintrace_d_rtrl"), 16, 512),
    (("pp_prop()", "braintrace_pp_prop"), 16, 512),
)
CELLS = ("elman", "gru", "lstm")
TABLES = ("grid", "windows", "memory", "phases", "networks", "estimators", "peers", "online_memory")
Place = tuple[Point, Sequence[str]]


class Size(NamedTuple):
    """The extent of the measurement."""

    grid: list[Point]
    windows: list[Place]
    lengths: list[Place]
    phases: list[Place]
    networks: list[Place]
    estimators: list[Place]
    peers: list[Place]
    online: list[Place]  # whose memory the compiler plans; nothing is run
    seconds: float  # for the repeats at a place
    rounds: tuple[int, int]  # at least and at most so many of them


def size(small: bool) -> Size:
    """Make the grid: each axis through a middle point (H 128, B 32, T 512, window 32), full and chunks."""
    if small:
        return Size(
            [Point(c, 16, 4, 32, w) for c in CELLS for w in (None, 16)],
            [(Point("elman", 16, 4, 64, 16), SLIDING), (Point("elman", 16, 4, 64, 16), LAGS)],
            [(Point("elman", 16, 4, T, 16), LENGTH) for T in (64, 256)]
            + [(Point("elman", 16, 1, T, 16), ("chunks",)) for T in (2**10, 2**12)],
            [(Point(c, 16, 4, 32), PHASES) for c in CELLS],
            _networks([16], [16], 4, 32, 16),
            [(Point("elman", 8, 4, 64), ("full()", "snap(1)", "uoro(16)", "nres(1)"))],
            [(Point("elman", 8, B, 16), who) for who, B, _ in PEERS[:1]],
            [(Point("elman", 8, 4, T), ("snap(1)", "nres(1)")) for T in (2**10, 2**12)],
            seconds=0.1,
            rounds=(2, 3),
        )
    places = [(h, 32, 512) for h in (32, 64, 128)] + [(256, 32, 256), (512, 16, 128)]
    places += [(128, 8, 512), (128, 64, 256), (64, 32, 128), (64, 8, 4096)]
    windows = [(*place, w) for place in places for w in (None, 32)]
    windows += [(64, 32, 512, w) for w in (8, 128)]
    phases = [(64, 32, 128), (64, 32, 512), (128, 32, 512), (256, 32, 256), (512, 16, 128)]
    lags = [Point("elman", 64, 8, 512, 64), Point("gru", 64, 8, 512, 64)]
    return Size(
        [Point(cell, *place) for cell in CELLS for place in windows],
        [(Point(c, 64, 8, T, 16), SLIDING) for c in ("elman", "gru") for T in (512, 2048)]
        + [(point, LAGS) for point in lags],
        [(Point("elman", 64, 8, 4**n, 64), LENGTH) for n in (4, 5, 6, 7, 8)]
        + [(Point("elman", 64, 1, 2**n, 64), ("chunks",)) for n in (10, 16, 18, 20)],
        [(Point(cell, *place), PHASES) for cell in CELLS for place in phases],
        _networks([64, 128, 256], [64, 256], 32, 512, 16),
        [(Point(cell, 64, 16, 512), estimators.ON_ALL) for cell in CELLS]
        + [(Point("leaky", 64, 16, 512), estimators.ON_LEAKY)],
        [(Point("elman", H, B, T), who) for H in (32, 64) for who, B, T in PEERS],
        [(Point("elman", 64, 16, T), estimators.ONLINE) for T in (2**10, 2**16)],
        seconds=4,
        rounds=(3, 9),
    )


def _networks(
    hidden: list[int], scanned: list[int], batch_size: int, steps: int, window: int
) -> list[Place]:
    """List a stacked LSTM, `bs.scan` in place of `lax.scan`, a cell with `step` alone, and README's block."""
    sizes = [(h, batch_size, steps) for h in hidden]
    return [
        *((Point("stacked", *place, w), STACKED) for place in sizes for w in (None, window)),
        *((Point("stacked", h, batch_size, steps, window), SCAN) for h in scanned),
        *((Point("lstm", h, batch_size, steps), STEP_ONLY) for h in scanned),
        *(
            (Point(c, *place, w), README)
            for c in ("elman", "lstm")
            for place in sizes
            for w in (None, window)
        ),
    ]


# ---- measuring


@contextmanager
def processes(names: Iterable[str]) -> Iterator[dict[str, ProcessPoolExecutor]]:
    """One for each contender; one for those that share arrays, and one for all estimators."""
    homes = {name: contenders.HOMES.get(name, name) for name in names}
    with ExitStack() as stack:
        pools = {
            home: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
            for home in sorted(set(homes.values()))
        }
        yield {name: pools[home] for name, home in homes.items()}


def compared(
    point: Point, names: Sequence[str], pools: dict[str, ProcessPoolExecutor], size: Size
) -> list[dict[str, Any]]:
    """Time the contenders at one place in turn, for as many rounds as there is time for."""
    told = {n: pools[n].submit(contenders.prepare, n, point).result() for n in names}
    scale = np.array([told[n]["scaled_by"] for n in names])
    once = sum(about.pop("warm") for about in told.values())
    rounds = int(np.clip(size.seconds / once, *size.rounds))
    runs = np.array(
        [[pools[n].submit(contenders.run, n, point).result() for n in names] for _ in range(rounds)]
    )
    times, faults = scale * runs[..., 0], np.median(runs[..., 1], axis=0)
    rows, first = [], told[names[0]].get("operations")
    for name, own, ratios, given in zip(
        names, times.T, (times / times[:, :1]).T, faults, strict=True
    ):
        row = point._asdict() | {"contender": name, "n": rounds, "page_faults": given}
        for column, values in (("seconds", own), ("ratio", ratios)):
            row |= {column: np.median(values), f"{column}_min": values.min()}
            row |= {f"{column}_max": values.max()}
        if first and "operations" in told[name]:
            row["operations_ratio"] = told[name]["operations"] / first
        peak = pools[name].submit(contenders.peak_bytes).result()
        rows.append(row | told[name] | {"peak_bytes": peak})
    return rows


def measure(folder: Path, small: bool, only: Sequence[str] = ()) -> list[str]:
    """Measure the tables, and write each as soon as it is whole.

    Every length of memory.csv has separate processes, so that each has its own peak of memory.

    Args:
      folder: The folder of the tables; machine.json says of each table on what it was measured.
      small: Whether to measure a grid of a minute.
      only: The names of the tables; the others stay as they are. Empty: all.

    Returns:
      A line for each place that failed. It is missing in its table.
    """
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # compilation is measured too
    folder.mkdir(parents=True, exist_ok=True)
    groups = [(table, rest) for table, *rest in _groups(size(small)) if not only or table in only]
    count, done, begun = sum(len(places) for _, (_, places) in groups), 0, time.monotonic()
    rows: list[dict[str, Any]] = []
    failed = []
    started = begun
    for (table, (act, places)), following in zip(groups, [*groups[1:], None], strict=True):
        with processes({name for _, who in places for name in who}) as pools:
            for point, who in places:
                before = time.monotonic()
                try:
                    rows += act(point, who, pools, size(small))
                except (
                    Exception
                ) as error:  # of a library that is not ours, such as a size it refuses
                    failed.append(f"{table}, {point}, {', '.join(who)}: {_reason(error)}")
                    print(f"left out: {failed[-1]}", file=sys.stderr, flush=True)
                done, now = done + 1, time.monotonic()
                left = (now - begun) / done * (count - done) / 60
                said = f"{done}/{count} {point}: {now - before:.0f} s, about {left:.0f} min left"
                print(said, file=sys.stderr, flush=True)
        if following is None or following[0] != table:
            write_table(_finished(pd.DataFrame(rows)), folder / f"{table}.csv")
            _note_machine(folder, table, now - started)
            rows, started = [], now
    return failed


def count(folder: Path) -> None:
    """Count the operations of estimators.csv again; its times stay as they were measured."""
    table = read_table(folder / "estimators.csv")
    points = table[["cell", "hidden", "batch_size", "steps"]].itertuples(index=False)
    rows = zip(table["contender"], points, strict=True)
    table["operations"] = [float(estimators.counted(name, Point(*at))) for name, at in rows]
    first = table.groupby(_places(table), sort=False)["operations"].transform("first")
    table["operations_ratio"] = table["operations"] / first
    write_table(table, folder / "estimators.csv")


def _groups(plan: Size) -> Iterator[tuple[str, Callable[..., list[dict[str, Any]]], list[Place]]]:
    """List the tables, how a place of each is measured, and the places; a table may have several groups."""
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        print(f"not installed, left out: {', '.join(missing)}; see make bench", file=sys.stderr)
    there = lambda names: [n for n in names if n.partition("_")[0] not in missing]  # noqa: E731
    yield "grid", compared, [(point, there(GRID)) for point in plan.grid]
    yield "windows", compared, plan.windows
    for place in plan.lengths:
        yield "memory", compared, [place]
    yield "phases", compared, plan.phases
    yield "networks", compared, [(point, there(who)) for point, who in plan.networks]
    yield "estimators", compared, plan.estimators
    yield "peers", compared, [(point, there(who)) for point, who in plan.peers]
    yield "online_memory", _planned, plan.online


def _planned(
    point: Point, names: Sequence[str], pools: dict[str, ProcessPoolExecutor], size: Size
) -> list[dict[str, Any]]:
    """The memory of the contenders at one place, as the compiler plans it; nothing is run."""
    return [pools[name].submit(contenders.plan, name, point).result() for name in names]


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _note_machine(folder: Path, table: str, seconds: float) -> None:
    """Note in machine.json on what a table was measured, and in how many minutes."""
    file = folder / "machine.json"
    machine = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    packages = ("jax", "torch", "flax", "braintrace")
    machine[table] = {
        "processor": devices.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in packages if find_spec(name)},
        "minutes": round(seconds / 60, 1),
    }
    files.write(file, json.dumps(machine, indent=1) + "\n")


def _finished(table: pd.DataFrame) -> pd.DataFrame:
    """Add the columns that follow from others."""
    if "seconds" not in table:
        return table
    table["tokens_per_second"] = table["steps"] * table["batch_size"] / table["seconds"]
    who, places = table["contender"], _places(table)
    products = table["seconds"].where(who.str.endswith("products"))
    own = products.groupby([places, who.str.removesuffix("_products")]).transform("max")
    all_ = products.groupby(places).transform("sum", min_count=1)
    part = who.isin([*contenders.PHASES, *contenders.PRODUCTS])
    table["share_of_limit"] = own.where(part, all_) / table["seconds"]
    return table


def _places(table: pd.DataFrame) -> pd.Series:
    """Name the place of each row."""
    points = (
        table[list(Point._fields)].astype(object).where(table[list(Point._fields)].notna(), None)
    )
    return pd.Series([str(Point(*p)) for p in points.itertuples(index=False)], table.index)


# ---- targets


class Target(NamedTuple):
    """A bound, and the values by place that are compared with it."""

    target: str
    bound: float
    values: pd.Series
    most: bool = False  # whether the bound is an upper one
    every: bool = False  # whether every value has to keep the bound, rather than their median


def targets(folder: Path) -> pd.DataFrame:
    """Make the table of targets: the median over the places, the worst place, and whether it was reached."""
    rows = []
    for target, bound, values, most, every in _targets(folder):
        values = values.dropna()
        if values.empty:
            continue
        at = values.idxmax() if most else values.idxmin()
        judged = values[at] if every else values.median()
        row = {"target": target, "bound": f"at {'most' if most else 'least'} {bound:g}"}
        row |= {"judged": "worst" if every else "median", "median": values.median()}
        row |= {"worst": values[at], "worst_at": at, "places": len(values)}
        rows.append(
            row | {"reached": "yes" if (judged <= bound if most else judged >= bound) else "no"}
        )
    return pd.DataFrame(rows)


def _targets(folder: Path) -> list[Target]:
    """List the targets, as seconds ÷ seconds if not named otherwise; the sweep's only if it was timed."""
    table, windows, memory = (
        read_table(folder / f"{n}.csv") for n in ("grid", "windows", "memory")
    )
    sweep = folder / "sweep.csv"
    ways = read_table(sweep).set_index("way") if sweep.is_file() else None

    def of(rows: pd.DataFrame, contender: str, column: str = "ratio") -> pd.Series:
        rows = rows[rows["contender"] == contender]
        return rows.set_index(_places(rows))[column]

    small, large = table[table["hidden"] <= 128], table[table["hidden"] > 128]
    others = table[~table["contender"].isin(["ours", "products"])]
    memory["root_states"] = memory["states"] / memory["steps"] ** 0.5
    memory["per_step"] = memory["seconds"] / memory["steps"]
    for column, first in (("temporary_bytes", 2**10), ("per_step", 2**16)):
        start = memory[column].where(memory["steps"] == first)
        of_same = start.groupby([memory["contender"], memory["batch_size"]]).transform("max")
        memory[f"{column}_growth"] = (memory[column] / of_same).where(memory["steps"] > first)
    memory["bent"] = (memory["per_step_growth"] - 1).abs()
    million = memory[memory["batch_size"] == 1]
    networks = folder / "networks.csv"
    return [
        Target("textbook JAX ÷ ours at H ≤ 128", 2, of(small, "textbook")),
        Target("textbook JAX ÷ ours at H > 128", 1.5, of(large, "textbook")),
        Target("PyTorch ÷ ours at H ≤ 128", 5, of(small, "torch")),
        Target("PyTorch ÷ ours at H > 128", 1.5, of(large, "torch")),
        Target(
            "fastest other ÷ ours", 1, others.groupby(_places(others))["ratio"].min(), every=True
        ),
        Target("one pass a loss ÷ sliding window", 10, of(windows, "one_pass_a_loss")),
        Target("one pass a loss ÷ lag table", 50, of(windows, "lags_one_pass_a_loss")),
        Target(
            "one pass a loss and lag ÷ lag table", 50,
            of(windows, "lags_one_pass_a_loss_and_lag"),
        ),
        Target("chunks ÷ full", 1, of(memory, "chunks")[lambda r: r != 1], most=True),
        Target("random segments ÷ full", 1, of(memory, "random_cuts"), most=True),
        Target(
            "bytes of chunks ÷ those at T 1024", 1.5,
            of(memory, "chunks", "temporary_bytes_growth"), most=True, every=True,
        ),
        Target(
            "states of checkpointed ÷ √T", 2.5,
            of(memory, "checkpointed", "root_states"), most=True, every=True,
        ),
        Target("checkpointed ÷ full", 1.5, of(memory, "checkpointed"), most=True),
        Target(
            "a million steps off linear from T 65536", 0.1,
            of(million, "chunks", "bent"), most=True, every=True,
        ),
        *(_network_targets(read_table(networks), of) if networks.is_file() else []),
        *_estimator_targets(folder, of),
        *([] if ways is None else [
            Target("60 processes ÷ a sweep without cache", 5, ways["ratio"].filter(like="no cache")),
            Target("60 processes ÷ a sweep with a warm cache", 5, ways["ratio"].filter(like="warm cache")),
            Target(
                "programs compiled by a second start", 0,
                ways["compiled"].filter(like="again"), most=True, every=True,
            ),
        ]),
    ]  # fmt: skip


def _network_targets(table: pd.DataFrame, of: Callable[..., pd.Series]) -> list[Target]:
    """List the targets of networks.csv: `bs.scan`, layers on the fast path, and README's block."""
    stacked = table[(table["cell"] == "stacked") & (table["hidden"] <= 128)]
    chunks = of(table, "scan_chunks") / of(table, "scan_full")
    return [
        Target("bs.scan ÷ lax.scan", 1.1, of(table, "scan_full"), most=True, every=True),
        Target("chunks by bs.scan ÷ full by bs.scan", 1, chunks, most=True, every=True),
        Target("textbook JAX ÷ two layers at H ≤ 128", 1.5, of(stacked, "textbook")),
        Target("PyTorch ÷ two layers at H ≤ 128", 1, of(stacked, "torch"), every=True),
        Target(
            "README's block ÷ split by hand",
            1 / 0.95,
            of(table, "as_in_readme"),
            most=True,
            every=True,
        ),
    ]


# what the targets of the estimators call them -> contender, and at most how many times the seconds of full
ESTIMATORS = {
    "SnAp-1": ("snap(1)", 2),
    "e-prop": ("eprop()", 2),
    "UORO, blocks of 16,": ("uoro(16)", 3),
    "KF-RTRL": ("kf_rtrl()", 15),
    "OK, 4 products,": ("ok(4)", 40),
    "RTRL, blocks of 64,": ("rtrl(64)", 150),
    "forward gradient": ("forward_gradient(1)", 2),
    "an ES pair": ("nres(1)", 1),
}


def _estimator_targets(folder: Path, of: Callable[..., pd.Series]) -> Iterator[Target]:
    """Of estimators.csv, peers.csv and online_memory.csv, of each where it was measured."""
    table, peers, held = (
        read_table(file) if (file := folder / f"{name}.csv").is_file() else None
        for name in ("estimators", "peers", "online_memory")
    )
    for called, (name, bound) in ESTIMATORS.items() if table is not None else ():
        yield Target(f"{called} ÷ full", bound, of(table, name), most=True, every=True)
    for (ours, theirs), *_ in PEERS if peers is not None else ():
        yield Target(f"{theirs} ÷ {ours}", 3, of(peers, theirs), every=True)
    if held is not None:
        ends = held.groupby("contender", sort=False)["temporary_bytes"].agg(["first", "last"])
        growth = ends["last"] / ends["first"]
        called = "bytes of online estimators ÷ those at T 1024"
        yield Target(called, 1.05, growth, most=True, every=True)


# ---- figures


def draw(folder: Path) -> list[Path]:
    """Draw all figures from the tables in the folder, and return their files."""
    table, held, phases = (read_table(folder / f"{n}.csv") for n in ("grid", "memory", "phases"))
    machines = json.loads((folder / "machine.json").read_text(encoding="utf-8"))

    def said(table: str) -> str:
        one = machines[table]
        return f"{one['processor']}, {one['cores']} cores, JAX {one['jax']}"

    with figure_layout.style():
        return [
            *_ratios(table, said("grid"), folder),
            *_length(held, said("memory"), folder),
            *_phases(phases, said("phases"), folder),
            *_estimators(folder, said),
        ]


def _ratios(table: pd.DataFrame, said: str, folder: Path) -> list[Path]:
    others = [name for name in GRID if name in set(table["contender"]) - {"ours"}]
    cells = [name for name in CELLS if name in set(table["cell"])]
    colors = dict(zip(others, plots.COLORS, strict=False))
    figure, axes = figure_layout.figure(
        2,
        len(cells),
        (15, 13),
        "How many times longer others take than bptt_study for one loss and gradient",
        "Top: full BPTT; bottom: chunks. A row is a place of the grid: hidden units H, sequences B, "
        "time steps T, window w. Marker and bar: median and range of "
        f"{plots.span(table['n'], 'ratio')}, each of two turns one after the other. Right of the dotted line "
        "bptt_study is faster. Matrix products alone: those with the recurrent weights, the limit. "
        f"{said}.",
        [
            Line2D([], [], color=colors[name], marker="o", markersize=8, label=GRID[name])
            for name in others
        ],
        sharex=True,
        sharey="row",
        gridspec_kw={"height_ratios": [9, 11]},
    )
    for truncated, row in zip((False, True), axes, strict=True):
        for cell, ax in zip(cells, row, strict=True):
            part = table[(table["cell"] == cell) & (table["window"].notna() == truncated)]
            _panel(part, colors, ax)
            ax.set_title(f"{cell}, {'chunks' if truncated else 'full'}")
        row[0].invert_yaxis()  # shared
    for ax in axes[1]:
        ax.set_xlabel("seconds ÷ seconds of bptt_study")
    for ax in axes[:, 0]:
        ax.set_ylabel("place of the grid", labelpad=14)
    return figure_layout.save(figure, folder, "ratios")


def _panel(part: pd.DataFrame, colors: dict[str, Any], ax: Axes) -> None:
    """Draw the ratios at each place, with a colour for each contender."""
    labels = [place.partition(", ")[2] for place in dict.fromkeys(_places(part))]
    for i, (name, color) in enumerate(colors.items()):
        rows = part[part["contender"] == name]
        y = np.arange(len(rows)) + 0.13 * (i - (len(colors) - 1) / 2)
        ax.hlines(y, rows["ratio_min"], rows["ratio_max"], color=color, linewidth=2)
        ax.plot(rows["ratio"], y, "o", color=color, markersize=6)
    ax.axvline(1, **plots.REFERENCE)
    ax.set_yticks(np.arange(len(labels)), labels)
    ax.set_xscale("log", base=4)
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}×" if x >= 1 else f"1/{1 / x:g}×")


STRATEGIES = {
    "full": "full",
    "chunks": "fixed",
    "random_cuts": "randomized",
    "checkpointed": "checkpointed",
}


def _length(held: pd.DataFrame, said: str, folder: Path) -> list[Path]:
    row, million = held.iloc[0], held[held["batch_size"] == 1]
    window = held["window"].max()
    held = held[held["batch_size"] == row["batch_size"]]
    looks = plots.looks(STRATEGIES.values())
    last = million.iloc[-1]
    figure, axes = figure_layout.figure(
        1,
        2,
        (13, 6.2),
        "What a longer sequence costs",
        f"{row['cell']}, {row['hidden']} units, {row['batch_size']} sequences; chunks of {window:g} steps, "
        f"random segments of {window / 4:g} on average, checkpointing with 2√T states. Left: temporary memory "
        "as the compiler planned it; dotted: as the strategy claims, its numbers for each token included. "
        "Right: time of one loss and gradient for each time step, median and range. With one "
        f"sequence {last['steps']:,} steps take {last['seconds']:.2g} s and "
        f"{last['temporary_bytes'] / 1e6:.2g} MB, the whole process {last['peak_bytes'] / 1e6:.0f} MB. {said}.",
        plots.handles(looks, markers=True),
    )
    left, right = axes[0]
    for i, (contender, strategy) in enumerate(STRATEGIES.items()):
        rows = held[held["contender"] == contender]
        look = looks[strategy]
        style = {"marker": look.marker, "color": look.color, "linewidth": 2, "markersize": 7}
        T = rows["steps"]
        left.plot(T, rows["temporary_bytes"] / 1e6, **style)
        left.plot(T, rows["predicted_bytes"] / 1e6, ":", color=look.color, linewidth=2)
        aside = T * 1.08 ** (i - 1.5)  # bars that do not hide each other
        right.plot(aside, 1e6 * rows["seconds"] / T, **style)
        low, high = (1e6 * rows[f"seconds_{end}"] / T for end in ("min", "max"))
        right.vlines(aside, low, high, color=look.color, linewidth=2)
    left.set_ylabel("temporary memory (MB)")
    right.set_ylabel("microseconds for each time step")
    for ax in (left, right):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_xticks(held["steps"].unique(), [f"{t:,}" for t in held["steps"].unique()])
        ax.set_xlabel("time steps T")
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6, 8)))
    return figure_layout.save(figure, folder, "length")


def _phases(table: pd.DataFrame, said: str, folder: Path) -> list[Path]:
    cells = [name for name in CELLS if name in set(table["cell"])]
    colors = dict(zip(contenders.PHASES, plots.COLORS, strict=False))
    figure, axes = figure_layout.figure(
        1,
        len(cells),
        (15, 11),
        "What the phases of full BPTT take alone, beside the whole",
        "A place (hidden units H, sequences B, time steps T) has three bars, from the top: the whole, one "
        "compiled program; its phases, each a program of its own on the same arrays; the phases' matrix "
        "products alone, at the shapes at which they have them. Bars: medians of "
        f"{plots.span(table['n'], 'turn')}. On the whole: the range of its seconds. Diamond: all phases one "
        f"after the other, median and range; each bar was timed apart. {said}.",
        [Rectangle((0, 0), 1, 1, color="0.75", label="the whole, one program")]
        + [Rectangle((0, 0), 1, 1, color=colors[name], label=name) for name in colors],
        sharex=True,
    )
    for cell, ax in zip(cells, axes[0], strict=True):
        _stacks(table[table["cell"] == cell], colors, ax)
        ax.set_title(cell)
        ax.set_xlabel("seconds ÷ seconds of the whole")
    axes[0, 0].set_ylabel("place; milliseconds of the whole")
    return figure_layout.save(figure, folder, "phases")


def _stacks(part: pd.DataFrame, colors: dict[str, Any], ax: Axes) -> None:
    """Draw three bars for each place: the whole, its phases, their products."""
    places = _places(part)
    labels = []
    for i, (place, rows) in enumerate(part.groupby(places, sort=False)):
        of = rows.set_index("contender")
        whole, apart = of.loc["full"], of.loc["apart"]
        ax.barh(i - 0.27, 1, 0.25, color="0.75")
        for y, suffix in ((i, ""), (i + 0.27, "_products")):
            ends = of["ratio"].reindex([name + suffix for name in colors], fill_value=0).cumsum()
            ax.barh(
                y, ends.diff().fillna(ends), 0.25, ends.shift(fill_value=0), color=colors.values()
            )
        ranges = [whole[f"seconds_{end}"] / whole["seconds"] for end in ("min", "max")]
        ax.hlines(i - 0.27, *ranges, color="black", linewidth=2)
        ax.hlines(i, apart["ratio_min"], apart["ratio_max"], color="black", linewidth=1)
        ax.plot(apart["ratio"], i, "D", color="black", markersize=6)
        said = str(place).partition(", ")[2].replace(", T", ",\nT")
        labels.append(f"{said}\n{1e3 * whole['seconds']:.3g} ms")
    ax.axvline(1, **plots.REFERENCE)
    ax.set_yticks(range(len(labels)), labels)
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")


def _estimators(folder: Path, said: Callable[[str], str]) -> list[Path]:
    if not (file := folder / "estimators.csv").is_file():
        return []
    table = read_table(file)
    table = table[table["contender"] != "full()"]
    names, place = list(dict.fromkeys(table["contender"])), table.iloc[0]
    cells = list(dict.fromkeys(table["cell"]))
    colors = dict(zip(cells, plots.COLORS, strict=False))
    figure, axes = figure_layout.figure(
        1,
        1,
        (10, 12),
        "What each estimator takes beside full BPTT",
        f"One loss and gradient on one device: {place['hidden']} units, {place['batch_size']} sequences, "
        f"{place['steps']} time steps. A number in brackets is a window, mean length, block, rank or hold, "
        "δ, or how many neighbours (SnAp), tangents or pairs. "
        f"Marker and bar: median and range of {plots.span(table['n'], 'turn')}. {said('estimators')}.",
        [
            Line2D([], [], color=colors[cell], marker="o", linestyle="", markersize=8, label=cell)
            for cell in cells
        ],
    )
    ax = axes[0, 0]
    for i, cell in enumerate(cells):
        rows = table[table["cell"] == cell]
        y = np.array([names.index(name) for name in rows["contender"]], float)
        y += 0.16 * (i - (len(cells) - 1) / 2)
        ax.hlines(y, rows["ratio_min"], rows["ratio_max"], color=colors[cell], linewidth=2)
        ax.plot(rows["ratio"], y, "o", color=colors[cell], markersize=6)
    ax.axvline(1, **plots.REFERENCE)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    ax.set_xlabel("seconds ÷ seconds of full BPTT")
    ax.set_ylabel("estimator")
    return figure_layout.save(figure, folder, "estimators")


def report(folder: Path) -> None:
    """Make targets and figures from the tables in the folder."""
    judged = targets(folder)
    write_table(judged, folder / "targets.csv")
    print(judged.to_string(index=False, float_format="{:.3g}".format))
    print(*draw(folder), sep="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = Path(__file__).resolve().parents[2] / "results" / "bench"
    parser.add_argument(
        "folder", nargs="?", type=Path, default=default, help="folder of the tables"
    )
    parser.add_argument("--measure", action="store_true", help="measure first, on a quiet machine")
    parser.add_argument(
        "--small", action="store_true", help="a grid of a minute, to see that it works"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], choices=TABLES, help="with --measure: these tables alone"
    )
    parser.add_argument(
        "--count", action="store_true", help="count the operations of estimators.csv again first"
    )
    figure_layout.add_format(parser)
    given = parser.parse_args()
    failed = measure(given.folder, given.small, given.only) if given.measure else []
    if given.count:
        count(given.folder)
    with figure_layout.write_as(given.format):
        report(given.folder)
    if failed:
        sys.exit("\n".join(["failed, and missing in the tables:", *failed]))
