"""Randomized telescopes: the sum over lags ends at a random horizon, with weights that make it unbiased."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from bptt_study.backprop.lag_weighted import lag_weighted
from bptt_study.strategies.laws import TRIED, Law, check_law, constant
from bptt_study.strategies.validated import validated
from bptt_study.types import Batch, Claim, Estimate, LagWeights, Params, Problem, State, Strategy
from bptt_study.validation import SettingError, instance, one_of


class Kind(NamedTuple):
    """The lags k that a sequence with horizon N keeps, and the chance of each, from q_n = P(N = n)."""

    keeps: Callable[[Any, Any], Any]  # (k, N) -> whether
    chance: Callable[[np.ndarray], np.ndarray]


KINDS = {
    "single": Kind(lambda k, n: k == n, lambda q: q),
    "roulette": Kind(lambda k, n: k <= n, lambda q: np.cumsum(q[::-1])[::-1]),
}


class Horizons(NamedTuple):
    """The law of the horizon N, and what follows from it."""

    kind: Kind
    probabilities: Callable[[int], np.ndarray]  # steps -> q_n

    def shares(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Compute q_n, and the weight that lag k has if it is kept.

        Raises:
          SettingError: If a lag has no chance to be kept, though the horizon may lie beyond it.
        """
        q = self.probabilities(steps)
        beyond = np.cumsum(q[::-1])[::-1] > 0  # for large lags the law's numbers may be 0
        if (never := beyond & (self.kind.chance(q) == 0)).any():
            found = f"one in which no horizon is {np.argmax(never)}"
            allowed = "one with every horizon, for the kind single"
            raise SettingError("law", found, allowed, "Take the kind roulette.")
        with np.errstate(divide="ignore", over="ignore"):  # a lag that is never kept divides by 0
            return q, 1 / self.kind.chance(q)

    def table(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """Compute w[n,k] of all horizons n, and their probabilities."""
        (q, weight), k = self.shares(steps), np.arange(steps)
        return np.where(self.kind.keeps(k, k[:, None]), weight, 0), q

    def patterns(self, steps: int) -> tuple[Float[Array, "N T T"], Float[Array, "N"]]:
        """Compute w[s,k] of all horizons, and their probabilities."""
        w, q = self.table(steps)
        return jnp.asarray(np.repeat(w[:, None], steps, axis=1)), jnp.asarray(q)

    def spread(self, steps: int) -> Float[np.ndarray, "T T"]:
        """Compute c[k,l], the covariance of w_k and w_l."""
        w, q = self.table(steps)
        return (w.T * q) @ w - 1


@validated
def telescope(
    problem: Problem,
    kind: str = "roulette",
    law: Law | None = None,
    tuned: Sequence[float] | Float[Array, "K"] | None = None,
) -> Strategy:
    """Make an unbiased gradient from a random horizon N of lags, drawn for each sequence.

    With ∇L = Σ_k G_k over lags k, "single" keeps G_N / P(N) alone, and "roulette" Σ_{k ≤ N} G_k / P(N ≥ k).
    In float32 the horizon is drawn from 23 random bits: the mean weight of a lag that is kept with a chance
    below about 1e-6 is not 1, and that of one below 2⁻²⁴ is 0. Float64 has 52 bits.

    Args:
      problem: Cell, readout and loss.
      kind: "single" or "roulette".
      law: The law of the horizon: N + 1 is the length of a segment. A length beyond the call counts as its
        last lag.
      tuned: Numbers in place of a law, to which P(N = k) is proportional, one for each lag of a call or more.
        For "single", the square roots of the diagonal of `lags.products` have the least variance, since each
        sequence draws its own horizon; for one sequence these are `lags.mass`.

    Returns:
      The strategy.

    Raises:
      SettingError: For another kind, a law without long segments, tuned numbers that are not above 0, and
        both together; in `estimate`, for fewer numbers than steps.

    References:
      Beatson & Adams 2019.
    """
    kept = KINDS[one_of("kind", kind, KINDS)]
    if law is not None and tuned is not None:
        raise SettingError("tuned", "numbers beside a law", "None, or given without a law")
    horizons = Horizons(kept, _of_law(law) if tuned is None else _tuned(tuned))

    def estimate(
        params: Params, state: State, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Estimate, State]:
        steps, size = batch.mask.shape
        q, weight = horizons.shares(steps)
        drawn = jnp.sum(jax.random.uniform(key, (size,)) >= np.cumsum(q)[:-1, None], axis=0)
        dtype = jnp.result_type(*jax.tree.leaves(params))
        most = float(jnp.finfo(dtype).max)  # beyond it a lag is drawn once in 1e38 calls
        weights = jnp.asarray(np.minimum(weight, most)[:, None], dtype)
        weights = jnp.where(kept.keeps(jnp.arange(steps)[:, None], drawn), weights, 0)
        return lag_weighted(problem, params, state, batch, weights)

    return Strategy(
        init=lambda params, batch_size: problem.cell.zeros(batch_size),
        estimate=estimate,
        claim=Claim(
            unbiased=True,
            source="Beatson & Adams 2019",
            lag_weights=LagWeights(
                jnp.ones,
                lambda steps, lags: jnp.ones((steps, lags)),
                patterns=horizons.patterns,
                spread=horizons.spread,
                table="products",
            ),
        ),
    )


def telescope_constant(problem: Problem, mean_length: float, kind: str = "roulette") -> Strategy:
    """Make `telescope` with geometric horizons, from the settings of the command line.

    Args:
      problem: Cell, readout and loss.
      mean_length: The mean of N + 1, time steps.
      kind: "single" or "roulette".

    Returns:
      The strategy.

    Raises:
      SettingError: As `constant` and `telescope`.
    """
    return telescope(problem, kind, constant(mean_length))


def _of_law(law: Law | None) -> Callable[[int], np.ndarray]:
    if law is None:
        raise SettingError("law", law, "a law, unless numbers are `tuned`")
    check_law(instance("law", law, Law), compensate=True)

    def probabilities(steps: int) -> np.ndarray:
        if steps > TRIED:
            check_law(law, True, steps)
        with jax.ensure_compile_time_eval():
            kept = np.asarray(law.keep(jnp.arange(1.0, steps)), float)
        exceeds = np.cumprod(np.append(1.0, kept))  # P(N ≥ k) is tiny for large k: float64 holds it
        return exceeds - np.append(exceeds[1:], 0)

    return probabilities


def _tuned(tuned: Any) -> Callable[[int], np.ndarray]:
    allowed = "finite numbers above 0, one for each lag"
    try:
        given = np.asarray(tuned, float)
    except (TypeError, ValueError) as error:
        raise SettingError("tuned", tuned, allowed) from error
    if given.ndim != 1 or not given.size or not (np.isfinite(given) & (given > 0)).all():
        raise SettingError("tuned", given.tolist(), allowed)
    given = np.ldexp(given, -np.frexp(given.max())[1])  # exact, and the sum is finite

    def probabilities(steps: int) -> np.ndarray:
        if steps > len(given):
            raise SettingError("tuned", f"{len(given)} numbers", f"one for each of {steps} steps")
        return given[:steps] / given[:steps].sum()

    return probabilities
