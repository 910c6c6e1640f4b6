"""Randomized truncation: links are cut at random, and what passes is scaled up to compensate."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.strategies.strategy_from import ALL_LAGS, strategy_from
from bptt_study.types import Batch, Claim, Estimate, LagWeights, Params, Problem, State, Strategy
from bptt_study.validation import SettingError, flag, number, whole


class Law(NamedTuple):
    """How segments end: the link δ = 1, 2, … steps after the last cut is kept with π = keep(δ)."""

    keep: Callable[[Float[Array, "..."]], Float[Array, "..."]]
    mean_length: float


def constant(mean_length: float) -> Law:
    """Cut every link with the probability 1/mean_length, in time steps: geometric segments."""
    cut = 1 / number("mean_length", mean_length, least=1)
    return Law(lambda delta: jnp.full_like(delta, 1 - cut), mean_length)


def power_law(mean_length: float, alpha: float = 6.0) -> Law:
    """Cut with (α - 1)/((α - 2) L0 + δ): the lengths fall off as a power, and their mean is L0.

    Args:
      mean_length: L0, time steps.
      alpha: α. Above 2 the mean is finite, above 3 the variance of the lengths, too.

    Raises:
      SettingError: For a mean length below 1, and α of 2 or less.

    References:
      Tallec & Ollivier 2017, section 4.2.
    """
    number("mean_length", mean_length, least=1)
    number("alpha", alpha, above=2)
    return Law(lambda delta: 1 - (alpha - 1) / ((alpha - 2) * mean_length + delta), mean_length)


def cuts(law: Law, uniforms: Float[Array, "T B"]) -> tuple[Bool[Array, "T B"], Float[Array, "T B"]]:
    """The links h_{t-1} -> h_t that are kept, and the probability π_t of each, given the cuts before.

    A link is kept if its uniform number is below π_t. So 0 keeps it and 1 cuts it, which is how all patterns
    are enumerated. The first step starts a segment in any case.

    Args:
      law: How segments end.
      uniforms: Numbers in [0, 1).
    """

    def link(delta: Array, uniform: Array) -> tuple[Array, tuple[Array, Array]]:
        pi = law.keep(delta)
        kept = uniform < pi
        return jnp.where(kept, delta + 1, 1.0), (kept, pi)

    delta = jnp.ones(uniforms.shape[1:])
    _, (kept, pi) = lax.scan(link, delta, uniforms[1:])
    first = jnp.ones((1, *uniforms.shape[1:]))
    return jnp.concatenate([first > 0, kept]), jnp.concatenate([first, pi])


def link_weights(
    kept: Bool[Array, "T B"], pi: Float[Array, "T B"], compensate: bool
) -> Float[Array, "T B"]:
    """ξ_t, which is 1/π_t with probability π_t and else 0, so that E[ξ_t] = 1; uncompensated, 1 or 0."""
    return jnp.where(kept, 1 / pi if compensate else 1.0, 0.0)


def randomized(problem: Problem, law: Law, compensate: bool = True, draws: int = 1) -> Strategy:
    """ARTBP: links are cut at random, and what passes is scaled up, so that the gradient is unbiased.

    The book's ξ_t: `λ_t = e_t + ξ_{t+1} J_{t+1}ᵀ λ_{t+1}`. Every sequence of a batch has draws of its own.

    Args:
      problem: Cell, readout and loss.
      law: How segments end.
      compensate: Whether what passes is divided by its probability π. False is the biased control.
      draws: So many independent draws are averaged: the same expectation, variance/draws, and that many
        backward passes.

    Raises:
      SettingError: For a compensation that does not exist, as a mean length of 1 keeps no link.

    References:
      Tallec & Ollivier 2017, equations 9-11 (anticipated reweighted truncated backpropagation).
    """
    if flag("compensate", compensate) and law.mean_length <= 1:
        raise SettingError(
            "mean_length",
            law.mean_length,
            "greater than 1",
            "No link would be kept, so nothing can be compensated; or set compensate=false.",
        )
    whole("draws", draws)

    def estimate(
        params: Params, state: State, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Estimate, State]:
        uniforms = jax.random.uniform(key, (*batch.mask.shape, draws))
        xi = jnp.moveaxis(link_weights(*cuts(law, uniforms), compensate), -1, 0)
        xi = xi[0] if draws == 1 else xi
        truncation = Truncation(link_weights=xi, reach=reach(law, batch.mask.size))
        return backpropagate(problem, params, state, batch, truncation)

    weights = ALL_LAGS._replace(spread=partial(_spread, law)) if compensate else _kept(law)
    claim = Claim(
        unbiased=compensate,
        memory="segment" if draws == 1 else "T",
        per_token=5 * draws,  # random bits, uniform numbers, probabilities, link weights, cuts
        source="Tallec & Ollivier 2017",
        lag_weights=weights._replace(
            patterns=partial(_patterns, law, compensate),
            draws=draws,
            link_weights=partial(_link_weights, law, compensate),
        ),
    )
    return strategy_from(problem, estimate, claim)


def survival(law: Law, lags: int) -> Float[Array, "K"]:
    """P(N > k) = π_1 … π_k of the segment length N, for the lags k = 0 … K - 1."""
    return jnp.cumprod(jnp.concatenate([jnp.ones(1), law.keep(jnp.arange(1.0, lags))]))


def reach(law: Law, tokens: int, chance: float = 0.01) -> int:
    """The length that with at most this chance any segment among so many tokens exceeds (a union bound).

    It is 2^16 steps at most. If a law reaches farther, the chance is larger.
    """
    with jax.ensure_compile_time_eval():
        survives = np.cumprod(np.asarray(law.keep(jnp.arange(1.0, 2**16)), float))
    return 1 + int(np.sum(survives > chance / tokens))


def _patterns(
    law: Law, compensate: bool, steps: int
) -> tuple[Float[Array, "N T T"], Float[Array, "N"]]:
    """All N = 2^(T-1) ways to cut one sequence: w[s,k] = ξ_{s-k+1} … ξ_s, and the probability of each."""
    cut = jnp.arange(2 ** (steps - 1)) >> jnp.arange(steps)[::-1, None] & 1  # [T, N], the first 0
    kept, pi = cuts(law, cut.astype(float))
    xi = link_weights(kept, pi, compensate)
    s, k, j = jnp.arange(steps)[:, None, None], jnp.arange(steps)[:, None], jnp.arange(steps)
    passed = ((s - k < j) & (j <= s))[..., None]
    w = jnp.prod(jnp.where(passed, xi, 1), axis=2)
    return jnp.moveaxis(w, -1, 0), jnp.prod(jnp.where(cut, 1 - pi, pi), axis=0)


def _link_weights(
    law: Law, compensate: bool, uniforms: Float[Array, "T *n"]
) -> Float[Array, "T *n"]:
    kept, pi = _cuts(law.keep(jnp.arange(1.0, len(uniforms) + 1)), uniforms)
    return link_weights(kept, pi, compensate)


@jax.jit
def _cuts(
    keep: Float[Array, "T"], uniforms: Float[Array, "T *n"]
) -> tuple[Bool[Array, "T *n"], Float[Array, "T *n"]]:
    """`cuts` for a law given as π at δ = 1 … T: one program for all of them."""
    return cuts(Law(lambda delta: keep[delta.astype(int) - 1], np.nan), uniforms)


@lru_cache(maxsize=32)  # [T, T, T] each
def _spread(law: Law, steps: int) -> Float[np.ndarray, "T T T"]:
    """c[j,t,u] of the variance with compensation, from the forward form z_t = I_t + ξ_t J_t z_{t-1}.

    ĝ - ∇L = Σ_j (ξ_j - 1) λ_j J_j z_{j-1}, whose terms are uncorrelated, as E[ξ_j | cuts before] = 1.
    Given that the segment began at step c, which has probability u_c π_1 … π_{j-1-c}, the variance
    of ξ_j is (1 - π_{j-c})/π_{j-c} and z_{j-1} sums steps t = c … j-1 over links that were all kept:

        Var ĝ = Σ_j Σ_{c<j} u_c S_{j-1-c} (1 - π_{j-c})/π_{j-c} ‖Σ_{t=c}^{j-1} (S_{t-c}/S_{j-1-c}) F[j,t]‖²

    with S_n = π_1 … π_n and F as `flow_products` says. In float64: S_n may be tiny.
    """
    pi = np.append(1.0, np.asarray(law.keep(jnp.arange(1.0, steps)), float))
    with np.errstate(divide="ignore"):
        log_S, n = np.cumsum(np.log(pi)), np.arange(steps)  # S may be below the least float
    age = n[:, None] - n
    log_outlives = np.where(age >= 0, log_S[np.abs(age)], -np.inf)  # [t, c]: of S_{t-c}
    outlives = np.exp(log_outlives)
    starts = np.linalg.solve(outlives, np.ones(steps))[:-1]  # u: every step lies in one segment
    log_kept, delta = log_S[np.abs(age[:-1, :-1])], pi[np.abs(age[1:, :-1])]  # [j, c], j = 1 … T-1
    before = (age[:-1, :-1] >= 0)[..., None] & (n < n[1:, None, None])  # c < j and t < j
    with np.errstate(over="ignore", invalid="ignore"):  # see `lags.variance`
        ratio = np.exp(
            log_outlives.T[:-1] - log_kept[..., None] / 2
        )  # [j, c, t]: S_{t-c}/√S_{j-1-c}
        each = np.sqrt(starts * (1 - delta) / delta)[..., None]
        root = np.where(before, each * ratio, 0)
        products = root.transpose(0, 2, 1) @ root
    return np.concatenate([np.zeros((1, steps, steps)), products])


def _kept(law: Law) -> LagWeights:
    """P(no cut within k links): lag by lag, what cuts without compensation let through."""

    def window(lags: int) -> Float[Array, "K"]:
        """E[(N - k)₊]/E[N] = 1 - Σ_{j<k} P(N > j)/E[N], renewal theory's stationary age."""
        return 1 - jnp.cumsum(jnp.append(0.0, survival(law, lags)[:-1])) / law.mean_length

    def weights(steps: int, lags: int) -> Float[Array, "T K"]:
        """w[s,k] = Σ_{r ≤ s-k} u_r P(N > s - r), u_r = P(a segment starts at step r), u_0 = 1.

        Every step lies in one segment, w[s,0] = 1, and these T equations are solved for u.
        """
        s, r = jnp.arange(steps)[:, None], jnp.arange(steps)
        outlives = jnp.tril(survival(law, steps)[jnp.abs(s - r)])
        starts = jax.scipy.linalg.solve_triangular(outlives, jnp.ones(steps), lower=True)
        return jnp.take_along_axis(
            jnp.cumsum(outlives * starts, axis=1), jnp.maximum(s - jnp.arange(lags), 0), axis=1
        )

    return LagWeights(window, weights)


def randomized_constant(
    problem: Problem, mean_length: float, compensate: bool = True, draws: int = 1
) -> Strategy:
    """`randomized` with the constant law, as the command line names its settings."""
    return randomized(problem, constant(mean_length), compensate, draws)


def randomized_power_law(
    problem: Problem,
    mean_length: float,
    alpha: float = 6.0,
    compensate: bool = True,
    draws: int = 1,
) -> Strategy:
    """`randomized` with the power law, as the command line names its settings."""
    return randomized(problem, power_law(mean_length, alpha), compensate, draws)
