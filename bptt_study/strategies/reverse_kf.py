"""Reverse Kronecker-factored RTRL: the other factor of the product follows the state."""

from bptt_study.influence.carried import strategy
from bptt_study.influence.one_product import reverse_kronecker
from bptt_study.strategies.validated import validated
from bptt_study.types import Claim, Problem, Strategy


@validated
def reverse_kf(problem: Problem) -> Strategy:
    """Make R-KF-RTRL, which replaces M by a random a ⊗ B with the expectation M, in two groups of parameters.

    Args:
      problem: Cell, readout and loss. The cell's parameters are matrices of features × (gates × units).

    Returns:
      The strategy.

    Raises:
      SettingError: For another cell.

    References:
      Marschall, Cho & Savin 2020.
    """
    past = reverse_kronecker(problem.cell, "reverse_kf")
    claim = Claim(unbiased=True, source="Marschall et al. 2020")
    return strategy(problem, past, claim, by_steps=True)
