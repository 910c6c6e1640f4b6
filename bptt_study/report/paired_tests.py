"""Comparisons paired by seed: bootstrap interval, Wilcoxon's signed ranks, Holm's correction, a verdict.

A seed fixes initial weights and data for all strategies, so scores are compared seed by seed. A seed that
diverged, whose score is not finite, is worse than any that did not, and as bad as another such.
"""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

LEVEL = 0.05
# stands for a difference to a diverged seed: it ranks last, and two of them cancel
LOST = 1e30


def differences(first: pd.Series, second: pd.Series, worst: float = np.inf) -> pd.Series:
    """first - second of each seed; ±inf where just one of them diverged, 0 where both did.

    worst: what a score that is not finite ranks as. ValueError if the seeds are not the same.
    """
    if sorted(first.index) != sorted(second.index) or not first.index.is_unique:
        raise ValueError("not the same seeds")
    a, b = (
        s.where(np.isfinite(s), np.copysign(LOST, worst)) for s in (first, second.loc[first.index])
    )
    d = a - b
    return d.where(d.abs() < LOST / 2, np.copysign(np.inf, d))


def interval(
    differences: Float[np.ndarray, "n"], resamples: int = 5000
) -> tuple[float, float, float]:
    """Median difference and its 95 % bootstrap interval (percentile), from a generator seeded anew."""
    sample = np.clip(np.asarray(differences, float), -LOST, LOST)
    draws = np.random.default_rng(0).choice(sample, (resamples, len(sample)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975), method="nearest")
    found = np.array([np.median(sample), low, high])
    found = np.where(np.abs(found) < LOST / 4, found, np.copysign(np.inf, found))
    return float(found[0]), float(found[1]), float(found[2])


def signed_rank(differences: Float[np.ndarray, "n"]) -> float:
    """p of Wilcoxon's signed-rank test (1945), two-sided, that differences are symmetric around 0.

    Exact; with ties by all 2^n signs, or 2^14 of them from a seeded generator. Zeros say nothing and
    are left out; p = 1 where nothing is left.
    """
    sample = np.clip(np.asarray(differences, float), -LOST, LOST)
    sample = sample[sample != 0]
    if not len(sample):
        return 1.0
    tied = len(np.unique(np.abs(sample))) < len(sample)
    signs = stats.PermutationMethod(n_resamples=2**14, rng=np.random.default_rng(0))
    return float(stats.wilcoxon(sample, method=signs if tied else "exact").pvalue)


def holm(p: Float[np.ndarray, "m"]) -> Float[np.ndarray, "m"]:
    """p adjusted for a family of m tests (Holm 1979): the i-th smallest times m - i, never falling."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    scaled = p[order] * (len(p) - np.arange(len(p)))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted


def verdict(
    difference: float, low: float, high: float, p: float, least: float, larger_is_better: bool
) -> str:
    """In words, from the numbers: what the first of two is, if a difference below `least` is of no interest.

    alike: the whole interval lies within ± least. better, worse: p < 0.05 and the median difference is
    at least `least`. undecided: neither.
    """
    if -least < low and high < least:
        return "alike"
    if p < LEVEL and abs(difference) >= least:
        return "better" if (difference > 0) == larger_is_better else "worse"
    return "undecided"


def compare(first: pd.Series, second: pd.Series, larger_is_better: bool = False) -> dict[str, Any]:
    """One comparison as columns: n, diverged, medians, difference (first - second) with interval, p."""
    worst = -np.inf if larger_is_better else np.inf
    d = differences(first, second, worst).to_numpy()
    middle, low, high = interval(d)
    return {
        "n": len(d),
        "diverged_first": int((~np.isfinite(first)).sum()),
        "diverged_second": int((~np.isfinite(second)).sum()),
        "median_first": float(np.median(first.where(np.isfinite(first), worst))),
        "median_second": float(np.median(second.where(np.isfinite(second), worst))),
        "difference": middle,
        "low": low,
        "high": high,
        "p": signed_rank(d),
    }


def family(comparisons: pd.DataFrame) -> pd.DataFrame:
    """Rows of `compare` that are tested together, with `p_holm` over all of them and the `verdict`.

    They also hold `least`, the smallest difference of interest, and `larger_is_better`.
    """
    table = comparisons.assign(p_holm=holm(comparisons["p"].to_numpy()))
    names = ["difference", "low", "high", "p_holm", "least", "larger_is_better"]
    words = [verdict(*row) for row in table[names].itertuples(index=False)]
    return table.assign(verdict=words)
