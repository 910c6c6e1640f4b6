"""What is an estimate of the gradient worth? Bias², variance and MSE against length, arithmetic and memory."""

from collections.abc import Sequence
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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


def frontier(seeds: pd.DataFrame) -> pd.DataFrame:
    """Find the length of least MSE for each budget of arithmetic and estimator, and the best estimator.

    A budget pays for n = budget ÷ arithmetic independent batches and draws. Their mean has the MSE
    bias² + variance/n; n < 1 is a batch with fewer sequences. A bias² below 0 counts as 0.
    """
    paid = _paid(seeds[seeds["over"] == "both"], BUDGETS)
    table = quality.aggregate(paid, [*SETTING, "budget", "batches"], "relative_mse")
    groups = table.groupby([*SETTING[:-1], "budget"], sort=False)
    table = table.loc[groups["relative_mse"].idxmin()]
    least = table.groupby(["task", "moment", "budget"])["relative_mse"].transform("min")
    return table.assign(best=np.isfinite(least) & (table["relative_mse"] == least))


def _paid(one: pd.DataFrame, budgets: Sequence[float]) -> pd.DataFrame:
    """Compute the number of batches that each budget pays for, and the MSE of their mean."""
    paid = pd.DataFrame({"budget": budgets}).merge(one, how="cross")
    batches = paid["budget"] / paid["relative_arithmetic"]
    mse = paid["relative_bias2"].clip(lower=0) + paid["relative_variance"] / batches
    return paid.assign(batches=batches, relative_mse=mse)


def memory(seeds: pd.DataFrame) -> pd.DataFrame:
    """Compute the MSE for a budget by the states held at once: windows, and full with recomputation."""
    one = seeds[seeds["over"] == "both"]
    windows = one[one["estimator"].isin(["fixed", "sliding"])]
    windows = windows.assign(states=windows["length"])
    exact = [
        _checkpointed(full, int(states))
        for task, full in one[one["estimator"] == "full"].groupby("task", sort=False)
        for states in np.union1d(windows.loc[windows["task"] == task, "states"], full["states"])
        if states > 1
    ]
    paid = _paid(pd.concat([windows, *exact]), MEMORY)
    keys = [*SETTING[:-1], "states", "budget", "relative_arithmetic"]
    return quality.aggregate(paid, keys, "relative_mse")


def _checkpointed(full: pd.DataFrame, states: int) -> pd.DataFrame:
    """Compute the arithmetic of full BPTT with so few states, the others computed again in the best order.

    It runs its forward pass more than once, so a budget pays for fewer batches. With the T states of all time
    steps it is full itself.
    """
    steps = int(full["states"].max())
    unit, places = revolve.layout(steps, states) if states < steps else (steps, 1)
    again = unit * revolve.forward_steps(steps // unit, places) / steps - 1
    cost = 1 + again * full["relative_forward"]
    return full.assign(estimator="checkpointed", states=states, relative_arithmetic=cost)


def crossings(seeds: pd.DataFrame) -> pd.DataFrame:
    """Find the budget from which an unbiased estimator has a smaller MSE than a biased one of the same length.

    At this budget, bias² + variance · arithmetic/budget is equal for both.
    """
    one = seeds[seeds["over"] == "both"]
    keys = [k for k in SEED if k != "estimator"]
    found = []
    for unbiased, rival in product(UNBIASED, RIVALS):
        own, other = (one[one["estimator"] == name] for name in (unbiased, rival))
        pair = own.merge(other, on=keys, suffixes=("", "_rival"))
        noise, less = (
            pair[f"relative_variance{whose}"] * pair[f"relative_arithmetic{whose}"]
            for whose in ("", "_rival")
        )
        bias2 = pair["relative_bias2_rival"]
        budget = ((noise - less) / bias2.where(bias2 > ZERO)).fillna(np.inf)
        budget = budget.mask(noise <= less, 0)  # whatever the bias, whose estimate may be below 0
        found.append(pair.assign(unbiased=unbiased, rival=rival, budget=budget))
    keys = ["task", "moment", "update", "unbiased", "rival", "length"]
    return tables.aggregate_all(pd.concat(found), keys, ["budget"]).drop(columns="diverged")


@each_moment
def draw_length(
    moments: pd.DataFrame, rows: pd.DataFrame, estimator_quality: pd.DataFrame
) -> Figure:
    """Draw bias², variance and MSE over the length: a row of panels for each, a column for each task."""
    tasks, draws = moments["task"].nunique(), moments[moments["over"] == "draws"]
    named, noise = plots.looks(set(draws["estimator"]) - {"full"}), quality.noise(moments)
    figure, axes = figure_layout.figure(
        len(PARTS), tasks, (2 + 3.9 * tasks, 12),
        f"Bias², variance and mean squared error of the gradient by truncation length, {when(moments)}",
        "Of one estimate on one training batch, over the strategy's draws, relative to the squared norm of the "
        "full gradient on it. Full BPTT is 0 in all three; compensated cuts have no bias and fixed windows no "
        "variance, and are missing there. Bias² and the variance of compensated cuts are exact, the other "
        "variances sampled. Dotted: variance of the full gradient over batches, the noise that training has "
        f"anyway. Arrows: beyond the axis. {quality.caption(draws, rows, estimator_quality)}",
        [*plots.handles(named, markers=True), quality.noise_handle()],
        sharey=True,
        sharex="col",
    )  # fmt: skip
    for part, row in zip(PARTS, axes, strict=True):
        for task, here, ax in plots.panels(draws, "task", row):
            ax.set(yscale="log", ylim=SHOWN, xlabel="window or mean length (time steps)")
            if part != "relative_bias2":
                ax.axhline(noise[task], **quality.NOISE)
            own = here[here[part] > ZERO]
            plots.lines(own, "length", part, named, plots.powers_of_two(ax))
            plots.above(own, "length", part, named, ax)
            plots.decades(ax.yaxis)
        row[0].set_ylabel(PARTS[part])
    return figure


def draw_frontier(
    frontier: pd.DataFrame, rows: pd.DataFrame, estimator_quality: pd.DataFrame
) -> Figure:
    """Draw the MSE of each estimator at its best length over the budget, relative to that of full BPTT."""
    table = last_moment(frontier)
    tasks, named = table["task"].nunique(), plots.looks(table["estimator"])
    figure, axes = figure_layout.figure(
        1, tasks, (2 + 3.9 * tasks, 6),
        "Is the gradient better for the same arithmetic? Mean squared error relative to that of full BPTT",
        f"{when(table).capitalize()}, against the gradient of all data. A budget pays for n independent "
        "batches and draws, whose mean has the error bias² + variance/n; below 1, for a batch with fewer "
        "sequences. Each line has at every budget its best length, and numbers say that of the best of all, "
        "where it changes. Below the black line an estimator is better than full BPTT. "
        f"{quality.caption(table, rows, estimator_quality)}",
        plots.handles(named, markers=True),
        sharex=True,
        sharey=True,
    )  # fmt: skip
    for _, part, ax in plots.panels(table, "task", axes[0]):
        draw_to_full(part, ax, named)
        ax.set(yscale="log", xlabel="arithmetic (full gradients of one batch)")
    axes[0, 0].set_ylabel("MSE ÷ MSE of full")
    return figure


def draw_to_full(table: pd.DataFrame, ax: Axes, named: dict[str, plots.Look]) -> None:
    """Draw the MSE of one task ÷ that of full over the budget, and the best length where it changes."""
    full = table[table["estimator"] == "full"].set_index("budget")["relative_mse"]
    table = table.assign(**table[MSE].div(table["budget"].map(full), axis=0))
    ax.axhline(1, **named["full"].line)
    others = table[table["estimator"] != "full"]
    plots.lines(others, "budget", "relative_mse", named, plots.powers_of_two(ax))
    best = table[table["best"]].drop_duplicates("budget").sort_values("budget")
    setting = best[["estimator", "length"]]
    changed = (setting != setting.shift()).any(axis=1) & best["length"].notna()
    for _, row in best[changed].iterrows():
        at, color = (row["budget"], row["relative_mse"]), named[row["estimator"]].color
        plots.note(tables.text(row["length"]), at, (0, -14), color, ax)


def draw_memory(
    memory: pd.DataFrame, rows: pd.DataFrame, estimator_quality: pd.DataFrame
) -> Figure:
    """Draw the MSE at the end over the states held, a row of panels per budget."""
    table = last_moment(memory)
    tasks = table["task"].nunique()
    exact = plots.LOOKS["full"]._replace(name="Full, checkpointed", marker="D", width=2.0)
    named = {"checkpointed": exact, **plots.looks(set(table["estimator"]) - {"checkpointed"})}
    figure, axes = figure_layout.figure(
        len(MEMORY), tasks, (2 + 3.9 * tasks, 2.5 + 3.5 * len(MEMORY)),
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
    )  # fmt: skip

    def title(key: tuple[int, str]) -> str:
        return f"{plots.TASKS.get(key[1], key[1])}, for {counted(key[0], 'full gradient')}"

    for _, part, ax in plots.panels(table, ["budget", "task"], axes.flat, title):
        ax.set(yscale="log", xlabel="states held at once")
        ax.margins(y=0.15)
        plots.lines(part, "states", "relative_mse", named, plots.powers_of_two(ax))
        for _, row in part[part["estimator"] == "checkpointed"].iterrows():
            at = row["states"], row["relative_mse"]
            plots.note(f"{row['relative_arithmetic']:.2g}", at, (0, 7), exact.color, ax)
    for ax in axes[:, 0]:
        ax.set_ylabel("MSE  $E\\|\\hat g - g\\|^2 / E\\|g_{batch}\\|^2$")
    return figure


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
