"""The bias, variance and arithmetic of many gradient estimators at the run's parameters."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from bptt_study import strategies
from bptt_study.backprop.forward import states
from bptt_study.instruments import lags, measure
from bptt_study.instruments.lag_table import finite
from bptt_study.probes.probe import Probe, Snapshot
from bptt_study.probes.weighted_estimates import weighted_estimates
from bptt_study.types import Batch, LagWeights, Params, Problem, Strategy
from bptt_study.validation import SettingError, whole

# The numbers of an estimator at a length; `report.columns.BIAS_VARIANCE` has all columns.
MEASURED = [
    *(f"{r}{name}" for r in ("", "relative_") for name in ("bias2", "variance", "mse")),
    *("norm2", "cosine"),
]


def estimator_quality(
    estimators: Mapping[str, Callable[[Problem, int], Strategy]],
    lengths: Sequence[int] | None = None,
    draws: int = 32,
    batches: int = 16,
) -> Probe:
    """Measure bias², variance, squared error and arithmetic of gradient estimators at the run's parameters.

    Rows with over = draws compare a strategy on one training batch with the full gradient g of this batch. The
    bias² is exact, from the lag weights, and so is the variance if the claim has it in closed form (`exact`).
    Otherwise the variance comes from `draws` draws, which are reported in any case. Rows with over = batches
    compare E[ĝ] on each training batch with the mean gradient: they show the noise of the data alone. Relative
    numbers are divided by ‖g‖², for batches by the mean of ‖g‖², and NaN if that is 0. States start from zero.

    Args:
      estimators: name -> (problem, length) -> strategy with lag weights. Full BPTT is added as the first one.
      lengths: The lengths at which each estimator is measured, up to T; lengths that an estimator refuses are
        left out. None: the powers of two below T, and T.
      draws: The number of draws of a strategy on the first batch.
      batches: The number of training batches.
    Returns:
      A probe with the columns of `report.columns.BIAS_VARIANCE`.

    Raises:
      SettingError: For a strategy without lag weights, and one that draws no link weights and has no variance
        in closed form.
    """
    whole("draws", draws, least=3)
    whole("batches", batches, least=3)
    known: dict[tuple[Problem, tuple[int, ...]], list[_Setting]] = {}

    def look(snapshot: Snapshot) -> pd.DataFrame:
        data = snapshot.batches(batches)
        first = jax.tree.map(lambda a: a[0], data)
        place = snapshot.problem, first.mask.shape
        if place not in known:
            known[place] = list(_settings(estimators, lengths, snapshot, first))
        settings = known[place]
        grid = pd.DataFrame(
            [(s.estimator, s.length, s.arithmetic, s.forward) for s in settings],
            columns=["estimator", "length", "arithmetic", "forward_arithmetic"],
        )
        try:
            finite(snapshot.params)
        except SettingError:  # a diverged seed
            return grid.assign(over="draws", **dict.fromkeys(MEASURED, np.nan))

        weights, which = np.unique([s.weights for s in settings], axis=0, return_inverse=True)
        distinct = _expected(snapshot.problem, snapshot.params, data, jnp.asarray(weights))
        expected = distinct[:, which]  # [batches, settings, parameters]
        tables = {
            "draws": _over_draws(settings, snapshot, first, np.asarray(expected[0], float), draws),
            "batches": _over_batches(expected),
        }
        parts = [
            pd.concat([grid.assign(over=over), pd.DataFrame(rows)], axis=1)
            for over, rows in tables.items()
        ]
        return pd.concat(parts, ignore_index=True)

    return Probe(look)


class _Setting(NamedTuple):
    """An estimator at one length, with everything that does not depend on parameters."""

    estimator: str
    length: float  # NaN for full
    strategy: Strategy
    claim: LagWeights
    weights: Float[np.ndarray, "T T"]
    arithmetic: int
    forward: int  # arithmetic of running the states forward, for any estimator


def _settings(
    estimators: Mapping[str, Callable[[Problem, int], Strategy]],
    lengths: Sequence[int] | None,
    snapshot: Snapshot,
    batch: Batch,
) -> Iterator[_Setting]:
    steps, size = batch.mask.shape
    run = partial(states, snapshot.problem.cell)
    once = measure.arithmetic(
        run, snapshot.params["cell"], snapshot.problem.cell.zeros(size), batch.inputs
    )

    def setting(name: str, length: float, strategy: Strategy) -> _Setting:
        state = strategy.init(snapshot.params, size)
        return _Setting(
            estimator=name,
            length=length,
            strategy=strategy,
            claim=lags.declared(strategy),
            weights=np.asarray(lags.weights(strategy, steps, steps)),
            arithmetic=measure.arithmetic(
                strategy.estimate, snapshot.params, state, batch, snapshot.key
            ),
            forward=once,
        )

    yield setting("full", np.nan, strategies.full(snapshot.problem))
    powers = {2**n for n in range(steps.bit_length())}
    tried = sorted(powers | {steps}) if lengths is None else [n for n in lengths if n <= steps]
    for name, make in estimators.items():
        refused: SettingError | None = None
        count = 0
        for length in tried:
            try:
                strategy = make(snapshot.problem, length)
            except SettingError as error:
                refused = error
            else:
                count += 1
                yield setting(name, length, strategy)
        if refused and not count:
            raise refused.within(name)


@partial(jax.jit, static_argnames=("problem",))
def _expected(
    problem: Problem, params: Params, batches: Batch, weights: Float[Array, "L T T"]
) -> Float[Array, "N L P"]:
    """Compute E[ĝ] on each batch."""

    def one(batch: Batch) -> Float[Array, "L P"]:
        grads = lags.weighted_gradients(problem, params, batch, weights)
        return jax.vmap(lambda tree: ravel_pytree(tree)[0])(grads)

    return lax.map(one, batches)


def _over_draws(
    settings: list[_Setting],
    snapshot: Snapshot,
    batch: Batch,
    expected: Float[np.ndarray, "L P"],
    draws: int,
) -> list[dict[str, Any]]:
    """Make a row for each setting on one batch; the first setting is full BPTT."""
    problem, params, exact = snapshot.problem, snapshot.params, expected[0]
    flows = lags.flows(problem, params, batch)
    most = max(setting.claim.draws for setting in settings)
    uniforms = jax.random.uniform(snapshot.key, (*batch.mask.shape, draws * most))

    def sampled(claim: LagWeights) -> measure.Quality | None:
        if claim.link_weights is None:
            return None
        xi = claim.link_weights(uniforms[..., : draws * claim.draws])
        xi = jnp.moveaxis(xi.reshape(*batch.mask.shape, draws, claim.draws), (2, 3), (0, 1))
        return measure.compare(weighted_estimates(problem, params, batch, xi), exact)

    return [
        _on_batch(setting, mean, exact, flows, sampled(setting.claim))
        for setting, mean in zip(settings, expected, strict=True)
    ]


def _on_batch(
    setting: _Setting,
    mean: Float[np.ndarray, "P"],
    exact: Float[np.ndarray, "P"],
    flows: Float[Array, "T T T"],
    sampled: measure.Quality | None,
) -> dict[str, Any]:
    if closed := sampled is None or setting.claim.spread is not None:
        variance = lags.variance(setting.strategy, flows)
    else:
        variance = sampled.variance.value
    norm2 = float(exact @ exact)
    numbers = _numbers(float(np.sum((mean - exact) ** 2)), variance, norm2)
    cosine = _ratio(float(mean @ exact), np.sqrt(float(mean @ mean) * norm2))
    return numbers | {"cosine": cosine, "exact": closed} | (_sampled(sampled) if sampled else {})


def _over_batches(expected: Float[Array, "N L P"]) -> list[dict[str, Any]]:
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
