"""The error of the strategy's gradient."""

import jax
import jax.numpy as jnp
import pandas as pd
from jax import lax
from jaxtyping import Array, Key

from bptt_study.backprop.pytrees import numbers
from bptt_study.instruments import lags
from bptt_study.instruments.compiled import compiled
from bptt_study.instruments.draws import names_draws
from bptt_study.probes.probe import Probe, Snapshot
from bptt_study.types import Batch, Params, Problem, Strategy
from bptt_study.validation import SettingError, whole


def gradient_error(draws: int = 16) -> Probe:
    """Compare the strategy's gradient with the exact gradient g on the batch, from the zero state.

    All parameters are in one vector. A few draws underestimate the variance of compensated cuts, most of which
    lies in rare draws, so the variance is in closed form wherever the strategy's claim has one.

    Args:
      draws: The number of estimates from which the variance is computed if there is no closed form.

    Returns:
      A probe with four columns. norm2 is ‖g‖². bias2 is ‖E[ĝ] - g‖², exactly, from the lag weights. variance
      is E‖ĝ - E[ĝ]‖². exact tells whether it is in closed form.
    """
    whole("draws", draws, least=2)

    @compiled(first=2)
    def means(
        problem: Problem, strategy: Strategy, params: Params, batch: Batch
    ) -> tuple[Array, Array]:
        kept = lags.weights(strategy, *(2 * batch.mask.shape[:1]))
        exact, mean = (
            numbers(lags.weighted_gradient(problem, params, batch, w))
            for w in (jnp.ones_like(kept), kept)
        )
        return jnp.sum(exact**2), jnp.sum((mean - exact) ** 2)

    @compiled(first=2)
    def sampled(
        problem: Problem, strategy: Strategy, params: Params, batch: Batch, key: Key[Array, ""]
    ) -> Array:
        state = strategy.init(params, batch.mask.shape[1])

        def one(key: Key[Array, ""]) -> Array:
            return numbers(strategy.estimate(params, state, batch, key)[0].grads)

        sample = lax.map(one, jax.random.split(key, draws))
        return jnp.sum(sample.var(axis=0, ddof=1))

    def look(snapshot: Snapshot) -> pd.DataFrame:
        problem, strategy, _, params, batch, key, _ = snapshot
        norm2, bias2 = means(problem, strategy, params, batch)
        closed, exactly = _in_closed_form(snapshot)
        variance = exactly if closed else sampled(problem, strategy, params, batch, key)
        row = {"norm2": float(norm2), "bias2": float(bias2), "variance": float(variance)}
        return pd.DataFrame([row | {"exact": closed}])

    return Probe(look, lag_weights=True)


def _in_closed_form(snapshot: Snapshot) -> tuple[bool, float]:
    """Return whether the claim has the variance in closed form, and it; nan beyond the range of a float."""
    problem, strategy, _, params, batch, *_ = snapshot
    weights = lags.declared(strategy)
    if weights.spread is None:
        return not names_draws(strategy.claim), 0.0
    try:
        table = getattr(lags, weights.table)(problem, params, batch)
        return True, lags.variance(strategy, table, weights.table)
    except SettingError:  # a diverged seed
        return True, float("nan")
