"""How long a string can a network learn to repeat with each estimator, and after how many tokens?

`bptt-study -m experiment=copy_curriculum` makes the tables and draws the figure;
`python experiments/copy_curriculum.py [FOLDER]` draws it again.

The strings grow as soon as the network repeats them, as in Mujika et al. 2018.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.ticker import EngFormatter

from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.csv_tables import read_table, write_table


def more_runs(config: Any) -> list[list[str]]:
    """Return the run of OK with two products; four take ten times as long."""
    return [["strategy=ok", "strategy.rank=2"]]


def analyse(folder: Path) -> list[Path]:
    """Write reached.csv: the largest length of each run at each log point, median over seeds with interval."""
    table = reached(read_table(folder / "table.csv.gz"))
    write_table(table, folder / "reached.csv")
    return [folder / "reached.csv"]


def reached(rows: pd.DataFrame) -> pd.DataFrame:
    """Aggregate the largest length over seeds; a diverged seed keeps the one that it reached."""
    table = tables.curves(rows.assign(diverged=False), "longest")
    lost = rows.groupby(["run", "update"])["diverged"].sum()
    at = pd.MultiIndex.from_frame(table[["run", "update"]])
    names = {"median": "longest", "low": "longest_low", "high": "longest_high"}
    return table.assign(diverged=lost.reindex(at).to_numpy()).rename(columns=names)


def draw(folder: Path) -> list[Path]:
    """Draw the figure of the study from the tables in the folder, and return its file."""
    if not (folder / "reached.csv").is_file():
        return []
    with figure_layout.style():
        return _lengths(
            read_table(folder / "reached.csv"), read_table(folder / "table.csv.gz"), folder
        )


def _lengths(table: pd.DataFrame, rows: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw the largest length over tokens, with the name of each run at the end of its line."""
    row = rows.iloc[0]
    named = plots.looks(table["strategy"])
    figure, [[ax]] = figure_layout.figure(
        1,
        1,
        (11, 7),
        "How long a string each estimator teaches a network to repeat",
        f"A string of n symbols is recalled n steps after each came. When the mean loss of "
        f"{row['task.mean_over']:g} updates falls below {row['task.bound']:g} bits, the largest n grows by 1. "
        f"{row['cell']}, {row['hidden']:g} units; updates of {row['steps']:g} time steps × "
        f"{row['batch_size']:g} sequences; Adam, rate {row['learning_rate']:g}. Line: median; band: its 95 % "
        f"bootstrap interval over n = {plots.span(table['n'], 'seed')}; diverged: "
        f"{table.groupby('run')['diverged'].max().sum() or 'none'}.",
    )
    ends = table.sort_values("update").drop_duplicates("run", keep="last")
    places = _apart(ends.sort_values("longest").set_index("run")["longest"])
    for run, line in table.groupby("run", sort=False):
        look, end = named[line["strategy"].iloc[0]], line.iloc[-1]
        style = (0, look.dashes) if look.dashes else "-"
        ax.fill_between(
            line["tokens"], line["longest_low"], line["longest_high"],
            color=look.color, alpha=0.15, linewidth=0,
        )  # fmt: skip
        ax.plot(
            line["tokens"], line["longest"], color=look.color, linestyle=style, linewidth=look.width
        )
        name = look.name if pd.isna(end["length"]) else f"{look.name} of {end['length']:g}"
        ax.annotate(
            f"{name}: {end['longest']:g}", (1, places[run]), (8, 0), va="center", color=look.color,
            xycoords=ax.get_yaxis_transform(), textcoords="offset points",
        )  # fmt: skip
    ax.set(xlim=(0, table["tokens"].max()), ylim=(0, 1.05 * max(places.values())))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel(plots.LABELS["tokens"])
    ax.set_ylabel("largest length (symbols)")
    return figure_layout.save(figure, folder, "reached")


def _apart(places: pd.Series, gap: float = 0.06) -> dict[str, float]:
    """Move the rising heights of labels apart by this share of the largest."""
    found: dict[str, float] = {}
    for run, place in places.items():
        found[str(run)] = max(place, max(found.values(), default=-1) + gap * places.max())
    return found


if __name__ == "__main__":
    print(*draw(figure_layout.folder(__file__)), sep="\n")
