"""Comparisons paired by seed: bootstrap interval, Wilcoxon's signed ranks, Holm's correction, and a verdict.

A seed fixes initial weights and data for all strategies, so scores are compared seed by seed. The score of a
diverged seed is not finite. It ranks below the scores of all others, and two diverged seeds are equal.
"""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy import stats

LEVEL = 0.05
# the score of a diverged seed: it ranks last, and two diverged seeds have the difference 0
LOST = 1e30


def differences(first: pd.Series, second: pd.Series, worst: float = np.inf) -> pd.Series:
    """Compute the difference first - second of each seed.

    Args:
      first: Scores by seed.
      second: Scores by seed.
      worst: The rank of a score that is not finite.

    Returns:
      The differences by seed: ±inf if one of the two diverged, 0 if both did.

    Raises:
      ValueError: If the seeds are not the same.
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
    """Compute the median difference and its 95 % bootstrap interval (percentile), from fixed random numbers."""
    sample = np.clip(np.asarray(differences, float), -LOST, LOST)
    draws = np.random.default_rng(0).choice(sample, (resamples, len(sample)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975), method="nearest")
    found = np.array([np.median(sample), low, high])
    found = np.where(np.abs(found) < LOST / 4, found, np.copysign(np.inf, found))
    return float(found[0]), float(found[1]), float(found[2])


def signed_rank(differences: Float[np.ndarray, "n"]) -> float:
    """Test by Wilcoxon's signed ranks whether the differences are symmetric around 0.

    The test is exact. With ties it takes all 2^n signs, or 2^14 draws of them from a seeded generator. Zeros
    have no sign and are left out.

    Args:
      differences: The differences [n].

    Returns:
      The two-sided p; 1 if all differences are 0.

    References:
      Wilcoxon 1945, Individual comparisons by ranking methods.
    """
    sample = np.clip(np.asarray(differences, float), -LOST, LOST)
    sample = sample[sample != 0]
    if not len(sample):
        return 1.0
    tied = len(np.unique(np.abs(sample))) < len(sample)
    signs = stats.PermutationMethod(n_resamples=2**14, rng=np.random.default_rng(0))
    return float(stats.wilcoxon(sample, method=signs if tied else "exact").pvalue)


def holm(p: Float[np.ndarray, "m"]) -> Float[np.ndarray, "m"]:
    """Adjust the p of a family of m tests: multiply the i-th smallest by m - i, and let no p fall again.

    References:
      Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    scaled = p[order] * (len(p) - np.arange(len(p)))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted


def verdict(
    difference: float, low: float, high: float, p: float, least: float, larger_is_better: bool
) -> str:
    """Put the comparison into a word, if differences below `least` are of no interest.

    Args:
      difference: The median difference, first - second.
      low: The lower end of its interval.
      high: The upper end of its interval.
      p: The p of the test.
      least: The smallest difference of interest.
      larger_is_better: Whether a larger score is better.

    Returns:
      "alike" if the whole interval lies within ± least. "better" or "worse", for the first, if p < 0.05 and the
      median difference is at least `least`. Otherwise "undecided".
    """
    if -least < low and high < least:
        return "alike"
    if p < LEVEL and abs(difference) >= least:
        return "better" if (difference > 0) == larger_is_better else "worse"
    return "undecided"


def compare(first: pd.Series, second: pd.Series, larger_is_better: bool = False) -> dict[str, Any]:
    """Compare two sets of scores: n, diverged, medians, difference (first - second) with its interval, p."""
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
    """Add `p_holm` and `verdict` to rows of `compare` that are tested together.

    Args:
      comparisons: The rows, with two more columns: `least`, the smallest difference of interest, and
        `larger_is_better`.

    Returns:
      The rows with the two new columns. One seed has no interval, so its verdict is "undecided".
    """
    table = comparisons.assign(p_holm=holm(comparisons["p"].to_numpy()))
    names = ["difference", "low", "high", "p_holm", "least", "larger_is_better"]
    words = [verdict(*row) for row in table[names].itertuples(index=False)]
    return table.assign(verdict=np.where(table["n"] > 1, words, "undecided"))
