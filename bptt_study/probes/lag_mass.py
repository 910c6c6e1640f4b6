"""How much gradient lies at each lag."""

import jax
import numpy as np
import pandas as pd

from bptt_study.instruments import lags
from bptt_study.probes.probe import Probe, Scene


def lag_mass() -> Probe:
    """How much gradient lies at each lag, and the strategy's share of it: lag, mass, kept.

    mass: ‖G_k‖, the norm of what all losses of the batch send k steps back. kept: E[w[s,k]], mean over the
    losses s ≥ k. State from zero.
    """

    def look(scene: Scene) -> pd.DataFrame:
        steps = len(scene.batch.mask)
        table = jax.jit(lags.gradients, static_argnums=(0, 3))(
            scene.problem, scene.params, scene.batch, steps
        )
        # losses of step s at lag k ≤ s
        counts = np.asarray(scene.batch.mask).sum(axis=1) * np.tri(steps).T
        kept = np.asarray(lags.weights(scene.strategy, steps, steps)).T * counts
        with np.errstate(invalid="ignore"):
            shares = kept.sum(axis=1) / counts.sum(axis=1)
        return pd.DataFrame({"lag": np.arange(steps), "mass": lags.mass(table), "kept": shares})

    return Probe(look)
