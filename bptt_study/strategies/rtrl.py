"""Real-time recurrent learning: the influence of all parameters on the state, carried forward in full."""

from bptt_study.influence.carried import strategy
from bptt_study.influence.whole import whole
from bptt_study.strategies.validated import validated
from bptt_study.types import Claim, Problem, Strategy
from bptt_study.validation import whole as whole_number


@validated
def rtrl(problem: Problem, block: int | None = None, carried: bool = True) -> Strategy:
    """Make real-time recurrent learning: M_t = J_t M_{t-1} + I_t, ĝ = Σ_t e_tᵀ M_t.

    The estimate is the gradient through all steps since the state was fresh. After an update, M still holds
    the contributions of earlier parameters. Any cell will do.

    Args:
      problem: Cell, readout and loss.
      block: Time steps between two updates of M; it does not change the numbers. None: the cheapest
        (Schmidhuber 1992). 1 is the form of the paper.
      carried: Whether M goes on from call to call. If not, the estimate is the gradient of the call.

    Returns:
      The strategy.

    Raises:
      SettingError: For a block below 1.

    References:
      Williams & Zipser 1989.
    """
    if block is not None:
        whole_number("block", block)
    claim = Claim(exact=True, unbiased=True, source="Williams & Zipser 1989")
    return strategy(problem, whole(problem.cell), claim, block, carried=carried)
