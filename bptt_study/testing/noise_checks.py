"""Checks of estimators with random signs, by enumeration of all signs: their mean, and its smoothing.

Each check takes a `Subject`, and raises CheckError if the claim does not hold. The first line of its docstring
is what `check_strategy` prints.
"""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bptt_study.instruments.draws import sign_shapes
from bptt_study.testing.errors import CheckError, require, rows, vector
from bptt_study.testing.examples import Example, example, gradient, steps_of
from bptt_study.testing.subject import Subject
from bptt_study.types import Batch, Problem, Strategy

SIGNS = 16  # the largest number of signs that are enumerated, in 2^16 patterns
# One sequence of T = 3 and H = 2; smaller for a strategy with a sign for every parameter.
TINY = [
    {"steps": steps, "sequences": 1, "inputs": hidden, "hidden": hidden, "outputs": 2}
    for steps, hidden in ((3, 2), (3, 1), (2, 1))
]
TOO_MANY = f"no tiny example with at most {SIGNS} random signs and a state that is not 0"


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
    require(
        strategy.given is not None, "`claim.noise` is declared, and the strategy has no `given`"
    )
    return sign_shapes(strategy.claim, steps, sequences, params)


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
    """With σ halved, the error of the mean over all signs falls to a quarter; each estimate is that of some.

    The check cannot set σ. It uses that parameters θ/c of a network that multiplies them by c are smoothed with
    c·σ.
    """
    ex = _smallest(subject)
    if ex is None:
        return TOO_MANY
    errors = []
    for scale in (1.0, 0.5):
        other = _scaled(ex, scale)
        strategy = subject.make_strategy(other.problem)
        found = enumerated(strategy, other)
        _is_among(strategy, other, found)
        mean = found.mean(axis=0) / scale
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
    return [steps_of(ex.batch, slice(-1)), steps_of(ex.batch, slice(-1, None))]


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
