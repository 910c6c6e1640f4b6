"""The check of an online claim: one call is the mean of two that follow each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bptt_study.testing.errors import close, require
from bptt_study.testing.examples import steps_of
from bptt_study.testing.noise_checks import noise_shapes
from bptt_study.testing.subject import Subject

STEPS = 12  # steps of the call that must equal two calls of half the length


def check_online(subject: Subject) -> None:
    """A call of 12 steps is the token-weighted mean of two calls of 6, from fresh and from carried states."""
    whole = Subject(subject.make_strategy, subject.cell, steps=STEPS)
    params, batch = whole.example.params, whole.example.batch
    half = STEPS // 2
    noise = _noise(whole, STEPS)
    estimate = jax.jit(_with_noise(whole))
    halves = [steps_of(batch, part) for part in (slice(half), slice(half, None))]

    def compare(kind: str, start: Any) -> None:
        (loss, grads, _), last = estimate(params, start, batch, noise)
        parts, state = [], start
        for part, signs in zip(halves, _halves(whole, noise), strict=True):
            found, state = estimate(params, state, part, signs)
            parts.append((found.loss, found.grads))
        first, second = (part.mask.sum() / batch.mask.sum() for part in halves)
        mean = jax.tree.map(lambda a, b: first * a + second * b, *parts)
        said = f"two calls of {half} steps from a {kind} state"
        close(mean, (loss, grads), name=f"{said} against one of {STEPS}")
        close(_floats(state), _floats(last), name=f"the state after {said}")

    compare("fresh", whole.zero)
    compare("carried", estimate(params, whole.zero, whole.example.earlier, noise)[1])


def _with_noise(subject: Subject) -> Any:
    """Return (params, state, batch, noise) -> estimate: `given` if there is noise, else any key will do."""
    strategy = subject.strategy
    if strategy.claim.noise is not None:
        return strategy.given
    drawn = np.ptp(subject.estimates, axis=0).max() / np.abs(subject.estimates).max()
    require(
        drawn <= 1e-12,
        "the strategy is online and draws: without `claim.noise` and `given` this cannot be checked",
    )
    return lambda params, state, batch, _: strategy.estimate(params, state, batch, subject.keys[0])


def _noise(subject: Subject, steps: int) -> Any:
    """Draw random signs for `steps` steps; None for a strategy that declares no noise."""
    if subject.claim.noise is None:
        return None
    rng = np.random.default_rng(11)
    shapes = noise_shapes(subject.strategy, steps, subject.sequences, subject.example.params)
    return jax.tree.map(lambda s: jnp.asarray(rng.choice([-1.0, 1.0], s.shape)), shapes)


def _halves(subject: Subject, noise: Any) -> list[Any]:
    """Split the noise into that of the first and of the second half of the steps."""
    if noise is None:
        return [None, None]
    params, size = subject.example.params, subject.sequences
    half = noise_shapes(subject.strategy, STEPS // 2, size, params)

    def part(number: int) -> Any:
        def cut(a: Any, s: Any) -> Any:
            if a.shape == s.shape:  # noise for the whole call: both halves have it
                return a
            fits = a.shape == (2 * s.shape[0], *s.shape[1:])
            require(fits, f"noise of {a.shape} in {STEPS} steps and {s.shape} in half of them")
            return a[number * len(a) // 2 :][: len(a) // 2]

        return jax.tree.map(cut, noise, half)

    return [part(0), part(1)]


def _floats(tree: Any) -> list[Any]:
    return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.inexact)]
