"""The length of a network's memory, by the gradient at each lag."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import scipy  # `scipy.stats` takes half a second: it loads itself on first use
from jaxtyping import Array, Float, Int

from bptt_study.backprop.compare import said
from bptt_study.backprop.pytrees import norm
from bptt_study.types import Params
from bptt_study.validation import SettingError


def mass(gradients: Params) -> Float[Array, "K"]:
    """Compute the gradient mass at each lag, ‖G_k‖ over the cell's parameters.

    Args:
      gradients: G_k, a tree like params with a leading axis [K].

    Returns:
      The norms [K].

    Raises:
      SettingError: For a part of the gradients.
    """
    if not (isinstance(gradients, dict) and "cell" in gradients):
        raise SettingError("gradients", said(gradients), 'a dict {"cell": …, "readout": …}')
    lags = len(jax.tree.leaves(gradients)[0])  # a cell may have no parameters
    return jax.vmap(norm, axis_size=lags)(gradients["cell"])


def effective_length(
    mass: Float[Array, "K"], shares: Sequence[float] = (0.5, 0.9, 0.99)
) -> Int[np.ndarray, "n"]:
    """Compute the effective truncation length: the least k + 1 whose lags 0 … k hold a share of Σ_k mass.

    Args:
      mass: `mass(gradients)`, or any row of `norms` or `adjoint_norms`, for all T lags.
      shares: Shares of the total mass.

    Returns:
      The length for each share, time steps.

    Raises:
      SettingError: For a total of 0, such as that of an empty mask, a mass of another shape, below 0 or not
        finite, and shares outside (0, 1].
    """
    each = _sizes("mass", mass, 1, "one finite number of at least 0 for each lag")
    parts = np.asarray(shares, dtype=float)
    if not ((parts > 0) & (parts <= 1)).all():
        raise SettingError("shares", parts.tolist(), "numbers above 0 and up to 1")
    # a power of two scales without rounding: the sum of finite numbers may be infinite
    held = np.cumsum(np.ldexp(each, -np.frexp(each.max())[1]))
    if not held[-1] > 0:
        raise SettingError("mass", held[-1], "greater than 0")
    # rounding may put a share of 1 beyond the last lag
    return np.minimum(np.searchsorted(held, held[-1] * parts), len(held) - 1) + 1


def _sizes(name: str, given: Array, axes: int, allowed: str) -> Float[np.ndarray, "..."]:
    """Return finite numbers of at least 0 as float64, with so many axes; raise SettingError for others."""
    table = np.asarray(given, dtype=float)
    if table.ndim != axes or not table.size:
        raise SettingError(name, f"shape {list(table.shape)}", allowed)
    if not (good := np.isfinite(table) & (table >= 0)).all():
        raise SettingError(name, table[~good][0], allowed)
    return table


class Decay(NamedTuple):
    """The rate of norms ∝ rate^k, with its 95 % interval."""

    rate: float  # factor per step of lag
    low: float
    high: float


def decay_rate(norms: Float[Array, "K B"]) -> Decay:
    """Fit the decay of ‖∂l_s/∂h_{s-k}‖ with the lag k, for one loss s: a line through the logarithms.

    The rate is exp(slope), the factor per step of lag. The slope is the mean of the sequences' slopes. As
    sequences are independent, the interval is Student's t interval over them. For one sequence it is that of
    the regression, which takes the lags as independent, and so is too narrow.

    Args:
      norms: Norms [K, B], such as `adjoint_norms(…)[-1]` for the last loss. Sequences with a norm of 0 are left
        out: it is that of a masked loss or of relu at rest, or too small for the float type.

    Returns:
      The rate with its interval.

    Raises:
      SettingError: For fewer than three lags, if no sequence is left, and for nan, inf and numbers below 0.
    """
    table = _sizes("norms", norms, 2, "finite numbers of at least 0, [K, B]")
    table = table[:, (table > 0).all(axis=0)]
    lags, sequences = table.shape
    if lags < 3 or sequences < 1:
        allowed = "of shape [K, B] with K ≥ 3 and a sequence without zeros"
        way_out = "If they underflow to 0, use fewer lags or float64."
        raise SettingError("norms", table.shape, allowed, way_out)
    fits = [scipy.stats.linregress(np.arange(lags), column) for column in np.log(table).T]
    slopes = np.array([fit.slope for fit in fits])
    error, freedom = fits[0].stderr, lags - 2
    if sequences > 1:
        error, freedom = scipy.stats.sem(slopes), sequences - 1
    half = scipy.stats.t.ppf(0.975, freedom) * error
    low, middle, high = np.exp(slopes.mean() + np.array([-half, 0.0, half]))
    return Decay(float(middle), float(low), float(high))
