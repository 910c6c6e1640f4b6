"""Checks of what a claim declares about its draws: the list of all, their variance, and link weights.

Each check takes a `Subject`, and raises CheckError if the promise does not hold. The first line of its
docstring is what `check_strategy` prints.
"""

from typing import Any

import jax
import numpy as np

import bptt_study as bs
from bptt_study.testing.errors import ALLOWED, close, require, rows, vector
from bptt_study.testing.subject import KEYS, Subject


def check_enumeration(subject: Subject) -> None:
    """The draws are those that the claim lists, with its probabilities, and each sequence has its own.

    Their probabilities sum to 1 and their mean is the declared weights (1 for an unbiased claim). Each estimate
    is one of them for every sequence, and the estimates have the variance of independent draws.
    """
    steps = len(subject.example.batch.mask)
    declared = bs.lags.declared(subject.strategy)
    assert declared.patterns is not None  # for the type checker: `checks` asked
    listed = jax.jit(declared.patterns, static_argnums=0)  # one program; op by op takes longer
    weights, probability = map(np.asarray, listed(steps))
    off = abs(probability.sum() - 1)
    require(off <= 1e-12, f"the probabilities of all draws sum to 1 up to {off:.3g}; allowed 1e-12")
    mean = np.tril(np.einsum("n,nsk->sk", probability, weights))
    lags = np.ones((steps, steps)) if subject.claim.unbiased else declared.weights(steps, steps)
    close(mean, np.tril(np.asarray(lags)), name="the mean of all draws' weights")
    alone = _of_each_sequence(subject, weights)
    if declared.draws == 1:
        _each_is_listed(subject, alone, probability)
    expected = 0.0
    for grads in alone:
        expected += probability @ np.sum((grads - probability @ grads) ** 2, axis=1)
    cell_mean = sum(probability @ grads for grads in alone)
    _varies(subject, cell_mean, expected / declared.draws, f"{declared.draws} independent draws")


def _of_each_sequence(subject: Subject, weights: np.ndarray) -> list[np.ndarray]:
    """Compute the part of each sequence in the cell's gradient, for every draw; each [N, P]."""
    problem, params, _, batch, state = subject.example

    def one(w: Any, only: Any) -> Any:
        return bs.lags.weighted_gradient(problem, params, batch, w[..., None] * only, state)["cell"]

    of_all = jax.jit(jax.vmap(jax.vmap(one, (0, None)), (None, 0)))
    found = of_all(weights, np.eye(subject.sequences))
    return [
        rows(jax.tree.map(lambda g, b=b: g[b], jax.device_get(found)))
        for b in range(subject.sequences)
    ]


def _each_is_listed(subject: Subject, alone: list[np.ndarray], probability: np.ndarray) -> None:
    """Check that each estimate is a sum of listed draws, and that sequences do not share their draws."""
    allowed = 1e-10 * max(np.abs(a).max() for a in alone)
    first, second = alone
    alike = []
    for drawn in rows(subject.draws[0].grads["cell"])[:KEYS]:
        off = np.abs((drawn - first)[:, None] - second).max(axis=-1)
        require(off.min() <= allowed, f"off from all listed draws by {off.min():.3g}")
        alike.append(np.diagonal(off).min() <= allowed)
    chance = float(np.sum(probability**2)) ** KEYS
    require(
        not all(alike) or chance > 1e-6 or not np.ptp(first, axis=0).any(),
        f"all sequences have the same draw in each of {KEYS} estimates, which has a chance of {chance:.1g}",
    )


def check_variance(subject: Subject) -> None:
    """E‖ĝ - E[ĝ]‖² of the cell's gradient is the declared variance, within 4 standard errors."""
    problem, params, _, batch, state = subject.example
    declared, steps = bs.lags.declared(subject.strategy), len(batch.mask)
    weights = bs.lags.weights(subject.strategy, steps, steps)
    mean = vector(bs.lags.weighted_gradient(problem, params, batch, weights, state)["cell"])
    table = getattr(bs.lags, declared.table)(problem, params, batch, state)
    expected = bs.lags.variance(subject.strategy, table, declared.table)
    _varies(subject, mean, expected, "its closed form")


def _varies(subject: Subject, mean: np.ndarray, expected: float, of: str) -> None:
    """Check that E‖ĝ - E[ĝ]‖² of the cell's gradient is the expected number."""
    squares = np.sum((rows(subject.draws[0].grads["cell"]) - mean) ** 2, axis=1)
    error = squares.std(ddof=1) / np.sqrt(len(squares))
    off = abs(squares.mean() - expected)
    require(
        off <= ALLOWED * error + 1e-20,
        f"the variance is {squares.mean() / expected if expected else np.inf:.3g} times that of "
        f"{of}, {off / error if error else np.inf:.1f} standard errors off; allowed {ALLOWED}",
    )


def check_link_weights(subject: Subject) -> None:
    """The products of the declared link weights have the declared weights as their mean."""
    declared, steps = bs.lags.declared(subject.strategy), len(subject.example.batch.mask)
    assert declared.link_weights is not None  # for the type checker: `checks` asked
    uniforms = jax.random.uniform(jax.random.key(3), (steps, 20_000))
    xi = np.asarray(jax.jit(declared.link_weights)(uniforms))
    expected = np.asarray(declared.weights(steps, steps))
    for s in range(1, steps):
        passed = np.cumprod(xi[s:0:-1], axis=0)  # over the links from h_s back, [lag - 1, draws]
        error = passed.std(axis=1, ddof=1) / np.sqrt(passed.shape[1])
        off = np.abs(passed.mean(axis=1) - expected[s, 1 : s + 1]) - (ALLOWED + 1) * error
        require(
            off.max() <= 1e-9, f"the link weights' mean is not the weight of lag {off.argmax() + 1}"
        )
