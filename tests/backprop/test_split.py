"""A batch split over devices gives what one device gives; run in a process that has four of them."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import TINY, how, in_a_process_with
from test_train import sgd, toy

import bptt_study as bs
from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.testing.examples import close
from bptt_study.training import devices
from bptt_study.training.budget import Budget
from bptt_study.training.train import make_train
from bptt_study.validation import SettingError

T, B, V, H = 11, 8, 5, 3
four = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices: see the first test")


def cut_to_cut(problem):
    """Each part turns as often as its own cuts want, some of them not at all: then they checkpoint."""

    def estimate(params, state, batch, key):
        gates = 1.2 * (jax.random.uniform(key, batch.mask.shape) < jnp.linspace(0, 0.2, B))
        return backpropagate(
            problem, params, state, batch, *how(link_weights=gates, reach=1, segment=1)
        )

    return bs.Strategy(lambda params, size: problem.cell.zeros(size), estimate)


STRATEGIES = {
    "full": bs.strategies.full,
    "checkpointed": bs.strategies.checkpointed,
    "chunks": partial(bs.strategies.fixed, window=3),
    "tbptt": partial(bs.strategies.fixed, window=5, stride=2),
    "draws": partial(bs.strategies.randomized, law=bs.strategies.constant(4), draws=3),
    "cut_to_cut": cut_to_cut,
}


@pytest.mark.slow
def test_in_a_process_with_four_devices():
    """All the others; not this one, which would start itself again and again."""
    said = in_a_process_with(4, __file__, "not in_a_process")
    assert "skipped" not in said, said


@pytest.fixture
def batch(rng):
    inputs, targets = (jnp.asarray(rng.integers(V, size=(T, B))) for _ in range(2))
    return bs.Batch(inputs, targets, jnp.asarray(rng.random((T, B)) < 0.8))


def problem(cell):
    return bs.Problem(cell(V, H), bs.readouts.linear(H, V), bs.losses.cross_entropy)


@four
@pytest.mark.parametrize(("cell", "parts"), [(bs.cells.elman, 4), (bs.cells.lstm, 2)])
@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
def test_an_estimate_in_parts_is_that_of_one_device(make, cell, parts, batch, key):
    strategy = make(problem(cell))
    params = problem(cell).init(key)
    state = jax.tree.map(lambda h: h + 0.3, strategy.init(params, B))
    estimate = jax.jit(strategy.estimate)
    with devices.split_batch(parts):
        estimated, last = estimate(params, state, batch, key)
    assert len(estimated.metrics["adjoint_norms"].sharding.device_set) == parts
    expected = jax.device_get(estimate(params, state, batch, key))
    close(jax.device_get((estimated, last)), expected)
    other = jax.device_get(
        estimate(params, state, batch._replace(mask=batch.mask.at[:, 0].set(False)), key)
    )
    with pytest.raises(AssertionError):
        close(jax.device_get(estimated.grads), other[0].grads)


@four
@pytest.mark.parametrize("name", ["full", "cut_to_cut"])
def test_a_compiled_estimate_is_that_of_one_device(name, batch, key):
    strategy = STRATEGIES[name](problem(bs.cells.elman))
    params = problem(bs.cells.elman).init(key)
    state = strategy.init(params, B)
    fast = devices.compile(strategy, metrics=["adjoint_norms"])
    expected, last = jax.device_get(jax.jit(strategy.estimate)(params, state, batch, key))
    actual, after = fast.estimate(params, state, batch, key)
    assert actual.metrics.keys() == {"adjoint_norms"}
    assert len(actual.metrics["adjoint_norms"].sharding.device_set) == 4
    close(jax.device_get(after), last)
    close(jax.device_get(actual), expected._replace(metrics=jax.device_get(actual.metrics)))
    # its own results, another device's and NumPy's are taken alike; other calls stay on one device
    elsewhere = jax.device_put(params, jax.devices()[3])
    expected = jax.device_get(jax.jit(strategy.estimate)(params, last, batch, key))[0]
    actual = fast.estimate(elsewhere, after, jax.device_get(batch), key)[0]
    close(jax.device_get(actual.grads), expected.grads)
    assert jnp.ones(2).sharding.device_set == {jax.devices()[0]}


@four
def test_what_comes_again_is_not_copied_again_and_what_changed_is(batch, key, monkeypatch):
    strategy = bs.strategies.full(problem(bs.cells.elman))
    params = problem(bs.cells.elman).init(key)
    state, copied, put = strategy.init(params, B), [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda a, *to: copied.append(len(a)) or put(a, *to))
    fast = devices.compile(strategy)
    mask = np.array(batch.mask, float)  # NumPy's, which may change
    first, _ = fast.estimate(params, state, batch._replace(mask=mask), key)
    mask[:, 0] = 0
    second, _ = fast.estimate(params, state, batch._replace(mask=mask), key)
    assert copied == [len(jax.tree.leaves((params, state, batch, key))), 1]
    expected = jax.jit(strategy.estimate)(params, state, batch._replace(mask=mask), key)[0]
    close(jax.device_get(second.grads), jax.device_get(expected.grads))
    with pytest.raises(AssertionError):
        close(jax.device_get(first.grads), jax.device_get(expected.grads))
    third, _ = fast.estimate(jax.tree.map(lambda p: 2 * p, params), state, batch, key)
    expected = jax.jit(strategy.estimate)(jax.tree.map(lambda p: 2 * p, params), state, batch, key)
    close(jax.device_get(third.grads), jax.device_get(expected[0].grads))


@four
def test_calls_wait_in_turn(batch, key):
    """Calls that run at once would wait for each other's threads, and XLA would end the process."""
    strategy = bs.strategies.full(problem(bs.cells.lstm))
    params = problem(bs.cells.lstm).init(key)
    long = jax.tree.map(lambda a: jnp.tile(a, (300, 1)), batch)
    state = strategy.init(params, B)
    fast = devices.compile(strategy)

    def ready(_):
        loss = fast.estimate(params, state, long, key)[0].loss
        return loss.is_ready()

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(ready, range(12)))
    # of one device, which waits for nobody, a result comes as JAX sends it
    with devices.split_batch(1):
        alone = jax.jit(strategy.estimate)
        jax.block_until_ready(alone(params, state, long, key))
        assert not alone(params, state, long, key)[0].loss.is_ready()


@four
@pytest.mark.parametrize(("size", "parts"), [(8, 4), (6, 2), (5, 1)])
def test_a_compiled_estimate_takes_the_devices_that_divide_its_batch(size, parts, batch, key):
    strategy = bs.strategies.full(problem(bs.cells.gru))
    params, own = problem(bs.cells.gru).init(key), jax.tree.map(lambda a: a[:, :size], batch)
    fast = devices.compile(strategy)
    estimated, _ = fast.estimate(params, strategy.init(params, size), own, key)
    assert estimated.metrics == {}
    assert len(jax.tree.leaves(estimated.grads)[0].sharding.device_set) == parts
    # within a program of the user's it is the estimate as it was
    within = jax.jit(fast.estimate)(params, strategy.init(params, size), own, key)[0]
    assert len(jax.tree.leaves(within.grads)[0].sharding.device_set) == 1
    close(jax.device_get(within.grads), jax.device_get(estimated.grads))


@four
def test_an_estimate_that_does_not_split_its_batch_is_compiled_for_one_device(batch, key):
    def estimate(params, state, batch, key):
        loss = params["cell"]["W_hh"].sum() * batch.mask.sum()
        return bs.Estimate(loss, params, {}), state

    own = bs.Strategy(lambda params, size: jnp.zeros(size), estimate)
    params = problem(bs.cells.elman).init(key)
    found, _ = devices.compile(own).estimate(params, own.init(params, B), batch, key)
    assert len(found.loss.sharding.device_set) == 1


def test_metrics_and_batches_that_do_not_exist_are_named(batch, key):
    p = problem(bs.cells.elman)
    params, full = p.init(key), bs.strategies.full(p)
    arguments = params, full.init(params, B), batch, key
    line = "`metrics` must be names among the strategy's: adjoint_norms, cuts; got nope"
    with pytest.raises(SettingError, match=line):
        devices.compile(full, metrics=["cuts", "nope"]).estimate(*arguments)
    with pytest.raises(SettingError, match="`metrics` must be a list of names; got cuts"):
        devices.compile(full, metrics="cuts")
    rtrl = bs.strategies.rtrl(p, carried=False)
    with pytest.raises(SettingError, match="the strategy's: it has none; got cuts"):
        devices.compile(rtrl, ["cuts"]).estimate(params, rtrl.init(params, B), batch, key)
    with pytest.raises(SettingError, match="`strategy` must be a Strategy"):
        devices.compile(p)
    with pytest.raises(SettingError, match="`batch` must be a Batch"):
        devices.compile(full).estimate(params, full.init(params, B), tuple(batch), key)


@four
def test_a_batch_that_does_not_divide_is_refused(batch, key):
    strategy = bs.strategies.full(problem(bs.cells.elman))
    params = problem(bs.cells.elman).init(key)
    with (
        devices.split_batch(3),
        pytest.raises(SettingError, match=r"batch_size` must be a multiple of .*\(3\); got 8"),
    ):
        strategy.estimate(params, strategy.init(params, B), batch, key)
    with pytest.raises(SettingError, match=r"`parts` must be between 1 and .* \(4\); got 5"):
        devices.split_batch(5)


@four
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_training_with_a_split_batch(seeds, key):
    """Seeds and parts together take all four devices, and seeds that do not divide are filled up."""
    p = bs.Problem(bs.cells.elman(3, H), bs.readouts.linear(H, 3), bs.losses.cross_entropy)
    strategy = bs.strategies.randomized(p, law=bs.strategies.constant(3))
    keys = jax.random.split(key, seeds)

    def train(split):
        budget = Budget(steps=6, batch_size=4, updates=7, logs=2, split=split)
        return make_train(p, strategy, sgd(), budget, toy())(keys)

    alone, parts = train(1), train(2)
    close(jax.device_get(parts.progress.params), jax.device_get(alone.progress.params))
    for one, other in zip(alone.records, parts.records, strict=True):
        np.testing.assert_allclose(other["validation_loss"], one["validation_loss"], rtol=1e-12)


def test_more_parts_than_devices_are_refused_at_the_door(command, tmp_path):
    """Before the first run of a sweep starts, which would do."""
    count = jax.device_count()
    many = 2 * count
    arguments = (*TINY, f"budget.split=1,{many}", f"budget.batch_size={many}")
    code, _, err = command("-m", *arguments, f"results_dir={tmp_path / 'results'}")
    assert code == 2
    assert (
        f"`budget.split` must be between 1 and the number of devices ({count}); got {many}" in err
    )
    assert not list(tmp_path.rglob("rows.csv"))


@pytest.mark.parametrize("split", [0, 3])
def test_a_split_that_does_not_divide_the_batch(split):
    with pytest.raises(SettingError, match=f"`split` .*; got {split}"):
        Budget(steps=6, batch_size=4, updates=7, split=split)
