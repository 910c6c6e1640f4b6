"""Sparse n-step approximation: the entries of the influence that a parameter reaches within n steps."""

from bptt_study.influence.carried import strategy
from bptt_study.influence.masked import masked
from bptt_study.influence.own_unit import own_unit
from bptt_study.influence.units import diagonal, is_exact
from bptt_study.strategies.validated import validated
from bptt_study.types import Claim, Problem, Strategy
from bptt_study.validation import whole


@validated
def snap(problem: Problem, n: int = 1, block: int | None = None, carried: bool = True) -> Strategy:
    """Make SnAp-n; n = 1 keeps the influence on the unit that owns the parameter.

    If no unit's state acts on another unit, as in `lru` and `min_gru`, n = 1 is exact.

    Args:
      problem: Cell, readout and loss. The cell has an affine form whose parameters end in gates × units.
      n: Steps within which a parameter must reach an entry.
      block: Time steps between two updates of M; it does not change the numbers. None: the cheapest.
      carried: Whether M goes on from call to call.

    Returns:
      The strategy.

    Raises:
      SettingError: For n or a block below 1, and for another cell.

    References:
      Menick et al. 2021.
    """
    whole("n", n)
    if block is not None:
        whole("block", block)
    cell = problem.cell
    past = own_unit(cell, diagonal, "snap") if n == 1 else masked(cell, "snap", n)
    exact = is_exact(problem.cell, diagonal)
    claim = Claim(exact=exact, unbiased=exact, source="Menick et al. 2021")
    return strategy(problem, past, claim, block, n > 1, carried)
