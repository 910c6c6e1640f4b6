"""Optimizers by configuration do what optax does by hand."""

import math
import sys
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bptt_study import optimizers
from bptt_study.validation import SettingError


@pytest.mark.parametrize("make", [optax.adam, optax.rprop, optax.sgd])
def test_the_first_state_is_that_of_the_learning_rate(make):
    """rprop begins with steps of the size of the rate; at the rate 0 it would stay where it is."""
    own = optimizers.clipped(make, 0.1)
    params, plain = {"w": jnp.asarray([1.0, -2.0])}, make(0.1)
    state, expected = jax.jit(own.init)(params), plain.init(params)
    here = there = params
    for _ in range(3):
        steps, state = own.transform.update(here, state, here)
        here = optax.apply_updates(here, steps)
        steps, expected = plain.update(there, expected, there)
        there = optax.apply_updates(there, steps)
    np.testing.assert_allclose(here["w"], there["w"], rtol=1e-12)
    assert np.abs(here["w"] - params["w"]).min() > 0.01


def test_rates_share_a_transform():
    one, other = (optimizers.clipped(optax.adam, rate).transform for rate in (0.1, 0.2))
    assert one is other


@pytest.mark.parametrize(
    ("make", "fits"),
    [
        (lambda learning_rate: optax.sgd(float(learning_rate)), False),
        (lambda learning_rate: optax.sgd(0.1 if learning_rate > 0.05 else 0.2), False),
        (lambda learning_rate: optax.sgd(math.sqrt(learning_rate)), False),
        (lambda learning_rate: optax.sgd(jnp.where(learning_rate > 0.05, 0.1, 0.2)), True),
    ],
)
def test_a_factory_that_needs_the_value_of_its_rate_is_refused(make, fits):
    """It ended in JAX's traceback when training started."""
    said = (
        r"^`transform` must be a factory of optax; got .* `learning_rate`: compute with jax\.numpy"
    )
    with nullcontext() if fits else pytest.raises(SettingError, match=said) as refused:
        optimizers.clipped(make, 0.1)
    assert fits or "\n" not in str(refused.value)


def test_clipping_of_short_floats_beyond_their_range():
    """The square of the norm is more than the largest float16."""
    grads = {"W": jnp.full(400, 20.0, "float16")}
    own = optimizers.clipped(optax.sgd, learning_rate=1.0, clip_norm=1.0)
    steps, _ = own.transform.update(grads, own.init(grads), grads)
    np.testing.assert_allclose(np.asarray(steps["W"], float), -0.05, rtol=1e-3)


def test_the_transform_has_no_learning_rate_of_its_own(command):
    """`clipped` passes the one of the optimizer, and would win."""
    allowed = (
        r"`transform\.learning_rate` must be left out; got 0\.5\. `learning_rate` stands beside"
    )
    with pytest.raises(SettingError, match=allowed):
        optimizers.clipped(partial(optax.adam, learning_rate=0.5), 0.1)
    status, _, errors = command("task=copy", "size=smoke", "+optimizer.transform.learning_rate=0.5")
    assert status == 2
    assert "`optimizer.transform.learning_rate` must be left out; got 0.5." in errors


@pytest.mark.parametrize(
    ("schedule", "shown", "reason"),
    [
        ("=0.5", "0.5", "Reason: TypeError: "),
        (".value=null", "{_target_: optax.constant_schedule, value: null}", "It returns nothing"),
        (".value=[1.0,2.0]", "{_target_: optax.constant_schedule", "Reason: TypeError"),
    ],
)
def test_a_schedule_is_checked_before_the_run(schedule, shown, reason, command):
    status, _, errors = command("task=copy", "size=smoke", f"optimizer.schedule{schedule}")
    assert status == 2, errors
    allowed = "a map from the number of updates done to one factor of the learning rate"
    assert f"`optimizer.schedule` must be {allowed}; got {shown}" in errors
    assert reason in errors


def test_an_update_that_fails_is_found_before_the_run(command):
    """A line search needs the loss, which training does not pass."""
    own = ["optimizer.transform._target_=optax.lbfgs", "~optimizer.transform.b1"]
    own += ["~optimizer.transform.b2", "optimizer.schedule=null"]
    status, _, errors = command("task=copy", "size=smoke", *own)
    assert status == 2, errors
    assert (
        "`optimizer` must be one whose update needs gradients, state and parameters alone" in errors
    )


@pytest.mark.parametrize(
    "rate", ["optax.exponential_decay(learning_rate, 4, 0.5)", "2 * learning_rate"]
)
def test_a_factory_that_takes_its_rate_for_a_number(rate, command, tmp_path, monkeypatch):
    """One fails in its update, the other before; without a schedule both work."""
    (tmp_path / "numbered.py").write_text(
        f"import optax\ndef own(learning_rate): return optax.sgd({rate})"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "numbered", raising=False)
    own = ["optimizer.transform._target_=numbered.own", "~optimizer.transform.b1"]
    own += ["~optimizer.transform.b2"]
    status, _, errors = command("task=copy", "size=smoke", *own)
    assert status == 2 and errors.count("\n") == 1, errors
    assert "With a schedule, the factory gets its learning_rate as a function of the" in errors
    status, _, errors = command("task=copy", "size=smoke", "optimizer.schedule=null", *own)
    assert status == 0, errors


def test_a_schedule_inside_accumulation_counts_the_inner_updates():
    """As docs/extending.md says: of four updates the second and the fourth step, by factors 1 and 10."""
    make = lambda learning_rate: optax.MultiSteps(optax.sgd(learning_rate), 2)  # noqa: E731
    own = optimizers.clipped(make, 0.1, schedule=lambda n: 10.0**n)
    grads = {"w": jnp.ones(())}
    state, steps = own.init(grads), []
    for _ in range(4):
        step, state = own.transform.update(grads, state, grads)
        steps.append(float(step["w"]))
    np.testing.assert_allclose(steps, [0, -0.1, 0, -1], rtol=1e-12)


OWN = """
import jax, optax
from optax import contrib

def sam(learning_rate):
    return contrib.sam(optax.sgd(learning_rate), optax.chain(contrib.normalize(), optax.sgd(0.1)))

def per_example(learning_rate):
    mean = lambda grads, state, params: (jax.tree.map(lambda g: g.mean(axis=0), grads), state)
    return optax.chain(optax.GradientTransformation(lambda params: (), mean), optax.sgd(learning_rate))

def old_key(learning_rate):
    keep = lambda grads, key, params: (grads, key)
    noise = optax.GradientTransformation(lambda params: jax.random.PRNGKey(0), keep)
    return optax.chain(optax.sgd(learning_rate), noise)
"""


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        ("optax.contrib.schedule_free_sgd", "got one with a ScheduleFreeState"),
        ("own_optimizers.sam", "got one with a SAMState"),
        ("own_optimizers.per_example", "shapes of the parameters; got one whose update has others"),
        ("own_optimizers.old_key", "one with typed random keys alone; got one with uint32[2]"),
    ],
)
def test_a_state_that_would_give_wrong_scores_is_refused(
    transform, said, command, tmp_path, monkeypatch
):
    """The scores were of other parameters than the optimizer's answer, or of one noise for all seeds."""
    (tmp_path / "own_optimizers.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    own = [f"optimizer.transform._target_={transform}", "~optimizer.transform.b1"]
    own += ["~optimizer.transform.b2", "optimizer.schedule=null"]
    status, _, errors = command("task=copy", "size=smoke", *own)
    assert status == 2 and errors.count("\n") == 1, errors
    assert "`optimizer` must be one" in errors and said in errors


@pytest.mark.parametrize("share", [0.29, 0.57, 0.58, 0.07])
def test_the_warmup_has_its_whole_share(share):
    """In binary 0.29 · 100 is less than 29."""
    schedule = optimizers.warmup_cosine(100, share)
    assert max(range(100), key=schedule) == round(100 * share)
