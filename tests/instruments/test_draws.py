"""A strategy that draws says what it draws, or it has no exact variance."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_study as bs
from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.instruments.draws import check_draws
from bptt_study.testing.check_strategy import CheckError, check_strategy
from bptt_study.training.check_estimate import check_estimate
from bptt_study.validation import SettingError

T, B, H, Q, SHARE = 6, 2, 3, 3, 0.5
UNNAMED = r"`(strategy\.)?claim\.lag_weights\.patterns` must be all draws"


def patterns(steps):
    """Whether each of the links 2 … T is cut: w[s,k] is the product of the ξ between s - k and s."""
    each = np.array(list(product((0, 1 / SHARE), repeat=steps - 1)))
    xi = np.concatenate([np.ones((len(each), 1)), each], axis=1)
    weights = np.zeros((len(xi), steps, steps))
    for s in range(steps):
        for k in range(s + 1):
            weights[:, s, k] = xi[:, s - k + 1 : s + 1].prod(axis=1)
    kept = (each > 0).sum(axis=1)
    return jnp.asarray(weights), jnp.asarray(SHARE**kept * (1 - SHARE) ** (steps - 1 - kept))


def random_cuts(problem, named, unbiased=True, scale=1.0):
    """Cuts at random, with lag weights of 1 on average; without `named` the claim does not say so."""

    def estimate(params, state, batch, key):
        kept = jax.random.bernoulli(key, SHARE, batch.mask.shape)
        return backpropagate(
            problem, params, state, batch, Truncation(link_weights=kept * scale / SHARE)
        )

    weights = bs.LagWeights(
        jnp.ones, lambda steps, lags: jnp.ones((steps, lags)), patterns if named else None
    )
    claim = bs.Claim(unbiased=unbiased, source="test", lag_weights=weights)
    return bs.Strategy(lambda params, size: problem.cell.zeros(size), estimate, claim)


@pytest.fixture(scope="module")
def given():
    rng = np.random.default_rng(0)
    cell = bs.cells.elman(Q, H)
    problem = bs.Problem(cell, bs.readouts.linear(H, Q), bs.losses.cross_entropy)
    inputs, targets = (jnp.asarray(rng.integers(Q, size=(T, B))) for _ in range(2))
    return problem, problem.init(jax.random.key(0)), bs.Batch(inputs, targets, jnp.ones((T, B)))


def test_named_draws_have_the_variance_of_the_draws(given):
    problem, params, batch = given
    exact = bs.measure.exact_quality(random_cuts(problem, True), problem, params, batch)
    drawn = bs.measure.quality(
        random_cuts(problem, False), problem, params, batch, jax.random.key(1), draws=2000
    )
    assert drawn.variance.low < exact.variance < drawn.variance.high
    check_estimate(problem, random_cuts(problem, True), batch)


@pytest.mark.parametrize("unbiased", [True, False])
def test_draws_that_the_claim_does_not_name_are_refused(given, unbiased):
    problem, params, batch = given
    cuts = random_cuts(problem, False, unbiased)
    with pytest.raises(SettingError, match=UNNAMED):
        bs.measure.exact_quality(cuts, problem, params, batch)
    with pytest.raises(SettingError, match=UNNAMED):
        check_estimate(problem, cuts, batch)
    with pytest.raises(SettingError, match=UNNAMED):
        check_draws(cuts, params, cuts.init(params, B), batch)


def test_no_variance_of_an_unbiased_strategy_without_draws(given):
    problem, params, batch = given
    flows = bs.lags.flows(problem, params, batch)
    with pytest.raises(SettingError, match=UNNAMED):
        bs.lags.variance(random_cuts(problem, False), flows)
    assert bs.lags.variance(bs.strategies.fixed(problem, 2), flows) == 0


def test_check_strategy_says_that_draws_are_not_named():
    with pytest.raises(CheckError, match=r"lag_weights.patterns` names no draws"):
        check_strategy(lambda problem: random_cuts(problem, False), "elman_tanh")


def test_a_key_that_is_not_used_for_the_gradient_is_no_draw(given):
    """A window of one's own whose metrics alone are random."""
    problem, params, batch = given
    fixed = bs.strategies.fixed(problem, 2)

    def estimate(params, state, batch, key):
        found, after = fixed.estimate(params, state, batch, key)
        metrics = {**found.metrics, "noise": jax.random.normal(key)}
        return found._replace(metrics=metrics), after

    own = fixed._replace(estimate=estimate)
    check_draws(own, params, own.init(params, B), batch)
    assert bs.measure.exact_quality(own, problem, params, batch).variance == 0
