"""Claims beyond one call and beyond one gradient: online, random signs as an argument, smoothing."""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bptt_study.testing.errors import CheckError, close, require, vector
from bptt_study.testing.examples import Example, example, gradient, stream
from bptt_study.testing.subject import Subject
from bptt_study.types import Batch, Problem, Strategy

STEPS = 12  # of one call that two of half the length must equal
SIGNS = 13  # so many are enumerated: 2^13 patterns
TINY = {"steps": 3, "sequences": 1, "inputs": 2, "hidden": 2, "outputs": 2}


def check_online(subject: Subject) -> None:
    """A call of 12 steps is the token-weighted mean of two calls of 6, the state handed on."""
    whole = Subject(subject.make_strategy, subject.cell, steps=STEPS)
    params, batch = whole.example.params, whole.example.batch
    half = STEPS // 2
    first, second = (_steps(batch, part) for part in (slice(half), slice(half, None)))
    noise = _noise(whole, STEPS)
    estimate = jax.jit(_with_noise(whole))
    (loss, grads, _), last = estimate(params, whole.start, batch, noise)
    parts, state = [], whole.start
    for part, signs in zip((first, second), _halves(whole, noise), strict=True):
        found, state = estimate(params, state, part, signs)
        parts.append((part.mask.sum(), (found.loss, found.grads)))
    tokens = sum(weight for weight, _ in parts)
    mean = jax.tree.map(
        lambda a, b: (parts[0][0] * a + parts[1][0] * b) / tokens, parts[0][1], parts[1][1]
    )
    close(mean, (loss, grads), name=f"two calls of {half} steps against one of {STEPS}")
    close(_floats(state), _floats(last), name=f"the state after two calls of {half} steps")


def _with_noise(subject: Subject) -> Any:
    """estimate(params, state, batch, noise): `given` where there is noise, else the key is of no matter."""
    strategy = subject.strategy
    if strategy.claim.noise is not None:
        return strategy.given
    drawn = np.ptp(subject.estimates, axis=0).max() / np.abs(subject.estimates).max()
    require(
        drawn <= 1e-12,
        "the strategy is online and draws: without `claim.noise` and `given` nothing can hold it to that",
    )
    return lambda params, state, batch, _: strategy.estimate(params, state, batch, subject.keys[0])


def _noise(subject: Subject, steps: int) -> Any:
    """Random signs for so many steps; None for a strategy that declares no noise."""
    if subject.claim.noise is None:
        return None
    rng = np.random.default_rng(11)
    shapes = noise_shapes(subject.strategy, steps, subject.sequences, subject.example.params)
    return jax.tree.map(lambda s: jnp.asarray(rng.choice([-1.0, 1.0], s.shape)), shapes)


def _halves(subject: Subject, noise: Any) -> list[Any]:
    """The noise of the first and of the second half of the steps."""
    if noise is None:
        return [None, None]
    params, size = subject.example.params, subject.sequences
    half = noise_shapes(subject.strategy, STEPS // 2, size, params)

    def part(number: int) -> Any:
        def cut(a: Any, s: Any) -> Any:
            if a.shape == s.shape:  # one for the whole call: both parts have it
                return a
            fits = a.shape == (2 * s.shape[0], *s.shape[1:])
            require(fits, f"noise of {a.shape} in {STEPS} steps and {s.shape} in half of them")
            return a[number * len(a) // 2 :][: len(a) // 2]

        return jax.tree.map(cut, noise, half)

    return [part(0), part(1)]


def noise_shapes(strategy: Strategy, steps: int, sequences: int, params: Any) -> Any:
    """The claim's noise as a tree of `jax.ShapeDtypeStruct`; its leaves may be shapes, too."""
    assert strategy.claim.noise is not None
    require(strategy.given is not None, "`claim.noise` is declared, and the strategy has no `given`")

    def shaped(leaf: Any) -> bool:
        return hasattr(leaf, "shape") or (
            isinstance(leaf, tuple) and all(isinstance(n, int) for n in leaf)
        )

    def struct(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(tuple(getattr(leaf, "shape", leaf)), jnp.zeros(()).dtype)

    shapes = strategy.claim.noise(steps, sequences, params)
    return jax.tree.map(struct, shapes, is_leaf=shaped)


def check_noise(subject: Subject) -> str | None:
    """Over all signs that `given` can get, the mean is the gradient; each estimate is one of them."""
    ex = example(subject.cell, **TINY)
    found = enumerated(subject.make_strategy(ex.problem), ex)
    if isinstance(found, str):
        return found
    expected = vector(gradient(_as_stream(ex), subject.claim.reach)[1])
    off = np.linalg.norm(found.mean(axis=0) - expected) / np.linalg.norm(expected)
    require(off <= 1e-12, f"the mean over all signs is off by {off:.3g}; allowed 1e-12")
    return None


def check_smoothed(subject: Subject) -> str | None:
    """The error of the mean over all signs quarters where σ is halved.

    That is done from outside: parameters θ/c of a network that multiplies them by c are smoothed with c·σ.
    """
    ex = example(subject.cell, **TINY)
    expected = vector(gradient(_as_stream(ex), subject.claim.reach)[1])
    errors = []
    for scale in (1.0, 0.5):
        other = _scaled(ex, scale)
        found = enumerated(subject.make_strategy(other.problem), other)
        if isinstance(found, str):
            return found
        errors.append(np.linalg.norm(found.mean(axis=0) / scale - expected))
    ratio = errors[0] / errors[1]
    require(3 < ratio < 5, f"with σ halved the error falls by {ratio:.3g}; expected 4 ± 1")
    return None


def _scaled(ex: Example, scale: float) -> Example:
    """The same network with the parameters θ/scale."""

    def times(params: Any) -> Any:
        return jax.tree.map(lambda p: scale * p, params)

    cell, readout, loss = ex.problem
    problem = Problem(
        cell._replace(step=lambda p, state, x: cell.step(times(p), state, x), affine=None),
        readout._replace(apply=lambda p, h: readout.apply(times(p), h)),
        loss,
    )
    return ex._replace(problem=problem, params=jax.tree.map(lambda p: p / scale, ex.params))


def _as_stream(ex: Example) -> Example:
    """Two steps before, one step as the call."""
    return ex._replace(
        earlier=_steps(ex.batch, slice(2)),
        batch=_steps(ex.batch, slice(2, None)),
    )


def enumerated(strategy: Strategy, ex: Example) -> np.ndarray | str:
    """The gradients for all patterns of signs, [N, P]; or why there are too many.

    A claim about the stream has two steps before the call, whose signs are enumerated as well.
    """
    calls = [ex.batch]
    state = strategy.init(ex.params, 1)
    if strategy.claim.reach == "stream":
        calls = [_as_stream(ex).earlier, _as_stream(ex).batch]
    shapes = [noise_shapes(strategy, len(call.mask), 1, ex.params) for call in calls]
    leaves, structure = jax.tree.flatten(shapes)
    count = sum(prod(leaf.shape) for leaf in leaves)
    if count > SIGNS:
        return f"2^{count} patterns of signs are too many to enumerate"
    signs = 1.0 - 2.0 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    parts = np.split(signs, np.cumsum([prod(leaf.shape) for leaf in leaves])[:-1], axis=1)
    noise = jax.tree.unflatten(
        structure,
        [jnp.asarray(part.reshape(-1, *leaf.shape)) for part, leaf in zip(parts, leaves, strict=True)],
    )
    assert strategy.given is not None

    def run(noise: Any) -> Any:
        at = state
        for call, given in zip(calls, noise, strict=True):
            estimate, at = strategy.given(ex.params, at, call, given)
        return estimate.grads

    grads = jax.jit(lambda all_of_them: jax.lax.map(run, all_of_them))(noise)
    rows = np.concatenate([np.reshape(g, (2**count, -1)) for g in jax.tree.leaves(grads)], axis=1)
    _is_among(strategy, ex, calls, rows)
    return rows


def _is_among(strategy: Strategy, ex: Example, calls: list[Batch], rows: np.ndarray) -> None:
    """`estimate` draws the noise that `given` takes."""
    for seed in range(5):
        state = strategy.init(ex.params, 1)
        for number, call in enumerate(calls):
            key = jax.random.fold_in(jax.random.key(seed), number)
            estimate, state = strategy.estimate(ex.params, state, call, key)
        off = np.abs(rows - vector(estimate.grads)).max(axis=1).min() / np.abs(rows).max()
        require(off <= 1e-12, f"an estimate is off by {off:.3g} from what any signs give")


def _steps(batch: Batch, part: slice) -> Batch:
    return jax.tree.map(lambda a: a[part], batch)


def _floats(tree: Any) -> list[Any]:
    return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.inexact)]
