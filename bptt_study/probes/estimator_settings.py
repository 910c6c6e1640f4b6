"""The estimators of `estimator_quality` at each of their lengths, and what does not depend on parameters."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import isqrt, prod
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Key

from bptt_study import strategies
from bptt_study.backprop.forward import states
from bptt_study.backprop.pytrees import floats, numbers
from bptt_study.instruments import lags, measure
from bptt_study.instruments.draws import check_draws
from bptt_study.probes.probe import Snapshot
from bptt_study.types import Batch, Claim, Params, Problem, Strategy
from bptt_study.validation import SettingError

# the first numbers of a `Setting`
GRID = ["estimator", "setting", "length", "forward_arithmetic", "states", "numbers"]
# see `estimator_quality`
Lengths = Sequence[int] | Mapping[str, Mapping[str, Sequence[int]]] | None


class Setting(NamedTuple):
    """An estimator at one length, with everything that does not depend on parameters."""

    estimator: str
    setting: str | None  # the name of the setting that the length is
    length: float  # NaN without one
    forward: int  # arithmetic of running the states forward, for any estimator
    states: float  # of a sequence, held at once
    # of a sequence, held at once: those of the states, and those that the claim names beside them
    numbers: float
    strategy: Strategy
    weights: Float[np.ndarray, "T T"] | None  # E[ĝ] by lags; None: it is known from draws alone
    # (params, state, batch, key) -> (estimate [P], state), compiled
    estimate: Callable[..., tuple[Array, Any]]
    # the mean over calls
    arithmetic: Callable[[Params, Batch, Key[Array, ""]], float]


def settings_of(
    estimators: Mapping[str, Callable[..., Strategy]],
    lengths: Lengths,
    snapshot: Snapshot,
    batch: Batch,
    draws: int,
) -> Iterator[Setting]:
    """Yield full BPTT, then each estimator at each of its lengths."""
    steps, size = batch.mask.shape
    problem = snapshot.problem
    run = partial(states, problem.cell)
    once = measure.arithmetic(run, snapshot.params["cell"], problem.cell.zeros(size), batch.inputs)
    width = numbers(floats(problem.cell.zeros(1))).size

    def setting(name: str, key: str | None, length: float, strategy: Strategy) -> Setting:
        state, claim = strategy.init(snapshot.params, size), strategy.claim
        check_draws(strategy, snapshot.params, state, batch)
        held = _states_held(claim, steps)
        return Setting(
            estimator=name,
            setting=key,
            length=length,
            forward=once,
            states=held,
            numbers=held * width + _beside(claim, snapshot.params, steps, width),
            strategy=strategy,
            weights=_weights(strategy, steps),
            estimate=jax.jit(partial(_vector, strategy)),
            arithmetic=measure.arithmetic_of_calls(strategy, snapshot.params, batch, draws),
        )

    yield setting("full", None, np.nan, strategies.full(problem))
    for made in strategies_of(estimators, lengths, problem, steps):
        yield setting(*made)


def strategies_of(
    estimators: Mapping[str, Callable[..., Strategy]],
    lengths: Lengths,
    problem: Problem,
    steps: int,
) -> Iterator[tuple[str, str | None, float, Strategy]]:
    """Yield each estimator at each of its lengths: its name, the name of the setting, the length, the strategy.

    Raises:
      SettingError: For a strategy that refuses all lengths, and lengths of no estimator.
    """
    if isinstance(lengths, Mapping) and (unknown := sorted(set(lengths) - set(estimators))):
        raise SettingError(f"lengths.{unknown[0]}", lengths[unknown[0]], "of one of the estimators")
    where = "lengths" if isinstance(lengths, Mapping) else "estimators"
    for name, factory in estimators.items():
        refused: SettingError | None = None
        count = 0
        for key, length, make in _at_lengths(name, factory, lengths, steps):
            try:
                strategy = make(problem)
            except SettingError as error:
                refused = error
            else:
                count += 1
                yield name, key, length, strategy
        if refused and not count:
            raise refused.within(f"{where}.{name}")


def check_fit(
    estimators: Mapping[str, Callable[..., Strategy]],
    lengths: Lengths,
    problem: Problem,
    steps: int,
) -> None:
    """Check that each estimator can be made for this network at one of its lengths, as `strategies_of` says."""
    deque(strategies_of(estimators, lengths, problem, steps), maxlen=0)


def _at_lengths(
    name: str, make: Callable[..., Strategy], lengths: Lengths, steps: int
) -> Iterator[tuple[str | None, float, Callable[[Problem], Strategy]]]:
    """Yield the settings of an estimator and their values, each with its factory."""
    if isinstance(lengths, Mapping):
        for key, values in lengths.get(name, {}).items():
            yield from ((key, n, partial(make, **{key: n})) for n in values)
        if name not in lengths:
            yield None, np.nan, make
        return
    powers = sorted({2**n for n in range(steps.bit_length())} | {steps})
    for n in powers if lengths is None else lengths:
        if n <= steps:
            yield None, n, _with(make, n)


def _with(make: Callable[..., Strategy], length: int) -> Callable[[Problem], Strategy]:
    return lambda problem: make(problem, length)


def _vector(
    strategy: Strategy, params: Params, state: Any, batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, "P"], Any]:
    estimate, state = strategy.estimate(params, state, batch, key)
    return numbers(estimate.grads), state


def _weights(strategy: Strategy, steps: int) -> Float[np.ndarray, "T T"] | None:
    """The weights of lags whose gradient is E[ĝ]; None if the claim has none."""
    claim = strategy.claim
    if claim.lag_weights is not None:
        return np.asarray(lags.weights(strategy, steps, steps))
    right = claim.exact or (claim.unbiased and claim.smoothed is None)
    return np.ones((steps, steps)) if right else None


def _states_held(claim: Claim, steps: int) -> float:
    """The number of states of a sequence that an estimate holds at once, by the claim."""
    if claim.passes != "reverse":
        return 1
    if claim.held is not None:
        return min(claim.held, steps)
    drawn = claim.lag_weights and claim.lag_weights.link_weights
    longest = _longest(drawn, steps) if drawn else steps
    return {"√T": min(2 * isqrt(steps), steps), "segment": longest, "1": 1}.get(claim.memory, steps)


def _beside(claim: Claim, params: Params, steps: int, width: int) -> float:
    """The numbers of a sequence held beside its states; within a call, perturbations count as if carried."""
    if claim.noise and claim.passes != "reverse" and claim.numbers is None:
        drawn = [leaf.shape[1:] for leaf in jax.tree.leaves(claim.noise(steps, 1, params))]
        return sum(map(prod, drawn)) + drawn[0][0] * width
    return (claim.numbers or 0) + claim.per_token * steps


def _longest(link_weights: Callable[[Array], Array], steps: int) -> float:
    """The mean length of the longest segment of T steps, over 1,000 draws."""
    cut = np.asarray(link_weights(jax.random.uniform(jax.random.key(0), (steps, 1000)))) == 0
    cut[0] = True
    begins = np.maximum.accumulate(np.where(cut, np.arange(steps)[:, None], 0))
    return float(np.mean(np.max(1 + np.arange(steps)[:, None] - begins, axis=0)))
