"""What is an estimate of the gradient worth? Bias², variance and MSE against length, arithmetic and memory."""

from fractions import Fraction
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from bptt_study.backprop.schedules import revolve
from bptt_study.report import figure_layout, plots, quality, tables
from bptt_study.report.quality import PARTS, SEED, SETTING, ZERO
from bptt_study.report.snapshots import each_moment, last_moment, when
from bptt_study.report.study import Study
from bptt_study.validation import counted

MSE = tables.interval_of("relative_mse")
BUDGETS = 2.0 ** np.arange(-4, 6)  # in full gradients of one training batch
MEMORY = (1, 32)  # the budgets for which a figure shows the states held
SHOWN = (1e-4, 1e3)  # the range of relative numbers that the axes show
UNBIASED = ("randomized", "randomized_power_law")
RIVALS = ("fixed", "sliding", "randomized_uncompensated")
# the box behind numbers that stand on lines
FREE = {"boxstyle": "square,pad=0.1", "facecolor": "white", "alpha": 0.8, "linewidth": 0}


# Tables


def frontier(seeds: pd.DataFrame) -> pd.DataFrame:
    """Find the length of least MSE for each budget of arithmetic and estimator, and the best estimator.

    A budget pays for n = budget ÷ arithmetic independent batches and draws. Their mean has the MSE
    bias² + variance/n; n < 1 is a batch with fewer sequences. A bias² below 0 counts as 0.
    """
    one = seeds[seeds["over"] == "both"]
    found = []
    for budget in BUDGETS:
        table = quality.aggregate(_paid(one, budget), [*SETTING, "batches"], "relative_mse")
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
    return quality.aggregate(paid, keys, "relative_mse")


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


@each_moment
def draw_length(
    moments: pd.DataFrame, rows: pd.DataFrame, estimator_quality: pd.DataFrame
) -> Figure:
    """Draw bias², variance and MSE over the length: a row of panels for each, a column for each task."""
    tasks, draws = moments["task"].nunique(), moments[moments["over"] == "draws"]
    named, noise = plots.looks(set(draws["estimator"]) - {"full"}), quality.noise(moments)
    figure, axes = figure_layout.figure(
        len(PARTS),
        tasks,
        (2 + 3.9 * tasks, 12),
        f"Bias², variance and mean squared error of the gradient by truncation length, {when(moments)}",
        "Of one estimate on one training batch, over the strategy's draws, relative to the squared norm of the "
        "full gradient on it. Full BPTT is 0 in all three; compensated cuts have no bias and fixed windows no "
        "variance, and are missing there. Bias² and the variance of compensated cuts are exact, the other "
        "variances sampled. Dotted: variance of the full gradient over batches, the noise that training has "
        f"anyway. Arrows: beyond the axis. {quality.caption(draws, rows, estimator_quality)}",
        [*plots.handles(named, markers=True), quality.noise_handle()],
        sharey=True,
        sharex="col",
    )
    for part, row in zip(PARTS, axes, strict=True):
        for task, here, ax in plots.panels(draws, "task", row):
            ax.set(yscale="log", ylim=SHOWN, xlabel="window or mean length (time steps)")
            ax.set_xscale("log", base=2)
            if part != "relative_bias2":
                ax.axhline(noise[task], **quality.NOISE)
            draw_lines(here, ax, named, part)
        row[0].set_ylabel(PARTS[part])
    return figure


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
    table = last_moment(frontier)
    tasks, named = table["task"].nunique(), plots.looks(table["estimator"])
    figure, axes = figure_layout.figure(
        1,
        tasks,
        (2 + 3.9 * tasks, 6),
        "Is the gradient better for the same arithmetic? Mean squared error relative to that of full BPTT",
        f"{when(table).capitalize()}, against the gradient of all data. A budget pays for n independent "
        "batches and draws, whose mean has the error bias² + variance/n; below 1, for a batch with fewer "
        "sequences. Each line has at every budget its best length, and numbers say that of the best of all, "
        "where it changes. Below the black line an estimator is better than full BPTT. "
        f"{quality.caption(table, rows, estimator_quality)}",
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
    table = last_moment(memory)
    tasks = table["task"].nunique()
    exact = plots.LOOKS["full"]._replace(name="Full, checkpointed", marker="D", width=2.0)
    named = {"checkpointed": exact, **plots.looks(set(table["estimator"]) - {"checkpointed"})}
    figure, axes = figure_layout.figure(
        len(MEMORY),
        tasks,
        (2 + 3.9 * tasks, 2.5 + 3.5 * len(MEMORY)),
        "What truncation must beat: the exact gradient with as few states, the others computed again",
        f"Mean squared error of the gradient {when(table)}, for the arithmetic of so many full gradients of "
        "one batch (the budget of the frontier), over the states of a sequence that are held at once. "
        "Checkpointed: full BPTT that keeps m states and runs the others forward again in the best order, "
        "which buys fewer batches; at the right end it is full. A window holds as many states as it is long. "
        "Numbers: arithmetic ÷ that of full. "
        f"{quality.caption(table, rows, estimator_quality)}",
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


STUDY = Study(
    question=__doc__,
    tables={
        "moments": lambda estimator_quality: quality.medians(quality.by_seed(estimator_quality)),
        "frontier": lambda estimator_quality: frontier(quality.by_seed(estimator_quality)),
        "memory": lambda estimator_quality: memory(quality.by_seed(estimator_quality)),
        "crossings": lambda estimator_quality: crossings(quality.by_seed(estimator_quality)),
    },
    figures={
        "length": draw_length,
        "frontier": draw_frontier,
        "memory": draw_memory,
    },
    check=partial(tables.told_by, names=("task",)),
)
