"""Probes of a run's own strategy and task, against enumeration and plain evaluation, on tiny problems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_study as bs
from bptt_study import probes
from bptt_study.instruments import measure
from bptt_study.testing import examples, loops
from bptt_study.validation import SettingError

STEPS = 5


def snapshot(strategy, training=None, **changed):
    """The examples' Elman network on T = 5, with its own batch as a task's parts."""
    ex = examples.example("elman_tanh", STEPS)
    batch = ex.batch._replace(**changed)
    task = bs.tasks.digits()._replace(validation=batch, training=training)
    key = jax.random.key(0)
    own = strategy(ex.problem)
    return probes.Snapshot(ex.problem, own, task, ex.params, batch, key, lambda n: batch)


def uncompensated(problem):
    return bs.strategies.randomized_constant(problem, 2.0, compensate=False)


@pytest.mark.slow
def test_gradient_error_is_that_of_all_draws():
    """Bias² exactly, variance within four standard errors of a chi-square with many draws."""
    s = snapshot(uncompensated)
    (found,) = probes.gradient_error(draws=2000).look(s).to_dict("records")
    exact = measure.exact_quality(s.strategy, s.problem, s.params, s.batch)
    assert exact.bias2 > 1e-6 and not found["exact"]
    np.testing.assert_allclose(found["bias2"], exact.bias2, rtol=1e-10)
    np.testing.assert_allclose(found["variance"], exact.variance, rtol=0.15)
    full = bs.strategies.full(s.problem).estimate(
        s.params, s.problem.cell.zeros(examples.B), s.batch, s.key
    )[0]
    norm2 = sum(jnp.sum(g**2) for g in jax.tree.leaves(full.grads))
    np.testing.assert_allclose(found["norm2"], norm2, rtol=1e-12)


@pytest.mark.parametrize(
    "law", [bs.strategies.constant(2.0), bs.strategies.power_law(mean_length=2, alpha=4)]
)
def test_the_error_of_compensated_cuts_is_in_closed_form(law):
    """Most of the variance lies in rare draws: two draws do not show it."""
    s = snapshot(lambda problem: bs.strategies.randomized(problem, law, draws=3))
    (found,) = probes.gradient_error(draws=2).look(s).to_dict("records")
    exact = measure.exact_quality(s.strategy, s.problem, s.params, s.batch)
    assert found["exact"] and exact.variance > 1e-6
    np.testing.assert_allclose(found["variance"], exact.variance, rtol=1e-10)
    lost = s._replace(params=jax.tree.map(lambda p: p * np.nan, s.params))
    (found,) = probes.gradient_error().look(lost).to_dict("records")
    assert np.isnan(found["variance"])


def test_what_is_discounted_has_that_bias_and_no_variance():
    s = snapshot(lambda problem: bs.strategies.discounted(problem, 2.0))
    (found,) = probes.gradient_error(draws=2).look(s).to_dict("records")
    exact = measure.exact_quality(uncompensated(s.problem), s.problem, s.params, s.batch)
    np.testing.assert_allclose(found["bias2"], exact.bias2, rtol=1e-10)
    assert found["variance"] == 0
    (other,) = (
        probes.gradient_error(draws=2)
        .look(snapshot(lambda problem: bs.strategies.discounted(problem, 3.0)))
        .to_dict("records")
    )
    assert abs(other["bias2"] / exact.bias2 - 1) > 0.1


def test_lag_mass_and_what_is_kept_of_it():
    def chunks(problem):
        return bs.strategies.fixed(problem, window=2)

    table = probes.lag_mass().look(snapshot(chunks, mask=jnp.ones((STEPS, examples.B))))
    # losses at steps 0 … 4 reach 0, 1, 0, 1, 0 back: of those at steps 1 … 4 two keep lag 1
    np.testing.assert_allclose(table["kept"], [1, 0.5, 0, 0, 0])
    s = snapshot(chunks)
    gradients = bs.lags.gradients(s.problem, s.params, s.batch, STEPS)["cell"]
    norms = [np.sqrt(sum(np.sum(g[k] ** 2) for g in gradients.values())) for k in range(STEPS)]
    np.testing.assert_allclose(probes.lag_mass().look(s)["mass"], norms)
    # a loss at step 3 alone, the second of its chunk, keeps lags 0 and 1; lag 4 has no loss
    only = jnp.zeros((STEPS, examples.B)).at[3].set(1)
    np.testing.assert_allclose(
        probes.lag_mass().look(snapshot(chunks, mask=only))["kept"], [1, 1, 0, 0, np.nan]
    )


def test_generalisation_evaluates_both_parts_on_as_many_steps():
    ex = examples.example("elman_tanh", STEPS)
    shorter = jax.tree.map(lambda a: a[:3], ex.earlier)
    table = probes.generalisation().look(snapshot(bs.strategies.full, training=shorter))
    for part, batch in (("training", shorter), ("validation", ex.batch)):
        first = jax.tree.map(lambda a: a[:3], batch)
        loss, _ = loops.plain_loss(ex.problem, ex.params, ex.problem.cell.zeros(examples.B), first)
        np.testing.assert_allclose(table.loc[table["part"] == part, "loss"], loss, rtol=1e-6)
    with pytest.raises(SettingError, match="training part"):  # before the first run
        probes.generalisation().check(bs.tasks.copy())


def test_the_training_part_is_the_other_part():
    digits = bs.tasks.digits(validation_fraction=0.25)
    sizes = [digits.training.mask.shape[1], digits.validation.mask.shape[1]]
    assert sizes == [1347, 450]
    inputs, targets = digits.sampler(64, 8).data
    np.testing.assert_array_equal(digits.training.inputs[..., 0], inputs.T)
    np.testing.assert_array_equal(digits.training.targets[-1], targets)
    text = bs.tasks.char_lm(validation_fraction=0.9)
    codes = text.sampler(64, 8).data
    stream = np.asarray(text.training.inputs).T.ravel()
    np.testing.assert_array_equal(stream, codes[: len(stream)])
    assert len(stream) > len(codes) - 64
