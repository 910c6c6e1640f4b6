"""Probes: what is looked at beside the loss, at some log points of a run and outside of its time.

A probe maps a `Scene` to rows of a table, `<probe>.csv.gz` of the study; the run's name, seed and update are
added to them. A factory per probe, named with its settings in conf/probe/; like a strategy, it may live
anywhere that Python can import.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from bptt_study import strategies
from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.backprop.forward import evaluate, states
from bptt_study.instruments import lags, measure
from bptt_study.types import Batch, LagWeights, Params, Problem, Strategy, Task
from bptt_study.validation import SettingError, number, whole


class Scene(NamedTuple):
    """One seed of a run at one log point."""

    problem: Problem
    strategy: Strategy
    task: Task
    params: Params
    batch: Batch  # as large as in training, the first sequences of the validation part
    key: Key[Array, ""]  # of this seed and update
    batches: Callable[[int], Batch]  # N training batches, spread over the run: leaves [N, T, B, …]


class Probe(NamedTuple):
    """`look(scene)` returns the rows of one seed at one log point."""

    look: Callable[[Scene], pd.DataFrame]
    metrics: frozenset[str] = frozenset()  # what the strategy's estimate must report for it
    check: Callable[[Task], None] = lambda task: None  # SettingError for a task it can't look at


def gradient_norms(draws: int = 16) -> Probe:
    """The strategy's own gradient norms over time steps and lag: axis, step, gradient_norm."""
    norms = jax.jit(partial(measure.gradient_norms, draws=whole("draws", draws)), static_argnums=0)

    def look(scene: Scene) -> pd.DataFrame:
        over = norms(scene.strategy, scene.params, scene.batch, scene.key)
        tables = (
            pd.DataFrame(
                {
                    "axis": axis,
                    "step": np.arange(len(values)) + (axis == "time"),
                    "gradient_norm": np.asarray(values),
                }
            )
            for axis, values in over.items()
        )
        return pd.concat(tables, ignore_index=True)

    return Probe(look, frozenset({"adjoint_norms"}))


def lag_mass() -> Probe:
    """How much gradient lies at each lag, and the strategy's share of it: lag, mass, kept.

    mass: ‖G_k‖, the norm of what all losses of the batch send k steps back. kept: E[w[s,k]], mean over the
    losses s ≥ k. State from zero.
    """

    def look(scene: Scene) -> pd.DataFrame:
        steps = len(scene.batch.mask)
        table = jax.jit(lags.gradients, static_argnums=(0, 3))(
            scene.problem, scene.params, scene.batch, steps
        )
        # losses of step s at lag k ≤ s
        counts = np.asarray(scene.batch.mask).sum(axis=1) * np.tri(steps).T
        kept = np.asarray(lags.weights(scene.strategy, steps, steps)).T * counts
        with np.errstate(invalid="ignore"):
            shares = kept.sum(axis=1) / counts.sum(axis=1)
        return pd.DataFrame({"lag": np.arange(steps), "mass": lags.mass(table), "kept": shares})

    return Probe(look)


def gradient_error(draws: int = 16) -> Probe:
    """The strategy's gradient against the exact one g on the batch: norm2, bias2, variance.

    norm2: ‖g‖². bias2: ‖E[ĝ] - g‖², exact from the lag weights. variance: E‖ĝ - E[ĝ]‖² over `draws` draws.
    State from zero; all parameters in one vector.
    """
    whole("draws", draws, least=2)

    @partial(jax.jit, static_argnums=(0, 1))
    def errors(
        problem: Problem, strategy: Strategy, params: Params, batch: Batch, key: Key[Array, ""]
    ) -> dict[str, Array]:
        steps, size = batch.mask.shape
        state = strategy.init(params, size)

        def one(key: Key[Array, ""]) -> Array:
            return ravel_pytree(strategy.estimate(params, state, batch, key)[0].grads)[0]

        kept = lags.weights(strategy, steps, steps)
        exact, mean = (
            ravel_pytree(lags.weighted_gradient(problem, params, batch, w))[0]
            for w in (jnp.ones_like(kept), kept)
        )
        sample = lax.map(one, jax.random.split(key, draws))
        return {
            "norm2": jnp.sum(exact**2),
            "bias2": jnp.sum((mean - exact) ** 2),
            "variance": jnp.sum(sample.var(axis=0, ddof=1)),
        }

    def look(scene: Scene) -> pd.DataFrame:
        found = errors(scene.problem, scene.strategy, scene.params, scene.batch, scene.key)
        return pd.DataFrame({name: [float(value)] for name, value in found.items()})

    return Probe(look)


def generalisation() -> Probe:
    """The training part evaluated as the validation part is: part, loss, accuracy.

    Of both as many steps of each stream as the shorter has, state from zero, so that neither has
    more of the first characters, which nothing comes before.
    """
    scores_of = jax.jit(evaluate, static_argnums=0)

    def look(scene: Scene) -> pd.DataFrame:
        parts = {"training": scene.task.training, "validation": scene.task.validation}
        if scene.task.training is None:
            allowed = "a probe that fits the task"
            way_out = "Only a task with a training part of its own has a generalisation gap."
            raise SettingError("probe", "generalisation", allowed, way_out)
        steps = min(len(batch.mask) for batch in parts.values() if batch is not None)
        found = []
        for name, batch in parts.items():
            shorter = jax.tree.map(lambda a: a[:steps], batch)
            scores = scores_of(scene.problem, scene.params, shorter)
            loss, accuracy = float(scores["validation_loss"]), scores.get("accuracy", np.nan)
            found.append({"part": name, "loss": loss, "accuracy": float(accuracy)})
        return pd.DataFrame(found)

    return Probe(look)


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

    Raises SettingError for a strategy without lag weights or that draws no gates without a closed form.
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
            lags.finite(scene.params)
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
            if (gates := setting.claim.gates) is not None:
                n = setting.claim.draws
                xi = gates(uniforms[..., : draws * n]).reshape(*first.mask.shape, draws, n)
                rows = _gated(scene.problem, scene.params, first, jnp.moveaxis(xi, (2, 3), (0, 1)))
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


@partial(jax.jit, static_argnames=("problem",))
def _gated(
    problem: Problem, params: Params, batch: Batch, gates: Float[Array, "N n T B"]
) -> Float[Array, "N P"]:
    """N estimates; which gates they had is no matter of the program, so that all laws share it."""
    state = problem.cell.zeros(batch.mask.shape[1])

    def one(gates: Float[Array, "n T B"]) -> Float[Array, "P"]:
        truncation = Truncation(link_weights=gates)
        estimate, _ = backpropagate(problem, params, state, batch, truncation)
        return ravel_pytree(estimate.grads)[0]

    return jax.vmap(one)(gates)


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


def bit_responses(count: int = 24) -> Probe:
    """How far a bit k steps ago moves the odds that the model gives: lag, response, kept; k < `count`.

    response: the change of P(class 1) at step t when x_{t-k} goes from 0 to 1, mean over the sequences of
    the validation part; whatever the model has learned of lag k, in the task's own units. kept: the
    share w_k of that lag's gradient that the strategy lets through (`lags.window`), NaN if it declares none.
    For tasks of two symbols and two classes.
    """
    whole("count", count)

    def check(task: Task) -> None:
        if (task.inputs, task.outputs) != (2, 2) or task.validation.inputs.ndim != 2:
            allowed = "a probe that fits the task"
            way_out = "It needs a task with two symbols and two classes, such as add."
            raise SettingError("probe", "bit_responses", allowed, way_out)
        steps = len(task.validation.inputs)
        if count > steps:
            raise SettingError(
                "count", count, f"between 1 and the steps of the validation part ({steps})"
            )

    @partial(jax.jit, static_argnames="problem")
    def responses(problem: Problem, params: Params, inputs: Array) -> Array:
        def odds(bit: int) -> Array:
            known = inputs.at[-count].set(bit)  # noqa: PD008 (JAX's) one bit, after as long a past as there is
            after = states(problem.cell, params["cell"], problem.cell.zeros(inputs.shape[1]), known)
            seen = problem.cell.read(jax.tree.map(lambda h: h[-count:], after))
            return jax.nn.softmax(problem.readout.apply(params["readout"], seen))[..., 1]

        return jnp.mean(odds(1) - odds(0), axis=1)

    def look(scene: Scene) -> pd.DataFrame:
        declared = scene.strategy.claim.lag_weights
        return pd.DataFrame(
            {
                "lag": np.arange(count),
                "response": responses(scene.problem, scene.params, scene.task.validation.inputs),
                "kept": np.nan if declared is None else np.asarray(declared.window(count)),
            }
        )

    return Probe(look, check=check)


def cut_variance(mean_length: float = 16, alpha: float = 6, draws: int = 64) -> Probe:
    """The variance that compensated random cuts bring into one loss's gradient, as that loss lies later.

    law (its strategy's name), horizon T, second_moment, signal, variance, sampled_variance. For the loss of
    step T alone, T = 1, ½, ¼, ⅛ of an update's steps: E[w²] of its longest lag, T - 1; and for the cell's
    parameters, mean over the sequences: ‖∇l_T‖² of the exact gradient; E‖ĝ - ∇l_T‖² exactly, as
    `lags.variance`, but from the table of one loss, which is small enough for long sequences; and the same
    from `draws` draws, which miss what rare draws bring.
    Both laws are looked at, whatever the run's own strategy.
    """
    laws = _laws(number("mean_length", mean_length, above=1), number("alpha", alpha, above=2))
    whole("draws", draws, least=2)

    def look(scene: Scene) -> pd.DataFrame:
        steps, size = scene.batch.mask.shape
        uniforms = jax.random.uniform(scene.key, (steps, size, draws))
        rows = []
        for horizon in sorted({max(2, steps // part) for part in (8, 4, 2, 1)}):
            last = 1.0 * (jnp.arange(steps) == horizon - 1)[:, None]
            batch = scene.batch._replace(mask=jnp.broadcast_to(last, (steps, size)))
            table = _by_lag(scene.problem, scene.params, batch)
            by_step = np.asarray(table, float)[
                :, horizon - 1 :: -1
            ]  # from lags to where they arrive
            flat = np.moveaxis(by_step, 1, 0).reshape(horizon, -1)
            products = flat @ flat.T / size  # ⟨G_t, G_u⟩, mean over the sequences
            for name, law in laws.items():
                claim = lags.declared(strategies.randomized(scene.problem, law))
                assert claim.spread is not None and claim.gates is not None
                # F[j,t] = G_t for every link j from t to the loss: nothing else passes over it
                spread = claim.spread(steps)[:horizon, :horizon, :horizon].sum(axis=0)
                xi = jnp.moveaxis(claim.gates(uniforms), -1, 0)[:, None]
                drawn = np.asarray(_gated(scene.problem, scene.params, batch, xi), float)
                rows.append(
                    {
                        "law": name,
                        "horizon": horizon,
                        "second_moment": 1 + spread[0, 0],
                        "signal": products.sum(),
                        "variance": np.vdot(spread, products),
                        # sequences draw independently: their mean has 1/B of their mean variance
                        "sampled_variance": size * drawn.var(axis=0, ddof=1).sum(),
                    }
                )
        return pd.DataFrame(rows)

    return Probe(look)


@cache  # so that the tables that a law brings are made once for all jobs
def _laws(mean_length: float, alpha: float) -> dict[str, strategies.Law]:
    return {
        "randomized": strategies.constant(mean_length),
        "randomized_power_law": strategies.power_law(mean_length, alpha),
    }


@partial(jax.jit, static_argnames="problem")
def _by_lag(problem: Problem, params: Params, batch: Batch) -> Float[Array, "B T P"]:
    """G_k of each sequence for itself, the cell's parameters in one vector."""

    def alone(sequence: Batch) -> Float[Array, "T P"]:
        batch = Batch(*(a[:, None] for a in sequence))
        cell = lags.gradients(problem, params, batch, len(batch.mask))["cell"]
        return jax.vmap(lambda g: ravel_pytree(g)[0])(cell)

    return jax.vmap(alone, in_axes=1)(batch)
