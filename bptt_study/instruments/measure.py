"""What a strategy's gradient looks like and costs, measured outside of any timed run."""

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # whose `stats`, half a second of every start, is imported where it is first used
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.flatten_util import ravel_pytree
from jax.interpreters import partial_eval
from jaxtyping import Array, Float, Key

from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.instruments import lags
from bptt_study.types import Batch, Params, Problem, State, Strategy
from bptt_study.validation import SettingError, whole


def gradient_norms(
    strategy: Strategy, params: Params, batch: Batch, key: Key[Array, ""], draws: int = 16
) -> dict[str, Float[Array, "T"]]:
    """Gradient norms over time steps and over the lag, as the strategy sees them; state from zero.

    time: ‖∂L/∂h_t‖ for t = 1 … T, L the mean loss of the batch, Frobenius norm over B and H.
    lag: ‖∂l_T/∂h_{T-k}‖ for k = 0 … T - 1, l_T the last step's loss, mean over the sequences.
    For the LSTM, h is the pair (h, c). Both are means over `draws` keys of a random strategy.
    """
    size = batch.mask.shape[1]
    state = strategy.init(params, size)
    last = batch._replace(mask=jnp.zeros_like(batch.mask).at[-1].set(1))

    def norms(key: Key[Array, ""]) -> dict[str, Array]:
        over_time = strategy.estimate(params, state, batch, key)[0].metrics["adjoint_norms"]
        over_lag = strategy.estimate(params, state, last, key)[0].metrics["adjoint_norms"]
        # the loss of one token is the mean over the batch times its size
        return {
            "time": jnp.linalg.norm(over_time, axis=1),
            "lag": over_lag[::-1].mean(axis=1) * size,
        }

    return jax.tree.map(lambda n: n.mean(axis=0), lax.map(norms, jax.random.split(key, draws)))


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


# One operation per number of the result, as XLA counts them too.
POINTWISE = """
    add add_any sub mul div neg abs sign max min pow integer_pow square sqrt rsqrt exp exp2 expm1
    log log1p tanh logistic sin cos erf erf_inv floor ceil round
"""


def arithmetic(fn: Callable[..., Any], *args: Any) -> int:
    """Floating-point operations of fn(*args), counted from its jaxpr with the lengths of its loops.

    A matrix product [M, N] × [N, K] counts 2MNK; pointwise functions one per number of the result,
    transcendental ones too; sums and maxima one per number of the argument. Moving numbers, random
    bits and factorisations count nothing; of the branches of a condition the dearest counts. XLA's own
    `cost_analysis()` takes a loop's body once, whatever its length. What no result needs is left out.
    A while loop counts as often as it turns with these arguments: fn is run up to it, and it turn by turn.

    Raises SettingError for a while loop in another loop, under vmap, or in a function that is compiled apart.
    """
    closed = jax.make_jaxpr(fn)(*args)
    jaxpr, used = _needed(closed.jaxpr)
    inputs = [a for a, u in zip(jax.tree.leaves(args), used, strict=True) if u]
    unnamed = jaxpr.debug_info._replace(result_paths=None)

    def inputs_of(n: int) -> list[Any]:
        head = jaxpr.replace(eqns=jaxpr.eqns[:n], outvars=jaxpr.eqns[n].invars, debug_info=unnamed)
        return jax.jit(jaxpr_as_fun(ClosedJaxpr(head, closed.consts)))(*inputs)

    def operations(n: int, name: str, params: dict[str, Any]) -> int:
        if name != "while":
            return _of_equation(jaxpr.eqns[n])
        asked, once = (
            _operations(_needed(params[part].jaxpr)[0]) for part in ("cond_jaxpr", "body_jaxpr")
        )
        turns = _turns(params, inputs_of(n)) if asked or once else 0
        return turns * once + (turns + 1) * asked

    return sum(operations(n, e.primitive.name, e.params) for n, e in enumerate(jaxpr.eqns))


def _needed(jaxpr: Any) -> tuple[Any, list[bool]]:
    """Without what no result needs, and which inputs that takes.

    A pullback also says the value that it is the derivative of; the compiler drops what nobody reads.
    """
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))


def _turns(loop: dict[str, Any], inputs: list[Any]) -> int:
    """How often a while loop turns."""
    parts = loop["cond_nconsts"], loop["cond_nconsts"] + loop["body_nconsts"]
    told, given, carry = inputs[: parts[0]], inputs[parts[0] : parts[1]], inputs[parts[1] :]
    goes_on, body = (jax.jit(jaxpr_as_fun(loop[name])) for name in ("cond_jaxpr", "body_jaxpr"))
    if loop["cond_jaxpr"].out_avals[0].shape:
        allowed = "free of while loops under vmap"
        raise SettingError("fn", "one", allowed, "Use loops of known length (lax.scan).")
    turns = 0
    while goes_on(*told, *carry)[0]:
        carry, turns = body(*given, *carry), turns + 1
    return turns


def temporary_bytes(fn: Callable[..., Any], *args: Any) -> int:
    """What the compiled fn(*args) holds beside its arguments and results, as the compiler planned it."""
    memory = jax.jit(fn).lower(*args).compile().memory_analysis()
    if memory is None:
        raise SettingError(
            "device", jax.default_backend(), "a device whose compiler reports its memory"
        )
    return int(memory.temp_size_in_bytes)


def _operations(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    inner = [
        _operations(getattr(sub, "jaxpr", sub))
        for value in params.values()
        for sub in (value if isinstance(value, (list, tuple)) else [value])
        if hasattr(sub, "jaxpr") or hasattr(sub, "eqns")
    ]
    if name == "while":
        if any(inner):
            allowed = "free of while loops inside other loops"
            raise SettingError("fn", "one", allowed, "Use loops of known length (lax.scan).")
        return 0
    if inner:  # one branch of a condition runs; of jit, custom rules and the like all of it
        once = max(inner) if name == "cond" else sum(inner)
        return params["length"] * once if name == "scan" else once
    out = equation.outvars[0].aval if equation.outvars else None
    if out is None or not jnp.issubdtype(out.dtype, jnp.inexact):
        return 0
    result = out.shape
    argument = equation.invars[0].aval.shape if equation.invars else ()
    if name == "dot_general":
        contracted = params["dimension_numbers"][0][0]
        return 2 * prod(result) * prod(argument[axis] for axis in contracted)
    if name.startswith(("reduce_", "cum")):
        return prod(argument)
    return prod(result) if name in POINTWISE.split() else 0
