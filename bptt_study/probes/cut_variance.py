"""The variance of compensated random cuts."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Array, Float

from bptt_study import strategies
from bptt_study.backprop.pytrees import numbers
from bptt_study.instruments import lags
from bptt_study.probes.probe import Probe, Snapshot
from bptt_study.probes.weighted_estimates import weighted_estimates
from bptt_study.types import Batch, Params, Problem
from bptt_study.validation import fits, number, whole

COLUMNS = ["law", "horizon", "second_moment", "signal", "variance", "sampled_variance"]


def cut_variance(mean_length: float = 16, alpha: float = 6, draws: int = 64) -> Probe:
    """Measure the variance that compensated random cuts add to a loss's gradient, for losses at several steps.

    The loss is that of step T alone, where T is 1, ½, ¼ and ⅛ of the batch's steps, rounded down, and at
    least 2. Both laws are measured, whatever the run's own strategy. The numbers are sums over the cell's
    parameters and means over the sequences whose loss at step T counts. A T at which none counts is left out.

    Args:
      mean_length: The mean length of both laws, time steps.
      alpha: α of the power law.
      draws: The number of draws for the sampled variance, which misses the contribution of rare draws.

    Returns:
      A probe with six columns. law is the name of the law's strategy. horizon is T. second_moment is E[w²] of
      the longest lag, T - 1. signal is ‖∇l_T‖² of the exact gradient. variance is E‖ĝ - ∇l_T‖², exactly, from
      the table of one loss, which fits into memory for long sequences too. sampled_variance is its estimate.

    Raises:
      SettingError: For a mean length of 1 or less, α of 2 or less, and fewer than two draws.
    """
    laws = _laws(number("mean_length", mean_length, above=1), number("alpha", alpha, above=2))
    whole("draws", draws, least=2)

    def look(snapshot: Snapshot) -> pd.DataFrame:
        mask = snapshot.batch.mask
        steps = len(mask)
        uniforms = jax.random.uniform(snapshot.key, (*mask.shape, draws))
        rows = []
        for horizon in sorted({min(steps, max(2, steps // part)) for part in (8, 4, 2, 1)}):
            last = jnp.arange(steps)[:, None] == horizon - 1
            batch = snapshot.batch._replace(mask=1.0 * (last & (mask > 0)))
            size = int(batch.mask.sum())
            if size == 0:
                continue
            table = _by_lag(snapshot.problem, snapshot.params, batch)
            # reordered from lags to the steps where they arrive
            by_step = np.asarray(table, float)[:, horizon - 1 :: -1]
            flat = np.moveaxis(by_step, 1, 0).reshape(horizon, -1)
            products = flat @ flat.T / size  # ⟨G_t, G_u⟩, mean over the sequences
            for name, law in laws.items():
                claim = lags.declared(strategies.randomized(snapshot.problem, law))
                assert claim.spread is not None and claim.link_weights is not None
                # F[j,t] = G_t for every link j from t to the loss, because only G_t passes over it
                spread = claim.spread(steps)[:horizon, :horizon, :horizon].sum(axis=0)
                xi = jnp.moveaxis(claim.link_weights(uniforms), -1, 0)[:, None]
                drawn = np.asarray(
                    weighted_estimates(snapshot.problem, snapshot.params, batch, xi), float
                )
                rows.append(
                    {
                        "law": name,
                        "horizon": horizon,
                        "second_moment": 1 + spread[0, 0],
                        "signal": products.sum(),
                        "variance": np.vdot(spread, products),
                        # sequences draw independently: the variance of their mean is 1/B of the mean variance
                        "sampled_variance": size * drawn.var(axis=0, ddof=1).sum(),
                    }
                )
        return pd.DataFrame(rows, columns=COLUMNS)

    # the uniform numbers of one sequence at least
    return Probe(look, fits=lambda problem, steps: fits("draws", draws, draws * steps))


@cache  # all runs share the tables of a law
def _laws(mean_length: float, alpha: float) -> dict[str, strategies.Law]:
    return {
        "randomized": strategies.constant(mean_length),
        "randomized_power_law": strategies.power_law(mean_length, alpha),
    }


@partial(jax.jit, static_argnames="problem")
def _by_lag(problem: Problem, params: Params, batch: Batch) -> Float[Array, "B T P"]:
    """Compute G_k of each sequence alone, with the cell's parameters in one vector."""

    def alone(sequence: Batch) -> Float[Array, "T P"]:
        batch = Batch(*(a[:, None] for a in sequence))
        cell = lags.gradients(problem, params, batch, len(batch.mask))["cell"]
        return jax.vmap(numbers)(cell)

    return jax.vmap(alone, in_axes=1)(batch)
