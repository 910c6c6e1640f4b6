"""The influence on the owning unit, and the best low rank of all the rest."""

from bptt_study.influence.carried import strategy
from bptt_study.influence.low_rank import low_rank
from bptt_study.influence.pytrees import width
from bptt_study.types import Claim, Problem, Strategy
from bptt_study.validation import SettingError, whole


def sketched(problem: Problem, rank: int) -> Strategy:
    """Sketched RTRL: SnAp-1 and a rest of low rank, cut off anew at each step. Biased, and nothing is random.

    Args:
      problem: Its cell has an affine form whose parameters end in gates × units.
      rank: Of the rest. 0 is `snap`, and as many as the state has numbers is `rtrl`.

    Raises:
      SettingError: For a rank outside that range, and another cell.
    """
    past = low_rank(problem.cell, "sketched", whole("rank", rank, least=0))
    if rank > (n := width(problem.cell)):
        raise SettingError("rank", rank, f"a whole number from 0 to {n}, the numbers of the state")
    exact = rank == n
    claim = Claim(
        exact=exact,
        unbiased=exact,
        memory="1",
        steps="1",
        source="sketched-rtrl 2026",
        reach="stream",
        online=True,
    )
    return strategy(problem, past, claim, by_steps=True)
