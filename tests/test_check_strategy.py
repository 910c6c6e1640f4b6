"""The battery over the package's strategies, and planted faults that it must find."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import STRATEGY_FILES, configured

import bptt_study as bs
from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.strategies.randomized import cuts
from bptt_study.testing import examples
from bptt_study.testing import check_strategy as check_all
from bptt_study.testing.check_strategy import ONCE, checks
from bptt_study.testing.gradient_checks import *
from bptt_study.types import Claim, Estimate

STRATEGIES = {file.stem: configured(file) for file in STRATEGY_FILES} | {
    "tbptt_2_5": lambda problem: bs.strategies.fixed(problem, window=5, stride=2),
    "uncompensated_power_law": lambda problem: bs.strategies.randomized_power_law(
        problem, mean_length=3, compensate=False
    ),
}


# relu differs from tanh in one pointwise function: the tests of cells and of unroll know both
CELLS = [cell for cell in examples.CELLS if cell != "elman_relu"]


@cache
def subject(name, cell):
    return Subject(STRATEGIES[name], cell)


CASES = [
    pytest.param(name, cell, check, id=f"{name}-{cell}-{check.__name__[6:]}")
    for name, make in STRATEGIES.items()
    for cell in CELLS
    for check in checks(make(examples.problem_of(cell)).claim)
    if check is not check_memory or cell == "elman_tanh"  # the cells hold alike
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


def gated(xi):
    """Gates xi(kept, π) for the constant law of mean length 3, with the claim of `randomized`."""

    def make(problem):
        law = bs.strategies.constant(3)

        def estimate(params, state, batch, key):
            kept, pi = cuts(law, jax.random.uniform(key, batch.mask.shape))
            return backpropagate(
                problem, params, state, batch, Truncation(link_weights=xi(kept, pi))
            )

        return bs.strategies.randomized(problem, law)._replace(estimate=estimate)

    return make


def per_loss(problem):
    """Full BPTT that goes back from each loss alone, T times T states, and claims T."""
    honest = bs.strategies.full(problem)

    def estimate(params, state, batch, key):
        def one(step):
            own = batch._replace(mask=batch.mask * (jnp.arange(len(batch.mask)) == step)[:, None])
            result, last = backpropagate(problem, params, state, own)
            share = own.mask.sum() / batch.mask.sum()
            return jax.tree.map(lambda a: share * a, (result.loss, result.grads)), last

        (losses, grads), last = jax.vmap(one)(jnp.arange(len(batch.mask)))
        loss, grads = jax.tree.map(lambda a: a.sum(axis=0), (losses, grads))
        return Estimate(loss, grads, {}), jax.tree.map(lambda h: h[0], last)

    return honest._replace(estimate=estimate)


def halved(result, state):
    return result._replace(grads=jax.tree.map(lambda g: 0.5 * g, result.grads)), state


def forgetful(problem):
    """Full BPTT from the zero state, whatever was carried."""
    honest = STRATEGIES["full"](problem)

    def estimate(params, state, batch, key):
        return honest.estimate(params, jax.tree.map(jnp.zeros_like, state), batch, key)

    return honest._replace(estimate=estimate)


def overstated(make):
    """A claim whose patterns are 1 % likelier than they are."""
    claim = make(examples.problem_of("elman_tanh")).claim
    weights = claim.lag_weights

    def patterns(steps):
        w, probability = weights.patterns(steps)
        return w, 1.01 * probability

    return claim._replace(lag_weights=weights._replace(patterns=patterns))


COUNTER = iter(range(10**6))
FAULTS = {
    "missing_grads": (
        check_shapes,
        lying(lambda r, s: (r._replace(grads={"cell": r.grads["cell"]}), s)),
    ),
    "zero_grads": (
        check_shapes,
        lying(lambda r, s: (r._replace(grads=jax.tree.map(jnp.zeros_like, r.grads)), s)),
    ),
    "half_precision": (
        check_float32,
        lying(
            lambda r, s: (
                r._replace(
                    loss=r.loss.astype("float64" if jax.config.jax_enable_x64 else "float16")
                ),
                s,
            )
        ),
    ),
    "state_grows": (check_state_closed, lying(lambda r, s: (r, (s, s)))),
    "state_of_weak_type": (
        check_traced_once,
        lying(lambda r, s: (r, jnp.broadcast_to(jnp.asarray(0.5), s.shape))),
    ),
    "depends_on_tracing": (
        check_jit,
        lying(lambda r, s: (r._replace(loss=r.loss + next(COUNTER)), s)),
    ),
    "other_loss": (check_loss, lying(lambda r, s: (r._replace(loss=1.001 * r.loss), s))),
    "truncates_and_claims_exact": (
        check_exact,
        lying(lambda r, s: (r, s), STRATEGIES["tbptt_2_5"], Claim(exact=True, unbiased=True)),
    ),
    "scaled_and_claims_exact": (check_exact, lying(halved)),
    "truncates_and_claims_unbiased": (
        check_unbiased,
        lying(lambda r, s: (r, s), STRATEGIES["sliding"], Claim(unbiased=True)),
    ),
    "uncompensated_and_claims_unbiased": (
        check_unbiased,
        lying(lambda r, s: (r, s), STRATEGIES["randomized_uncompensated"], Claim(unbiased=True)),
    ),
    "compensated_by_the_wrong_power": (
        check_unbiased,
        gated(lambda kept, pi: jnp.where(kept, pi**-0.5, 0)),
    ),
    "compensated_twice": (
        check_unbiased,
        gated(lambda kept, pi: jnp.where(kept, pi**-2, 0)),
    ),
    "not_among_its_draws": (
        check_enumeration,
        gated(lambda kept, pi: jnp.where(kept, pi**-1.01, 0)),
    ),
    "draws_more_likely_than_declared": (
        check_enumeration,
        lying(lambda r, s: (r, s), STRATEGIES["randomized"], overstated(STRATEGIES["randomized"])),
    ),
    "window_off_by_one": (
        check_lag_weights,
        lying(
            lambda r, s: (r, s),
            lambda problem: bs.strategies.fixed(problem, window=4, stride=1),
            STRATEGIES["sliding"](examples.problem_of("elman_tanh")).claim,
        ),
    ),
    "h_0_ignored": (check_loss, forgetful),
    "quadratic_memory": (check_memory, per_loss),
    "unknown_memory": (
        check_memory,
        lying(lambda r, s: (r, s), claim=Claim(exact=True, unbiased=True, memory="little")),
    ),
    "unbiased_and_claims_nothing": (
        check_bias_shows,
        lying(lambda r, s: (r, s), STRATEGIES["randomized"], Claim()),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault):
    check, make_liar = FAULTS[fault]
    with pytest.raises(AssertionError):
        check(Subject(make_liar, "elman_tanh"))


def test_a_shared_zero_gradient_is_no_agreement(monkeypatch):
    """A dead model, of which every strategy's gradient is zero, is refused as a reference."""
    dead = examples.example("elman_tanh")
    dead = dead._replace(params=jax.tree.map(jnp.zeros_like, dead.params))
    monkeypatch.setattr(battery, "example", lambda *_: dead)
    with pytest.raises(AssertionError, match="dead model"):
        examples.reference.__wrapped__("elman_tanh")
    with pytest.raises(AssertionError, match="no gradient"):
        check_shapes(subject_of_zeros())


def subject_of_zeros():
    return Subject(
        lying(lambda r, s: (r._replace(grads=jax.tree.map(jnp.zeros_like, r.grads)), s)),
        "elman_tanh",
    )


def test_exact_must_be_unbiased():
    with pytest.raises(AssertionError, match="exact is unbiased"):
        checks(Claim(exact=True, unbiased=False))


BIASED = [n for n, make in STRATEGIES.items() if not make(examples.problem_of("gru")).claim.unbiased]


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("cell", CELLS[1:])
def test_biased_settings_cut_something(name, cell):
    """So that check_bias_shows, which lets uncut settings pass, had something to see."""
    deviation, exact, _ = subject(name, cell).deviation()
    assert np.linalg.norm(deviation.mean(axis=0)) > 0.001 * np.linalg.norm(exact)


@pytest.mark.parametrize("claimed", ["T", "segment"])
def test_many_draws_store_all_states(claimed):
    def make(problem):
        strategy = bs.strategies.randomized(problem, bs.strategies.constant(3), draws=3)
        assert strategy.claim.memory == "T"
        return strategy._replace(claim=strategy.claim._replace(memory=claimed))

    subject = Subject(make, "elman_tanh")
    if claimed == "T":
        return check_memory(subject)
    with pytest.raises(AssertionError, match="more memory"):
        check_memory(subject)
