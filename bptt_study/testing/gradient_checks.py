"""Checks of the gradient that a claim promises: exactly, on average, or by its lag weights.

Each check takes a `Subject`, and raises CheckError if the promise does not hold. The first line of its
docstring is what `check_strategy` prints.
"""

from typing import Any

import jax
import numpy as np

import bptt_study as bs
from bptt_study.testing.errors import ALLOWED, CheckError, require, rows, vector
from bptt_study.testing.examples import reference
from bptt_study.testing.loops import looped_loss
from bptt_study.testing.protocol_checks import check_loss, check_metrics, check_state_closed
from bptt_study.testing.subject import Subject
from bptt_study.types import Claim
from bptt_study.validation import SettingError

# Sizes beside the usual one. The long one is beyond every window and chunk that is likely to be set.
ONE = {"steps": 1, "sequences": 1}
LONGER = {"steps": 10, "sequences": 1, "inputs": 2, "hidden": 2, "outputs": 2}
# steps far from the start, a multiple of most strides, and lags, of which they are many times as many
LATE, LAGS = 840, 128
# beyond a window or chunk of 100, for a claim that names no length
FAR = {"steps": 260, "sequences": 1, "inputs": 2, "hidden": 2, "outputs": 2}
LONG = {"steps": 70, "sequences": 5, "inputs": 2, "hidden": 4, "outputs": 5}


def check_exact(subject: Subject) -> None:
    """Every draw is the gradient of the plain loop, and agrees with finite differences."""
    deviation, exact, _ = subject.deviation()
    off = np.abs(deviation).max() / np.abs(exact).max()
    require(off <= 1e-12, f"off from the exact gradient by {off:.3g} of it; allowed 1e-12")
    if subject.claim.reach == "call" and not subject.size:
        _check_differences(subject)


def _check_differences(subject: Subject) -> None:
    problem, params, _, batch, state = subject.example
    rng = np.random.default_rng(5)
    for _ in range(3):
        ray = jax.tree.map(lambda p: rng.standard_normal(p.shape), params)

        def along(e: float, ray: Any = ray) -> Any:
            moved = jax.tree.map(lambda p, r: p + e * r, params, ray)
            return looped_loss(problem, moved, state, batch)[0]

        near, far = (float(along(h) - along(-h)) for h in (1e-4, 2e-4))
        slope = (8 * near - far) / 12e-4  # exact up to h⁴
        off = abs(vector(subject.first[0].grads) @ vector(ray) - slope)
        require(off <= 1e-8, f"off from finite differences by {off:.3g}; allowed 1e-8")


def check_unbiased(subject: Subject) -> None:
    """The mean over keys is the gradient within 4 standard errors, which are at most a tenth of it."""
    _no_mean(*subject.deviation())


def check_lag_weights(subject: Subject) -> None:
    """The mean over keys is the lag table times the declared weights, within 4 standard errors.

    If a strategy draws nothing, every estimate has that value. The readout's gradient has no lags: each draw
    has all of it.
    """
    deviation, exact, direction = subject.deviation()
    readout = vector(subject.reference[1]["readout"])
    off = np.abs(rows(subject.draws[0].grads["readout"]) - readout).max() / np.abs(readout).max()
    require(off <= 1e-10, f"off from the readout's gradient by {off:.3g} of it; allowed 1e-10")
    problem, params, _, batch, state = subject.example
    steps = len(batch.mask)
    weights = bs.lags.weights(subject.strategy, steps, steps)
    expected = vector(bs.lags.weighted_gradient(problem, params, batch, weights, state))
    deviation = deviation + exact - expected
    if not subject.draws_nothing:
        return _no_mean(deviation, expected, direction)
    size = np.abs(expected).max()
    apart = np.ptp(deviation, axis=0).max() / size
    unnamed = (
        "it differs between keys by {:.3g} of itself, and `lag_weights.patterns` names no draws"
    )
    require(apart <= 1e-10, unnamed.format(apart))
    off = np.abs(deviation).max() / size
    require(off <= 1e-10, f"off from its lag weights by {off:.3g} of the gradient; allowed 1e-10")


def _no_mean(deviation: np.ndarray, exact: np.ndarray, direction: np.ndarray) -> None:
    """Raise unless the mean of the rows is zero within their noise, as a vector and along a direction."""
    draws = len(deviation)
    error = np.linalg.norm(deviation.std(axis=0, ddof=1)) / np.sqrt(draws)
    rounding = 1e-10 * np.linalg.norm(exact)
    noise = error / np.linalg.norm(exact)
    require(noise <= 0.1, f"too noisy to tell: a standard error of {noise:.2g} of the gradient")
    along = deviation @ direction
    for off, one in (
        (np.linalg.norm(deviation.mean(axis=0)), error),
        (abs(along.mean()), along.std(ddof=1) / np.sqrt(draws)),
    ):
        times = off / one if one else np.inf
        require(
            off <= ALLOWED * one + rounding,
            f"the mean over {draws:,} draws is off by {times:.1f} standard errors; allowed {ALLOWED}",
        )


def check_window(subject: Subject) -> str | None:
    """The lag profile of an endless sequence is the mean of the declared weights far from its start."""
    declared = bs.lags.declared(subject.strategy)
    late = np.asarray(declared.weights(2 * LATE, LAGS))[LATE:]
    halves = late.reshape(2, -1, LAGS).mean(axis=1)
    if declared.patterns is not None and np.abs(np.subtract(*halves)).max() > 1e-3:
        return f"its weights still change after {2 * LATE:,} steps"
    off = np.abs(late.mean(axis=0) - np.asarray(declared.window(LAGS))).max()
    require(off <= 0.02, f"the window is off from the weights' mean by {off:.3g}; allowed 0.02")
    return None


def check_bias_shows(subject: Subject) -> str | None:
    """A strategy that does not claim to be unbiased shows its bias, unless it cuts nothing here."""
    deviation, exact, _ = subject.deviation()
    if np.abs(deviation).max() <= 1e-9 * np.abs(exact).max():
        return None
    try:
        check_unbiased(subject)
    except CheckError as error:
        if "too noisy" in str(error):
            raise
        return None
    if _nothing_passes(subject):
        return "the cell passes nothing back through time, so there is nothing to be biased about"
    raise CheckError("no bias to see: claim unbiasedness, or the check is blind here")


def _nothing_passes(subject: Subject) -> bool:
    """Return True if the immediate derivatives alone are the gradient, as for an mlp."""
    problem, params, _, batch, state = subject.example
    immediate = bs.strategies.fixed(problem, window=1)
    found = vector(jax.jit(immediate.estimate)(params, state, batch, subject.keys[0])[0].grads)
    exact = vector(reference(subject.cell, **subject.size)[1])
    return bool(np.abs(found - exact).max() <= 1e-9 * np.abs(exact).max())


def check_sizes(subject: Subject) -> str | None:
    """The claim holds for one step of one sequence too, and for more steps than usual.

    A strategy that draws nothing is checked at 70 steps, another one at 10, before its noise grows. An exact
    one is checked at 260 steps too, unless its gradient there is nan, which claims nothing. A strategy may
    refuse a call of some length by a SettingError.
    """
    sizes = [ONE, LONG if subject.draws_nothing else LONGER]
    refused = ""
    for size in (*sizes, FAR) if subject.claim.exact else sizes:
        said = ", ".join(f"{name} = {number}" for name, number in size.items())
        other = Subject(subject.make_strategy, subject.cell, **size)
        try:
            _check_far(other) if size is FAR else _check_size(other)
        except CheckError as error:
            raise CheckError(f"with {said}: {error}") from error
        except SettingError as error:
            refused = refused or f"with {said}: {error}"
    return refused or None


def _check_size(subject: Subject) -> None:
    for check in (check_metrics, check_state_closed, check_loss, *of_gradient(subject.claim)):
        check(subject)


def _check_far(subject: Subject) -> None:
    if not np.isnan(subject.estimates).all():
        check_exact(subject)


def of_gradient(claim: Claim) -> list[Any]:
    """List the checks of the gradient itself that go with a claim.

    Args:
      claim: The claim.

    Returns:
      The checks.
    """
    chosen: list[Any] = [check_exact] if claim.exact else []
    if claim.lag_weights is not None and claim.reach == "call":
        chosen.append(check_lag_weights)
    if claim.unbiased and not claim.exact and claim.smoothed is None:
        chosen.append(check_unbiased)
    return chosen
