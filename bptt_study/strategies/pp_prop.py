"""One trace of the features and one of the slopes: the smallest state that carries credit forward."""

from bptt_study.influence.carried import strategy
from bptt_study.influence.traces import traces
from bptt_study.strategies.validated import validated
from bptt_study.types import Claim, Problem, Strategy
from bptt_study.validation import SettingError, number


@validated
def pp_prop(problem: Problem, decay: float = 0.9) -> Strategy:
    """Make pp-prop, the pre- and postsynaptic traces of ES-D-RTRL: M ≈ ε_f ⊗ ε_x, two running means.

    Args:
      problem: Cell, readout and loss. The cell's parameters are matrices of features × (gates × units).
      decay: α, the share of themselves that the traces keep at each step.

    Returns:
      The strategy.

    Raises:
      SettingError: For a decay outside [0, 1), and for another cell.

    References:
      Wang et al. 2024 (braintrace).
    """
    if number("decay", decay, least=0) >= 1:
        raise SettingError("decay", decay, "a number of at least 0 and below 1")
    past = traces(problem.cell, "pp_prop", decay)
    claim = Claim(source="Wang et al. 2024")
    return strategy(problem, past, claim, by_steps=True)
