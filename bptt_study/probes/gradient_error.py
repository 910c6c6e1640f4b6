"""The error of the strategy's gradient."""

import jax
import jax.numpy as jnp
import pandas as pd
from jax import lax
from jaxtyping import Array, Key

from bptt_study.backprop.pytrees import numbers
from bptt_study.instruments import lags
from bptt_study.instruments.compiled import compiled
from bptt_study.probes.probe import Probe, Snapshot
from bptt_study.types import Batch, Params, Problem, Strategy
from bptt_study.validation import whole


def gradient_error(draws: int = 16) -> Probe:
    """Compare the strategy's gradient with the exact gradient g on the batch, from the zero state.

    All parameters are in one vector.

    Args:
      draws: The number of estimates from which the variance is computed.

    Returns:
      A probe with three columns. norm2 is ‖g‖². bias2 is ‖E[ĝ] - g‖², exactly, from the lag weights. variance
      is E‖ĝ - E[ĝ]‖².
    """
    whole("draws", draws, least=2)

    @compiled(first=2)
    def errors(
        problem: Problem, strategy: Strategy, params: Params, batch: Batch, key: Key[Array, ""]
    ) -> dict[str, Array]:
        steps, size = batch.mask.shape
        state = strategy.init(params, size)

        def one(key: Key[Array, ""]) -> Array:
            return numbers(strategy.estimate(params, state, batch, key)[0].grads)

        kept = lags.weights(strategy, steps, steps)
        exact, mean = (
            numbers(lags.weighted_gradient(problem, params, batch, w))
            for w in (jnp.ones_like(kept), kept)
        )
        sample = lax.map(one, jax.random.split(key, draws))
        return {
            "norm2": jnp.sum(exact**2),
            "bias2": jnp.sum((mean - exact) ** 2),
            "variance": jnp.sum(sample.var(axis=0, ddof=1)),
        }

    def look(snapshot: Snapshot) -> pd.DataFrame:
        found = errors(
            snapshot.problem, snapshot.strategy, snapshot.params, snapshot.batch, snapshot.key
        )
        return pd.DataFrame({name: [float(value)] for name, value in found.items()})

    return Probe(look, lag_weights=True)
