"""The bias, variance and costs of many gradient estimators at the run's parameters."""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import lax
from jaxtyping import Array, Float

from bptt_study.backprop.pytrees import numbers
from bptt_study.instruments import lags, measure
from bptt_study.instruments.lag_arguments import finite
from bptt_study.probes.estimator_settings import GRID, Lengths, Setting, check_fit, settings_of
from bptt_study.probes.lessons import taught
from bptt_study.probes.probe import Probe, Snapshot
from bptt_study.probes.weighted_estimates import weighted_estimates
from bptt_study.types import Batch, Claim, LagWeights, Params, Problem, Strategy
from bptt_study.validation import SettingError, fits, whole

# The numbers of an estimator at a length; `report.columns.BIAS_VARIANCE` has all columns.
MEASURED = [
    *(f"{r}{name}" for r in ("", "relative_") for name in ("bias2", "variance", "mse")),
    *("norm2", "cosine"),
]


def estimator_quality(
    estimators: Mapping[str, Callable[..., Strategy]],
    lengths: Lengths = None,
    draws: int = 32,
    batches: int = 16,
    lessons: int = 0,
) -> Probe:
    """Measure bias², variance, squared error and costs of gradient estimators at the run's parameters.

    Rows with over = draws compare a strategy on one training batch with the full gradient g of this batch.
    Whatever has a formula is exact: the bias² by lag weights, or 0 by a claim; the variance in closed form, or
    0 if nothing is drawn (`exact`). The rest comes from `draws` draws, which are reported in any case. Rows
    with over = batches compare E[ĝ] on each training batch with the mean gradient: they show the noise of the
    data alone. Relative numbers are divided by ‖g‖², for batches by the mean of ‖g‖², and NaN if that is 0.
    States start from zero. The arithmetic is that of `measure.arithmetic_of_calls` on the first batch.

    Args:
      estimators: name -> (problem, length) -> strategy. If `lengths` is a mapping, (problem) -> strategy that
        also takes the setting by its name. Full BPTT is added as the first one.
      lengths: The lengths at which each estimator is measured, up to T; lengths that an estimator refuses are
        left out. None: the powers of two below T, and T. A mapping gives each estimator a setting of its
        own with the values to measure, such as {"uoro": {"block": [1, 4]}}; those that it lacks have none.
      draws: The number of draws of a strategy on the first batch. If its expectation has no formula, so many
        on each batch. It is also the least number of calls over which arithmetic is averaged.
      batches: The number of training batches.
      lessons: The number of estimates that a strategy makes before it is measured, if it learns as synthetic
        gradients do. The parameters stay as they are.

    Returns:
      A probe with the columns of `report.columns.BIAS_VARIANCE`.

    Raises:
      SettingError: For fewer than three draws or batches, and a strategy that refuses all lengths.
    """
    whole("draws", draws, least=3)
    whole("batches", batches, least=3)
    whole("lessons", lessons, least=0)
    known: dict[tuple[Problem, tuple[int, ...]], list[Setting]] = {}

    def look(snapshot: Snapshot) -> pd.DataFrame:
        data = snapshot.batches(batches)
        first = jax.tree.map(lambda a: a[0], data)
        place = snapshot.problem, first.mask.shape
        if place not in known:
            known[place] = list(settings_of(estimators, lengths, snapshot, first, draws))
        settings = known[place]
        grid = pd.DataFrame([s[: len(GRID)] for s in settings], columns=GRID)
        work = [s.arithmetic(snapshot.params, first, snapshot.key) for s in settings]
        grid.insert(GRID.index("forward_arithmetic"), "arithmetic", work)
        try:
            finite(snapshot.params)
        except SettingError:  # a diverged seed
            lost = grid.assign(**dict.fromkeys(MEASURED, np.nan))
            return pd.concat([lost.assign(over=over) for over in ("draws", "batches")])

        drawn = [_drawn(s, snapshot, data, draws, lessons) for s in settings]
        expected = _expectations(settings, snapshot, data, drawn)
        tables = {
            "draws": _over_draws(settings, snapshot, first, expected[0], draws, drawn),
            "batches": _over_batches(expected),
        }
        parts = [
            pd.concat([grid.assign(over=over), pd.DataFrame(rows)], axis=1)
            for over, rows in tables.items()
        ]
        return pd.concat(parts, ignore_index=True)

    def check(problem: Problem, steps: int) -> None:
        fits("draws", draws, draws * steps)
        fits("batches", batches, 3 * batches * steps)
        check_fit(estimators, lengths, problem, steps)

    return Probe(look, fits=check)


def _has_formulas(claim: Claim) -> bool:
    """Tell whether the claim says what is drawn, or that nothing is."""
    weights = claim.lag_weights
    if weights is None:
        return claim.exact
    draws = weights.patterns is not None or claim.noise is not None
    return not draws or weights.spread is not None or weights.link_weights is not None


def _drawn(
    setting: Setting, snapshot: Snapshot, data: Batch, draws: int, lessons: int
) -> list[Float[np.ndarray, "N P"]]:
    """Run a strategy whose claim leaves something open: N estimates on each batch, or 1 if nothing is drawn.

    If the claim says what E[ĝ] is, only the first batch is needed. Nothing is drawn if the claim declares no
    draws and all estimates on the first batch are the same.
    """
    strategy, params = setting.strategy, snapshot.params
    claim, weights = strategy.claim, strategy.claim.lag_weights
    if _has_formulas(claim):
        return []
    each = [jax.tree.map(lambda a, n=n: a[n], data) for n in range(len(data.mask))]
    state = taught(strategy, params, data, snapshot.key, lessons)
    keys = jax.random.split(snapshot.key, draws)

    def estimates(batch: Batch, keys: Any) -> list[Float[np.ndarray, "P"]]:
        return [np.asarray(setting.estimate(params, state, batch, key)[0], float) for key in keys]

    first = np.stack(estimates(each[0], keys))
    draws_declared = claim.noise is not None or (
        weights is not None and weights.patterns is not None
    )
    kept = draws if draws_declared or (first != first[0]).any() else 1
    others = each[1:] if setting.weights is None else []
    return [first[:kept], *(np.stack(estimates(batch, keys[:kept])) for batch in others)]


def _expectations(
    settings: list[Setting],
    snapshot: Snapshot,
    data: Batch,
    drawn: list[list[Float[np.ndarray, "N P"]]],
) -> Float[np.ndarray, "N L P"]:
    """Compute E[ĝ] of each setting on each batch."""
    known = [s.weights for s in settings if s.weights is not None]
    weights, which = np.unique(known, axis=0, return_inverse=True)
    by_lags = np.asarray(_expected(snapshot.problem, snapshot.params, data, jnp.asarray(weights)))
    rows, index = [], iter(which)
    for setting, found in zip(settings, drawn, strict=True):
        own = setting.weights is not None
        rows.append(by_lags[:, next(index)] if own else np.stack([f.mean(axis=0) for f in found]))
    return np.stack(rows, axis=1)


@partial(jax.jit, static_argnames=("problem",))
def _expected(
    problem: Problem, params: Params, batches: Batch, weights: Float[Array, "L T T"]
) -> Float[Array, "N L P"]:
    """Compute E[ĝ] on each batch."""

    def one(batch: Batch) -> Float[Array, "L P"]:
        grads = lags.weighted_gradients(problem, params, batch, weights)
        return jax.vmap(numbers)(grads)

    return lax.map(one, batches)


def _over_draws(
    settings: list[Setting],
    snapshot: Snapshot,
    batch: Batch,
    expected: Float[np.ndarray, "L P"],
    draws: int,
    drawn: list[list[Float[np.ndarray, "N P"]]],
) -> list[dict[str, Any]]:
    """Make a row for each setting on one batch; the first setting is full BPTT."""
    problem, params = snapshot.problem, snapshot.params
    expected = np.asarray(expected, float)
    exact = expected[0]
    declared = [s.strategy.claim.lag_weights for s in settings]
    most = max(weights.draws for weights in declared if weights)
    uniforms = jax.random.uniform(snapshot.key, (*batch.mask.shape, draws * most))
    table = cache(lambda name: getattr(lags, name)(problem, params, batch))

    def sampled(
        weights: LagWeights | None, found: list[Float[np.ndarray, "N P"]]
    ) -> measure.Quality | None:
        if weights is None or weights.link_weights is None:
            return measure.compare(found[0], exact) if found and len(found[0]) > 1 else None
        xi = weights.link_weights(uniforms[..., : draws * weights.draws])
        xi = jnp.moveaxis(xi.reshape(*batch.mask.shape, draws, weights.draws), (2, 3), (0, 1))
        return measure.compare(weighted_estimates(problem, params, batch, xi), exact)

    return [
        _on_batch(setting, mean, exact, table, sampled(weights, found))
        for setting, mean, weights, found in zip(settings, expected, declared, drawn, strict=True)
    ]


def _on_batch(
    setting: Setting,
    mean: Float[np.ndarray, "P"],
    exact: Float[np.ndarray, "P"],
    table: Callable[[str], Float[Array, "T T *T"]],
    sampled: measure.Quality | None,
) -> dict[str, Any]:
    weights = setting.strategy.claim.lag_weights
    bias2 = float(np.sum((mean - exact) ** 2))
    if closed := sampled is None or bool(weights and weights.spread):
        variance = (
            lags.variance(setting.strategy, table(weights.table), weights.table) if weights else 0.0
        )
    else:
        assert sampled is not None
        variance = sampled.variance.value
        bias2 = sampled.bias2.value if setting.weights is None else bias2
    norm2 = float(exact @ exact)
    numbers = _numbers(bias2, variance, norm2)
    cosine = _ratio(float(mean @ exact), np.sqrt(float(mean @ mean) * norm2))
    return numbers | {"cosine": cosine, "exact": closed} | (_sampled(sampled) if sampled else {})


def _over_batches(expected: Float[np.ndarray, "N L P"]) -> list[dict[str, Any]]:
    """Make a row for each setting over all batches."""
    full, rows = expected[:, 0], []
    norm2 = float(jnp.mean(jnp.sum(full**2, axis=1)))
    for n in range(expected.shape[1]):
        found = measure.compare(expected[:, n], full)
        numbers = _numbers(found.bias2.value, found.variance.value, norm2)
        rows.append(numbers | {"cosine": found.cosine.value, "exact": False} | _sampled(found))
    return rows


def _numbers(bias2: float, variance: float, norm2: float) -> dict[str, float]:
    absolute = {"bias2": bias2, "variance": variance, "mse": bias2 + variance}
    relative = {f"relative_{name}": _ratio(value, norm2) for name, value in absolute.items()}
    return absolute | relative | {"norm2": norm2}


def _ratio(value: float, norm: float) -> float:
    """Return value ÷ norm; NaN if the norm is 0, as for an empty mask."""
    return value / norm if norm > 0 else np.nan


def _sampled(found: measure.Quality) -> dict[str, float]:
    return {
        f"sampled_{name}{end}": value
        for name in ("bias2", "variance", "mse")
        for end, value in zip(("", "_low", "_high"), getattr(found, name), strict=True)
    }
