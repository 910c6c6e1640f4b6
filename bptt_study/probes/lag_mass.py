"""How much gradient lies at each lag."""

import jax
import numpy as np
import pandas as pd

from bptt_study.instruments import lags
from bptt_study.probes.probe import Probe, Snapshot


def lag_mass() -> Probe:
    """Measure how much gradient lies at each lag, and the strategy's share of it, from the zero state.

    Returns:
      A probe with the columns lag; mass, ‖G_k‖ of what all losses of the batch send k steps back; and kept,
      E[w[s,k]] as the mean over the losses s ≥ k, NaN where there is none.
    """

    def look(snapshot: Snapshot) -> pd.DataFrame:
        steps = len(snapshot.batch.mask)
        table = jax.jit(lags.gradients, static_argnums=(0, 3))(
            snapshot.problem, snapshot.params, snapshot.batch, steps
        )
        # losses of step s at lag k ≤ s
        counts = np.asarray(snapshot.batch.mask).sum(axis=1) * np.tri(steps).T
        kept = np.asarray(lags.weights(snapshot.strategy, steps, steps)).T * counts
        with np.errstate(invalid="ignore"):
            shares = kept.sum(axis=1) / counts.sum(axis=1)
        return pd.DataFrame({"lag": np.arange(steps), "mass": lags.mass(table), "kept": shares})

    return Probe(look, lag_weights=True)
