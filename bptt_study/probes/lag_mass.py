"""The size of the gradient at each lag."""

import jax
import numpy as np
import pandas as pd

from bptt_study.instruments import lags
from bptt_study.probes.probe import Probe, Snapshot


def lag_mass() -> Probe:
    """Measure the size of the gradient at each lag, and the share that the strategy keeps, from the zero state.

    Returns:
      A probe with three columns. lag is k. mass is ‖G_k‖, where G_k is the gradient that all losses of the
      batch send k steps back. kept is the mean of E[w[s,k]] over the losses s ≥ k that count, NaN if there is
      none.
    """

    def look(snapshot: Snapshot) -> pd.DataFrame:
        steps = len(snapshot.batch.mask)
        table = jax.jit(lags.gradients, static_argnums=(0, 3))(
            snapshot.problem, snapshot.params, snapshot.batch, steps
        )
        # [k, s]: the number of losses of step s that have lag k ≤ s
        counts = np.asarray(snapshot.batch.mask).sum(axis=1) * np.tri(steps).T
        kept = np.asarray(lags.weights(snapshot.strategy, steps, steps)).T * counts
        with np.errstate(invalid="ignore"):
            shares = kept.sum(axis=1) / counts.sum(axis=1)
        return pd.DataFrame({"lag": np.arange(steps), "mass": lags.mass(table), "kept": shares})

    return Probe(look, lag_weights=True)
