"""Which estimators' gradients point the same way along one trajectory, and does that predict how they learn?

`bptt-study -m experiment=alignment` makes the tables and draws the figures;
`python experiments/alignment.py [FOLDER]` draws them again.

A network is trained by full BPTT, and at some updates each estimator makes its gradient of the same batches
(Marschall, Cho & Savin 2020). Beside it each estimator trains a network of its own, from the same weights.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from scipy import stats

from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.csv_tables import read_table, write_table

EXACT = "full"
RESAMPLES = 2000


def more_runs(config: Any) -> list[list[str]]:
    """A run trained with each of the probe's estimators."""
    others = [name for name in config.probes.alignment.estimators if name != EXACT]
    return [[f"strategy={name}", "snapshots=0"] for name in others]


def analyse(folder: Path) -> list[Path]:
    """matrix.csv, learning.csv and correlation.csv.

    matrix.csv: the cosine of each pair of estimators, mean over the trajectory, median over seeds.
    learning.csv: each estimator's cosine with the exact gradient beside the final loss of its own run.
    correlation.csv: Spearman's rank correlation of the two, with its 95 % bootstrap interval over estimators.
    """
    if not (folder / "alignment.csv.gz").is_file():  # snapshots=0
        return []
    rows = tables.same_data(read_table(folder / "table.csv.gz"))
    pairs = matrix(read_table(folder / "alignment.csv.gz"))
    learned = learning(pairs, rows)
    written = {"matrix": pairs, "learning": learned, "correlation": correlation(learned)}
    for name, table in written.items():
        write_table(table, folder / f"{name}.csv")
    return [folder / f"{name}.csv" for name in written]


def matrix(probed: pd.DataFrame) -> pd.DataFrame:
    """The mean cosine along the trajectory of each seed, as a median over seeds with its interval."""
    keys = ["task", "first", "second"]
    seeds = probed.groupby([*keys, "seed"], sort=False)["cosine"].mean().reset_index()
    found = tables.aggregate(seeds.assign(diverged=seeds["cosine"].isna()), keys, "cosine")
    return found.rename(columns={"median": "cosine"})


def learning(pairs: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Each estimator's alignment with the exact gradient, and the final loss of its own run."""
    exact = pairs[pairs["first"] == EXACT].rename(columns={"second": "strategy"})
    named = {name: f"cosine_{name}" for name in ("low", "high")}
    exact = exact.rename(columns=named)[["task", "strategy", "cosine", *named.values()]]
    losses = tables.aggregate(tables.final(rows), ["task", "strategy"], "validation_loss")
    losses = losses.rename(
        columns={"median": "validation_loss"}
        | {name: f"validation_loss_{name}" for name in ("low", "high")}
    )
    return exact.merge(losses, on=["task", "strategy"])


def correlation(learned: pd.DataFrame) -> pd.DataFrame:
    """Spearman's ρ between alignment and final loss over the inexact estimators of each task."""
    found = []
    for task, part in learned[learned["strategy"] != EXACT].groupby("task", sort=False):
        points = part[["cosine", "validation_loss"]].to_numpy(float)
        points[~np.isfinite(points)] = 1e30  # diverged: the worst
        drawn = np.random.default_rng(0).integers(len(points), size=(RESAMPLES, len(points)))
        low, high = np.nanquantile(spearman(points[drawn]), (0.025, 0.975))
        rho = {"rho": float(spearman(points)), "rho_low": low, "rho_high": high}
        found.append({"task": task, "estimators": len(points), **rho})
    return pd.DataFrame(found)


def spearman(points: np.ndarray) -> np.ndarray:
    """The correlation of the ranks of x and y, [..., n, 2] -> [...]; nan where one has a single value."""
    ranks = stats.rankdata(points, axis=-2)
    x, y = np.moveaxis(ranks - ranks.mean(axis=-2, keepdims=True), -1, 0)
    with np.errstate(invalid="ignore"):
        return np.sum(x * y, axis=-1) / np.sqrt(np.sum(x * x, axis=-1) * np.sum(y * y, axis=-1))


def draw(folder: Path) -> list[Path]:
    """All figures of the study whose tables lie in the folder; returns their files."""
    if not (folder / "matrix.csv").is_file():
        return []
    rows = tables.same_data(read_table(folder / "table.csv.gz"))
    pairs, learned, rho = (
        read_table(folder / f"{name}.csv") for name in ("matrix", "learning", "correlation")
    )
    with figure_layout.style():
        return [*_matrix(pairs, rows, folder), *_learning(learned, rho, rows, folder)]


def _matrix(pairs: pd.DataFrame, rows: pd.DataFrame, folder: Path) -> list[Path]:
    tasks = list(pairs["task"].unique())
    order = list(dict.fromkeys(pairs["first"]))
    names = [plots.looks(order)[name].name for name in order]
    figure, axes = figure_layout.figure(
        1,
        len(tasks),
        (2.5 + 6.2 * len(tasks), 8.6),
        "Which estimators' gradients point the same way",
        "Cosine of two estimates of the cell's gradient on the same batch, mean over "
        f"batches and {_snapshots(rows)} updates of one trajectory, along which full BPTT trains; median over "
        f"n = {plots.span(pairs['n'], 'seed')}, whose intervals are in matrix.csv. {_setting(rows)}",
        sharey=True,
    )
    for task, ax in zip(tasks, axes[0], strict=True):
        part = pairs[pairs["task"] == task]
        grid = part.pivot_table(index="first", columns="second", values="cosine")
        values = grid.loc[order, order].to_numpy()
        ax.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
        for (y, x), value in np.ndenumerate(values):
            color = "white" if abs(value) > 0.6 else "black"
            number = f"{value:.2f}".replace("0.", ".")
            ax.text(x, y, number, ha="center", va="center", color=color, fontsize=9.5)
        ax.set_xticks(range(len(order)), names, rotation=90)
        ax.set_yticks(range(len(order)), names)
        ax.grid(False)
        ax.set_title(plots.TASKS.get(task, task))
        ax.set_xlabel("estimator")
    axes[0, 0].set_ylabel("estimator")
    return figure_layout.save(figure, folder, "matrix")


def _learning(
    learned: pd.DataFrame, rho: pd.DataFrame, rows: pd.DataFrame, folder: Path
) -> list[Path]:
    tasks = list(learned["task"].unique())
    named = plots.looks(learned["strategy"])
    figure, axes = figure_layout.figure(
        1,
        len(tasks),
        (2 + 5.2 * len(tasks), 7),
        "Does alignment with the exact gradient predict learning?",
        "Alignment: cosine with the full gradient along the trajectory of full BPTT, mean over batches and "
        f"{_snapshots(rows)} updates. Loss: of a network that the estimator itself trains. Median and 95 % "
        f"bootstrap interval over n = {plots.span(learned['n'], 'seed')}; diverged: "
        f"{learned['diverged'].sum() or 'none'}. ρ: Spearman's rank correlation over "
        f"{rho['estimators'].max()} inexact estimators, with its 95 % bootstrap interval over them. "
        f"{_setting(rows)}",
        plots.handles(named, markers=True),
    )
    for task, ax in zip(tasks, axes[0], strict=True):
        part = learned[learned["task"] == task]
        _scatter(part, named, ax)
        row = rho[rho["task"] == task].iloc[0]
        interval = f"[{row['rho_low']:.2f}, {row['rho_high']:.2f}]"
        ax.set_title(f"{plots.TASKS.get(task, task)}: ρ = {row['rho']:.2f} {interval}")
        ax.set_xlabel("cosine with the full gradient")
        ax.set_ylabel(plots.loss_label(task))
    return figure_layout.save(figure, folder, "learning")


def _scatter(part: pd.DataFrame, named: dict[str, plots.Look], ax: Axes) -> None:
    for _, row in part.iterrows():
        look = named[row["strategy"]]
        x, y = row["cosine"], row["validation_loss"]
        ax.vlines(
            x, row["validation_loss_low"], row["validation_loss_high"], look.color, linewidth=1.5
        )
        ax.hlines(y, row["cosine_low"], row["cosine_high"], look.color, linewidth=1.5)
        ax.plot(x, y, look.marker or "*", color=look.color, markersize=11)


def _snapshots(rows: pd.DataFrame) -> int:
    return int(rows["snapshots"].max())


def _setting(rows: pd.DataFrame) -> str:
    """Tasks, network and budget, in words."""
    said = []
    for _, part in rows.groupby("task", sort=False):
        row = part.iloc[0]
        lag = (
            f"t1 = {row['t1']:g}, t2 = {row['t2']:g}"
            if row["task"] == "add"
            else f"lag {row['lag']:g}"
        )
        said.append(
            f"{plots.panel_name(row)}, {lag}: {row['updates']:g} updates of {row['steps']:g} time steps × "
            f"{row['batch_size']:g} sequences"
        )
    row = rows.iloc[0]
    length = tables.lengths(rows).max()
    return f"{row['hidden']:g} units, truncation length {length:g}; {'; '.join(said)}."


if __name__ == "__main__":
    print(*draw(figure_layout.folder(__file__)), sep="\n")
