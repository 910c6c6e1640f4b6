"""Randomized truncation: links are cut at random, and the adjoints that pass are scaled up to compensate."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.strategies.laws import (
    TRIED,
    Law,
    check_law,
    constant,
    power_law,
    reach,
    survival,
    tails,
)
from bptt_study.strategies.strategy_from import ALL_LAGS, strategy_from
from bptt_study.strategies.validated import validated
from bptt_study.types import Batch, Claim, Estimate, LagWeights, Params, Problem, State, Strategy
from bptt_study.validation import flag, instance, whole


def cuts(law: Law, uniforms: Float[Array, "T B"]) -> tuple[Bool[Array, "T B"], Float[Array, "T B"]]:
    """Decide which links h_{t-1} -> h_t are kept.

    A link is kept if its uniform number is below π_t. So 0 keeps it and 1 cuts it, which is how all patterns
    are enumerated. The first step always starts a segment.

    Args:
      law: The law of the segments.
      uniforms: Numbers in [0, 1), [T, B].

    Returns:
      The links that are kept [T, B], and the probability π_t of each [T, B], given the cuts before it.
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
    """Compute ξ_t, which is 1/π_t with probability π_t and else 0, so that E[ξ_t] = 1.

    Args:
      kept: The links that are kept [T, B].
      pi: π_t [T, B].
      compensate: False makes ξ_t 1 for a kept link.

    Returns:
      The link weights ξ_t [T, B].
    """
    return jnp.where(kept, 1 / pi if compensate else 1.0, 0.0)


@validated
def randomized(problem: Problem, law: Law, compensate: bool = True, draws: int = 1) -> Strategy:
    """Make ARTBP: links are cut at random, and adjoints that pass are scaled up, so the gradient is unbiased.

    The book's ξ_t: `λ_t = e_t + ξ_{t+1} J_{t+1}ᵀ λ_{t+1}`. Every sequence of a batch has its own draws.

    Args:
      problem: Cell, readout and loss.
      law: The law of the segments.
      compensate: Whether adjoints that pass are divided by their probability π. False is the biased control.
      draws: The number of independent draws that are averaged. They have the same expectation, divide the
        variance by `draws`, and take as many backward passes.

    Returns:
      The strategy.

    Raises:
      SettingError: For a compensation that does not exist: a mean length of 1 keeps no link. For a law of
        one's own that is no law.

    References:
      Tallec & Ollivier 2017, equations 9-11 (anticipated reweighted truncated backpropagation).
    """
    instance("law", law, Law)
    whole("draws", draws)
    check_law(law, flag("compensate", compensate))

    def estimate(
        params: Params, state: State, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Estimate, State]:
        if len(batch.mask) > TRIED:
            check_law(law, compensate, len(batch.mask))
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


def _patterns(
    law: Law, compensate: bool, steps: int
) -> tuple[Float[Array, "N T T"], Float[Array, "N"]]:
    """List all N = 2^(T-1) ways to cut one sequence: w[s,k] = ξ_{s-k+1} … ξ_s, and their probabilities."""
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
    """Call `cuts` for a law given as π at δ = 1 … T, so that one program serves all laws."""
    return cuts(Law(lambda delta: keep[delta.astype(int) - 1], np.nan), uniforms)


@lru_cache(maxsize=32)  # [T, T, T] each
def _spread(law: Law, steps: int) -> Float[np.ndarray, "T T T"]:
    """Make c[j,t,u] of the variance with compensation, from the forward form z_t = I_t + ξ_t J_t z_{t-1}.

    ĝ - ∇L = Σ_j (ξ_j - 1) λ_j J_j z_{j-1}, whose terms are uncorrelated, as E[ξ_j | cuts before] = 1.
    Given that the segment began at step c, which has probability u_c π_1 … π_{j-1-c}, the variance
    of ξ_j is (1 - π_{j-c})/π_{j-c} and z_{j-1} sums steps t = c … j-1 over links that were all kept:

        Var ĝ = Σ_j Σ_{c<j} u_c S_{j-1-c} (1 - π_{j-c})/π_{j-c} ‖Σ_{t=c}^{j-1} (S_{t-c}/S_{j-1-c}) F[j,t]‖²

    with S_n = π_1 … π_n and F as in `flow_products`. The numbers are float64, because S_n may be tiny.
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
    """Make the lag weights of cuts without compensation, P(no cut within k links)."""

    def window(lags: int) -> Float[Array, "K"]:
        """Compute E[(N - k)₊]/E[N] = Σ_{j≥k} P(N > j)/E[N], renewal theory's stationary age."""
        return jnp.asarray(tails(law, lags))

    def weights(steps: int, lags: int) -> Float[Array, "T K"]:
        """Compute w[s,k] = Σ_{r ≤ s-k} u_r P(N > s - r), u_r = P(a segment starts at step r), u_0 = 1.

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
    """Make `randomized` with the constant law, from the settings of the command line.

    Args:
      problem: Cell, readout and loss.
      mean_length: The mean length of a segment, time steps.
      compensate: As in `randomized`.
      draws: As in `randomized`.

    Returns:
      The strategy.

    Raises:
      SettingError: As `constant` and `randomized`.
    """
    return randomized(problem, constant(mean_length), compensate, draws)


def randomized_power_law(
    problem: Problem,
    mean_length: float,
    alpha: float = 6.0,
    compensate: bool = True,
    draws: int = 1,
) -> Strategy:
    """Make `randomized` with the power law, from the settings of the command line.

    Args:
      problem: Cell, readout and loss.
      mean_length: L0, the mean length of a segment, time steps.
      alpha: α, as in `power_law`.
      compensate: As in `randomized`.
      draws: As in `randomized`.

    Returns:
      The strategy.

    Raises:
      SettingError: As `power_law` and `randomized`.
    """
    return randomized(problem, power_law(mean_length, alpha), compensate, draws)
