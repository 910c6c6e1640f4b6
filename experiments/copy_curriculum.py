"""How long a string can a network learn to repeat with each estimator, and after how many tokens?

The strings grow as soon as the network repeats them, as in Mujika et al. 2018.
"""

from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.study import Study
from bptt_study.validation import SettingError


def more_runs(config: Any) -> list[list[str]]:
    """Return the run of OK with two products, since four take much longer."""
    return [["strategy=ok", "strategy.rank=2"]]


def reached(rows: pd.DataFrame) -> pd.DataFrame:
    """Aggregate the largest length over seeds at each log point; a diverged seed keeps its last one."""
    kept = rows.sort_values("update").groupby(["run", "seed"])["longest"].ffill()
    table = tables.curves(rows.assign(longest=kept, diverged=False), "longest")
    lost = rows.groupby(["run", "update"])["diverged"].sum()
    at = pd.MultiIndex.from_frame(table[["run", "update"]])
    return tables.named(table.assign(diverged=lost.reindex(at).to_numpy()), "longest")


def draw(reached: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Draw the largest length over tokens, with the name of each run at the end of its line."""
    table, values = reached, partial(plots.values, rows)
    named = plots.looks(table["strategy"])
    figure, [[ax]] = figure_layout.figure(
        1, 1, (11, 7),
        "How long a string each estimator teaches a network to repeat",
        f"A string of n symbols is recalled n steps after each came. When the mean loss of "
        f"{values('task.mean_over')} updates falls below {values('task.bound')} bits, the largest n grows "
        f"by 1. Optimizer {values('optimizer')}, rate {values('learning_rate')}. {plots.spread(table)} "
        f"{plots.runs(rows)}",
    )  # fmt: skip
    ends = table.sort_values("update").drop_duplicates("run", keep="last")
    places = _apart(ends.sort_values("longest").set_index("run")["longest"])
    for run, line in table.groupby("run", sort=False):
        look, end = named[line["strategy"].iloc[0]], line.iloc[-1]
        plots.band(line, "tokens", ax=ax, y="longest", **look.line)
        name = (
            look.name if pd.isna(end["length"]) else f"{look.name} of {tables.text(end['length'])}"
        )
        plots.beside(f"{name}: {end['longest']:g}", places[run], ax, look.color)
    ax.set(xlim=(0, table["tokens"].max()), ylim=(0, 1.05 * max(places.values())))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set_xlabel(plots.LABELS["tokens"])
    ax.set_ylabel("largest length (symbols)")
    return figure


def _apart(places: pd.Series, gap: float = 0.06) -> dict[str, float]:
    """Move the rising heights of labels apart by this share of the largest."""
    found: dict[str, float] = {}
    for run, place in places.items():
        found[str(run)] = max(place, max(found.values(), default=-1) + gap * places.max())
    return found


def check(rows: pd.DataFrame) -> None:
    """Check that the runs have a largest length, and that strategy and window tell them apart."""
    if "longest" not in rows:
        raise SettingError(
            "task", ", ".join(rows["task"].unique()), "copy_curriculum in this study"
        )
    tables.told_by(rows, ("strategy", "truncation_length"), numbers=True)


STUDY = Study(
    question=__doc__,
    tables={"reached": reached},
    figures={"reached": draw},
    more_runs=more_runs,
    check=check,
)
