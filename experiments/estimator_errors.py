"""What is the error of every estimator made of, and which have the least?

For so much arithmetic, and for so many numbers held: two frontiers.
"""

from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

from bptt_study.report import figure_layout, plots, quality, tables
from bptt_study.report.quality import COSTS, PARTS, ZERO
from bptt_study.report.snapshots import each_moment, when
from bptt_study.report.study import Study

MSE = tables.interval_of("relative_mse")
FLOOR = 1e-4  # where a figure shows an error of 0


def estimators(all_estimators: pd.DataFrame) -> pd.DataFrame:
    """Compute bias², variance and MSE of every estimator as `moments` does, with the name of its setting."""
    table = quality.medians(quality.by_seed(all_estimators))
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


@each_moment
def draw_estimators(
    estimators: pd.DataFrame, rows: pd.DataFrame, all_estimators: pd.DataFrame
) -> Figure:
    """Draw bias² and variance of every estimator, a row for each of its settings."""
    one = estimators["over"] == "draws"
    draws = estimators[one & (estimators["estimator"] != "full")]
    tasks, named = draws["task"].nunique(), plots.looks(draws["estimator"])
    noise = quality.noise(estimators)
    order = [(n, length) for n in named for length in _lengths(draws, n)]
    figure, axes = figure_layout.figure(
        1,
        tasks,
        (4 + 4.6 * tasks, 3.2 + 0.235 * len(order)),
        f"What the error of each estimator is made of, {when(estimators)}",
        "Of one estimate on one training batch, against its full gradient, relative to the squared norm of "
        "that. No square: no bias; no circle: no variance; neither: exact. Numbers beyond the axis lie at its "
        "edge. Dotted: variance of the full gradient over batches. Bar: 95 % bootstrap interval of the median "
        f"over {plots.seeds(draws)}. PES, NRES and truncated ES in the limit of a small σ, with 16 pairs where "
        f"none are named. {quality.runs(rows, all_estimators)}",
        [
            Line2D([], [], marker="s", color="0.3", mfc="white", linestyle="", label="bias²"),
            Line2D([], [], marker="o", color="0.3", linestyle="", label="variance"),
            quality.noise_handle(),
        ],
        sharey=True,
    )
    for task, part, ax in plots.panels(draws, "task", axes[0]):
        ax.set(xscale="log", xlim=(FLOOR, 1e6), ylim=(len(order) - 0.4, -0.6))
        ax.axvline(noise[task], **quality.NOISE)
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
        f"Two frontiers: least error for so much arithmetic, and for so many numbers held, {when(draws)}",
        "Mean squared error of one estimate on one training batch, against its full gradient, relative to the "
        f"squared norm of that; at {FLOOR:g}: exact, or less. Beyond the axis: at its edge. Grey: the "
        "frontier, the least error at this cost or less. A line joins the settings of an estimator, with "
        "larger markers for larger values. Arithmetic is counted from the program and leaves factorisations "
        "out (OK, sketched RTRL); numbers of a sequence are those held at once, by each estimator's claim. "
        f"Median over {plots.seeds(draws)}. {quality.runs(rows, all_estimators)}",
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


STUDY = Study(
    question=__doc__,
    tables={"estimators": estimators, "frontiers": frontiers},
    figures={"estimators": draw_estimators, "frontiers": draw_frontiers},
    check=partial(tables.told_by, names=("task",)),
)
