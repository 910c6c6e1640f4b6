"""Does the headline come out the same on this device as in the committed table?

Each row is a configuration of the images' half of `compare_strategies`, trained with the settings that its rows
in `results/compare_strategies/table.csv.gz` name: `median` over the seeds of the last validation loss, the
committed median with its 95 % interval, and whether the one lies within the other. The text's half is left out:
its corpus differs with Python's version.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pandas as pd

import bptt_study as bs
from bptt_study import optimizers, strategies
from bptt_study.report import tables
from bptt_study.report.csv_tables import read_table
from bptt_study.tasks import digits
from bptt_study.training.train import Budget, make_train

COMMITTED = Path(__file__).resolve().parents[2] / "results" / "compare_strategies" / "table.csv.gz"
# (strategy, truncation length), the most important first: a limit may stop the part
ORDER = [("full", 64), ("fixed", 16), ("randomized", 16), ("fixed", 4), ("randomized", 4)]


def rows(small: bool) -> Iterator[dict[str, Any]]:
    """Train one configuration after the other; `small` takes 4 updates of two seeds."""
    table = read_table(COMMITTED)
    table = table[table["task"] == "digits"]
    task = digits(order=table["order"].iloc[0])
    if task.facts["corpus_sha256"] != table["corpus_sha256"].iloc[0]:
        raise SystemExit("the images are not those of the committed table")
    scores = tables.final_scores(table, "validation_loss").set_index("run")
    settings = table.drop_duplicates("run").set_index("run")
    place = {name: n for n, name in enumerate(ORDER)}
    order = [(row.strategy, row.truncation_length) for row in settings.itertuples()]
    settings = settings.iloc[np.argsort([place.get(o, len(ORDER)) for o in order], kind="stable")]
    for run, row in settings[: 1 if small else None].iterrows():
        seeds = 2 if small else table.loc[table["run"] == run, "seed"].nunique()
        updates = 4 if small else int(row["updates"])
        found = _trained(row, task, seeds, updates)
        committed = scores.loc[run]
        low, high = committed["low"], committed["high"]
        yield {
            "strategy": row["strategy"],
            "truncation_length": row["truncation_length"],
            "updates": updates,
            "seeds": seeds,
            **found,
            "committed": committed["median"],
            "committed_low": low,
            "committed_high": high,
            "within": float("nan") if small else float(low <= found["median"] <= high),
            "device": jax.devices()[0].device_kind,
        }


def judged(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Count the medians that lie within the committed intervals."""
    within = table["within"].dropna()
    if len(within):
        inside, count = int(within.sum()), len(within)
        what = f"medians within the committed 95 % intervals, of {count}"
        # each interval misses the median of as many other seeds about once in six times
        yield {"what": what, "value": inside, "bound": count / 2, "holds": inside >= count / 2}


def _trained(row: pd.Series, task: bs.Task, seeds: int, updates: int) -> dict[str, float]:
    """Train all seeds with the settings of a row of the committed table."""
    hidden = int(row["hidden"])
    cell = bs.cells.elman(task.inputs, hidden, row["activation"])
    problem = bs.Problem(cell, bs.readouts.linear(hidden, task.outputs), task.loss)
    schedule = {"cosine": optax.cosine_decay_schedule(1.0, updates), "constant": None}
    optimizer = optimizers.clipped(
        {"adam": optax.adam, "sgd": optax.sgd}[row["optimizer"]],
        row["learning_rate"],
        row["clip_norm"],
        schedule[row["schedule"]],
    )
    batch_size, steps = int(row["batch_size"]), int(row["steps"])
    bound = row["divergence_bound"]
    budget = Budget(steps, batch_size, updates, logs=1, divergence_bound=bound)
    train = make_train(problem, _strategy(problem, row), optimizer, budget, task)
    trained = train(jax.vmap(jax.random.key)(np.arange(seeds)))
    losses = np.asarray(trained.records[-1]["validation_loss"], float)
    return {
        "median": float(np.median(losses)),
        "least": float(losses.min()),
        "largest": float(losses.max()),
        "seconds": trained.seconds,
        "compile_seconds": trained.compile_seconds,
    }


def _strategy(problem: bs.Problem, row: pd.Series) -> bs.Strategy:
    """Make the strategy that a row of the committed table names, with its settings."""
    if not np.isnan(row["window"]):
        return strategies.fixed(problem, int(row["window"]), int(row["stride"]))
    if not np.isnan(row["alpha"]):
        law = strategies.power_law(row["mean_length"], row["alpha"])
        return strategies.randomized(problem, law, bool(row["compensate"]), int(row["draws"]))
    if not np.isnan(row["mean_length"]):
        law = strategies.constant(row["mean_length"])
        return strategies.randomized(problem, law, bool(row["compensate"]), int(row["draws"]))
    return strategies.full(problem)
