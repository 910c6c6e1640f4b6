"""Eligibility propagation: credit stays within each unit, and takes no path through the recurrent weights."""

from bptt_study.influence.carried import strategy
from bptt_study.influence.own_unit import own_unit
from bptt_study.influence.units import direct, is_exact
from bptt_study.strategies.validated import validated
from bptt_study.types import Claim, Problem, Strategy
from bptt_study.validation import whole


@validated
def eprop(problem: Problem, block: int | None = None, carried: bool = True) -> Strategy:
    """Make e-prop: S_t = d_t S_{t-1} + I_t, where d_t is the part of J_t that takes no recurrent weight.

    In `elman` and `linear` d is 0, so that e-prop is `frozen`; in the LSTM d is the forget gate.

    Args:
      problem: Cell, readout and loss. The cell has an affine form whose parameters end in gates × units.
      block: Time steps between two updates of S; it does not change the numbers. None: the cheapest.
      carried: Whether S goes on from call to call.

    Returns:
      The strategy.

    Raises:
      SettingError: For a block below 1, and for another cell.

    References:
      Bellec et al. 2020.
    """
    if block is not None:
        whole("block", block)
    past = own_unit(problem.cell, direct, "eprop")
    exact = is_exact(problem.cell, direct)
    claim = Claim(exact=exact, unbiased=exact, source="Bellec et al. 2020")
    return strategy(problem, past, claim, block, carried=carried)
