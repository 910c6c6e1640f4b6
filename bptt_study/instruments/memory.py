"""How long the memory of a network is, by the gradient at each lag."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
import scipy  # whose `stats`, half a second of every start, is imported where it is first used
from jaxtyping import Array, Float, Int

from bptt_study.backprop.pytrees import norm
from bptt_study.types import (
    Params,
)
from bptt_study.validation import SettingError


def mass(gradients: Params) -> Float[Array, "K"]:
    """‖G_k‖ over the cell's parameters: the gradient mass at lag k."""
    return jax.vmap(norm)(gradients["cell"])


def effective_length(
    mass: Float[Array, "K"], shares: Sequence[float] = (0.5, 0.9, 0.99)
) -> Int[np.ndarray, "n"]:
    """The effective truncation length: the least k + 1 whose lags 0 … k hold each share of Σ_k mass.

    `mass` is `mass(gradients)`, or any row of `norms` or `adjoint_norms`. The total is that of the
    table: give it all T lags. SettingError where there is no mass at all.
    """
    held = np.cumsum(np.asarray(mass, dtype=float))
    if not held[-1] > 0:
        raise SettingError("mass", held[-1], "greater than 0")
    # rounding: a share of 1 is reached by the last lag at the latest
    return np.minimum(np.searchsorted(held, held[-1] * np.asarray(shares)), len(held) - 1) + 1


class Decay(NamedTuple):
    """norms ∝ rate^k; the interval is at 95 %."""

    rate: float  # per step of lag
    low: float
    high: float


def decay_rate(norms: Float[Array, "K B"]) -> Decay:
    """Decay of ‖∂l_s/∂h_{s-k}‖ with k, one loss s in B sequences: a line through the logarithms.

    `adjoint_norms(...)[-1]` is that of the last loss. Sequences with a norm of 0 (masked, relu at rest)
    are left out. The slope is the mean of the sequences' own; Student's t interval over them, as
    they are independent; for one sequence that of the regression, which takes the lags as
    independent and is too narrow for it. SettingError for fewer than three lags or no sequence left.
    """
    table = np.asarray(norms, dtype=float)
    table = table[:, (table > 0).all(axis=0)]
    lags, sequences = table.shape
    if lags < 3 or sequences < 1:
        raise SettingError(
            "norms", table.shape, "of shape [K, B] with K ≥ 3 and a sequence without zeros"
        )
    fits = [scipy.stats.linregress(np.arange(lags), column) for column in np.log(table).T]
    slopes = np.array([fit.slope for fit in fits])
    error, freedom = fits[0].stderr, lags - 2
    if sequences > 1:
        error, freedom = scipy.stats.sem(slopes), sequences - 1
    half = scipy.stats.t.ppf(0.975, freedom) * error
    low, middle, high = np.exp(slopes.mean() + np.array([-half, 0.0, half]))
    return Decay(float(middle), float(low), float(high))
