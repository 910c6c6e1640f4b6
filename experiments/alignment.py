"""Which estimators' gradients point the same way along one trajectory, and does that predict how they learn?

A network is trained by full BPTT, and at some updates each estimator makes its gradient of the same batches
(Marschall, Cho & Savin 2020). Beside it each estimator trains a network of its own, from the same weights.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.study import Study
from bptt_study.validation import SettingError

EXACT = "full"
RESAMPLES = 2000


def more_runs(config: Any) -> list[list[str]]:
    """Return the overrides of a run trained with each of the probe's estimators."""
    others = [name for name in config.probes.alignment.estimators if name != EXACT]
    return [[f"strategy={name}", "snapshots=0"] for name in others]


def matrix(alignment: pd.DataFrame) -> pd.DataFrame:
    """Compute the mean cosine along the trajectory of each seed, as a median over seeds with its interval."""
    keys = ["task", "first", "second"]
    probed = tables.unless_stopped(alignment, "cosine")
    of_seed = probed.groupby([*keys, "seed"], sort=False)["cosine"]
    seeds = of_seed.mean().where(of_seed.count() == of_seed.size()).reset_index()
    return tables.aggregate(seeds, keys, "cosine", -np.inf).rename(columns={"median": "cosine"})


def learning(matrix: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Put each estimator's alignment with the exact gradient beside the final loss of its own run, if any."""
    names = {"second": "strategy", "low": "cosine_low", "high": "cosine_high"}
    exact = matrix[matrix["first"] == EXACT].rename(columns=names)
    exact = exact[["task", "strategy", *tables.interval_of("cosine")]]
    keys = ["task", "strategy"]
    losses = tables.aggregate_all(tables.final(rows), keys, ["validation_loss"])
    return pd.concat([t.set_index(keys) for t in (exact, losses)], axis=1).reset_index()


def correlation(learning: pd.DataFrame) -> pd.DataFrame:
    """Compute Spearman's ρ between alignment and final loss over the inexact estimators of each task.

    Its 95 % bootstrap interval is over estimators. Those without a cosine or without a run are not counted.
    """
    found = []
    for task, part in learning[learning["strategy"] != EXACT].groupby("task", sort=False):
        points = part[["cosine", "validation_loss"]].dropna().to_numpy(float)
        drawn = np.random.default_rng(0).integers(len(points), size=(RESAMPLES, len(points)))
        low, high = np.nanquantile(spearman(points[drawn]), (0.025, 0.975))
        rho = {"rho": float(spearman(points)), "rho_low": low, "rho_high": high}
        found.append({"task": task, "estimators": len(points), **rho})
    return pd.DataFrame(found)


def spearman(points: np.ndarray) -> np.ndarray:
    """Correlate the ranks of x and y, [..., n, 2] -> [...]; nan where one has a single value."""
    ranks = stats.rankdata(points, axis=-2)
    x, y = np.moveaxis(ranks - ranks.mean(axis=-2, keepdims=True), -1, 0)
    with np.errstate(invalid="ignore"):
        return np.sum(x * y, axis=-1) / np.sqrt(np.sum(x * x, axis=-1) * np.sum(y * y, axis=-1))


def draw_matrix(
    matrix: pd.DataFrame, rows: pd.DataFrame, alignment: pd.DataFrame
) -> Iterator[tuple[str, Figure]]:
    """Draw the cosine of each pair of estimators as a colour and a number, a figure for each task."""
    order = list(dict.fromkeys(matrix["first"]))
    names = [plots.looks(order)[name].name for name in order]
    for task, part in matrix.groupby("task", sort=False):
        moments = _moments(alignment[alignment["task"] == task])
        trained = _trained(rows[rows["task"] == task], alignment)
        figure, [[ax]] = figure_layout.figure(
            1, 1, (12.5, 11.2),
            f"Which estimators' gradients point the same way: {plots.TASKS.get(str(task), task)}",
            "Cosine of two estimates of the cell's gradient on the same batch, mean over "
            f"batches and {moments} of one trajectory, along which {trained} trains; median "
            f"over n = {plots.span(part['n'], 'seed')}, whose intervals are in matrix.csv. "
            f"{_runs(rows[rows['task'] == task])}",
        )  # fmt: skip
        grid = part.pivot_table(index="first", columns="second", values="cosine")
        values = grid.loc[order, order].to_numpy()
        ax.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
        for (y, x), value in np.ndenumerate(values):
            color = "white" if abs(value) > 0.6 else "black"
            number = f"{value:.2f}".replace("0.", ".")
            ax.text(x, y, number, ha="center", va="center", color=color, fontsize=9)
        ax.set_xticks(range(len(order)), names, rotation=90)
        ax.set_yticks(range(len(order)), names)
        ax.grid(False)
        ax.set(xlabel="estimator", ylabel="estimator")
        yield str(task), figure


def draw_learning(
    learning: pd.DataFrame, correlation: pd.DataFrame, rows: pd.DataFrame, alignment: pd.DataFrame
) -> Figure:
    """Draw the final loss of each estimator over its cosine with the exact gradient."""
    tasks, named = learning["task"].nunique(), plots.looks(learning["strategy"])
    figure, axes = figure_layout.figure(
        1, tasks, (2 + 5.2 * tasks, 7),
        "Does alignment with the exact gradient predict learning?",
        f"Alignment: cosine with the full gradient along the trajectory of {_trained(rows, alignment)}, mean "
        f"over batches and {_moments(alignment)}. Loss: of a network that the estimator itself trains. "
        f"{plots.spread(learning, 'Marker', 'bars')} ρ: Spearman's rank correlation over "
        f"{correlation['estimators'].max()} inexact estimators, with its 95 % bootstrap interval over them. "
        f"{_runs(rows)}",
        plots.handles(named, markers=True),
    )  # fmt: skip
    for task, part, ax in plots.panels(learning, "task", axes[0]):
        for _, row in part.iterrows():
            cosine, loss = (row[tables.interval_of(c)] for c in ("cosine", "validation_loss"))
            plots.cross(cosine, loss, named[row["strategy"]], ax, size=11)
        of_task = correlation[correlation["task"] == task]
        rho, low, high = of_task[tables.interval_of("rho")].iloc[0]
        ax.set_title(f"{ax.get_title()}: ρ = {rho:.2f} [{low:.2f}, {high:.2f}]")
        ax.set(
            xlabel="cosine with the full gradient",
            ylabel=plots.loss_label(rows[rows["task"] == task]),
        )
    return figure


def _moments(alignment: pd.DataFrame) -> str:
    return plots.span(alignment.groupby("task")["update"].nunique(), "update")


def _trained(rows: pd.DataFrame, alignment: pd.DataFrame) -> str:
    return plots.trained(rows[rows["run"].isin(alignment["run"])])


def _runs(rows: pd.DataFrame) -> str:
    length = tables.lengths(rows).max()
    return f"Truncation length {tables.text(length)}. " * pd.notna(length) + plots.runs(rows)


def check(rows: pd.DataFrame) -> None:
    """Check that the runs are told apart, and that the probe saw one trajectory of each task."""
    tables.told_by(rows, ("task", "strategy"), numbers=True)
    probed = rows[rows["snapshots"] > 0]
    for task, names in probed.groupby("task", sort=False)["strategy"].unique().items():
        if len(names) > 1:
            way_out = "Give the others snapshots=0."
            allowed = f"one with snapshots on {task}, whose trajectory the estimators share"
            raise SettingError("strategy", ", ".join(names), allowed, way_out)


STUDY = Study(
    question=__doc__,
    tables={"matrix": matrix, "learning": learning, "correlation": correlation},
    figures={"matrix": draw_matrix, "learning": draw_learning},
    more_runs=more_runs,
    check=check,
)
