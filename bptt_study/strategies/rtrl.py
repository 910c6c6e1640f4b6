"""Real-time recurrent learning: the influence of all parameters on the state, carried forward whole."""

from bptt_study.influence.carried import strategy
from bptt_study.influence.whole import whole
from bptt_study.types import Claim, Problem, Strategy
from bptt_study.validation import flag
from bptt_study.validation import whole as whole_number


def rtrl(problem: Problem, block: int | None = None, carried: bool = True) -> Strategy:
    """Real-time recurrent learning (Williams & Zipser 1989): M_t = J_t M_{t-1} + I_t, ĝ = Σ_t e_tᵀ M_t.

    The estimate is the gradient, through all steps since the state was fresh. After an update M keeps what the
    earlier parameters put into it. Any cell will do.

    Args:
      problem: Cell, readout and loss.
      block: Time steps between two rolls of M, which change no number; None: as many as cost least
        (Schmidhuber 1992). 1 is the form of the paper.
      carried: Whether M goes on from call to call. Without, the estimate is the gradient of the call.

    Raises:
      SettingError: For a block below 1.
    """
    if block is not None:
        whole_number("block", block)
    claim = Claim(
        exact=True,
        unbiased=True,
        memory="1",
        steps="block",
        source="Williams & Zipser 1989",
        reach="stream" if flag("carried", carried) else "call",
        online=carried,
    )
    return strategy(problem, whole(problem.cell), claim, block, carried=carried)
