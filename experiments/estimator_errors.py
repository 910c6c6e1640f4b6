"""What is the error of every estimator made of, and which has the least for its arithmetic, or numbers held?"""

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bptt_study.report import figure_layout, plots, quality, tables
from bptt_study.report.quality import COSTS, PARTS, ZERO
from bptt_study.report.snapshots import each_moment, when
from bptt_study.report.study import Study

MSE = tables.interval_of("relative_mse")
FLOOR = 1e-4  # where a figure shows an error of 0
EDGES = (FLOOR, 1e3)  # where it shows what lies beyond


def estimators(all_estimators: pd.DataFrame) -> pd.DataFrame:
    """Compute bias², variance and MSE of every estimator as medians, with the name of its setting."""
    table = quality.medians(quality.by_seed(all_estimators))
    named = all_estimators.drop_duplicates("estimator").set_index("estimator")["setting"]
    return table.assign(setting=table["estimator"].map(named))


def frontiers(estimators: pd.DataFrame) -> pd.DataFrame:
    """List the estimators that no other beats in MSE at the same arithmetic, or with as few numbers held.

    The MSE is that of one estimate on one batch, against the gradient of this batch.
    """
    draws, found = estimators[estimators["over"] == "draws"], []
    for cost in COSTS:
        dearer = draws.sort_values([cost, "relative_mse"], kind="stable")
        for _, part in dearer.groupby(["task", "moment"], sort=False):
            error = part["relative_mse"].round(9)  # beyond lies float32's rounding
            best = part[error < error.cummin().shift(fill_value=np.inf)]
            found.append(best.assign(cost=cost.removeprefix("relative_"), relative_cost=best[cost]))
    kept = ["task", "moment", "cost", "relative_cost", "estimator", "setting", "length", *MSE]
    return pd.concat(found, ignore_index=True)[kept]


@each_moment
def draw_estimators(
    estimators: pd.DataFrame, rows: pd.DataFrame, all_estimators: pd.DataFrame
) -> Figure:
    """Draw bias² and variance of every estimator, a row for each of its settings."""
    draws = estimators[(estimators["over"] == "draws") & (estimators["estimator"] != "full")]
    tasks, named = draws["task"].nunique(), plots.looks(draws["estimator"])
    noise, listed = quality.noise(estimators), listing(draws, named)
    figure, axes = figure_layout.figure(
        1, tasks, (4 + 4.6 * tasks, 3.2 + 0.235 * len(listed)),
        f"What the error of each estimator is made of, {when(estimators)}",
        "Of one estimate on one training batch, against its full gradient, relative to the squared norm of "
        "that. No square: no bias; no circle: no variance; neither: exact. Numbers beyond the axis lie at its "
        "edge. Dotted: variance of the full gradient over batches. PES, NRES and truncated ES in the limit of "
        "a small σ, with 16 pairs where none are named. "
        f"{quality.caption(draws, rows, all_estimators, 'Marker', 'bar')}",
        [
            Line2D([], [], marker="s", color="0.3", mfc="white", linestyle="", label="bias²"),
            Line2D([], [], marker="o", color="0.3", linestyle="", label="variance"),
            quality.noise_handle(),
        ],
        sharey=True,
    )  # fmt: skip
    for task, part, ax in plots.panels(draws, "task", axes[0]):
        ax.set(xscale="log", xlim=(FLOOR, 1e6), xlabel="÷ squared norm of the gradient")
        ax.axvline(noise[task], **quality.NOISE)
        for _, row in part.merge(listed, on=["estimator", "length"]).iterrows():
            draw_error(row, named[row["estimator"]], ax)
        plots.decades(ax.xaxis, step=2)
    labels = plots.listed(list(listed["name"]), axes[0, 0]).get_yticklabels()
    for label, name in zip(labels, listed["estimator"], strict=True):
        label.set(color=named[name].color, fontsize="small")
    axes[0, 0].set_ylabel("estimator")
    return figure


def listing(draws: pd.DataFrame, named: dict[str, plots.Look]) -> pd.DataFrame:
    """List estimators in the order of their looks, with length, height in the figure and name."""
    each = draws.drop_duplicates(["estimator", "length"]).sort_values("length")
    listed = pd.concat([each[each["estimator"] == name] for name in named])
    names = [estimator_name(row, named[row["estimator"]]) for _, row in listed.iterrows()]
    return listed[["estimator", "length"]].assign(y=range(len(listed)), name=names)


def estimator_name(row: pd.Series, look: plots.Look) -> str:
    """Name an estimator, with its setting if it has one."""
    if pd.isna(row["length"]):
        return look.name
    setting = "length" if pd.isna(row["setting"]) else row["setting"]
    return f"{look.name}, {plots.setting_name(setting, row['length'])}"


def draw_error(row: pd.Series, look: plots.Look, ax: Axes) -> None:
    """Draw bias² and variance of one estimator with their intervals, each only if it is not 0."""
    for part, marker, fill, off in (("bias2", "s", "white", -0.14), ("variance", "o", None, 0.14)):
        found = row[tables.interval_of(f"relative_{part}")].astype(float)
        if abs(found.iloc[0]) > ZERO:
            mark = {"mfc": fill or look.color, "clip_on": False}
            x, y = found.clip(*ax.get_xlim()), (row["y"] + off,) * 3
            plots.cross(x, y, look._replace(marker=marker), ax, size=7, **mark)


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
    named = {n: look._replace(marker=look.marker or "D", dashes="") for n, look in named.items()}
    figure, axes = figure_layout.figure(
        tasks, len(COSTS), (14, 2.5 + 5.2 * tasks),
        f"Two frontiers: least error for so much arithmetic, and for so many numbers held, {when(draws)}",
        "Mean squared error of one estimate on one training batch, against its full gradient, relative to the "
        f"squared norm of that; at {FLOOR:g}: exact, or less. Beyond the axis: at its edge. Grey: the "
        "frontier, the least error at this cost or less. A line joins the settings of an estimator, with "
        "larger markers for larger values. Arithmetic is counted from the program and leaves factorisations "
        "out (OK, sketched RTRL); numbers of a sequence are those held at once, by each estimator's claim. "
        f"Median over {plots.seeds(draws)}. {quality.runs(rows, all_estimators)}",
        plots.handles(named, markers=True),
        sharey=True,
        sharex="col",
    )  # fmt: skip
    for (cost, label), column in zip(COSTS.items(), axes.T, strict=True):
        least = frontiers[frontiers["cost"] == cost.removeprefix("relative_")]
        for task, here, ax in plots.panels(draws, "task", column):
            ax.set(xscale="log", yscale="log", ylim=(FLOOR / 1.5, 2e3), xlabel=label)
            draw_frontier(least[least["task"] == task], 2 * here[cost].max(), ax)
            for name, look in named.items():
                draw_settings(here[here["estimator"] == name], cost, look, ax)
            plots.decades(ax.yaxis)
    for ax in axes[:, 0]:
        ax.set_ylabel(PARTS["relative_mse"])
    return figure


def draw_frontier(best: pd.DataFrame, end: float, ax: Axes) -> None:
    """Draw the least error at each cost or less, up to the cost `end`."""
    x, y = best["relative_cost"], best["relative_mse"].clip(*EDGES)
    ax.step([*x, end], [*y, y.iloc[-1]], where="post", color="0.8", linewidth=9, zorder=0)


def draw_settings(part: pd.DataFrame, cost: str, look: plots.Look, ax: Axes) -> None:
    """Draw the error of each setting of one estimator over its cost, joined by a line."""
    part = part.sort_values("length")
    x, y = part[cost], part["relative_mse"].clip(*EDGES)
    ax.plot(x, y, color=look.color, linewidth=1, alpha=0.6)
    ax.scatter(x, y, 28 * (1 + np.arange(len(part))), [look.color], marker=look.marker, zorder=3)


STUDY = Study(
    question=__doc__,
    tables={"estimators": estimators, "frontiers": frontiers},
    figures={"estimators": draw_estimators, "frontiers": draw_frontiers},
    check=partial(tables.told_by, names=("task",)),
)
