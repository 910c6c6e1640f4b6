"""The battery over the package's strategies, and planted faults that it must find."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import STRATEGY_FILES, configured

import bptt_study as bs
from bptt_study import battery
from bptt_study.types import Claim

STRATEGIES = {file.stem: configured(file) for file in STRATEGY_FILES} | {
    "tbptt_2_5": lambda problem: bs.strategies.fixed(problem, window=5, stride=2),
    "uncompensated_power_law": lambda problem: bs.strategies.randomized_power_law(
        problem, mean_length=3, compensate=False
    ),
}


# relu differs from tanh in one pointwise function: the tests of cells and of unroll know both
CELLS = [cell for cell in battery.CELLS if cell != "elman_relu"]


@cache
def subject(name, cell):
    return battery.Subject(STRATEGIES[name], cell)


CASES = [
    pytest.param(name, cell, check, id=f"{name}-{cell}-{check.__name__[6:]}")
    for name, make in STRATEGIES.items()
    for cell in CELLS
    for check in battery.checks(make(battery.problem_of(cell)).claim)
]


@pytest.mark.parametrize(("name", "cell", "check"), CASES)
def test_strategy(name, cell, check):
    check(subject(name, cell))


def lying(change, make=STRATEGIES["full"], claim=None):
    """The strategy of `make` with its estimate changed: what the battery must notice."""

    def make_liar(problem):
        honest = make(problem)

        def estimate(params, state, batch, key):
            return change(*honest.estimate(params, state, batch, key))

        return honest._replace(estimate=estimate, claim=claim or honest.claim)

    return make_liar


def halved(result, state):
    return result._replace(grads=jax.tree.map(lambda g: 0.5 * g, result.grads)), state


COUNTER = iter(range(10**6))
FAULTS = {
    "missing_grads": (
        battery.check_shapes,
        lying(lambda r, s: (r._replace(grads={"cell": r.grads["cell"]}), s)),
    ),
    "zero_grads": (
        battery.check_shapes,
        lying(lambda r, s: (r._replace(grads=jax.tree.map(jnp.zeros_like, r.grads)), s)),
    ),
    "half_precision": (
        battery.check_float32,
        lying(
            lambda r, s: (
                r._replace(
                    loss=r.loss.astype("float64" if jax.config.jax_enable_x64 else "float16")
                ),
                s,
            )
        ),
    ),
    "state_grows": (battery.check_state_closed, lying(lambda r, s: (r, (s, s)))),
    "state_of_weak_type": (
        battery.check_traced_once,
        lying(lambda r, s: (r, jnp.broadcast_to(jnp.asarray(0.5), s.shape))),
    ),
    "depends_on_tracing": (
        battery.check_jit,
        lying(lambda r, s: (r._replace(loss=r.loss + next(COUNTER)), s)),
    ),
    "other_loss": (battery.check_loss, lying(lambda r, s: (r._replace(loss=1.001 * r.loss), s))),
    "truncates_and_claims_exact": (
        battery.check_exact,
        lying(lambda r, s: (r, s), STRATEGIES["tbptt_2_5"], Claim(exact=True, unbiased=True)),
    ),
    "scaled_and_claims_exact": (battery.check_exact, lying(halved)),
    "truncates_and_claims_unbiased": (
        battery.check_unbiased,
        lying(lambda r, s: (r, s), STRATEGIES["sliding"], Claim(unbiased=True)),
    ),
    "uncompensated_and_claims_unbiased": (
        battery.check_unbiased,
        lying(lambda r, s: (r, s), STRATEGIES["randomized_uncompensated"], Claim(unbiased=True)),
    ),
    "unbiased_and_claims_nothing": (
        battery.check_bias_shows,
        lying(lambda r, s: (r, s), STRATEGIES["randomized"], Claim()),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault):
    check, make_liar = FAULTS[fault]
    with pytest.raises(AssertionError):
        check(battery.Subject(make_liar, "elman_tanh"))


def test_exact_must_be_unbiased():
    with pytest.raises(AssertionError, match="exact is unbiased"):
        battery.checks(Claim(exact=True, unbiased=False))


BIASED = [n for n, make in STRATEGIES.items() if not make(battery.problem_of("gru")).claim.unbiased]


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("cell", CELLS[1:])
def test_biased_settings_cut_something(name, cell):
    """So that check_bias_shows, which lets uncut settings pass, had something to see."""
    deviation, exact, _ = subject(name, cell).deviation()
    assert np.linalg.norm(deviation.mean(axis=0)) > 0.001 * np.linalg.norm(exact)
