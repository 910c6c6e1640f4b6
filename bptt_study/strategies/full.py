"""Full backpropagation through time: the whole sequence, with every link."""

from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.strategies.strategy_from import ALL_LAGS, strategy_from
from bptt_study.strategies.validated import validated
from bptt_study.types import Claim, Problem, Strategy


@validated
def full(problem: Problem) -> Strategy:
    """Make the strategy with the exact gradient of the batch's loss, from the carried state on.

    Args:
      problem: Cell, readout and loss.

    Returns:
      The strategy.

    References:
      Rumelhart, Hinton & Williams 1986; Werbos 1990.
    """
    return strategy_from(
        problem,
        lambda params, state, batch, key: backpropagate(problem, params, state, batch),
        Claim(exact=True, unbiased=True, source="Werbos 1990", lag_weights=ALL_LAGS),
    )
