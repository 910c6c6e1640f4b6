"""Kronecker-factored RTRL: the influence as one random Kronecker product."""

from bptt_study.influence.carried import strategy
from bptt_study.influence.kronecker import kronecker_factored
from bptt_study.types import Claim, Problem, Strategy


def kf_rtrl(problem: Problem) -> Strategy:
    """KF-RTRL (Mujika, Meier & Steger 2018): M is replaced by u ⊗ A with that expectation, in two groups.

    Raises:
      SettingError: For a cell whose parameters are not matrices of features × (gates × units).
    """
    claim = Claim(
        unbiased=True,
        memory="1",
        steps="1",
        source="Mujika et al. 2018",
        reach="stream",
        online=True,
    )
    past = kronecker_factored(problem.cell, "kf_rtrl")
    return strategy(problem, past, claim, by_steps=True)
