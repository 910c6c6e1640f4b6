"""The table of the probe `estimator_quality`: errors relative to the gradient, and costs relative to full BPTT.

`over` says what varies: the strategy's draws on one batch, the training batches, or both. No files, no jax.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from bptt_study.report import plots, snapshots, tables

PARTS = {
    "relative_bias2": "bias²  $\\|E\\hat g - g\\|^2 / \\|g\\|^2$",
    "relative_variance": "variance  $E\\|\\hat g - E\\hat g\\|^2 / \\|g\\|^2$",
    "relative_mse": "MSE  $E\\|\\hat g - g\\|^2 / \\|g\\|^2$",
}
COSTS = {
    "relative_arithmetic": "arithmetic ÷ that of full",
    "relative_numbers": "numbers held at once ÷ those of full",
}
SETTING = ["task", "moment", "update", "estimator", "length"]
SEED = ["run", "seed", *SETTING]
ZERO = 1e-9  # relative numbers below this are float32's rounding
NOISE: dict[str, Any] = {"color": "0.25", "linewidth": 1.8, "linestyle": (0, (1, 1.5)), "zorder": 1}


def by_seed(probed: pd.DataFrame) -> pd.DataFrame:
    """Compute the relative numbers of each seed, and add rows with over = both for one draw on one batch.

    Args:
      probed: The table of the probe. Each of its runs has rows of full BPTT.

    Returns:
      Columns SEED, over, COSTS, relative_forward, states, cosine, PARTS; nan in the last two where the seed had
      diverged. Arithmetic is the median over the seeds, since draws and windows may differ between them.
    """
    probed = tables.unless_stopped(probed, "cosine", *PARTS)
    full = probed[probed["estimator"] == "full"].groupby("run")[["arithmetic", "numbers"]].first()
    arithmetic, numbers = (probed["run"].map(full[name]) for name in full)
    table = probed.assign(
        moment=snapshots.moments(probed),
        relative_arithmetic=probed["arithmetic"] / arithmetic,
        relative_forward=probed["forward_arithmetic"] / arithmetic,
        relative_numbers=probed["numbers"] / numbers,
    )
    table = table[[*SEED, "over", *COSTS, "relative_forward", "states", "cosine", *PARTS]]
    seeds = table.groupby(SETTING, dropna=False, sort=False)["relative_arithmetic"]
    table = table.assign(relative_arithmetic=seeds.transform("median"))
    draws, batches = (table[table["over"] == over] for over in ("draws", "batches"))
    both = batches.merge(draws[[*SEED, "relative_variance"]], on=SEED, suffixes=("", "_draws"))
    both["relative_variance"] += both.pop("relative_variance_draws")
    both["relative_mse"] = both["relative_bias2"] + both["relative_variance"]
    return pd.concat([table, both.assign(over="both")], ignore_index=True)


def medians(seeds: pd.DataFrame) -> pd.DataFrame:
    """Compute the median over seeds of each number of `by_seed`, with its interval."""
    table = aggregate(seeds, [*SETTING, "over", *COSTS], *PARTS, "cosine")
    table.loc[table["over"] == "both", tables.interval_of("cosine")] = np.nan
    return table


def aggregate(seeds: pd.DataFrame, keys: list[str], *values: str) -> pd.DataFrame:
    """Aggregate numbers over seeds, as `tables.aggregate_all`; a seed has diverged if its MSE is not finite."""
    lost = ~np.isfinite(seeds["relative_mse"])
    return tables.aggregate_all(seeds.assign(diverged=lost), keys, values, {"cosine": -np.inf})


def noise(table: pd.DataFrame) -> pd.Series:
    """Select from `medians` the noise of the minibatch: the variance of full BPTT over batches, by task."""
    full = table[(table["over"] == "batches") & (table["estimator"] == "full")]
    return full.set_index("task")["relative_variance"]


def noise_handle() -> Line2D:
    """Make the legend's entry for the line NOISE."""
    return Line2D([], [], label="noise of the minibatch", **NOISE)


def caption(
    table: pd.DataFrame,
    rows: pd.DataFrame,
    probed: pd.DataFrame,
    median: str = "Line",
    interval: str = "band",
) -> str:
    """Write what the marks mean, the tasks on which seeds diverged, and the runs.

    Args:
      table: The medians that a figure shows.
      rows: The rows of the study.
      probed: The table of the probe, whose runs count.
      median: The mark of a median.
      interval: The mark of its interval.

    Returns:
      The text.
    """
    lost = table.loc[table["diverged"] > 0, "task"].unique()
    where = f" Diverged on {', '.join(lost)}." if len(lost) else ""
    return f"{plots.spread(table, median, interval)}{where} {runs(rows, probed)}"


def runs(rows: pd.DataFrame, probed: pd.DataFrame) -> str:
    """Put the runs that the probe has measured into words, and name the strategies that train them."""
    shown = rows[rows["run"].isin(probed["run"])]
    return f"Trained by {plots.trained(shown)}. {plots.runs(shown)}"
