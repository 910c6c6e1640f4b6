"""The norms of the strategy's adjoints."""

import numpy as np
import pandas as pd

from bptt_study.instruments import measure
from bptt_study.instruments.compiled import compiled
from bptt_study.probes.probe import Probe, Snapshot
from bptt_study.validation import whole


def gradient_norms(draws: int = 16) -> Probe:
    """Measure the norms of the strategy's own adjoints over time steps and over lags, from the zero state.

    Args:
      draws: The number of draws over which the norms are averaged.

    Returns:
      A probe with the columns axis ("time" or "lag"), step and gradient_norm: see `measure.gradient_norms`.
    """
    norms = compiled("draws")(measure.gradient_norms)
    whole("draws", draws)

    def look(snapshot: Snapshot) -> pd.DataFrame:
        at = snapshot.params, snapshot.batch, snapshot.key
        over = norms(snapshot.strategy, *at, draws=draws)
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
