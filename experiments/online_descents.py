"""Which estimators lead to θ* on the influence balancing system, with an update after every K steps?

As Vicol et al. 2021 and 2023 published it. Losses near 0 need float64: `make lab` sets JAX_ENABLE_X64=1.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.study import Study

CONVERGED = 0.1  # share of the loss of θ = 0 that may be left

MANY, ONCE = "seeds=10", "seeds=1"  # ONCE: nothing is drawn
# strategy, K, and what differs; one parameter has no units, and estimators that need these refuse it
ESTIMATORS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("full", 10, (ONCE,)),
    ("full", 100, (ONCE,)),
    ("full", 100, (ONCE, "task.burn_in=0")),
    ("truncated_es", 1, (MANY, "strategy.hold=1", "strategy.pairs=500")),
    ("full_es", 100, (MANY, "strategy.pairs=2")),
    ("forward_gradient", 100, (MANY, "strategy.tangents=1")),
    ("pes", 1, (MANY, "strategy.hold=1", "strategy.pairs=500")),
    ("pes", 1, (MANY, "strategy.hold=1", "strategy.pairs=50")),
    ("nres", 1, (MANY, "strategy.pairs=500")),
    ("nres", 1, (MANY, "strategy.pairs=2")),
    ("rtrl", 1, (ONCE,)),
    ("uoro", 1, (MANY,)),
    ("uoro", 1, (MANY, "optimizer.learning_rate=1e-5")),
    ("uoro", 1, (MANY, "strategy.draws=100")),
    ("dni", 1, (ONCE, "strategy.block=1", "strategy.rate=0.001")),
    ("bp_lambda", 10, (ONCE, "strategy.block=5", "strategy.rate=0.001")),
    ("adaptive", 400, (ONCE, "task.burn_in=0")),
    ("discounted", 100, (ONCE,)),
    ("randomized_uncompensated", 100, (MANY,)),
    ("randomized", 100, (MANY,)),
    ("randomized_power_law", 100, (MANY,)),
    ("telescope", 100, (MANY,)),
)
TO, AWAY = "to θ*", "away"
# strategy, K, losses that count, rate, pairs: where it leads in Vicol et al. 2021, nres in Vicol et al. 2023
SAID = {
    ("full", 1, 1, 1e-4, 0): AWAY,
    ("full", 10, 1, 1e-4, 0): AWAY,
    ("full", 100, 1, 1e-4, 0): AWAY,
    ("truncated_es", 1, 1, 1e-4, 500): AWAY,
    ("pes", 1, 1, 1e-4, 500): TO,
    ("nres", 1, 1, 1e-4, 500): TO,
    ("nres", 1, 1, 1e-4, 2): TO,
    ("rtrl", 1, 1, 1e-4, 0): TO,
    ("uoro", 1, 1, 1e-5, 0): TO,
}


def more_runs(config: Any) -> list[list[str]]:
    """List the overrides of the other estimators."""
    return [
        [f"strategy={name}", f"budget.steps={K}", f"task.burn_in={K - 1}", *settings]
        for name, K, settings in ESTIMATORS
    ]


ESTIMATOR = ("strategy", "steps", "burn_in", "learning_rate", "strategy.pairs", "draws")


def estimators(rows: pd.DataFrame) -> pd.DataFrame:
    """Make one line per estimator: its last loss, where that leads, and what was published.

    loss_to_rtrl and loss_to_tbptt: the median ÷ that of RTRL, and of BPTT through one step.
    """
    settings = {
        "steps": "unroll",
        "learning_rate": "learning_rate",
        "strategy.pairs": "pairs",
        "draws": "draws",
    }
    last = tables.final(rows)
    found = last.reindex(columns=list(dict.fromkeys([*last, *settings])))
    found = found.assign(counted=found["steps"] - found["burn_in"])
    keys = ["run", "strategy", *settings, "counted"]
    found = tables.aggregate(found, keys, "validation_loss").rename(columns=settings)

    def at_every_step(strategy: str) -> float:
        return found.loc[(found["strategy"] == strategy) & (found["unroll"] == 1), "median"].iloc[0]

    start = rows.loc[rows["update"] == 0, "validation_loss"].iloc[0]
    there = found["high"] < CONVERGED * rows["nothing_loss"].iloc[0]
    told = found[["strategy", "unroll", "counted", "learning_rate", "pairs"]].fillna({"pairs": 0})
    said = told.apply(tuple, axis=1).map(SAID)
    found = found.assign(
        leads=np.select([there, found["low"] > start], [TO, AWAY], "neither"),
        published=said,
        start_loss=start,
        loss_to_rtrl=found["median"] / at_every_step("rtrl"),
        loss_to_tbptt=found["median"] / at_every_step("full"),
    )
    return tables.named(found.drop(columns="run"), "loss")


def draw_estimators(estimators: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Draw the last loss of each estimator, and where it leads as published."""
    table = estimators.sort_values("loss", ascending=False, ignore_index=True)
    looks = plots.looks(table["strategy"])
    settings = map(str, rows.reindex(columns=["environment"])["environment"].unique())
    wide = sorted({"float64" if '"enable_x64": true' in s else "float32" for s in settings})
    figure, [[ax]] = figure_layout.figure(
        1,
        1,
        (13, 3.2 + 0.36 * len(table)),
        "Influence balancing: which estimators lead to θ*",
        "Loss at rest after 3 000 updates by gradient descent from θ = ½ (dotted: the loss there), each after "
        "K steps, on the loss of the last one, as in Vicol et al. 2021 (full: BPTT through these K, the state "
        "carried on); rate 1e-4 where no other is named, "
        f"σ = 0.1. Marker: median; bar: 95 % bootstrap interval over n = {table['n'].max()} seeds; n = 1 where "
        "nothing is drawn. Right: where it leads as published; ≠: not with us. 23 states, 10 of them +1; "
        f"{' and '.join(wide)}.",
    )
    ax.set_xscale("log")
    limits = 1e-22, 1e24
    for y, row in table.iterrows():
        loss = row[tables.interval_of("loss")].astype(float).clip(*limits)
        plots.cross(loss, (y, y, y), looks[row["strategy"]], ax, size=10)
        if pd.notna(row["published"]):
            agrees = row["published"] == row["leads"]
            ax.annotate(
                row["published"] + " ≠" * (not agrees), (1, y), (8, 0), va="center",
                xycoords=ax.get_yaxis_transform(), textcoords="offset points",
                color="0.3" if agrees else plots.COLORS[3],
            )  # fmt: skip
    ax.axvline(table["start_loss"].iloc[0], **plots.REFERENCE)
    names = [_estimator(row, looks) for _, row in table.iterrows()]
    ax.set_yticks(range(len(table)), names)
    ax.set(xlim=limits, ylim=(len(table) - 0.4, -0.6))
    ax.xaxis.set_major_locator(LogLocator(base=10, numticks=12))
    ax.set_xlabel("loss after 3 000 updates (½ (s¹ - 1)²)")
    return figure


def _estimator(row: pd.Series, looks: dict[str, plots.Look]) -> str:
    """Name an estimator, with the settings that tell it from others."""
    parts = [looks[row["strategy"]].name, f"K = {tables.text(row['unroll'])}"]
    parts += ["all losses"] * (row["counted"] > 1)
    parts += [f"{tables.text(row['pairs'])} pairs"] if row["pairs"] > 0 else []
    parts += [f"mean of {tables.text(row['draws'])}"] if row["draws"] > 1 else []
    parts += [f"rate {tables.text(row['learning_rate'])}"] if row["learning_rate"] != 1e-4 else []
    return ", ".join(parts)


def check(rows: pd.DataFrame) -> None:
    """Check that the names of the estimators tell their runs apart."""
    tables.told_by(rows, ESTIMATOR)


STUDY = Study(
    question=__doc__,
    tables={"estimators": estimators},
    figures={"estimators": draw_estimators},
    more_runs=more_runs,
    check=check,
)
