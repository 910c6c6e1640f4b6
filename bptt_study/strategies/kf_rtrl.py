"""Kronecker-factored RTRL: the influence of each group of weights as one random Kronecker product."""

from bptt_study.influence.carried import strategy
from bptt_study.influence.one_product import kronecker_factored
from bptt_study.strategies.validated import validated
from bptt_study.types import Claim, Problem, Strategy


@validated
def kf_rtrl(problem: Problem) -> Strategy:
    """Make KF-RTRL, which replaces M by a random u ⊗ A with the expectation M, in two groups of parameters.

    Args:
      problem: Cell, readout and loss. The cell's parameters are matrices of features × (gates × units).

    Returns:
      The strategy.

    Raises:
      SettingError: For another cell.

    References:
      Mujika, Meier & Steger 2018.
    """
    past = kronecker_factored(problem.cell, "kf_rtrl")
    claim = Claim(unbiased=True, source="Mujika et al. 2018")
    return strategy(problem, past, claim, by_steps=True)
