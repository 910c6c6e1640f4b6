"""Optimal Kronecker-sum approximation: the influence as a few Kronecker products, with the least noise."""

from bptt_study.influence.carried import strategy
from bptt_study.influence.optimal import optimal_kronecker
from bptt_study.types import Claim, Problem, Strategy
from bptt_study.validation import whole


def ok(problem: Problem, rank: int) -> Strategy:
    """OK (Benzing et al. 2019): M is replaced by a sum of `rank` Kronecker products with that expectation.

    It is exact where M has no more than that many, as in the first `rank` steps.

    Args:
      problem: Its cell's parameters are matrices of features × (gates × units).
      rank: Products that are kept for each of the two groups.

    Raises:
      SettingError: For a rank below 1, and another cell.
    """
    past = optimal_kronecker(problem.cell, "ok", whole("rank", rank))
    claim = Claim(
        unbiased=True,
        memory="1",
        steps="1",
        source="Benzing et al. 2019",
        reach="stream",
        online=True,
    )
    return strategy(problem, past, claim, by_steps=True)
