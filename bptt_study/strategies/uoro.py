"""Unbiased online recurrent optimization: the influence as one product of random vectors."""

from bptt_study.influence.carried import strategy
from bptt_study.influence.rank_one import averaged, rank_one, shared_rank_one
from bptt_study.strategies.validated import validated
from bptt_study.types import Claim, Problem, Strategy
from bptt_study.validation import flag, whole


@validated
def uoro(problem: Problem, block: int = 1, draws: int = 1, shared: bool = False) -> Strategy:
    """Make UORO, which replaces M by a random product s̃ θ̃ᵀ with the expectation M. Any cell will do.

    Args:
      problem: Cell, readout and loss.
      block: Time steps between two draws of ν. 1 is the paper's form, where every step adds noise. With more
        steps, credit within a block is exact, and each block draws ν once.
      draws: The number of independent copies that one estimate averages.
      shared: Whether the whole batch has one product. It holds fewer numbers and has more noise.

    Returns:
      The strategy.

    Raises:
      SettingError: For a block or draws below 1.

    References:
      Tallec & Ollivier 2018.
    """
    whole("block", block), whole("draws", draws)
    one = (shared_rank_one if flag("shared", shared) else rank_one)(problem.cell)
    past = one if draws == 1 else averaged(one, draws)
    claim = Claim(unbiased=True, source="Tallec & Ollivier 2018")
    by_steps = block == 1
    return strategy(problem, past, claim, None if by_steps else block, by_steps)
