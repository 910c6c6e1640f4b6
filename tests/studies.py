"""Small tables of a study, made by hand: what a sweep would leave, with numbers that are known."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bptt_study.report import provenance, study
from bptt_study.report.columns import NORM_KEYS
from bptt_study.report.csv_tables import TABLE, read_table, write_table
from bptt_study.runner import stories

TEXT = {
    "task": "char_lm", "corpus": "stdlib_docs", "cell": "elman", "hidden": 8, "steps": 64, "batch_size": 4,
    "uniform_loss": 3.3, "unigram_loss": 2.8, "bigram_loss": 2.3, "chance_accuracy": 0.2,
}  # fmt: skip
DIGITS = {
    "task": "digits", "corpus": "digits", "cell": "elman", "hidden": 8, "steps": 64, "batch_size": 4,
    "uniform_loss": 2.3, "chance_accuracy": 0.1,
}  # fmt: skip
FULL = {"strategy": "full", "truncation_length": 64}


def fixed(window: int) -> dict[str, Any]:
    return {"strategy": "fixed", "window": window, "stride": window, "truncation_length": window}


def randomized(mean: float) -> dict[str, Any]:
    return {"strategy": "randomized", "mean_length": mean, "truncation_length": mean}


def run(
    name: str,
    settings: Mapping[str, Any],
    losses: Sequence[Sequence[float]],
    accuracies: Sequence[Sequence[float]] | None = None,
) -> pd.DataFrame:
    """Rows of one run; losses[seed][log point] at updates 0, 10, …; not finite: diverged.

    As in training, a diverged seed keeps the scores of its last parameters, which are finite.
    """
    updates = 10 * np.arange(len(losses[0]))
    rows = []
    for seed, values in enumerate(losses):
        accuracy = accuracies[seed] if accuracies else np.full(len(values), 0.5)
        good = np.isfinite(values)
        last = np.maximum.accumulate(np.where(good, np.arange(len(values)), 0))
        values, accuracy = np.asarray(values)[last], np.asarray(accuracy)[last]
        measured = {
            "seed": seed, "update": updates, "tokens": 100 * updates,
            "validation_loss": values, "accuracy": accuracy, "diverged": ~good,
        }  # fmt: skip
        bits = {"bits_per_character": np.divide(values, np.log(2))}
        rows.append(pd.DataFrame(measured | (bits if settings["task"] == "char_lm" else {})))
    return pd.concat(rows, ignore_index=True).assign(run=name, **settings)


def costs(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the runs of these rows: a quarter of a second per update."""
    moments = rows[["run", "update"]].drop_duplicates()
    return moments.assign(seconds=moments["update"] / 4, launcher="basic")


def headline() -> pd.DataFrame:
    """Text and digits; full, fixed 4 and 16, randomized 4 and 16; three seeds, of which one diverged."""
    inf = np.inf
    return pd.concat(
        [
            run("z1", TEXT | FULL, [[3.4, 2.0, 1.0], [3.4, 2.1, 1.1], [3.4, 2.2, 1.2]]),
            run("y1", TEXT | fixed(4), [[3.4, 2.4, 2.0], [3.4, 2.5, 2.1], [3.4, 2.6, 2.2]]),
            run("x1", TEXT | fixed(16), [[3.4, 2.3, 1.4], [3.4, 2.4, 1.5], [3.4, 2.5, 1.6]]),
            run("w1", TEXT | randomized(4), [[3.4, 2.5, 1.3], [3.4, 2.6, 1.7], [3.4, inf, inf]]),
            run("v1", TEXT | randomized(16), [[3.4, 2.2, 1.25], [3.4, 2.3, 1.3], [3.4, 2.4, 1.35]]),
            run("u1", DIGITS | FULL, [[2.4, 1.0, 0.5]] * 3, [[0.1, 0.8, 0.9]] * 3),
            run("t1", DIGITS | fixed(4), [[2.4, 1.5, 1.2]] * 3, [[0.1, 0.5, 0.6]] * 3),
        ],
        ignore_index=True,
    )


def text_cuts(table: pd.DataFrame, length: int = 70) -> pd.DataFrame:
    """Cuts of the text's runs: fixed at its window, randomized before characters 1 and 9."""
    text = ("the assert statement " * 4)[:length]
    position = np.arange(length)
    tables = []
    for _, row in table[table["task"] == "char_lm"].drop_duplicates("run").iterrows():
        pattern = {
            "full": position < 0,
            "fixed": (position % row["truncation_length"] == 0) & (position > 0),
            "randomized": np.isin(position, [1, 9]),
        }[row["strategy"]]
        keys = {name: row.get(name) for name in NORM_KEYS}
        tables.append(
            pd.DataFrame({"position": position, "character": list(text), "cut": pattern, **keys})
        )
    return pd.concat(tables, ignore_index=True)


def networks() -> pd.DataFrame:
    """Rows of a study of norms: elman at two radii and gru, full and fixed 3."""
    cells = [{"spectral_radius": 0.7}, {"spectral_radius": 1.3}, {"cell": "gru"}]
    return pd.concat(
        [
            run(f"{9 - i}{s['strategy']}", TEXT | cell | s, [[3.4, 2.0]] * 2)
            for i, cell in enumerate(cells)
            for s in (FULL, fixed(3))
        ],
        ignore_index=True,
    )


def norms(table: pd.DataFrame, steps: int = 6) -> pd.DataFrame:
    """Norms 2^-step·(seed + 1), zero from the window on; twice as large after training."""
    tables = []
    for _, row in table.drop_duplicates("run").iterrows():
        window = row["window"] if row["window"] > 0 else steps
        keys = {name: row.get(name) for name in NORM_KEYS}
        for seed in (0, 1):
            for update in (0, 10):
                for axis in ("time", "lag"):
                    step = np.arange(steps) + (axis == "time")
                    norm = 2.0**-step * (seed + 1) * (1 + update / 10)
                    norm = np.where((axis == "lag") & (step >= window), 0, norm)
                    columns = {"seed": seed, "update": update, "axis": axis, "step": step}
                    tables.append(pd.DataFrame({**columns, "gradient_norm": norm, **keys}))
    return pd.concat(tables, ignore_index=True)


def balancing() -> dict[str, pd.DataFrame]:
    """Tables of influence balancing: two systems with thresholds, one of them with the published runs."""
    system = {"task": "influence_balancing", "cell": "influence", "states": 23, "positive": 10,
              "steps": 400, "learning_rate": 0.12, "schedule": "inverse_sqrt", "nothing_loss": 0.5}  # fmt: skip
    law = "randomized_power_law"
    runs = [
        run("a", system | fixed(10), [[0.5, 1e9, np.nan]] * 2),
        run("b", system | fixed(200), [[0.5, 1e2, 1e-9]] * 2),
        run("c", system | randomized(16) | {"strategy": law}, [[0.5, 1.0, 1e-9], [0.5, 3.0, 1e-8]]),
    ]
    columns = ["strategy", "stride", "alpha", "predicted_window", "observed_window", "turning_window",
               "failed_windows", "converged_windows"]  # fmt: skip
    rows = [
        ["fixed", 1, None, 41, 41, 41, "40", "41 184"],
        ["fixed", None, None, 110, 184, 110, "10 109 110", "184"],  # does not agree
        ["randomized_uncompensated", None, None, 90, None, 88, "85 90 184", ""],
        [f"{law}_uncompensated", None, 6, 85, 85, 82, "", "80 85 184"],
    ]
    thresholds = pd.DataFrame(rows, columns=columns)
    own, other = {"states": 23, "positive": 10}, {"states": 9, "positive": 3}
    slopes = [
        thresholds[columns[:3]].assign(window=window, gradient_share=share, **system)
        for system in (own, other)
        for window, share in ((20, -2.0), (41, 0.1), (110, 0.5), (400, 1.0))
    ]
    return {
        "table": pd.concat(runs, ignore_index=True),
        "thresholds": pd.concat([thresholds.assign(**own), thresholds.assign(**other)]),
        "slopes": pd.concat(slopes, ignore_index=True),
    }


def descents() -> dict[str, pd.DataFrame]:
    """Tables of the online descents: one estimator that arrives, one that leads away, one between."""
    system = {"task": "influence_balancing", "cell": "influence", "states": 23, "positive": 10,
              "theta": 0.5, "learning_rate": 1e-4, "updates": 3000}  # fmt: skip
    names = ["strategy", "unroll", "counted", "learning_rate", "pairs", "draws", "n", "diverged", "loss",
             "loss_low", "loss_high", "leads", "published"]  # fmt: skip
    descents = [
        ["rtrl", 1, 1, 1e-4, None, None, 1, 0, 1e-17, 1e-17, 1e-17, "to θ*", "to θ*"],
        ["full", 100, 100, 1e-4, None, None, 1, 0, 60.0, 60.0, 60.0, "away", None],
        ["uoro", 1, 1, 1e-5, None, 1, 10, 1, 0.3, 1e-3, np.inf, "neither", "to θ*"],
    ]
    return {
        "table": run("a", system | {"strategy": "rtrl"}, [[8.0, 1e-17]]),
        "estimators": pd.DataFrame(descents, columns=names).assign(start_loss=8.0),
    }


def verdict(seeds: int = 12, steps: int = 64) -> dict[str, pd.DataFrame]:
    """The tables of a book_verdict: losses and errors that are known, the mass 2^-k at lag k.

    Loss of seed i: that of its run · (1 + i/1000); training part: 0.1 less, on little data 0.1·window/64 + 0.2.
    Variance: 8/draws with compensation and 2 without, so that 4 draws match.
    """
    lost = np.inf
    of = {
        "full": (FULL, 1.0), "fixed1": (fixed(1), 2.0), "fixed4": (fixed(4), 1.2),
        "fixed16": (fixed(16), 1.01), "random4": (randomized(4) | {"draws": 1}, 1.5),
        "random16": (randomized(16) | {"draws": 1}, 1.1), "random4x4": (randomized(4) | {"draws": 4}, 1.3),
        "random4x16": (randomized(4) | {"draws": 16}, 1.1),
        "random4x64": (randomized(4) | {"draws": 64}, 1.05),
        "biased4": (randomized(4) | {"strategy": "randomized_uncompensated", "draws": 1}, 1.4),
        "mean4": (randomized(4) | {"strategy": "discounted"}, 1.35),
    }  # fmt: skip
    rows, mass, errors, parts = [], [], [], []
    lag = np.arange(steps)
    for task, held, little in ((TEXT, 0.1, 0.97), (DIGITS, 0.2, 0.8)):
        for name, (settings, loss) in of.items():
            for share in (held, little)[: 2 if name in ("full", "fixed4", "random4") else 1]:
                window = settings.get("window", settings["truncation_length"])
                own = name != "random4" or share == held
                losses = [[3.0, loss * (1 + i / 1000) if own or i else lost] for i in range(seeds)]
                key = f"{task['task']}{name}{share}"
                rows.append(run(key, task | settings | {"validation_fraction": share}, losses))
                for i, update in product(range(seeds), (0, 10)):
                    at = {"run": key, "seed": i, "update": update}
                    loss_there = losses[i][1]
                    if update and not np.isfinite(loss_there):
                        at, loss_there = {**at, "stopped": True}, losses[i][0]
                    kept = lag < (settings.get("window") or steps)
                    table = {"lag": lag, "mass": 2.0**-lag, "kept": 1.0 * kept}
                    mass.append(pd.DataFrame(table | at))
                    variance = 8 / settings.get("draws", np.inf)
                    variance = 2.0 if name == "biased4" else variance
                    errors.append({**at, "norm2": 2.0, "bias2": 0.5, "variance": 2 * variance})
                    gap = 0.1 if share == held else 0.2 + 0.1 * window / 64
                    gap *= 1 + (i - 5.5) / 1e4
                    for part, less in (("training", gap), ("validation", 0.0)):
                        parts.append({**at, "part": part, "loss": loss_there - less})
    return {
        "table": pd.concat(rows, ignore_index=True),
        "lag_mass": pd.concat(mass, ignore_index=True),
        "gradient_error": pd.DataFrame(errors),
        "generalisation": pd.DataFrame(parts),
    }


QUALITY = {  # estimator, setting, length: arithmetic, numbers, bias², variance
    ("full", None, np.nan): (10, 100, 0.0, 0.0),
    ("fixed", "window", 2): (10, 20, 0.5, 0.0),
    ("fixed", "window", 8): (11, 80, 0.5, 0.0),  # as good as 2, and dearer
    ("uoro", "block", 1): (30, 10, 0.0, 8.0),
    ("uoro", "block", 4): (8, 40, 0.0, 0.25),
    ("rtrl", "block", 4): (300, 2000, 0.0, 0.0),
}


def quality(task: str, name: str, steps: int = 16) -> pd.DataFrame:
    """Make the table of the probe estimator_quality: QUALITY for three seeds and moments, with noise 0.125."""
    rows = [
        {
            **{"run": name, "task": task, "seed": seed, "update": update, "over": over},
            **{"estimator": estimator, "setting": setting, "length": length, "cosine": 1.0},
            **{"arithmetic": arithmetic, "numbers": numbers, "forward_arithmetic": 2},
            "states": steps,
            "relative_bias2": bias2,
            "relative_variance": variance if over == "draws" else 0.125,
            "relative_mse": bias2 + variance,
        }
        for (estimator, setting, length), (arithmetic, numbers, bias2, variance) in QUALITY.items()
        for over, seed, update in product(("draws", "batches"), range(3), (0, 5, 10))
    ]
    return pd.DataFrame(rows)


def make_tables(experiment: str, folder: Path) -> list[Path]:
    """Make the tables of a shipped experiment, none of which fails."""
    _complete(experiment, folder)
    return _made(study.make(_story(experiment)._replace(figures={}), folder))


def draw(experiment: str, folder: Path) -> list[Path]:
    """Draw the figures of a shipped experiment, none of which fails."""
    _complete(experiment, folder)
    return _made(study.draw(_story(experiment), folder))


def _complete(experiment: str, folder: Path) -> None:
    """Give the table of a study the columns that every table has and that the test did not care for."""
    usual = {"task": experiment, "truncation_length": np.nan, "validation_loss": 1.0}
    rows = read_table(folder / TABLE)
    if missing := {
        name: v for name, v in (usual | {"diverged": False}).items() if name not in rows
    }:
        write_table(rows.assign(**missing), folder / TABLE)


def _story(experiment: str) -> study.Study:
    found = stories.shipped(experiment)
    assert found
    return found


def _made(made: study.Made) -> list[Path]:
    assert not made.failed, made.failed
    return made.files


def write(folder: Path, **named: pd.DataFrame) -> Path:
    """A study's folder with these tables and the costs; table="table.csv.gz" and so on."""
    folder.mkdir()
    raw = costs(named["table"]).assign(study=folder.name, seed=0)
    (folder / provenance.FILE).write_text(provenance.packed(raw), encoding="utf-8")
    files = {"table": "table.csv.gz", "cuts": "cuts.csv.gz", "norms": "gradient_norms.csv.gz"}
    probes = ("lag_mass", "gradient_error", "generalisation")
    files |= {name: f"{name}.csv.gz" for name in probes}
    for name, table in named.items():
        write_table(table, folder / files.get(name, f"{name}.csv"))
    return folder
