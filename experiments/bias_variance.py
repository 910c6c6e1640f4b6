"""What is an estimate of the gradient worth? Bias², variance and MSE against length, arithmetic and memory."""

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import wraps
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from bptt_study.backprop.schedules import revolve
from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.study import Study
from bptt_study.validation import counted

PARTS = {
    "relative_bias2": "bias²  $\\|E\\hat g - g\\|^2 / \\|g\\|^2$",
    "relative_variance": "variance  $E\\|\\hat g - E\\hat g\\|^2 / \\|g\\|^2$",
    "relative_mse": "MSE  $E\\|\\hat g - g\\|^2 / \\|g\\|^2$",
}
MSE = tables.interval_of("relative_mse")
SETTING = ["task", "moment", "update", "estimator", "length"]
SEED = ["run", "seed", *SETTING]
BUDGETS = 2.0 ** np.arange(-4, 6)  # in full gradients of one training batch
MEMORY = (1, 32)  # the budgets for which a figure shows the states held
ZERO = 1e-9  # relative numbers below this are float32's rounding
SHOWN = (1e-4, 1e3)  # the range of relative numbers that the axes show
WHEN = {"start": "before training", "middle": "half-way", "end": "after training"}
ALL_ON = ("char_lm", "copy")  # the tasks of all estimators: a short and a long reach
COSTS = {
    "relative_arithmetic": "arithmetic ÷ that of full",
    "relative_numbers": "numbers held at once ÷ those of full",
}
FLOOR = 1e-4  # where a figure shows an error of 0
UNBIASED = ("randomized", "randomized_power_law")
RIVALS = ("fixed", "sliding", "randomized_uncompensated")
# the box behind numbers that stand on lines
FREE = {"boxstyle": "square,pad=0.1", "facecolor": "white", "alpha": 0.8, "linewidth": 0}


def more_runs(config: Any) -> list[list[str]]:
    """Return the run beside this one that measures all estimators, on half the units and time steps."""
    if config.task["_target_"].rpartition(".")[2] not in ALL_ON:
        return []
    steps = config.budget.steps and [f"budget.steps={config.budget.steps // 2}"]
    few = ["budget.batch_size=16"] if config.budget.batch_size > 16 else []
    half = [f"hidden={config.hidden // 2}", f"seeds={min(config.seeds, 4)}"]
    return [["probe=[all_estimators]", *half, *(steps or []), *few]]


# Tables


def by_seed(estimator_quality: pd.DataFrame) -> pd.DataFrame:
    """Compute the relative numbers of each seed, and add rows with over = both for one draw on one batch."""
    probed = tables.unless_stopped(estimator_quality, "cosine", *PARTS)
    updates = probed.groupby("run")["update"].unique().map(sorted)
    names = {run: _names([int(u) for u in found]) for run, found in updates.items()}
    moment = [names[run][u] for run, u in zip(probed["run"], probed["update"], strict=True)]
    full = probed[probed["estimator"] == "full"].groupby("run")[["arithmetic", "numbers"]].first()
    arithmetic, numbers = (probed["run"].map(full[name]) for name in full)
    table = probed.assign(
        moment=moment,
        relative_arithmetic=probed["arithmetic"] / arithmetic,
        relative_forward=probed["forward_arithmetic"] / arithmetic,
        relative_numbers=probed["numbers"] / numbers,
    )
    table = table[[*SEED, "over", *COSTS, "relative_forward", "states", "cosine", *PARTS]]
    draws, batches = (table[table["over"] == over] for over in ("draws", "batches"))
    both = batches.merge(draws[[*SEED, "relative_variance"]], on=SEED, suffixes=("", "_draws"))
    both["relative_variance"] += both.pop("relative_variance_draws")
    both["relative_mse"] = both["relative_bias2"] + both["relative_variance"]
    return pd.concat([table, both.assign(over="both")], ignore_index=True)


def _names(updates: list[int]) -> dict[int, str]:
    half = updates[-1] / 2 if len(updates) == 3 else None
    middle = {u: "middle" if u == half else f"update {u}" for u in updates[1:-1]}
    return {updates[-1]: "end", updates[0]: "start", **middle}


def moments(seeds: pd.DataFrame) -> pd.DataFrame:
    """Compute the median over seeds of each relative number, with its interval."""
    table = _aggregate(seeds, [*SETTING, "over", *COSTS], *PARTS, "cosine")
    table.loc[table["over"] == "both", tables.interval_of("cosine")] = np.nan
    return table


def estimators(all_estimators: pd.DataFrame) -> pd.DataFrame:
    """Compute bias², variance and MSE of every estimator as `moments` does, with the name of its setting."""
    table = moments(by_seed(all_estimators))
    named = all_estimators.drop_duplicates("estimator").set_index("estimator")["setting"]
    return table.assign(setting=table["estimator"].map(named))


def frontiers(estimators: pd.DataFrame) -> pd.DataFrame:
    """List the estimators that no other beats in MSE at the same arithmetic, or with as few numbers held.

    The MSE is that of one estimate on one batch, against the gradient of this batch.
    """
    found = []
    for cost in COSTS:
        one = estimators[estimators["over"] == "draws"].sort_values(
            [cost, "relative_mse"], kind="stable"
        )
        for _, part in one.groupby(["task", "moment"], sort=False):
            error = part["relative_mse"].round(9)  # beyond lies float32's rounding
            best = part[error < error.cummin().shift(fill_value=np.inf)]
            found.append(best.assign(cost=cost.removeprefix("relative_"), relative_cost=best[cost]))
    kept = ["task", "moment", "cost", "relative_cost", "estimator", "setting", "length", *MSE]
    return pd.concat(found, ignore_index=True)[kept]


def _aggregate(seeds: pd.DataFrame, keys: list[str], *values: str) -> pd.DataFrame:
    lost = ~np.isfinite(seeds["relative_mse"])
    return tables.aggregate_all(seeds.assign(diverged=lost), keys, values, {"cosine": -np.inf})


def frontier(seeds: pd.DataFrame) -> pd.DataFrame:
    """Find the length of least MSE for each budget of arithmetic and estimator, and the best estimator.

    A budget pays for n = budget ÷ arithmetic independent batches and draws. Their mean has the MSE
    bias² + variance/n; n < 1 is a batch with fewer sequences. A bias² below 0 counts as 0.
    """
    one = seeds[seeds["over"] == "both"]
    found = []
    for budget in BUDGETS:
        table = _aggregate(_paid(one, budget), [*SETTING, "batches"], "relative_mse")
        groups = table.groupby(SETTING[:-1], sort=False)
        found.append(table.loc[groups["relative_mse"].idxmin()].assign(budget=budget))
    table = pd.concat(found, ignore_index=True)
    least = table.groupby(["task", "moment", "budget"])["relative_mse"].transform("min")
    return table.assign(best=np.isfinite(least) & (table["relative_mse"] == least))


def _paid(one: pd.DataFrame, budget: float) -> pd.DataFrame:
    """Compute the number of batches that the budget pays for, and the MSE of their mean."""
    batches = budget / one["relative_arithmetic"]
    mse = one["relative_bias2"].clip(lower=0) + one["relative_variance"] / batches
    return one.assign(budget=budget, batches=batches, relative_mse=mse)


def memory(seeds: pd.DataFrame) -> pd.DataFrame:
    """Compute the MSE for a budget by the states held at once: windows, and full with recomputation.

    Full with m states recomputes the others in the best order. It runs its forward pass more than once, so the
    budget pays for fewer batches. With the T states of all time steps it is full itself.
    """
    one = seeds[seeds["over"] == "both"]
    windows = one[one["estimator"].isin(["fixed", "sliding"])]
    found = [windows.assign(states=windows["length"])]
    for task, full in one[one["estimator"] == "full"].groupby("task", sort=False):
        steps = int(full["states"].max())  # full holds the states of all time steps
        lengths = np.union1d(windows.loc[windows["task"] == task, "length"].astype(int), [steps])
        for states in (m for m in lengths if m > 1):
            unit, places = revolve.layout(steps, states) if states < steps else (steps, 1)
            again = unit * revolve.forward_steps(steps // unit, places) / steps - 1
            cost = 1 + again * full["relative_forward"]
            found.append(
                full.assign(estimator="checkpointed", states=states, relative_arithmetic=cost)
            )
    each = pd.concat(found, ignore_index=True)
    paid = pd.concat([_paid(each, budget) for budget in MEMORY], ignore_index=True)
    keys = [*SETTING[:-1], "states", "budget", "relative_arithmetic"]
    return _aggregate(paid, keys, "relative_mse")


def crossings(seeds: pd.DataFrame) -> pd.DataFrame:
    """Find the budget from which an unbiased estimator has a smaller MSE than a biased one of the same length.

    At this budget, bias² + variance · arithmetic/budget is equal for both.
    """
    one = seeds[seeds["over"] == "both"]
    keys = [k for k in SEED if k != "estimator"]
    found = []
    for unbiased in UNBIASED:
        for rival in RIVALS:
            a, b = (one[one["estimator"] == name] for name in (unbiased, rival))
            pair = a.merge(b, on=keys, suffixes=("", "_rival"))
            noise = pair["relative_variance"] * pair["relative_arithmetic"]
            less = pair["relative_variance_rival"] * pair["relative_arithmetic_rival"]
            bias2 = pair["relative_bias2_rival"]
            known = bias2 > ZERO
            budget = ((noise - less) / bias2.where(known, 1)).clip(lower=0).where(known, np.inf)
            found.append(pair.assign(unbiased=unbiased, rival=rival, budget=budget))
    keys = ["task", "moment", "update", "unbiased", "rival", "length"]
    table = tables.aggregate_all(pd.concat(found), keys, ["budget"])
    return table.drop(columns="diverged")


# Figures


def each_moment(draw: Callable[..., Figure]) -> Callable[..., Iterator[tuple[str, Figure]]]:
    """Draw a figure for each moment of training, of which every table that has moments keeps one."""

    @wraps(draw)
    def drawn(**found: pd.DataFrame) -> Iterator[tuple[str, Figure]]:
        timed = {name: table for name, table in found.items() if "moment" in table}
        for moment in next(iter(timed.values()))["moment"].unique():
            now = {name: table[table["moment"] == moment] for name, table in timed.items()}
            yield moment.replace(" ", "_"), draw(**found | now)

    return drawn


def _at_last(table: pd.DataFrame) -> pd.DataFrame:
    """Select the rows of the last moment."""
    return table[table["moment"] == table["moment"].iloc[-1]]


def _when(table: pd.DataFrame) -> str:
    """Put the moment of a table into words."""
    moment = table["moment"].iloc[0]
    return WHEN.get(moment, moment)


@each_moment
def draw_length(
    moments: pd.DataFrame, rows: pd.DataFrame, estimator_quality: pd.DataFrame
) -> Figure:
    """Draw bias², variance and MSE over the length: a row of panels for each, a column for each task."""
    tasks, draws = moments["task"].nunique(), moments[moments["over"] == "draws"]
    named, noise = plots.looks(set(draws["estimator"]) - {"full"}), _noise(moments)
    figure, axes = figure_layout.figure(
        len(PARTS),
        tasks,
        (2 + 3.9 * tasks, 12),
        f"Bias², variance and mean squared error of the gradient by truncation length, {_when(moments)}",
        "Of one estimate on one training batch, over the strategy's draws, relative to the squared norm of the "
        "full gradient on it. Full BPTT is 0 in all three; compensated cuts have no bias and fixed windows no "
        "variance, and are missing there. Bias² and the variance of compensated cuts are exact, the other "
        "variances sampled. Dotted: variance of the full gradient over batches, the noise that training has "
        f"anyway. Arrows: beyond the axis. {_spread(draws, 'band')} {_runs(rows, estimator_quality)}",
        [*plots.handles(named, markers=True), _noise_handle()],
        sharey=True,
        sharex="col",
    )
    for part, row in zip(PARTS, axes, strict=True):
        for task, here, ax in plots.panels(draws, "task", row):
            ax.set(yscale="log", ylim=SHOWN, xlabel="window or mean length (time steps)")
            ax.set_xscale("log", base=2)
            if part != "relative_bias2":
                ax.axhline(noise[task], **_NOISE)
            draw_lines(here, ax, named, part)
        row[0].set_ylabel(PARTS[part])
    return figure


_NOISE = {"color": "0.25", "linewidth": 1.8, "linestyle": (0, (1, 1.5)), "zorder": 1}


def _noise(table: pd.DataFrame) -> pd.Series:
    """Return the variance of the full gradient over batches, by task."""
    full = table[(table["over"] == "batches") & (table["estimator"] == "full")]
    return full.set_index("task")["relative_variance"]


def _noise_handle() -> Line2D:
    line = {k: v for k, v in _NOISE.items() if k != "zorder"}
    return Line2D([], [], label="noise of the minibatch", **line)


def draw_lines(table: pd.DataFrame, ax: Axes, named: dict[str, plots.Look], value: str) -> Axes:
    """Draw one line per estimator over length."""
    low, high = ax.get_ylim()
    above = []
    for name, look in named.items():
        part = table[(table["estimator"] == name) & (table[value] > ZERO)].sort_values("length")
        if part.empty:
            continue
        at = part["length"]
        ax.plot(at, part[value], **look.line)
        inside = part[value].between(low, high)
        ax.scatter(at, part[value].where(inside), 36, [look.color], marker=look.marker, zorder=3)
        band = part[[f"{value}_low", f"{value}_high"]].clip(low / 2, 2 * high).to_numpy().T
        ax.fill_between(at, *band, color=look.color, alpha=0.15, linewidth=0)
        above += [(a, v, look.color) for a, v in zip(at, part[value], strict=True) if v > high]
    for n, (a, v, color) in enumerate(sorted(above, key=lambda item: item[:2])):
        ax.annotate(
            f"↑ $10^{{{np.log10(v):.0f}}}$", (a, high), (2, -14 - 16 * n), color=color, bbox=FREE,
            textcoords="offset points", fontsize="small",
        )  # fmt: skip
    ax.yaxis.set_major_locator(LogLocator(numticks=20))
    ax.yaxis.set_minor_locator(LogLocator(subs=(), numticks=20))
    return _ticks(ax)


def _ticks(ax: Axes) -> Axes:
    ax.xaxis.set_major_locator(LogLocator(base=2, subs=(1,), numticks=20))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{Fraction(x)}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    return ax


def draw_frontier(
    frontier: pd.DataFrame, rows: pd.DataFrame, estimator_quality: pd.DataFrame
) -> Figure:
    """Draw the MSE of each estimator at its best length over the budget, relative to that of full BPTT."""
    table = _at_last(frontier)
    tasks, named = table["task"].nunique(), plots.looks(table["estimator"])
    figure, axes = figure_layout.figure(
        1,
        tasks,
        (2 + 3.9 * tasks, 6),
        "Is the gradient better for the same arithmetic? Mean squared error relative to that of full BPTT",
        f"{_when(table).capitalize()}, against the gradient of all data. A budget pays for n independent "
        "batches and draws, whose mean has the error bias² + variance/n; below 1, for a batch with fewer "
        "sequences. Each line has at every budget its best length, and numbers say that of the best of all, "
        "where it changes. Below the black line an estimator is better than full BPTT. "
        f"{_spread(table, 'band')} {_runs(rows, estimator_quality)}",
        plots.handles(named, markers=True),
        sharex=True,
        sharey=True,
    )
    for _, part, ax in plots.panels(table, "task", axes[0]):
        ax.set(yscale="log", xlabel="arithmetic (full gradients of one batch)")
        ax.set_xscale("log", base=2)
        draw_frontier_lines(part, ax, named)
    axes[0][0].set_ylabel("MSE ÷ MSE of full")
    return figure


def draw_frontier_lines(table: pd.DataFrame, ax: Axes, named: dict[str, plots.Look]) -> Axes:
    """Draw the relative MSE over the budget, a line and its interval for each estimator."""
    full = table[table["estimator"] == "full"].set_index("budget")["relative_mse"]
    table = table.assign(**table[MSE].div(table["budget"].map(full), axis=0))
    for name, look in named.items():
        part = table[table["estimator"] == name].sort_values("budget")
        middle, low, high = (part[column] for column in MSE)
        ax.plot(part["budget"], middle, marker=look.marker, markersize=5, **look.line)
        if name != "full":
            ax.fill_between(part["budget"], low, high, color=look.color, alpha=0.12, linewidth=0)
    best = table[table["best"]].drop_duplicates("budget").sort_values("budget")
    setting = best["estimator"] + best["length"].astype(str)
    for _, row in best[setting != setting.shift()].iterrows():
        if np.isfinite(row["length"]):
            ax.annotate(
                tables.text(row["length"]), (row["budget"], row["relative_mse"]), (0, -14),
                textcoords="offset points", ha="center", fontsize="small",
                color=named[row["estimator"]].color,
            )  # fmt: skip
    return _ticks(ax)


def draw_memory(
    memory: pd.DataFrame, rows: pd.DataFrame, estimator_quality: pd.DataFrame
) -> Figure:
    """Draw the MSE at the end over the states held, a row of panels per budget."""
    table = _at_last(memory)
    tasks = table["task"].nunique()
    exact = plots.LOOKS["full"]._replace(name="Full, checkpointed", marker="D", width=2.0)
    named = {"checkpointed": exact, **plots.looks(set(table["estimator"]) - {"checkpointed"})}
    figure, axes = figure_layout.figure(
        len(MEMORY),
        tasks,
        (2 + 3.9 * tasks, 2.5 + 3.5 * len(MEMORY)),
        "What truncation must beat: the exact gradient with as few states, the others computed again",
        f"Mean squared error of the gradient {_when(table)}, for the arithmetic of so many full gradients of "
        "one batch (the budget of the frontier), over the states of a sequence that are held at once. "
        "Checkpointed: full BPTT that keeps m states and runs the others forward again in the best order, "
        "which buys fewer batches; at the right end it is full. A window holds as many states as it is long. "
        "Numbers: arithmetic ÷ that of full. "
        f"{_spread(table, 'band')} {_runs(rows, estimator_quality)}",
        plots.handles(named, markers=True),
        sharex="col",
        sharey="row",
    )
    for budget, row in zip(MEMORY, axes, strict=True):
        for _, here, ax in plots.panels(table[table["budget"] == budget], "task", row):
            ax.set(yscale="log", xlabel="states held at once")
            ax.set_xscale("log", base=2)
            ax.margins(y=0.15)
            draw_memory_lines(here, ax, named)
            ax.set_title(f"{ax.get_title()}, for {counted(budget, 'full gradient')}")
        row[0].set_ylabel("MSE  $E\\|\\hat g - g\\|^2 / E\\|g_{batch}\\|^2$")
    return figure


def draw_memory_lines(table: pd.DataFrame, ax: Axes, named: dict[str, plots.Look]) -> Axes:
    """Draw the MSE over the states held, with the cost of the exact gradient as numbers."""
    for name, look in named.items():
        part = table[table["estimator"] == name]
        plots.band(part, "states", ax=ax, y="relative_mse", marker=look.marker, **look.line)
        for _, row in part[part["estimator"] == "checkpointed"].iterrows():
            ax.annotate(
                f"{row['relative_arithmetic']:.2g}", (row["states"], row["relative_mse"]), (0, 7),
                textcoords="offset points", ha="center", fontsize="small", color=look.color,
                bbox=FREE,
            )  # fmt: skip
    return _ticks(ax)


@each_moment
def draw_estimators(
    estimators: pd.DataFrame, rows: pd.DataFrame, all_estimators: pd.DataFrame
) -> Figure:
    """Draw bias² and variance of every estimator, a row for each of its settings."""
    one = estimators["over"] == "draws"
    draws = estimators[one & (estimators["estimator"] != "full")]
    tasks, named = draws["task"].nunique(), plots.looks(draws["estimator"])
    noise = _noise(estimators)
    order = [(n, length) for n in named for length in _lengths(draws, n)]
    figure, axes = figure_layout.figure(
        1,
        tasks,
        (4 + 4.6 * tasks, 3.2 + 0.235 * len(order)),
        f"What the error of each estimator is made of, {_when(estimators)}",
        "Of one estimate on one training batch, against its full gradient, relative to the squared norm of "
        "that. No square: no bias; no circle: no variance; neither: exact. Numbers beyond the axis lie at its "
        "edge. Dotted: variance of the full gradient over batches. Bar: 95 % bootstrap interval of the median "
        f"over {plots.seeds(draws)}. PES, NRES and truncated ES in the limit of a small σ, with 16 pairs where "
        f"none are named. {_runs(rows, all_estimators)}",
        [
            Line2D([], [], marker="s", color="0.3", mfc="white", linestyle="", label="bias²"),
            Line2D([], [], marker="o", color="0.3", linestyle="", label="variance"),
            _noise_handle(),
        ],
        sharey=True,
    )
    for task, part, ax in plots.panels(draws, "task", axes[0]):
        ax.set(xscale="log", xlim=(FLOOR, 1e6), ylim=(len(order) - 0.4, -0.6))
        ax.axvline(noise[task], **_NOISE)
        for _, row in part.iterrows():
            draw_error(row, order.index(_place(row)), named[row["estimator"]], ax)
        ax.xaxis.set_major_locator(LogLocator(base=100, numticks=20))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("÷ squared norm of the gradient")
    axes[0, 0].set_ylabel("estimator")
    words = draws.drop_duplicates("estimator").set_index("estimator")["setting"]
    axes[0, 0].set_yticks(range(len(order)), [_words(named[n].name, words[n], k) for n, k in order])
    for label, (name, _) in zip(axes[0, 0].get_yticklabels(), order, strict=True):
        label.set(color=named[name].color, fontsize="small")
    return figure


def draw_error(row: pd.Series, y: float, look: plots.Look, ax: Axes) -> None:
    """Draw bias² and variance of one estimator with their intervals, each only if it is not 0."""
    for part, marker, fill, off in (("bias2", "s", "white", -0.14), ("variance", "o", None, 0.14)):
        found = row[tables.interval_of(f"relative_{part}")].astype(float)
        if abs(found.iloc[0]) > ZERO:
            mark = {"mfc": fill or look.color, "clip_on": False}
            x, at = found.clip(*ax.get_xlim()), (y + off,) * 3
            plots.cross(x, at, look._replace(marker=marker), ax, size=7, **mark)


def _lengths(draws: pd.DataFrame, name: str) -> list[float]:
    found: list[float] = sorted(draws.loc[draws["estimator"] == name, "length"].fillna(0).unique())
    return found


def _place(row: pd.Series) -> tuple[str, float]:
    return row["estimator"], 0.0 if pd.isna(row["length"]) else row["length"]


def _words(name: str, setting: object, length: float) -> str:
    """Name an estimator with its setting."""
    return f"{name}, {str(setting).replace('_', ' ')} {tables.text(length)}" if length else name


@each_moment
def draw_frontiers(
    estimators: pd.DataFrame,
    frontiers: pd.DataFrame,
    rows: pd.DataFrame,
    all_estimators: pd.DataFrame,
) -> Figure:
    """Draw the MSE of every estimator over arithmetic and over numbers held, with the two frontiers."""
    draws = estimators[estimators["over"] == "draws"]
    tasks, named = draws["task"].nunique(), plots.looks(draws["estimator"])
    figure, axes = figure_layout.figure(
        tasks,
        len(COSTS),
        (14, 2.5 + 5.2 * tasks),
        f"Two frontiers: least error for so much arithmetic, and for so many numbers held, {_when(draws)}",
        "Mean squared error of one estimate on one training batch, against its full gradient, relative to the "
        f"squared norm of that; at {FLOOR:g}: exact, or less. Beyond the axis: at its edge. Grey: the "
        "frontier, the least error at this cost or less. A line joins the settings of an estimator, with "
        "larger markers for larger values. Arithmetic is counted from the program and leaves factorisations "
        "out (OK, sketched RTRL); numbers of a sequence are those held at once, by each estimator's claim. "
        f"Median over {plots.seeds(draws)}. {_runs(rows, all_estimators)}",
        plots.handles(
            {n: look._replace(marker=look.marker or "D", dashes="") for n, look in named.items()},
            markers=True,
        ),
        sharey=True,
        sharex="col",
    )
    for (cost, label), column in zip(COSTS.items(), axes.T, strict=True):
        least = frontiers[frontiers["cost"] == cost.removeprefix("relative_")]
        for task, here, ax in plots.panels(draws, "task", column):
            ax.set(xscale="log", yscale="log", ylim=(FLOOR / 1.5, 2e3), xlabel=label)
            best = least[least["task"] == task]
            x = [*best["relative_cost"], 2 * here[cost].max()]
            y = best["relative_mse"].clip(FLOOR, 1e3)
            ax.step(x, [*y, y.iloc[-1]], where="post", color="0.8", linewidth=9, zorder=0)
            for name, look in named.items():
                part = here[here["estimator"] == name].sort_values("length")
                error = part["relative_mse"].clip(FLOOR, 1e3)
                ax.plot(part[cost], error, color=look.color, linewidth=1, alpha=0.6)
                sizes = 28 * (1 + np.arange(len(part)))
                ax.scatter(
                    part[cost], error, sizes, [look.color], marker=look.marker or "D", zorder=3
                )
            ax.yaxis.set_major_locator(LogLocator(numticks=20))
    for ax in axes[:, 0]:
        ax.set_ylabel(PARTS["relative_mse"])
    return figure


def _spread(table: pd.DataFrame, interval: str) -> str:
    """Write what the marks mean, and the tasks on which seeds diverged."""
    lost = table.loc[table["diverged"] > 0, "task"].unique()
    said = plots.spread(table, interval=interval)
    return f"{said} Diverged on {', '.join(lost)}." if len(lost) else said


def _runs(rows: pd.DataFrame, probed: pd.DataFrame) -> str:
    """Put the runs that a probe has measured into words."""
    return f"Trained by {plots.trained(rows)}. {plots.runs(rows, probed)}"


def check(rows: pd.DataFrame) -> None:
    """Check that each task has one network, beside the smaller one whose every estimator is measured."""
    largest = rows["hidden"] == rows.groupby("task")["hidden"].transform("max")
    for part in (rows[largest], rows[~largest]):
        tables.told_by(part, ("task",))


STUDY = Study(
    question=__doc__,
    tables={
        "moments": lambda estimator_quality: moments(by_seed(estimator_quality)),
        "frontier": lambda estimator_quality: frontier(by_seed(estimator_quality)),
        "memory": lambda estimator_quality: memory(by_seed(estimator_quality)),
        "crossings": lambda estimator_quality: crossings(by_seed(estimator_quality)),
        "estimators": estimators,
        "frontiers": frontiers,
    },
    figures={
        "length": draw_length,
        "frontier": draw_frontier,
        "memory": draw_memory,
        "estimators": draw_estimators,
        "frontiers": draw_frontiers,
    },
    more_runs=more_runs,
    check=check,
)
