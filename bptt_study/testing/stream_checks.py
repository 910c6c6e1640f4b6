"""Checks of claims beyond one call and one gradient: online, random signs as an argument, smoothing.

Each check takes a `Subject`, and raises CheckError if the claim does not hold. The first line of its docstring
is what `check_strategy` prints.
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bptt_study.testing.errors import CheckError, close, require, rows, vector
from bptt_study.testing.examples import Example, example, gradient
from bptt_study.testing.subject import Subject
from bptt_study.types import Batch, Problem, Strategy

STEPS = 12  # steps of the call that must equal two calls of half the length
SIGNS = 16  # the largest number of signs that are enumerated, in 2^16 patterns
# One sequence of T = 3 and H = 2; smaller for a strategy with a sign for every parameter.
TINY = [
    {"steps": steps, "sequences": 1, "inputs": hidden, "hidden": hidden, "outputs": 2}
    for steps, hidden in ((3, 2), (3, 1), (2, 1))
]
TOO_MANY = f"no tiny example with at most {SIGNS} random signs and a state that is not 0"


def check_online(subject: Subject) -> None:
    """A call of 12 steps is the token-weighted mean of two successive calls of 6."""
    whole = Subject(subject.make_strategy, subject.cell, steps=STEPS)
    params, batch = whole.example.params, whole.example.batch
    half = STEPS // 2
    first, second = (_steps(batch, part) for part in (slice(half), slice(half, None)))
    noise = _noise(whole, STEPS)
    estimate = jax.jit(_with_noise(whole))
    _, start = estimate(params, whole.zero, whole.example.earlier, noise)
    (loss, grads, _), last = estimate(params, start, batch, noise)
    parts, state = [], start
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


def noise_shapes(strategy: Strategy, steps: int, sequences: int, params: Any) -> Any:
    """Return the claim's noise as a tree of `jax.ShapeDtypeStruct`.

    Args:
      strategy: The strategy, whose claim gives the noise; its leaves may be plain shapes, too.
      steps: T.
      sequences: B.
      params: The parameters.

    Returns:
      The tree.

    Raises:
      CheckError: If the strategy has no `given`.
    """
    assert strategy.claim.noise is not None
    require(
        strategy.given is not None, "`claim.noise` is declared, and the strategy has no `given`"
    )

    def shaped(leaf: Any) -> bool:
        return hasattr(leaf, "shape") or (
            isinstance(leaf, tuple) and all(isinstance(n, int) for n in leaf)
        )

    def struct(leaf: Any) -> Any:
        return jax.ShapeDtypeStruct(tuple(getattr(leaf, "shape", leaf)), jnp.zeros(()).dtype)

    shapes = strategy.claim.noise(steps, sequences, params)
    return jax.tree.map(struct, shapes, is_leaf=shaped)


def check_noise(subject: Subject) -> str | None:
    """The mean over all signs is the gradient, and each estimate is that of some signs."""
    ex = _smallest(subject)
    if ex is None:
        return TOO_MANY
    strategy = subject.make_strategy(ex.problem)
    expected = _expected(ex, subject.claim.reach)
    found = enumerated(strategy, ex)
    _is_among(strategy, ex, found)
    off = np.linalg.norm(found.mean(axis=0) - expected) / np.linalg.norm(expected)
    require(off <= 1e-12, f"the mean over {len(found):,} signs is off by {off:.3g}; allowed 1e-12")
    return None


def check_smoothed(subject: Subject) -> str | None:
    """With σ halved, the error of the mean over all signs falls to a quarter.

    The check cannot set σ. It uses that parameters θ/c of a network that multiplies them by c are smoothed with
    c·σ.
    """
    ex = _smallest(subject)
    if ex is None:
        return TOO_MANY
    errors = []
    for scale in (1.0, 0.5):
        other = _scaled(ex, scale)
        mean = enumerated(subject.make_strategy(other.problem), other).mean(axis=0) / scale
        errors.append(np.linalg.norm(mean - _expected(ex, subject.claim.reach)))
    ratio = errors[0] / errors[1]
    require(3 < ratio < 5, f"with σ halved the error falls by {ratio:.3g}; expected 4 ± 1")
    return None


def _smallest(subject: Subject) -> Example | None:
    """Return the first example of TINY whose signs are few enough to enumerate, or None.

    Dropout may leave no unit of so few, and such an example tests nothing.
    """
    for size in TINY:
        try:
            ex = example(subject.cell, **size)
        except CheckError:
            continue
        if _signs(_shapes_of_calls(subject.make_strategy(ex.problem), ex)) <= SIGNS:
            return ex
    return None


def _calls(ex: Example, reach: str) -> list[Batch]:
    """Return the calls whose signs are enumerated; a claim about the stream has a call before the last step."""
    if reach == "call":
        return [ex.batch]
    return [_steps(ex.batch, slice(-1)), _steps(ex.batch, slice(-1, None))]


def _expected(ex: Example, reach: str) -> np.ndarray:
    """Compute the gradient of the last of these calls, from the zero state."""
    *earlier, batch = _calls(ex, reach)
    start = ex.problem.cell.zeros(1)
    ex = ex._replace(earlier=earlier[0] if earlier else ex.earlier, batch=batch, state=start)
    return vector(gradient(ex, reach)[1])


def _shapes_of_calls(strategy: Strategy, ex: Example) -> list[Any]:
    calls = _calls(ex, strategy.claim.reach)
    return [noise_shapes(strategy, len(call.mask), 1, ex.params) for call in calls]


def _signs(shapes: Any) -> int:
    return sum(prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _scaled(ex: Example, scale: float) -> Example:
    """Make the same network with the parameters θ/scale."""

    def times(params: Any) -> Any:
        return jax.tree.map(lambda p: scale * p, params)

    cell, readout, loss = ex.problem
    problem = Problem(
        cell._replace(step=lambda p, state, x: cell.step(times(p), state, x), affine=None),
        readout._replace(apply=lambda p, h: readout.apply(times(p), h)),
        loss,
    )
    return ex._replace(problem=problem, params=jax.tree.map(lambda p: p / scale, ex.params))


def enumerated(strategy: Strategy, ex: Example) -> np.ndarray:
    """Compute the gradients for all patterns of signs, from the zero state.

    Args:
      strategy: The strategy, whose claim declares its noise.
      ex: The example.

    Returns:
      The gradients [N, P].
    """
    shapes = _shapes_of_calls(strategy, ex)
    leaves, structure = jax.tree.flatten(shapes)
    count = _signs(shapes)
    signs = 1.0 - 2.0 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    ends = np.cumsum([prod(leaf.shape) for leaf in leaves])[:-1]
    noise = jax.tree.unflatten(
        structure,
        [
            jnp.asarray(part.reshape(-1, *leaf.shape))
            for part, leaf in zip(np.split(signs, ends, axis=1), leaves, strict=True)
        ],
    )

    def run(noise: Any) -> Any:
        assert strategy.given is not None  # for the type checker: `noise_shapes` asked
        state = strategy.init(ex.params, 1)
        for call, given in zip(_calls(ex, strategy.claim.reach), noise, strict=True):
            estimate, state = strategy.given(ex.params, state, call, given)
        return estimate.grads

    return rows(jax.jit(lambda noise: jax.lax.map(run, noise, batch_size=2048))(noise))


def _is_among(strategy: Strategy, ex: Example, given: np.ndarray) -> None:
    """`estimate` draws the noise that `given` takes."""

    def run(key: Any) -> Any:
        state = strategy.init(ex.params, 1)
        for number, call in enumerate(_calls(ex, strategy.claim.reach)):
            own = jax.random.fold_in(key, number)
            estimate, state = strategy.estimate(ex.params, state, call, own)
        return estimate.grads

    for drawn in rows(
        jax.jit(lambda keys: jax.lax.map(run, keys))(jax.random.split(jax.random.key(0), 5))
    ):
        off = np.abs(given - drawn).max(axis=1).min() / np.abs(given).max()
        require(off <= 1e-12, f"an estimate is off by {off:.3g} from what any signs give")


def _steps(batch: Batch, part: slice) -> Batch:
    return jax.tree.map(lambda a: a[part], batch)


def _floats(tree: Any) -> list[Any]:
    return [a for a in jax.tree.leaves(tree) if jnp.issubdtype(a.dtype, jnp.inexact)]
