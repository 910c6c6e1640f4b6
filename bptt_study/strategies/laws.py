"""The laws of random segments: the probability with which each link is kept."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bptt_study.validation import SettingError, number


class Law(NamedTuple):
    """The law of the segments: link δ = 1, 2, … steps after the last cut is kept with probability keep(δ)."""

    keep: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    mean_length: float


MANY = 2**16  # time steps; segments that are longer are left out, or estimated
TRIED = 4096  # time steps over which a law is checked when it is given; a longer call checks as many as it has


def check_law(law: Law, compensate: bool, steps: int = TRIED) -> None:
    """Check that a law has probabilities, of which compensation can divide, and the mean length that it says.

    Args:
      law: The law of the segments.
      compensate: Whether adjoints are divided by the probabilities.
      steps: T, the steps of a call.

    Raises:
      SettingError: For another law.
    """
    if number("mean_length", law.mean_length, least=1) <= 1 and compensate:
        way_out = (
            "No link would be kept to be compensated. With compensate=false there are such cuts."
        )
        raise SettingError("mean_length", law.mean_length, "greater than 1", way_out)
    pi = _keep(law, steps)
    if pi.shape != (steps - 1,) or not ((pi >= 0) & (pi <= 1)).all():
        wrong = pi.shape if pi.shape != (steps - 1,) else pi[~((pi >= 0) & (pi <= 1))][0]
        raise SettingError("law.keep", f"one that returns {wrong}", "a probability for each δ")
    if compensate and (pi == 0).any():
        said, allowed = (
            f"0 for δ = {pi.argmin() + 1}",
            "above 0 where adjoints are scaled up by 1/π",
        )
        raise SettingError("law.keep", said, allowed, "A link that is never kept is never counted.")
    survives = np.cumprod(np.append(1.0, pi))
    length = survives.sum()  # E[N] = Σ P(N > k), without what lies beyond
    most = length + _beyond(survives)
    if not 0.999 * length <= law.mean_length <= 1.001 * most:
        shown = most if np.isfinite(most) else length
        allowed = f"the mean length of the segments that `law.keep` makes ({shown:.4g})"
        raise SettingError("law.mean_length", law.mean_length, allowed)


def _beyond(survives: Float[np.ndarray, "T"]) -> float:
    """Bound Σ P(N > k) over k ≥ T: there, P falls at least as k^-c does, as over the last half of the steps."""
    steps, last = len(survives), survives[-1]
    if last == 0:
        return 0.0
    c = np.log(survives[steps // 2] / last) / np.log((steps - 1) / (steps // 2))
    return float(steps * last / (c - 1)) if c > 1 else np.inf


def constant(mean_length: float) -> Law:
    """Make the law that cuts every link with the probability 1/mean_length: geometric segments.

    Args:
      mean_length: The mean length of a segment, time steps.

    Returns:
      The law.

    Raises:
      SettingError: For a mean length below 1.
    """
    cut = 1 / number("mean_length", mean_length, least=1)
    return Law(lambda delta: jnp.full_like(delta, 1 - cut), mean_length)


def power_law(mean_length: float, alpha: float = 6.0) -> Law:
    """Make the law that cuts link δ with (α - 1)/((α - 2) L0 + δ): the lengths have a power law's tail.

    Args:
      mean_length: L0, the mean length of a segment, time steps.
      alpha: α. Above 2 the mean of the lengths is finite, above 3 their variance, too.

    Returns:
      The law.

    Raises:
      SettingError: For a mean length below 1, and α of 2 or less.

    References:
      Tallec & Ollivier 2017, section 4.2.
    """
    number("mean_length", mean_length, least=1)
    number("alpha", alpha, above=2)
    return Law(lambda delta: 1 - (alpha - 1) / ((alpha - 2) * mean_length + delta), mean_length)


def survival(law: Law, lags: int) -> Float[Array, "K"]:
    """Compute P(N > k) = π_1 … π_k of the segment length N.

    Args:
      law: The law of the segments.
      lags: K.

    Returns:
      The probabilities for k = 0 … K - 1, shape [K].
    """
    return jnp.cumprod(jnp.concatenate([jnp.ones(1), law.keep(jnp.arange(1.0, lags))]))


def reach(law: Law, tokens: int, chance: float = 0.01) -> int:
    """Compute a length that no segment exceeds, with a probability of at least 1 - `chance` (a union bound).

    Args:
      law: The law of the segments.
      tokens: The number of tokens, each of which may start a segment.
      chance: The probability that some segment is longer.

    Returns:
      The length, time steps, at most 2^16. For a law with longer segments the probability is larger.
    """
    return 1 + int(np.sum(np.cumprod(_keep(law, MANY)) > chance / tokens))


def tails(law: Law, lags: int) -> Float[np.ndarray, "K"]:
    """Compute Σ_{j≥k} P(N > j)/E[N] from the far end; as 1 - Σ_{j<k} P(N > j)/E[N], small ones would cancel.

    Args:
      law: The law of the segments.
      lags: K.

    Returns:
      The sums for k = 0 … K - 1, float64.
    """
    survives = np.cumprod(np.append(1.0, _keep(law, lags + MANY)))
    beyond = np.clip(law.mean_length - survives.sum(), 0, _beyond(survives))
    sums = np.cumsum(np.append(survives, beyond)[::-1])[::-1]
    return sums[:lags] / sums[0]


def _keep(law: Law, steps: int) -> Float[np.ndarray, "T-1"]:
    """Compute π at δ = 1 … T - 1, outside of any trace."""
    with jax.ensure_compile_time_eval():
        return np.asarray(law.keep(jnp.arange(1.0, steps)), float)
