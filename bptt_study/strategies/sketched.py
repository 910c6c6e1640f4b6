"""Sketched RTRL: the influence on the owning unit, and a low-rank approximation of the rest."""

from bptt_study.influence.carried import strategy
from bptt_study.influence.low_rank import low_rank
from bptt_study.influence.pytrees import width
from bptt_study.strategies.validated import validated
from bptt_study.types import Claim, Problem, Strategy
from bptt_study.validation import SettingError, whole


@validated
def sketched(problem: Problem, rank: int) -> Strategy:
    """Make sketched RTRL: SnAp-1, and a rest of low rank that is truncated at each step.

    It is biased, and nothing in it is random.

    Args:
      problem: Cell, readout and loss. The cell has an affine form whose parameters end in gates × units.
      rank: The rank of the rest. 0 is `snap`; as many as the state has numbers is `rtrl`.

    Returns:
      The strategy.

    Raises:
      SettingError: For a rank outside that range, and for another cell.
    """
    past = low_rank(problem.cell, "sketched", whole("rank", rank, least=0))
    if rank > (n := width(problem.cell)):
        raise SettingError("rank", rank, f"a whole number from 0 to {n}, the numbers of the state")
    exact = rank == n
    claim = Claim(exact=exact, unbiased=exact, source="sketched-rtrl 2026")
    return strategy(problem, past, claim, by_steps=True)
