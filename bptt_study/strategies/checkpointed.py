"""Full backpropagation through time at less memory: some states are kept, the others computed again."""

from math import isqrt
from typing import Any

import jax.numpy as jnp

from bptt_study.backprop.backpropagate import Memory, backpropagate
from bptt_study.types import Batch, Claim, Estimate, LagWeights, Params, Problem, State, Strategy
from bptt_study.validation import whole


def checkpointed(problem: Problem, states: int | None = None) -> Strategy:
    """The gradient of `full`, to rounding, with at most `states` states held at once (Gruslys et al. 2016).

    states None: 2√T, of which √T are kept and as many stored step by step, so that every step is run
    forward twice at most (Chen et al. 2016). Fewer are kept in the order that runs the fewest steps
    again, more run fewer again; from T on it is `full`.

    Raises SettingError for less than 2 states.
    """
    if states is not None:
        whole("states", states, least=2)

    def estimate(params: Params, state: State, batch: Batch, key: Any) -> tuple[Estimate, State]:
        memory = Memory(states or 2 * max(1, isqrt(len(batch.mask))))
        return backpropagate(problem, params, state, batch, memory=memory)

    return Strategy(
        init=lambda params, batch_size: problem.cell.zeros(batch_size),
        estimate=estimate,
        claim=Claim(
            exact=True,
            unbiased=True,
            memory="√T" if states is None else "m",
            source="Gruslys et al. 2016",
            lag_weights=LagWeights(jnp.ones, lambda steps, lags: jnp.ones((steps, lags))),
        ),
    )
