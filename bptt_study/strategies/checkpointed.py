"""Full backpropagation through time in less memory: some states are stored, and the others recomputed."""

from math import isqrt
from typing import Any

from bptt_study.backprop.backpropagate import Memory, backpropagate
from bptt_study.strategies.strategy_from import ALL_LAGS, strategy_from
from bptt_study.strategies.validated import validated
from bptt_study.types import Batch, Claim, Estimate, Params, Problem, State, Strategy
from bptt_study.validation import whole


@validated
def checkpointed(problem: Problem, states: int | None = None) -> Strategy:
    """Make the strategy with the gradient of `full`, to rounding, that holds a bounded number of states.

    With fewer states, more steps are run again; their order keeps the number of steps least. From
    `states` = T on, the strategy is `full`.

    Args:
      problem: Cell, readout and loss.
      states: The largest number of states to hold. None: 2√T. Then T steps take at most 3 T steps forward,
        and about 2 T if T has a divisor near √T (Chen et al. 2016).

    Returns:
      The strategy.

    Raises:
      SettingError: For fewer than 2 states.

    References:
      Gruslys et al. 2016; Griewank & Walther 2000.
    """
    if states is not None:
        whole("states", states, least=2)

    def estimate(params: Params, state: State, batch: Batch, key: Any) -> tuple[Estimate, State]:
        memory = Memory(states or 2 * max(1, isqrt(len(batch.mask))))
        return backpropagate(problem, params, state, batch, memory=memory)

    claim = Claim(
        exact=True,
        unbiased=True,
        memory="√T" if states is None else "m",
        held=states,
        source="Gruslys et al. 2016",
        lag_weights=ALL_LAGS,
    )
    return strategy_from(problem, estimate, claim)
