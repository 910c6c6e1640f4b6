"""Bias, variance and arithmetic of many gradient estimators at the run's parameters."""

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
from bptt_study.probes.probe import Probe, Scene
from bptt_study.probes.weighted_estimates import weighted_estimates
from bptt_study.types import Batch, LagWeights, Params, Problem, Strategy
from bptt_study.validation import SettingError, whole

# what `estimator_quality` measures of an estimator at a length; all columns: records
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
    """Bias², variance, mean squared error and arithmetic of gradient estimators, at the run's parameters.

    `estimators`: name -> (problem, length) -> strategy with lag weights; each is tried at all `lengths` up
    to T (by default the powers of two below T, and T), and left out where it refuses one. Full BPTT
    goes first. States start from zero. Columns: `records.ESTIMATOR_QUALITY`.

    over = draws, of a strategy on one training batch, against the full gradient g of this batch: bias²
    exact from the lag weights, and the variance too where the claim has it in closed form (`exact`);
    else, and beside it, from `draws` draws. over = batches, of E[ĝ] over `batches` training batches,
    against their mean gradient: the noise of the data alone. Numbers are relative to ‖g‖², for `batches`
    to the mean of ‖g‖².

    Raises SettingError for a strategy without lag weights or that draws no link_weights without a closed form.
    """
    whole("draws", draws, least=3)
    whole("batches", batches, least=3)

    known: dict[tuple[Problem, tuple[int, ...]], list[_Setting]] = {}

    def look(scene: Scene) -> pd.DataFrame:
        data = scene.batches(batches)
        first = jax.tree.map(lambda a: a[0], data)
        place = scene.problem, first.mask.shape
        if place not in known:
            known[place] = list(_settings(estimators, lengths, scene, first))
        settings = known[place]
        most = max(s.claim.draws for s in settings)
        grid = pd.DataFrame(
            [(s.estimator, s.length, s.arithmetic, s.forward) for s in settings],
            columns=["estimator", "length", "arithmetic", "forward_arithmetic"],
        )
        try:
            finite(scene.params)
        except SettingError:  # a diverged seed
            return grid.assign(over="draws", **dict.fromkeys(MEASURED, np.nan))

        weights, which = np.unique([s.weights for s in settings], axis=0, return_inverse=True)
        distinct = _expected(scene.problem, scene.params, data, jnp.asarray(weights))
        expected = distinct[:, which]  # [batches, settings, parameters]
        full = expected[:, 0]
        flows = lags.flows(scene.problem, scene.params, first)
        uniforms = jax.random.uniform(scene.key, (*first.mask.shape, draws * most))
        on_batch, on_data = [], []
        for setting, mean in zip(settings, np.asarray(expected[0], float), strict=True):
            sampled = None
            if (link_weights := setting.claim.link_weights) is not None:
                n = setting.claim.draws
                xi = link_weights(uniforms[..., : draws * n]).reshape(*first.mask.shape, draws, n)
                rows = weighted_estimates(
                    scene.problem, scene.params, first, jnp.moveaxis(xi, (2, 3), (0, 1))
                )
                sampled = measure.compare(rows, full[0])
            on_batch.append(_on_batch(setting, mean, np.asarray(full[0], float), flows, sampled))
        norm2 = float(jnp.mean(jnp.sum(full**2, axis=1)))
        for n in range(len(settings)):
            found = measure.compare(expected[:, n], full)
            numbers = _numbers(found.bias2.value, found.variance.value, norm2)
            cosine = {"cosine": found.cosine.value, "exact": False}
            on_data.append(numbers | cosine | _sampled(found))
        tables = {"draws": on_batch, "batches": on_data}
        return pd.concat(
            [
                pd.concat([grid.assign(over=over), pd.DataFrame(rows)], axis=1)
                for over, rows in tables.items()
            ],
            ignore_index=True,
        )

    return Probe(look)


class _Setting(NamedTuple):
    """An estimator at one length, and what of it needs no parameters."""

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
    scene: Scene,
    batch: Batch,
) -> Iterator[_Setting]:
    steps, size = batch.mask.shape
    run = partial(states, scene.problem.cell)
    once = measure.arithmetic(
        run, scene.params["cell"], scene.problem.cell.zeros(size), batch.inputs
    )

    def setting(name: str, length: float, strategy: Strategy) -> _Setting:
        state = strategy.init(scene.params, size)
        return _Setting(
            estimator=name,
            length=length,
            strategy=strategy,
            claim=lags.declared(strategy),
            weights=np.asarray(lags.weights(strategy, steps, steps)),
            arithmetic=measure.arithmetic(strategy.estimate, scene.params, state, batch, scene.key),
            forward=once,
        )

    yield setting("full", np.nan, strategies.full(scene.problem))
    powers = {2**n for n in range(steps.bit_length())}
    tried = sorted(powers | {steps}) if lengths is None else [n for n in lengths if n <= steps]
    for name, make in estimators.items():
        refused: SettingError | None = None
        count = 0
        for length in tried:
            try:
                strategy = make(scene.problem, length)
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
    """E[ĝ] on each batch."""

    def one(batch: Batch) -> Float[Array, "L P"]:
        grads = lags.weighted_gradients(problem, params, batch, weights)
        return jax.vmap(lambda tree: ravel_pytree(tree)[0])(grads)

    return lax.map(one, batches)


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
    cosine = float(mean @ exact) / np.sqrt(float(mean @ mean) * norm2)
    return numbers | {"cosine": cosine, "exact": closed} | (_sampled(sampled) if sampled else {})


def _numbers(bias2: float, variance: float, norm2: float) -> dict[str, float]:
    absolute = {"bias2": bias2, "variance": variance, "mse": bias2 + variance}
    relative = {f"relative_{name}": value / norm2 for name, value in absolute.items()}
    return absolute | relative | {"norm2": norm2}


def _sampled(found: measure.Quality) -> dict[str, float]:
    return {
        f"sampled_{name}{end}": value
        for name in ("bias2", "variance", "mse")
        for end, value in zip(("", "_low", "_high"), getattr(found, name), strict=True)
    }
