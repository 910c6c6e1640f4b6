"""Reverse Kronecker-factored RTRL: the other factor of the product follows the state."""

from bptt_study.influence.carried import strategy
from bptt_study.influence.kronecker import reverse_kronecker
from bptt_study.types import Claim, Problem, Strategy


def reverse_kf(problem: Problem) -> Strategy:
    """R-KF-RTRL (Marschall, Cho & Savin 2020): M is replaced by a ⊗ B with that expectation, in two groups.

    Raises:
      SettingError: For a cell whose parameters are not matrices of features × (gates × units).
    """
    claim = Claim(
        unbiased=True,
        memory="1",
        steps="1",
        source="Marschall et al. 2020",
        reach="stream",
        online=True,
    )
    past = reverse_kronecker(problem.cell, "reverse_kf")
    return strategy(problem, past, claim, by_steps=True)
