"""Which estimators lead to θ* on the influence balancing system, with an update after every K steps?

Vicol et al. 2021 and 2023 published where some lead. Losses near 0 need float64: `make lab` sets
JAX_ENABLE_X64=1.
"""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bptt_study.report import figure_layout, plots, tables
from bptt_study.report.study import Study

MANY = "seeds=10"  # without it nothing is drawn
# strategy, K, and what differs; one parameter has no units, and estimators that need these refuse it
ESTIMATORS: tuple[tuple[str, int, *tuple[str, ...]], ...] = (
    ("full", 10),
    ("full", 100),
    ("full", 100, "task.burn_in=0"),
    ("truncated_es", 1, MANY, "strategy.hold=1", "strategy.pairs=500"),
    ("full_es", 100, MANY, "strategy.pairs=2"),
    ("forward_gradient", 100, MANY, "strategy.tangents=1"),
    ("pes", 1, MANY, "strategy.hold=1", "strategy.pairs=500"),
    ("pes", 1, MANY, "strategy.hold=1", "strategy.pairs=50"),
    ("nres", 1, MANY, "strategy.pairs=500"),
    ("nres", 1, MANY, "strategy.pairs=2"),
    ("rtrl", 1),
    ("uoro", 1, MANY),
    ("uoro", 1, MANY, "optimizer.learning_rate=1e-5"),
    ("uoro", 1, MANY, "strategy.draws=100"),
    ("dni", 1, "strategy.block=1", "strategy.rate=0.001"),
    ("bp_lambda", 10, "strategy.block=5", "strategy.rate=0.001"),
    ("adaptive", 400, "task.burn_in=0"),
    ("discounted", 100),
    ("randomized_uncompensated", 100, MANY),
    ("randomized", 100, MANY),
    ("randomized_power_law", 100, MANY),
    ("telescope", 100, MANY),
)
TO, AWAY = "to θ*", "away"
# of this system: where an estimator leads in Vicol et al. 2021, nres in Vicol et al. 2023
PUBLISHED = {"states": 23, "positive": 10, "theta": 0.5, "updates": 3000}
TOLD = ["strategy", "unroll", "counted", "learning_rate", "pairs"]
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
CONVERGED = 0.1  # share of the loss of θ = 0 that may be left


def more_runs(config: Any) -> list[list[str]]:
    """List the overrides of the other estimators; the losses of the first K - 1 steps do not count."""
    return [
        [f"strategy={name}", f"budget.steps={K}", f"task.burn_in={K - 1}", *settings]
        for name, K, *settings in ESTIMATORS
    ]


def estimators(rows: pd.DataFrame) -> pd.DataFrame:
    """Make one line per estimator: its last loss, where that leads, and what was published.

    loss_to_rtrl and loss_to_tbptt: the median ÷ that of RTRL, and of BPTT through one step.
    """
    last = tables.final(rows).rename(columns={"steps": "unroll", "strategy.pairs": "pairs"})
    last = last.assign(counted=last["unroll"] - last["burn_in"])
    keys = ["run", "strategy", "unroll", "learning_rate", "pairs", "draws", "counted"]
    last = last.reindex(columns=[*keys, "seed", "validation_loss", "diverged"])
    found = tables.named(tables.aggregate(last, keys, "validation_loss"), "loss")
    found = found.drop(columns="run")
    every_step = found[found["unroll"] == 1].drop_duplicates("strategy").set_index("strategy")
    start, nothing = rows.loc[rows["update"] == 0, ["validation_loss", "nothing_loss"]].iloc[0]
    there, away = found["loss_high"] < CONVERGED * nothing, found["loss_low"] > start
    said = found[TOLD].fillna({"pairs": 0}).apply(tuple, axis=1).map(SAID)
    same = (rows[list(PUBLISHED)] == list(PUBLISHED.values())).all(axis=None)
    return found.assign(
        leads=np.select([there, away], [TO, AWAY], "neither"),
        published=said if same else None,
        start_loss=start,
        loss_to_rtrl=found["loss"] / every_step["loss"].get("rtrl", np.nan),
        loss_to_tbptt=found["loss"] / every_step["loss"].get("full", np.nan),
    )


def draw(estimators: pd.DataFrame, rows: pd.DataFrame) -> Figure:
    """Draw the last loss of each estimator, and where it leads as published."""
    table = estimators.sort_values("loss", ascending=False, ignore_index=True)
    looks, values = plots.looks(table["strategy"]), partial(plots.values, rows)
    rate = tables.text(table["learning_rate"].mode()[0])
    settings = map(str, rows.reindex(columns=["environment"])["environment"].unique())
    wide = sorted({"float64" if '"enable_x64": true' in s else "float32" for s in settings})
    figure, [[ax]] = figure_layout.figure(
        1, 1, (13, 3.2 + 0.36 * len(table)),
        "Influence balancing: which estimators lead to θ*",
        f"Loss at rest after {values('updates')} updates by gradient descent from θ = {values('theta')} "
        "(dotted: the loss there), each after K steps, on the loss of the last one, as in Vicol et al. 2021 "
        f"(full: BPTT through these K, the state carried on); rate {rate} where no other is named, σ = 0.1. "
        f"Marker: median; bar: 95 % bootstrap interval over n = {table['n'].max()} seeds; n = 1 where nothing "
        f"is drawn. Right: where it leads as published; ≠: not with us. {values('states')} states, "
        f"{values('positive')} of them +1; {' and '.join(wide)}.",
    )  # fmt: skip
    limits = 1e-22, 1e24
    ax.set(
        xscale="log", xlim=limits, xlabel=f"loss after {values('updates')} updates (½ (s¹ - 1)²)"
    )
    for y, row in table.iterrows():
        loss = row[tables.interval_of("loss")].astype(float).clip(*limits)
        plots.cross(loss, (y, y, y), looks[row["strategy"]], ax, size=10)
        if pd.notna(row["published"]):
            agrees = row["published"] == row["leads"]
            color = "0.3" if agrees else plots.COLORS[3]
            plots.beside(row["published"] + " ≠" * (not agrees), y, ax, color)
    ax.axvline(table["start_loss"].iloc[0], **plots.REFERENCE)
    ax.xaxis.set_major_locator(LogLocator(base=10, numticks=12))
    plots.listed([_name(row, looks, rate) for _, row in table.iterrows()], ax)
    return figure


def _name(row: pd.Series, looks: dict[str, plots.Look], rate: str) -> str:
    """Name an estimator, with the settings that tell it from others."""
    pairs, draws, own = (tables.text(row[name]) for name in ("pairs", "draws", "learning_rate"))
    parts = [looks[row["strategy"]].name, f"K = {tables.text(row['unroll'])}"]
    parts += ["all losses"] * (row["counted"] > 1)
    parts += [f"{pairs} pairs"] * (pairs != "")
    parts += [f"mean of {draws}"] * (row["draws"] > 1)
    return ", ".join([*parts, *[f"rate {own}"] * (own != rate)])


STUDY = Study(
    question=__doc__,
    tables={"estimators": estimators},
    figures={"estimators": draw},
    more_runs=more_runs,
    check=partial(
        tables.told_by,
        names=("strategy", "steps", "burn_in", "learning_rate", "strategy.pairs", "draws"),
    ),
)
