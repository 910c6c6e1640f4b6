"""The strategy's own gradient norms."""

from functools import partial

import jax
import numpy as np
import pandas as pd

from bptt_study.instruments import measure
from bptt_study.probes.probe import Probe, Scene
from bptt_study.validation import whole


def gradient_norms(draws: int = 16) -> Probe:
    """The strategy's own gradient norms over time steps and lag: axis, step, gradient_norm."""
    norms = jax.jit(partial(measure.gradient_norms, draws=whole("draws", draws)), static_argnums=0)

    def look(scene: Scene) -> pd.DataFrame:
        over = norms(scene.strategy, scene.params, scene.batch, scene.key)
        tables = (
            pd.DataFrame(
                {
                    "axis": axis,
                    "step": np.arange(len(values)) + (axis == "time"),
                    "gradient_norm": np.asarray(values),
                }
            )
            for axis, values in over.items()
        )
        return pd.concat(tables, ignore_index=True)

    return Probe(look, frozenset({"adjoint_norms"}))
