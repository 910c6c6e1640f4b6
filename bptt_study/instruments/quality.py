"""Bias and variance of a gradient estimator, sampled or enumerated."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # whose `stats`, half a second of every start, is imported where it is first used
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.instruments import lags
from bptt_study.types import Batch, Params, Problem, State, Strategy
from bptt_study.validation import SettingError, whole


class Interval(NamedTuple):
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float


class Quality(NamedTuple):
    """A gradient estimator ĝ against the exact gradient g, all parameters in one vector."""

    bias2: Interval  # ‖E[ĝ] - g‖²
    variance: Interval  # E‖ĝ - E[ĝ]‖²
    mse: Interval  # E‖ĝ - g‖² = bias² + variance
    cosine: Interval  # E[cos(ĝ, g)]
    signal_to_noise: Interval  # ‖E[ĝ]‖²/variance; inf without variance


def quality(
    strategy: Strategy,
    problem: Problem,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    draws: int = 64,
    state: State | None = None,
) -> Quality:
    """Bias, variance and the like of a strategy over `draws` keys, on one batch: see `compare`.

    `state` is h_0, for a strategy that carries it; without one, both start from zero. Holds
    draws × parameters numbers. The variance of compensated random cuts has a heavy tail, of which few
    draws see little: `lags.variance` has it exactly.

    Raises SettingError for fewer than three draws and for parameters that are not finite.
    """
    lags.finite(params)
    size = batch.mask.shape[1]
    start = strategy.init(params, size) if state is None else state
    hidden = problem.cell.zeros(size) if state is None else state

    @jax.jit
    def estimates(keys: Key[Array, "N"]) -> Float[Array, "N P"]:
        def one(key: Key[Array, ""]) -> Float[Array, "P"]:
            return ravel_pytree(strategy.estimate(params, start, batch, key)[0].grads)[0]

        return lax.map(one, keys)

    exact = ravel_pytree(backpropagate(problem, params, hidden, batch)[0].grads)[0]
    return compare(estimates(jax.random.split(key, whole("draws", draws, least=3))), exact)


def over_batches(
    strategy: Strategy, problem: Problem, params: Params, batches: Batch, key: Key[Array, ""]
) -> Quality:
    """Quality over N independent batches, leaves [N, T, B, …], with one draw on each: see `compare`.

    The gradient is that of all batches: its estimate from one batch varies with the data, for full BPTT
    too, and by the strategy's draws. State from zero. Holds 2N × parameters numbers.

    Raises SettingError for fewer than three batches and for parameters that are not finite.
    """
    lags.finite(params)
    count, _, size = batches.mask.shape
    state = strategy.init(params, size)

    @jax.jit
    def gradients(batches: Batch, keys: Key[Array, "N"]) -> tuple[Array, Array]:
        def one(arguments: tuple[Batch, Key[Array, ""]]) -> tuple[Array, Array]:
            batch, key = arguments
            estimate = strategy.estimate(params, state, batch, key)[0]
            exact = backpropagate(problem, params, problem.cell.zeros(size), batch)[0]
            return ravel_pytree(estimate.grads)[0], ravel_pytree(exact.grads)[0]

        return lax.map(one, (batches, keys))

    whole("batches", count, least=3)
    return compare(*gradients(batches, jax.random.split(key, count)))


def compare(estimates: Float[Array, "N P"], exact: Float[Array, "*N P"]) -> Quality:
    """N independent estimates of one vector g. Rows are draws on one batch, `exact` its gradient [P]; or
    one draw on each of N batches, `exact` the gradients of these [N, P] and g their mean: then the
    variance is also that of the data.

    ‖mean of ĝ - g‖² counts variance/N of these differences as bias, and is freed of it; so `bias2` can
    come out below 0. Intervals are the jackknife's with Student's t (Efron & Stein 1981); for an
    unbiased estimator that of `bias2` is rough, as a square has no slope at 0. SettingError for
    fewer than three rows.
    """
    rows, own = np.asarray(estimates, dtype=float), np.asarray(exact, dtype=float)
    N, g = whole("draws", len(rows), least=3), own.reshape(-1, rows.shape[1]).mean(axis=0)
    mean, m = rows.mean(axis=0), (rows - own).mean(axis=0)
    e, d = rows - mean, rows - own - m
    q, p = (e * e).sum(axis=1), (d * d).sum(axis=1)
    lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(g)
    cosine = rows @ g / np.where(lengths > 0, lengths, 1)

    def statistics(
        count: int, noise: Any, own: Any, off: Any, signal: Any, cosine: Any
    ) -> np.ndarray:
        """From Σ‖ĝ_n - mean‖², the same of ĝ_n - g_n, ‖mean of ĝ - g‖² and ‖mean‖²; for all or all but one."""
        variance = noise / (count - 1)
        bias2, signal = off - own / (count - 1) / count, signal - variance / count
        silent = variance <= 1e-28 * (signal + g @ g)  # rounding
        ratio = np.where(silent, np.inf, signal / np.where(silent, 1, variance))
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


class Moments(NamedTuple):
    """The numbers of `Quality` that can be had exactly."""

    bias2: float
    variance: float
    mse: float
    signal_to_noise: float  # inf without variance


def exact_quality(
    strategy: Strategy, problem: Problem, params: Params, batch: Batch, state: State | None = None
) -> Moments:
    """Bias², variance and the like by enumeration of all draws, as the strategy's claim lists them.

    The sequences of a batch draw independently, so their variances add: 2^(T-1) patterns for each,
    2^(T-1) · B gradients, held at once. `state` is h_0, zeros by default.

    Raises SettingError for T > 12, for a claim without lag weights and for parameters that are not finite.
    """
    steps, size = batch.mask.shape
    if steps > 12:
        way_out = "For longer sequences use `lags.variance` or `measure.quality`."
        raise SettingError("steps", steps, "between 1 and 12", way_out)
    lags.finite(params)
    claim = lags.declared(strategy)
    if claim.patterns is None and (strategy.claim.noise or claim.spread):
        way_out = "Use `lags.variance` or `quality`."
        raise SettingError(
            "strategy", "another kind of noise", "one that draws lag weights", way_out
        )
    alone = claim.weights(steps, steps)[None], jnp.ones(1)
    weights, probability = claim.patterns(steps) if claim.patterns else alone

    def cell(weights: Float[Array, "T T B"]) -> Float[Array, "P"]:
        grads = lags.weighted_gradient(problem, params, batch, weights, state)
        return ravel_pytree(grads["cell"])[0]

    @jax.jit
    def single(weights: Float[Array, "N T T"]) -> Float[Array, "N B P"]:
        return lax.map(lambda w: jax.vmap(lambda b: cell(w[..., None] * b))(jnp.eye(size)), weights)

    draws = single(weights)
    mean = jnp.einsum("n,nbp->bp", probability, draws)
    variance = float(jnp.einsum("n,nbp->", probability, (draws - mean) ** 2)) / claim.draws
    total, every = mean.sum(axis=0), jnp.ones((steps, steps, size))
    readout = lags.gradients(problem, params, batch, 1, state)["readout"]
    bias2 = float(jnp.sum((total - cell(every)) ** 2))
    signal = float(jnp.sum(total**2) + sum(jnp.sum(g**2) for g in jax.tree.leaves(readout)))
    ratio = signal / variance if variance > 0 else float("inf")
    return Moments(bias2, variance, bias2 + variance, ratio)
