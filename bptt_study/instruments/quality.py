"""Bias and variance of a gradient estimator, sampled."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # `scipy.stats` takes half a second: it loads itself on first use
from jax import lax
from jaxtyping import Array, Float, Key

from bptt_study.backprop.arguments import arguments, arrays
from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.backprop.pytrees import numbers
from bptt_study.backprop.shapes import check_call
from bptt_study.instruments.lag_arguments import finite
from bptt_study.types import Batch, Params, Problem, State, Strategy
from bptt_study.validation import SettingError, instance, whole


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


class Quality(NamedTuple):
    """The quality of an estimator ĝ of the exact gradient g, with all parameters in one vector.

    The signal is the estimator's own mean E[ĝ], with its bias; g does not enter. So the ratio says how many
    estimates one must average to see the direction of E[ĝ], right or wrong. The cosine is the mean of the
    estimates' own cosines with g, so noise lowers it, too.
    """

    bias2: Interval  # ‖E[ĝ] - g‖²
    variance: Interval  # E‖ĝ - E[ĝ]‖²
    mse: Interval  # E‖ĝ - g‖² = bias² + variance
    cosine: Interval  # E[cos(ĝ, g)], where an estimate of 0 counts as 0; nan if g is 0
    signal_to_noise: Interval  # ‖E[ĝ]‖²/variance; inf without variance, nan without both


def quality(
    strategy: Strategy,
    problem: Problem,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    draws: int = 64,
    state: State | None = None,
) -> Quality:
    """Sample bias, variance and the like of a strategy on one batch, as `compare` defines them.

    The variance of compensated random cuts has a heavy tail, which few draws hardly show: `lags.variance`
    gives it exactly.

    Args:
      strategy: The estimator.
      problem: Cell, readout and loss, for the exact gradient.
      params: The parameters.
      batch: One batch of T steps.
      key: The key, which is split into one key per draw.
      draws: The number of estimates; draws × parameters numbers are held.
      state: h_0, leaves [B, H], if that is the whole state of the strategy. None: zeros.

    Returns:
      Each number with its 95 % interval.

    Raises:
      SettingError: For fewer than three draws, parameters that are not finite, and a state for a strategy
        that carries more than h_0.
    """
    instance("strategy", strategy, Strategy)
    params, batch = arguments(problem, params, batch)
    finite(params)
    size = batch.mask.shape[1]
    start = strategy.init(params, size)
    if state is not None:
        alone: Any = jax.tree.structure(problem.cell.zeros(size))
        if strategy.claim.reach == "stream" or alone != jax.tree.structure(start):
            allowed = "None for a strategy that carries more than h_0"
            why = "From the zero state its reference is the call's."
            raise SettingError("state", "given", allowed, why)
        start = state
    hidden = problem.cell.zeros(size) if state is None else state

    @jax.jit
    def estimates(keys: Key[Array, "N"]) -> Float[Array, "N P"]:
        def one(key: Key[Array, ""]) -> Float[Array, "P"]:
            return numbers(strategy.estimate(params, start, batch, key)[0].grads)

        return lax.map(one, keys)

    exact = numbers(backpropagate(problem, params, hidden, batch)[0].grads)
    return compare(estimates(jax.random.split(key, whole("draws", draws, least=3))), exact)


def over_batches(
    strategy: Strategy, problem: Problem, params: Params, batches: Batch, key: Key[Array, ""]
) -> Quality:
    """Sample the quality over independent batches with one draw on each, as `compare` defines it.

    The exact gradient is that of all batches. Its estimate from one batch varies with the data, even for full
    BPTT, and with the strategy's draws. So E[ĝ] is the mean over data and draws, and `signal_to_noise` is its
    ‖E[ĝ]‖² ÷ the variance of the estimate from one batch. States start from zero.

    Args:
      strategy: The estimator.
      problem: Cell, readout and loss, for the exact gradients.
      params: The parameters.
      batches: N batches, leaves [N, T, B, …]; 2N × parameters numbers are held.
      key: The key, which is split into one key per batch.

    Returns:
      Each number with its 95 % interval.

    Raises:
      SettingError: For fewer than three batches, one batch alone, batches that do not fit the network, and
        parameters that are not finite.
    """
    instance("strategy", strategy, Strategy)
    params, batches = (
        arrays("params", params),
        arrays("batches", instance("batches", batches, Batch)),
    )
    count, _, size = _check_batches(problem, params, batches)
    finite(params)
    state = strategy.init(params, size)

    @jax.jit
    def gradients(batches: Batch, keys: Key[Array, "N"]) -> tuple[Array, Array]:
        def one(arguments: tuple[Batch, Key[Array, ""]]) -> tuple[Array, Array]:
            batch, key = arguments
            estimate = strategy.estimate(params, state, batch, key)[0]
            exact = backpropagate(problem, params, problem.cell.zeros(size), batch)[0]
            return numbers(estimate.grads), numbers(exact.grads)

        return lax.map(one, (batches, keys))

    whole("batches", count, least=3)
    return compare(*gradients(batches, jax.random.split(key, count)))


def _check_batches(problem: Problem, params: Params, batches: Batch) -> tuple[int, ...]:
    """Check batches as one with all their sequences, before jit hides the ids, and return [N, T, B]."""
    shape = batches.mask.shape
    if len(shape) != 3:
        found = f"a mask of shape {list(shape)}"
        raise SettingError("batches", found, "N batches, whose mask is [N, T, B]")
    for name, array in batches._asdict().items():
        if array.shape[:3] != shape:
            found, allowed = (
                f"shape {list(array.shape)}",
                f"of the mask's shape {list(shape)}, or [N, T, B, …]",
            )
            raise SettingError(f"batches.{name}", found, allowed)
    together = jax.tree.map(
        lambda a: jnp.moveaxis(a, 0, 1).reshape(shape[1], -1, *a.shape[3:]), batches
    )
    params, together = arguments(problem, params, together)
    check_call(problem, params, problem.cell.zeros(shape[0] * shape[2]), together)
    return shape


def compare(
    estimates: Float[Array | np.ndarray, "N P"], exact: Float[Array | np.ndarray, "*N P"]
) -> Quality:
    """Compute bias², variance, mean squared error, cosine and signal-to-noise ratio of N estimates of g.

    A complex number counts as its two parts.

    ‖mean of ĝ - g‖² contains 1/N of the variance of these differences. It is subtracted, so `bias2` may be
    negative. For an unbiased estimator the interval of `bias2` is rough, as a square has no slope at 0.
    Likewise `signal_to_noise` is (‖mean of ĝ‖² - variance/N)/variance, and may be negative. It is that of E[ĝ],
    whatever the bias.

    Args:
      estimates: Independent rows [N, P]: draws on one batch, or one draw on each of N batches.
      exact: For draws on one batch, its gradient g [P]. For N batches, their gradients [N, P], whose mean is g;
        then the variance includes that of the data.

    Returns:
      Each number with its 95 % interval, by the jackknife and Student's t.

    Raises:
      SettingError: For fewer than three rows.

    References:
      Efron & Stein 1981 (jackknife).
    """
    rows, own = _reals(estimates), _reals(exact)
    N, g = whole("draws", len(rows), least=3), own.reshape(-1, rows.shape[1]).mean(axis=0)
    mean, m = rows.mean(axis=0), (rows - own).mean(axis=0)
    e, d = rows - mean, rows - own - m
    q, p = (e * e).sum(axis=1), (d * d).sum(axis=1)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(g)
    cosine = rows @ g / np.where(lengths > 0, lengths, 1 if g.any() else np.nan)

    def statistics(
        count: int, noise: Any, own: Any, off: Any, signal: Any, cosine: Any
    ) -> np.ndarray:
        """Compute the five numbers of all rows, or of all but one, from sums over them.

        noise is Σ‖ĝ_n - mean‖², own the same sum for ĝ_n - g_n, off ‖mean of ĝ - g‖², signal ‖mean‖².
        """
        variance = noise / (count - 1)
        bias2, signal = off - own / (count - 1) / count, signal - variance / count
        silent = variance <= 1e-28 * (signal + g @ g)  # rounding
        noiseless = np.where(signal > 0, np.inf, np.nan)
        ratio = np.where(silent, noiseless, signal / np.where(silent, 1, variance))
        return np.stack([bias2, variance, bias2 + variance, cosine, ratio])

    value = statistics(N, q.sum(), p.sum(), m @ m, mean @ mean, cosine.mean())
    without = statistics(
        N - 1,
        q.sum() - q * N / (N - 1),
        p.sum() - p * N / (N - 1),
        m @ m - 2 * (d @ m) / (N - 1) + p / (N - 1) ** 2,
        mean @ mean - 2 * (e @ mean) / (N - 1) + q / (N - 1) ** 2,
        (cosine.sum() - cosine) / (N - 1),
    )
    finite = np.isfinite(value)
    spread = np.where(finite[:, None], without, 0).std(axis=1) * np.sqrt(N - 1)
    half = scipy.stats.t.ppf(0.975, N - 1) * spread
    return Quality(*map(Interval, value.tolist(), (value - half).tolist(), (value + half).tolist()))


def _reals(vectors: Any) -> np.ndarray:
    """Return vectors with the parts of complex numbers side by side."""
    a = np.asarray(vectors)
    parts = [a.real, a.imag] if np.iscomplexobj(a) else [a]
    return np.concatenate(parts, axis=-1).astype(float)
