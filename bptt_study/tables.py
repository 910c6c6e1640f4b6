"""DataFrame in, DataFrame out: census, aggregates and intervals. No jax, no axes, no files."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

SCORES = ("validation_loss", "accuracy", "seconds")
# what tells the rows of a summary apart, and the reference lines that belong beside their scores
LABELS = ("task", "corpus", "cell", "strategy", "truncation_length")
REFERENCES = {
    "uniform_loss": "chance",
    "unigram_loss": "1-gram",
    "bigram_loss": "2-gram",
    "trigram_loss": "3-gram",
    "fourgram_loss": "4-gram",
}


def missing(rows: pd.DataFrame, expected: Mapping[str, int]) -> list[str]:
    """The runs of which there are not as many rows as expected."""
    found = rows["run"].value_counts().to_dict() if len(rows) else {}
    return [run for run, count in expected.items() if found.get(run, 0) != count]


def final(rows: pd.DataFrame) -> pd.DataFrame:
    """The last logged row of every run and seed."""
    return rows[rows["update"] == rows.groupby("run")["update"].transform("max")]


def interval(values: pd.Series, resamples: int = 2000) -> tuple[float, float, float]:
    """Median over seeds and its 95 % bootstrap interval (percentile); n is too small for a bell curve.

    What is not finite, a diverged seed, ranks last, so it can neither vanish nor hide the others. The
    generator is seeded anew, so that the same seeds give the same numbers.
    """
    sample = values.to_numpy(float)
    sample = np.where(np.isfinite(sample), sample, np.inf)
    draws = np.random.default_rng(0).choice(sample, (resamples, len(sample)))
    # the nearest order statistic: between a finite number and infinity there is nothing to interpolate
    low, high = np.quantile(_medians(draws), (0.025, 0.975), method="nearest")
    return float(_medians(sample[None])[0]), float(low), float(high)


def _medians(draws: np.ndarray) -> np.ndarray:
    """Median of each row; of two middle ones the mean."""
    middle = np.sort(draws, axis=1)[:, [(draws.shape[1] - 1) // 2, draws.shape[1] // 2]]
    medians: np.ndarray = middle.mean(axis=1)
    return medians


def aggregate(rows: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    """`value` over the seeds of each group: median, low, high, n, and how many diverged."""
    groups = rows.groupby(by, sort=False, dropna=False)
    table = groups[value].apply(lambda v: pd.Series(interval(v), index=["median", "low", "high"]))
    counts = groups.agg(n=("seed", "nunique"), diverged=("diverged", "sum"))
    return table.unstack().join(counts).reset_index()


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per run: its last scores with intervals over seeds, beside the reference lines.

    `learned`: the whole interval of the validation loss lies below what needs no input, the better of
    chance and the unigram model.
    """
    last = final(rows)
    kept = [c for c in ("run", *LABELS, "tokens", "updates", *REFERENCES) if c in last]
    table = last.groupby("run", sort=False)[kept].first().reset_index(drop=True)
    for score in SCORES:
        if score in last:
            spread = aggregate(last, ["run"], score)
            new = {score: "median", f"{score}_low": "low", f"{score}_high": "high"}
            table = table.assign(**{name: spread[column] for name, column in new.items()})
            table = table.assign(n=spread["n"], diverged=spread["diverged"])
    floor = table[[c for c in ("uniform_loss", "unigram_loss") if c in table]].min(axis=1)
    return table.assign(learned=table["validation_loss_high"] < floor)


def as_text(summary: pd.DataFrame) -> str:
    """The comparison as it is printed at the end of a sweep."""
    labels = ["task", "cell", "strategy", "truncation_length"]
    shown = summary[labels].rename(columns={"truncation_length": "length"})
    for score in SCORES:
        if score in summary:
            shown[score] = [
                "" if np.isnan(m) else f"{m:.3f} [{low:.3f}, {high:.3f}]"
                for m, low, high in summary[[score, f"{score}_low", f"{score}_high"]].to_numpy()
            ]
    shown["seeds"] = summary["n"]
    shown["diverged"] = summary["diverged"]
    shown["learned"] = summary["learned"]
    references = summary.groupby("task", sort=False)[
        [c for c in REFERENCES if c in summary]
    ].first()
    lines = [
        f"{task}: "
        + ", ".join(f"{REFERENCES[str(c)]} {v:.3f}" for c, v in row.items() if v == v)
        + " nats"
        for task, row in references.iterrows()
    ]
    head = "Median over seeds [95 % bootstrap interval] after the last update; seconds of training per seed"
    return "\n".join([head, shown.to_string(index=False), "Reference validation losses:", *lines])
