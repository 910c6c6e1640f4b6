"""The past taken as given: no credit goes back in time."""

from bptt_study.strategies.fixed import fixed
from bptt_study.types import Problem, Strategy


def frozen(problem: Problem) -> Strategy:
    """Make ĝ = Σ_t e_tᵀ I_t, which keeps lag 0 alone: `fixed` with a window of 1.

    It is the baseline that shows whether a task needs credit for the past at all.

    Args:
      problem: Cell, readout and loss.

    Returns:
      The strategy.
    """
    return fixed(problem, window=1)
