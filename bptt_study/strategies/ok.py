"""Optimal Kronecker-sum approximation: the influence as a few Kronecker products, with the least noise."""

from bptt_study.influence.carried import strategy
from bptt_study.influence.optimal import optimal_kronecker
from bptt_study.strategies.validated import validated
from bptt_study.types import Claim, Problem, Strategy
from bptt_study.validation import whole


@validated
def ok(problem: Problem, rank: int) -> Strategy:
    """Make OK, which replaces M by a random sum of `rank` Kronecker products with the expectation M.

    It is exact as long as M has no more than `rank` terms, as in the first `rank` steps.

    Args:
      problem: Cell, readout and loss. The cell's parameters are matrices of features × (gates × units).
      rank: The number of products that are kept for each of the two groups of parameters.

    Returns:
      The strategy.

    Raises:
      SettingError: For a rank below 1, and for another cell.

    References:
      Benzing et al. 2019.
    """
    past = optimal_kronecker(problem.cell, "ok", whole("rank", rank))
    claim = Claim(unbiased=True, source="Benzing et al. 2019")
    return strategy(problem, past, claim, by_steps=True)
