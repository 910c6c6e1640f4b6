"""The norms of the strategy's adjoints."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bptt_study.instruments import measure
from bptt_study.instruments.compiled import compiled
from bptt_study.probes.probe import Probe, Snapshot
from bptt_study.validation import SettingError, one_of, whole

AXES = ("time", "lag")


def gradient_norms(draws: int = 16, axes: Sequence[str] = AXES) -> Probe:
    """Measure the norms of the strategy's own adjoints over time steps and over lags, from the zero state.

    Args:
      draws: The number of draws over which the norms are averaged.
      axes: The axes of the table: "time", "lag" or both.

    Returns:
      A probe with the columns axis ("time" or "lag"), step and gradient_norm: see `measure.gradient_norms`.

    Raises:
      SettingError: For another axis, or none.
    """
    norms = compiled("draws")(measure.gradient_norms)
    whole("draws", draws)
    if not axes:
        raise SettingError("axes", [*axes], f"some of {', '.join(AXES)}")
    for axis in axes:
        one_of("axes", axis, AXES)

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
            if axis in axes
        )
        return pd.concat(tables, ignore_index=True)

    return Probe(look, frozenset({"adjoint_norms"}))
