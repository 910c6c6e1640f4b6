"""The variance of perturbed passes."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bptt_study import strategies
from bptt_study.instruments import lags
from bptt_study.instruments.lag_arguments import finite
from bptt_study.probes.probe import Probe, Snapshot
from bptt_study.types import Problem
from bptt_study.validation import SettingError, whole


def perturbation_variance(unrolls: Sequence[int] | None = None) -> Probe:
    """Measure the variance that perturbations bring, the more often they are drawn anew.

    The batch is divided into n unrolls of equal length. `pes` draws a perturbation in each and `nres` one for
    all of them, which for n = 1 is the same. One pair of random signs on the cell's parameters, σ → 0, from the
    zero state, in closed form, whatever the run's own strategy.

    Args:
      unrolls: n, each a divisor of the batch's steps; None: all divisors.

    Returns:
      A probe with the columns estimator, by its strategy's name; unrolls, n; variance, E‖ĝ - ∇L‖²; norm2,
      ‖∇L‖² of the cell's parameters; and noise, the first ÷ the second, NaN where that is 0.

    Raises:
      SettingError: For a number of unrolls that does not divide the batch's steps.

    References:
      Vicol et al. 2021; Li et al. 2023.
    """
    asked = None if unrolls is None else [whole("unrolls", n) for n in unrolls]

    def fits(problem: Problem, steps: int) -> None:
        if wrong := [n for n in asked or [] if steps % n]:
            raise SettingError("unrolls", min(wrong), f"a divisor of the batch's {steps} steps")

    def look(snapshot: Snapshot) -> pd.DataFrame:
        problem, steps = snapshot.problem, len(snapshot.batch.mask)
        fits(problem, steps)
        divisors = [n for n in range(1, steps + 1) if steps % n == 0]
        columns = ["estimator", "unrolls", "variance"]
        try:
            finite(snapshot.params)
        except SettingError:  # a diverged seed
            lost = [(name, n, np.nan) for n in asked or divisors for name in ("pes", "nres")]
            return pd.DataFrame(lost, columns=columns).assign(norm2=np.nan, noise=np.nan)

        flows = lags.shared_flows(problem, snapshot.params, snapshot.batch)
        norm2 = np.asarray(flows[0], float).sum()  # F[0,t] is all that the losses send to step t
        same = lags.variance(strategies.nres(problem, None), flows, table="shared_flows")
        rows = []
        for n in asked or divisors:
            pes = strategies.pes(problem, None, hold=steps // n)
            anew = lags.variance(pes, flows, table="shared_flows")
            rows += [("pes", n, anew), ("nres", n, same)]
        table = pd.DataFrame(rows, columns=columns)
        noise = table["variance"] / norm2 if norm2 > 0 else np.nan
        return table.assign(norm2=norm2, noise=noise)

    return Probe(look, fits=fits)
