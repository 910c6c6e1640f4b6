"""Quality against exact moments of enumerated draws; operations against formulas and XLA's own count."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from support import in_a_process_with, table_of, without_metrics

import bptt_study as bs
from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.backprop.forward import states as states_of
from bptt_study.backprop.schedules import revolve
from bptt_study.instruments import measure
from bptt_study.testing import examples
from bptt_study.validation import SettingError

T, B = examples.T, examples.B
PROBLEM = examples.problem_of("linear")


def moments(name, xi, probability):
    """Exact bias², variance and ‖E ĝ‖² of draws that are one pattern per sequence, independent."""
    hand = table_of(name)
    single = np.einsum("stn,stbp->nbp", oracles.gated(xi), hand.grads)  # [pattern, B, P]
    mean = np.einsum("n,nbp->bp", probability, single)
    variance = np.einsum("n,nbp->", probability, (single - mean) ** 2)
    exact = np.concatenate([oracles.weighted(hand, oracles.full(T)), hand.readout])
    expected = np.concatenate([mean.sum(axis=0), hand.readout])
    return np.sum((expected - exact) ** 2), variance, np.sum(expected**2)


@pytest.mark.slow
@pytest.mark.parametrize("compensate", [True, False])
def test_quality_of_random_cuts_is_that_of_all_patterns(compensate, key):
    """Every exact number lies near its interval, and far from that of the other estimator."""
    ex, cut = examples.example("elman_tanh"), 1 / 3
    patterns = np.array(list(np.ndindex(*[2] * (T - 1))))  # 1: kept
    probability = np.prod(np.where(patterns, 1 - cut, cut), axis=1)
    kept = np.concatenate([np.ones((1, len(patterns))), patterns.T])

    def exact(compensate):
        scale = 1 / (1 - cut) if compensate else 1
        bias2, variance, signal = moments("elman_tanh", kept * scale, probability)
        return {
            "bias2": bias2,
            "variance": variance,
            "mse": bias2 + variance,
            "signal_to_noise": signal / variance,
        }

    strategy = bs.strategies.randomized(ex.problem, bs.strategies.constant(3), compensate)
    enumerated = measure.exact_quality(strategy, ex.problem, ex.params, ex.batch, ex.state)
    for name, expected in exact(compensate).items():
        assert getattr(enumerated, name) == pytest.approx(expected, rel=1e-9, abs=1e-25), name
        if name != "mse":  # here both have nearly the same
            other = exact(not compensate)[name]
            assert getattr(enumerated, name) != pytest.approx(other, rel=0.1), name
    found = measure.quality(strategy, ex.problem, ex.params, ex.batch, key, 1000, ex.state)
    for name, expected in exact(compensate).items():
        value, low, high = getattr(found, name)
        assert abs(value - expected) < 0.9 * (high - low), name  # 3.5 standard errors
        assert high - low < 0.5 * exact(not compensate)["mse" if name == "bias2" else name]
    other = exact(not compensate)
    assert not found.variance.low < other["variance"] < found.variance.high
    assert not found.bias2.low < other["bias2"] < found.bias2.high
    assert (found.bias2.low <= 0 <= found.bias2.high) == compensate
    assert 0 < found.cosine.low < found.cosine.high < 1


@pytest.mark.slow
def test_quality_without_draws(key):
    """Full BPTT is the gradient; the sliding window has a bias and no variance."""
    ex, hand = examples.example("gru"), table_of("gru")
    full = bs.strategies.full(ex.problem)
    found = measure.quality(full, ex.problem, ex.params, ex.batch, key, 3, ex.state)
    assert max(map(abs, (*found.bias2, *found.variance, *found.mse))) < 1e-28
    np.testing.assert_allclose(found.cosine, 1)
    assert found.signal_to_noise.value == np.inf
    sliding = bs.strategies.fixed(ex.problem, 2, stride=1)
    found = measure.quality(sliding, ex.problem, ex.params, ex.batch, key, 3, ex.state)
    enumerated = measure.exact_quality(sliding, ex.problem, ex.params, ex.batch, ex.state)
    lost = oracles.weighted(hand, oracles.full(T) - oracles.sliding(T, 2))
    np.testing.assert_allclose(found.bias2, lost @ lost, rtol=1e-10)
    np.testing.assert_allclose(found.mse, lost @ lost, rtol=1e-10)
    assert enumerated == (pytest.approx(lost @ lost), 0, pytest.approx(lost @ lost), np.inf)
    kept = np.concatenate([oracles.weighted(hand, oracles.sliding(T, 2)), hand.readout])
    exact = np.concatenate([oracles.weighted(hand, oracles.full(T)), hand.readout])
    cosine = kept @ exact / np.linalg.norm(kept) / np.linalg.norm(exact)
    np.testing.assert_allclose(found.cosine, cosine, rtol=1e-12)
    fresh = measure.quality(full, ex.problem, ex.params, ex.batch, key, 3)
    assert fresh.mse.value < 1e-28


def test_intervals_cover(rng):
    """Gaussian vectors with known bias, variance and ratio: nearly 95 of 100 intervals hold them."""
    P, N, runs = 5, 40, 400
    g, off, scale = rng.standard_normal(P), np.full(P, 0.3), 0.7
    bias2, variance = off @ off, P * scale**2
    exact = {
        "bias2": bias2,
        "variance": variance,
        "mse": bias2 + variance,
        "signal_to_noise": (g + off) @ (g + off) / variance,
    }
    rows = g + off + scale * rng.standard_normal((runs, N, P))
    found = [measure.compare(r, g) for r in rows]
    for name, expected in exact.items():
        value, low, high = np.array([getattr(f, name) for f in found]).T
        assert 0.9 < np.mean((low < expected) & (expected < high)) < 0.985, name
        slack = (
            0.03 if name == "signal_to_noise" else 0
        )  # a ratio of unbiased numbers is not unbiased
        error = 4 * value.std() / runs**0.5
        assert abs(value.mean() - expected) < error + slack * expected, name
    # the ratio, freed of the noise in ‖mean‖², and the jackknife, by hand
    once = rows[0]
    noise = once.var(axis=0, ddof=1).sum()
    ratio = (np.sum(once.mean(axis=0) ** 2) - noise / N) / noise
    assert found[0].signal_to_noise.value == pytest.approx(ratio, rel=1e-12)
    loo = [measure.compare(np.delete(once, n, axis=0), g).bias2.value for n in range(N)]
    error = np.sqrt((N - 1) / N * np.sum((np.array(loo) - np.mean(loo)) ** 2))
    _, low, high = found[0].bias2
    np.testing.assert_allclose((high - low) / 2, 2.0226909 * error, rtol=1e-6)


def test_compare_over_batches_knows_which_gradient_belongs_to_which(rng):
    """Noisy data and an estimator off by 0.3 on each batch: the bias is not drowned in the data's noise.

    Negative control: against the mean gradient alone, variance/N is taken from bias² that isn't in it.
    """
    P, N, runs = 5, 20, 300
    g, off = rng.standard_normal(P), np.full(P, 0.3)
    found, wrong = [], []
    for _ in range(runs):
        gradients = g + 2 * rng.standard_normal((N, P))
        estimates = gradients + off + 0.1 * rng.standard_normal((N, P))
        found.append(measure.compare(estimates, gradients))
        wrong.append(measure.compare(estimates, gradients.mean(axis=0)))
    bias2 = np.array([f.bias2 for f in found])
    assert bias2[:, 0].mean() == pytest.approx(off @ off, abs=4 * bias2[:, 0].std() / runs**0.5)
    assert 0.88 < np.mean((bias2[:, 1] < off @ off) & (off @ off < bias2[:, 2])) < 0.99
    assert np.mean([f.variance.value for f in found]) == pytest.approx(P * 4.01, rel=0.05)
    assert np.mean([f.bias2.value for f in wrong]) < -0.5 * off @ off
    full = measure.compare(gradients, gradients)
    assert full.bias2 == (0, 0, 0)
    assert full.mse.value == pytest.approx(gradients.var(axis=0, ddof=1).sum())


@pytest.mark.slow
def test_over_batches(key):
    """Full BPTT has the data's variance alone, compensated cuts theirs on top; sliding 1 has a bias."""
    ex = examples.example("elman_tanh")
    batches = jax.tree.map(
        lambda a, b: jnp.stack([jnp.roll(x, n, axis=0) for n in range(3) for x in (a, b)]),
        ex.batch,
        ex.earlier,
    )
    at = ex.problem, ex.params, batches, key
    zero = ex.problem.cell.zeros(B)
    grads = np.stack(
        [
            examples.vector(backpropagate(ex.problem, ex.params, zero, b)[0].grads)
            for b in (jax.tree.map(lambda a, n=n: a[n], batches) for n in range(6))
        ]
    )
    full = measure.over_batches(bs.strategies.full(ex.problem), *at)
    assert full.variance.value == pytest.approx(grads.var(axis=0, ddof=1).sum(), rel=1e-12)
    assert full.bias2.value == pytest.approx(0, abs=1e-28)
    chunks = bs.strategies.fixed(ex.problem, 1)
    short = measure.over_batches(chunks, *at)
    assert short.bias2.value > 0.01
    kept = np.stack(
        [
            examples.vector(chunks.estimate(ex.params, zero, b, key)[0].grads)
            for b in (jax.tree.map(lambda a, n=n: a[n], batches) for n in range(6))
        ]
    )
    variance = kept.var(axis=0, ddof=1).sum()  # the signal is the estimator's mean, with its bias
    ratio = (np.sum(kept.mean(axis=0) ** 2) - variance / 6) / variance
    assert short.signal_to_noise.value == pytest.approx(ratio, rel=1e-12)
    unlike = (np.sum(grads.mean(axis=0) ** 2) - variance / 6) / variance
    assert ratio != pytest.approx(unlike, rel=0.05)
    random = measure.over_batches(
        bs.strategies.randomized(ex.problem, bs.strategies.constant(1.5)), *at
    )
    assert random.variance.value > full.variance.value
    few = jax.tree.map(lambda a: a[:2], batches)
    with pytest.raises(
        SettingError, match=r"`batches` must be a whole number of at least 3; got 2"
    ):
        measure.over_batches(bs.strategies.full(ex.problem), ex.problem, ex.params, few, key)


def test_over_batches_draws_for_each_batch(key):
    """On copies of one batch the variance is that of the strategy's draws alone."""
    ex = examples.example("elman_tanh")
    strategy = bs.strategies.randomized(ex.problem, bs.strategies.constant(3), compensate=False)
    copies = jax.tree.map(lambda a: jnp.stack([a] * 400), ex.batch)
    found = measure.over_batches(strategy, ex.problem, ex.params, copies, key)
    exact = measure.exact_quality(strategy, ex.problem, ex.params, ex.batch)
    assert found.variance.low < exact.variance < found.variance.high
    assert found.variance.value == pytest.approx(exact.variance, rel=0.2)


def test_exact_quality_of_the_mean_of_draws(key):
    """Four draws have a quarter of the variance, and the same bias; by sampling, too."""
    ex = examples.example("elman_tanh")

    def make(draws):
        law = bs.strategies.constant(3)
        return bs.strategies.randomized(ex.problem, law, compensate=False, draws=draws)

    one, four = (
        measure.exact_quality(make(n), ex.problem, ex.params, ex.batch, ex.state) for n in (1, 4)
    )
    assert four.bias2 == pytest.approx(one.bias2, rel=1e-12)
    assert four.variance == pytest.approx(one.variance / 4, rel=1e-12)
    assert four.signal_to_noise == pytest.approx(4 * one.signal_to_noise, rel=1e-12)
    found = measure.quality(make(4), ex.problem, ex.params, ex.batch, key, 400, ex.state)
    assert found.variance.low < four.variance < found.variance.high < one.variance


def test_an_empty_mask_has_no_gradient_and_no_error(key):
    """0 wherever a number is a sum over tokens; a ratio of two of them is not a number."""
    ex = examples.example("elman_tanh")
    empty = ex.batch._replace(mask=jnp.zeros_like(ex.batch.mask))
    at = ex.problem, ex.params, empty
    random = bs.strategies.randomized(ex.problem, bs.strategies.constant(3))
    sampled = measure.quality(random, *at, key, 3)
    for found in (sampled.bias2, sampled.variance, sampled.mse):
        assert found == (0, 0, 0)
    assert np.isnan(sampled.signal_to_noise).all() and np.isnan(sampled.cosine).all()
    assert measure.compare(np.zeros((3, 2)), np.ones(2)).cosine == (0, 0, 0), "0 of an estimate 0"
    exact = measure.exact_quality(random, *at)
    assert exact[:3] == (0, 0, 0) and np.isnan(exact.signal_to_noise)
    norms = measure.gradient_norms(random, ex.params, empty, key, 2)
    assert not norms["time"].any() and not norms["lag"].any()


@pytest.mark.parametrize("masked", [0, 1, -1])
def test_norms_over_the_lag_start_at_the_last_loss_that_counts(masked, key):
    """By a loop for each sequence; a masked target may be anything. One sequence has no loss."""
    ex = examples.example("elman_tanh", sequences=4)
    steps, size = ex.batch.mask.shape
    ends = np.resize([steps - 1, 3, 0, -1], size)
    mask = 0.5 * (np.arange(steps)[:, None] <= ends)
    batch = bs.Batch(ex.batch.inputs, jnp.where(mask > 0, ex.batch.targets, masked), mask)
    cell, readout, loss = ex.problem[:3]

    def last_loss(moved, b):
        h = cell.zeros(1)
        for t in range(ends[b] + 1):
            h = cell.step(ex.params["cell"], h, ex.batch.inputs[t, b : b + 1]) + moved[t]
        outputs = readout.apply(ex.params["readout"], cell.read(h))
        return loss(outputs[None], batch.targets[ends[b], b][None, None])[0, 0]

    expected = np.full((steps, size), np.nan)
    for b in np.flatnonzero(ends >= 0):
        adjoints = jax.grad(last_loss)(jnp.zeros((steps, 1, examples.H)), b)
        expected[: ends[b] + 1, b] = np.linalg.norm(adjoints[: ends[b] + 1, 0], axis=-1)[::-1]
    found = measure.gradient_norms(bs.strategies.full(ex.problem), ex.params, batch, key, 1)["lag"]
    np.testing.assert_allclose(found, np.nanmean(expected, axis=1), rtol=1e-12)


def test_what_a_strategy_does_not_report_or_carry_alone(key):
    ex = examples.example("mlp")
    full = bs.strategies.full(ex.problem)

    def silent(*arguments):
        result, state = full.estimate(*arguments)
        return result._replace(metrics={}), state

    with pytest.raises(SettingError, match="must be one that reports `adjoint_norms`"):
        measure.gradient_norms(full._replace(estimate=silent), ex.params, ex.batch, key)
    carried = full._replace(claim=full.claim._replace(reach="stream"))
    with pytest.raises(SettingError, match="`state` must be None for a strategy that carries"):
        measure.quality(carried, ex.problem, ex.params, ex.batch, key, 3, ex.state)


def test_norms_of_a_mask_of_flags(key):
    ex = examples.example("elman_tanh")
    full, found = bs.strategies.full(ex.problem), []
    for kind in (bool, float):
        batch = ex.batch._replace(mask=(ex.batch.mask > 0).astype(kind))
        found.append(measure.gradient_norms(full, ex.params, batch, key, 1)["lag"])
    np.testing.assert_allclose(*found, rtol=1e-14)


def test_too_few_draws_and_parameters_that_are_not_finite(key):
    ex = examples.example("mlp")
    full = bs.strategies.full(ex.problem)
    with pytest.raises(SettingError, match=r"`draws` .*; got 2"):
        measure.quality(full, ex.problem, ex.params, ex.batch, key, 2)
    bad = jax.tree.map(lambda p: p.at[0].set(np.nan), ex.params)
    batches = jax.tree.map(lambda a: jnp.stack([a] * 3), ex.batch)
    for made in (
        lambda: measure.quality(full, ex.problem, bad, ex.batch, key),
        lambda: measure.exact_quality(full, ex.problem, bad, ex.batch),
        lambda: measure.over_batches(full, ex.problem, bad, batches, key),
    ):
        with pytest.raises(
            SettingError, match=r"`params\.\w+\.\w+` must be finite; got nan or inf"
        ):
            made()


@pytest.mark.parametrize("law", [bs.strategies.constant(3), bs.strategies.power_law(3, 4)])
def test_enumerated_draws_have_the_declared_mean(law):
    for compensate in (True, False):
        claim = bs.strategies.randomized(PROBLEM, law, compensate).claim.lag_weights
        weights, probability = claim.patterns(6)
        assert probability.shape == (32,)
        assert probability.sum() == pytest.approx(1)
        mean = np.tril(np.einsum("n,nsk->sk", probability, weights))
        np.testing.assert_allclose(mean, np.tril(claim.weights(6, 6)), atol=1e-14)
    with_no_link = bs.strategies.randomized(PROBLEM, bs.strategies.constant(1), compensate=False)
    weights, probability = with_no_link.claim.lag_weights.patterns(4)
    assert probability.sum() == 1
    mean = np.tril(np.einsum("n,nsk->sk", probability, weights))
    np.testing.assert_allclose(mean, np.eye(4)[[0, 0, 0, 0]])


def test_too_long_to_enumerate():
    ex = examples.example("elman_tanh", steps=13)
    full = bs.strategies.full(ex.problem)
    with pytest.raises(SettingError, match=r"`steps` must be between 1 and 12; got 13. .*quality"):
        measure.exact_quality(full, ex.problem, ex.params, ex.batch)
    ex = examples.example("elman_tanh")
    undeclared = full._replace(claim=bs.Claim())
    with pytest.raises(SettingError, match="lag_weights"):
        measure.exact_quality(undeclared, ex.problem, ex.params, ex.batch)


def test_operations_by_formula():
    """Products, loops in loops, branches."""
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    assert measure.arithmetic(jnp.matmul, a, b) == 2 * 3 * 4 * 5
    batched = jax.vmap(jnp.matmul)
    assert measure.arithmetic(batched, jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5))) == 7 * 120
    assert measure.arithmetic(lambda x: jnp.tanh(x) + x, a) == 2 * 12
    assert measure.arithmetic(jnp.sum, a) == 12
    assert measure.arithmetic(lambda n: n + n, jnp.arange(5)) == 0

    def inner(x, _):
        return jax.lax.scan(lambda y, _: (y @ jnp.ones((4, 4)), None), x, length=3)[0], None

    def loops(x):
        return jax.lax.scan(inner, x, length=10)[0]

    assert (
        measure.arithmetic(loops, a) == measure.arithmetic(jax.jit(loops), a) == 30 * 2 * 3 * 4 * 4
    )

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, lambda y: y @ jnp.ones((4, 4)), lambda y: y + 1, x)

    assert measure.arithmetic(branch, a) == 2 * 3 * 4 * 4
    assert measure.arithmetic(branch, -a) == 3 * 4


def test_operations_of_a_choice_in_a_loop_are_those_that_run():
    """By a table, by the state of the loop, and beside other choices. Control: under vmap both branches run."""
    one = 2 * 3 * 3  # a product of x and ones

    def product(x):
        return x @ jnp.ones((3, 3))

    def by_table(x):
        def step(x, dear):
            return jax.lax.cond(dear, product, lambda x: x + 1, x), None

        return jax.lax.scan(step, x, np.array([True, False, False, True, False]))[0]

    assert measure.arithmetic(by_table, jnp.ones(3)) == 2 * one + 3 * 3
    assert measure.arithmetic(jax.jit(by_table), jax.ShapeDtypeStruct((3,), float)) == 2 * one + 9
    each = measure.arithmetic(jax.vmap(by_table), jnp.ones((7, 3)))  # the table is the same for all
    assert each == 7 * (2 * one + 3 * 3)

    def by_state(x):
        def step(x, _):
            return jax.lax.cond(x[0] < 9, product, lambda x: x + 1, x), x[0]

        return jax.lax.scan(step, x, length=5, reverse=True)

    assert measure.arithmetic(by_state, jnp.ones(3)) == 2 * one + 3 * 3  # 1, 3, 9
    assert measure.arithmetic(jax.checkpoint(by_state), 9 * jnp.ones(3)) == 5 * 3
    both = measure.arithmetic(jax.vmap(by_state), jnp.ones((7, 3)))
    assert both == 5 * 7 * (one + 3)
    # the backward pass goes back through the branches that ran: a product each
    backward = jax.vjp(lambda x: by_state(x)[0].sum(), jnp.ones(3))[1]
    assert 2 * one <= measure.arithmetic(backward, 1.0) < 3 * one

    def inside(x):  # a while loop in a branch in a scan
        def step(x, turns):
            loop = partial(jax.lax.fori_loop, 0, turns, lambda _, x: product(x))
            return jax.lax.cond(turns > 1, loop, lambda x: x, x), None

        return jax.lax.scan(step, x, np.array([0, 1, 2, 3]))[0]

    assert measure.arithmetic(inside, jnp.ones(3)) == 5 * one


def test_operations_of_calls_are_counted_once_if_no_value_decides(monkeypatch):
    """A loop over a table has choices, but no value decides. Control: the key decides."""
    ex, counted = examples.example("elman_tanh"), []
    full = bs.strategies.full(ex.problem)

    def by(dear):
        def estimate(params, state, batch, key):
            found, state = full.estimate(params, state, batch, key)
            dears = dear(key)
            add = lambda x, d: (jax.lax.cond(d, lambda x: x + x, lambda x: x, x), None)  # noqa: E731
            return found._replace(loss=jax.lax.scan(add, found.loss, dears)[0]), state

        strategy = full._replace(estimate=estimate)
        mean = measure.arithmetic_of_calls(strategy, ex.params, ex.batch, 64)
        return mean(ex.params, ex.batch, jax.random.key(0))

    split = jax.random.split
    monkeypatch.setattr(jax.random, "split", lambda key, *n: counted.extend(n) or split(key, *n))
    one = by(lambda key: np.array([False, False]))
    assert by(lambda key: np.array([True, False])) == one + 1
    assert one + 0.7 < by(lambda key: jax.random.bits(key, (2,)) % 2 == 0) < one + 1.3
    assert counted == [1, 1, 64]
    never = full._replace(claim=full.claim._replace(period=0))
    with pytest.raises(SettingError, match=r"`claim\.period` must be .*; got 0"):
        measure.arithmetic_of_calls(never, ex.params, ex.batch, 64)


def test_operations_of_calls_are_those_without_metrics():
    ex = examples.example("elman_tanh")
    full, key = bs.strategies.full(ex.problem), jax.random.key(0)
    at = ex.params, full.init(ex.params, B), ex.batch, key
    mean = measure.arithmetic_of_calls(full, ex.params, ex.batch, 1)(ex.params, ex.batch, key)
    assert (
        mean
        == measure.arithmetic(without_metrics(full), *at)
        < measure.arithmetic(full.estimate, *at)
    )


M = np.ones((4, 4))
ONE = 2 * 4**3  # a product of M and M


def branch(f):
    """The branch that runs f is taken if `runs`."""
    return lambda x, runs: jax.lax.cond(runs, lambda x: f(x, runs), lambda x: x, x)


def loop(f):
    """The second one of three turns runs f."""

    def run(x, runs):
        def turn(n, x):
            return jax.lax.cond(n == 1, lambda x: f(x, runs), lambda x: x, x)

        return jax.lax.fori_loop(0, 3 + jnp.array(0), turn, x)

    return run


def scan(f):
    return lambda x, runs: jax.lax.scan(lambda x, _: (f(x, runs), None), x, length=2)[0]


def rule(f):
    ruled = jax.custom_vjp(f)
    ruled.defvjp(lambda x, runs: (f(x, runs), None), lambda _, g: (g, None))
    return ruled


def batched_by_rule(f):
    ruled = jax.custom_batching.custom_vmap(f)
    ruled.def_vmap(lambda *_: None)  # not called
    return ruled


def solution(f):
    """Of a linear system; its products with the matrix do not run."""

    def run(x, runs):
        return jax.lax.custom_linear_solve(
            lambda x: x @ M @ M, x, lambda _, x: f(x, runs), lambda _, x: x @ M
        )

    return run


@pytest.mark.parametrize(
    "nest",
    [
        (branch, branch),
        (loop, branch),
        (branch, loop),
        (branch, scan, branch),
        (loop, jax.jit, loop),
        (solution, loop, solution),
        (rule, branch, jax.checkpoint, loop, solution, branch),
        (loop, scan, rule, loop, branch, batched_by_rule, loop),
        (scan, loop, jax.jit, branch, scan, jax.checkpoint, branch, rule, loop, scan),
    ],
)
def test_operations_of_a_choice_are_those_that_run_at_every_depth(nest):
    """Each scan runs what is in it twice, each of the others once."""
    f = branch(lambda x, _: x @ M)
    for wrap in reversed(nest):
        f = wrap(f)
    assert measure.arithmetic(f, M, True) == 2 ** nest.count(scan) * ONE
    assert measure.arithmetic(f, M, False) == 0


def test_operations_of_choices_that_loops_decide():
    """Against a Python loop that takes the same branches."""

    def product(x):
        return x @ M

    def same(x):
        return x

    def jaxs(x):
        def step(x, i):
            def turn(j, x):
                some = partial(jax.lax.fori_loop, 0, j, lambda _, x: product(x))
                other = partial(jax.lax.cond, i > 2, product, same)
                return jax.lax.cond((i + j) % 2 == 0, some, other, x)

            return jax.lax.fori_loop(0, i, turn, x), None

        return jax.lax.scan(step, x, np.arange(5))[0]

    products = 0
    for i in range(5):
        for j in range(i):
            products += j if (i + j) % 2 == 0 else i > 2
    assert measure.arithmetic(jaxs, M) == products * ONE


def test_operations_of_a_loop_are_those_that_its_results_need():
    def run(x):
        def turn(n, x):
            return jax.jit(lambda x: (x @ M, x + 1))(x)[1]

        return jax.lax.fori_loop(0, 3 + jnp.array(0), turn, x)

    assert measure.arithmetic(run, M) == 3 * M.size


def test_operations_of_the_gradient_of_a_condition():
    """The product of the backward pass alone; memory without content counts nothing."""

    def loss(x, runs):
        return jnp.sum(branch(lambda x, _: x @ M)(x, runs))

    gradient = jax.grad(loss)
    assert measure.arithmetic(gradient, M, True) == ONE
    assert measure.arithmetic(gradient, M, False) == 0
    assert measure.arithmetic(lambda: jax.lax.empty((3,), float)) == 0


def test_operations_of_a_linear_solver_are_those_of_its_solution():
    """Factorising counts nothing; conjugate gradients count the turns of their loop."""
    A, b = np.diag(np.arange(1.0, 33)), np.ones(32)
    assert measure.arithmetic(jnp.linalg.solve, A, b) == 0
    assert measure.arithmetic(jnp.linalg.inv, A) == 0

    def solved(turns):
        descend = partial(jax.scipy.sparse.linalg.cg, lambda x: A @ x, maxiter=turns, tol=0)
        return measure.arithmetic(lambda b: descend(b)[0], b)

    each = solved(1) - solved(0)
    assert 2 * 32**2 < each < 1.2 * 2 * 32**2  # a product with A, and sums over vectors
    assert solved(3) == solved(0) + 3 * each


def test_split_operations_are_those_of_all_devices():
    """Of the axis that is split; the other one, of which the body knows nothing, splits nothing by itself."""
    kinds = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.sharding.AbstractMesh((2, 3), ("a", "b"), kinds)
    rows = jax.sharding.PartitionSpec("b")
    split = partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=rows, axis_names={"b"})
    x = jnp.ones((12, 4))
    for f in (lambda x: x @ M, lambda x: jax.lax.scan(lambda x, _: (x @ M, None), x, length=5)[0]):
        assert measure.arithmetic(split(f), x) == measure.arithmetic(f, x)
    # one device's copy of what each of them has completely
    whole = jax.sharding.PartitionSpec()
    same = jax.shard_map(lambda x: x @ M, mesh=mesh, in_specs=whole, out_specs=whole)
    assert measure.arithmetic(same, M) == 2 * 3 * ONE


# `test_in_a_process_with_two_devices` runs these, and fails if it skips one
needs_two_devices = pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")


@needs_two_devices
@pytest.mark.parametrize("check_vma", [False, True])
def test_split_operations_of_a_choice_are_those_of_each_device(check_vma):
    """One device takes a branch and turns where the other does not."""
    mesh = jax.make_mesh((2,), ("b",), (jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("b")
    split = partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=check_vma)

    def chosen(x, runs):
        return branch(lambda x, _: x @ M)(x, runs[0])

    def turning(x, runs):
        return jax.lax.fori_loop(0, jnp.where(runs[0], 3, 1), lambda _, x: x @ M, x)

    x, runs = jnp.ones((8, 4)), np.array([False, True])
    for f, times in ((chosen, 1), (turning, 3 + 1), (scan(chosen), 2)):
        assert measure.arithmetic(split(f), x, runs) == times * ONE
        assert measure.arithmetic(scan(split(f)), x, runs) == 2 * times * ONE


@needs_two_devices
def test_split_operations_of_an_estimate():
    """They are those of one device, and what each device repeats: sums of the parts, and means."""
    problem = bs.Problem(bs.cells.elman(2, 8), bs.readouts.linear(8, 5), bs.losses.cross_entropy)
    params, ones = problem.init(jax.random.key(0)), jnp.ones((6, 16))
    batch = bs.Batch(ones.astype(int), ones.astype(int), ones)
    for strategy in (
        bs.strategies.full(problem),
        bs.strategies.adaptive(problem, delta=0.1, windows=(2, 4)),
        bs.strategies.randomized(problem, bs.strategies.constant(2)),
    ):
        arguments = params, strategy.init(params, 16), batch, jax.random.key(0)
        alone = measure.arithmetic(strategy.estimate, *arguments)
        with bs.devices.split_batch(2):
            split = measure.arithmetic(strategy.estimate, *arguments)
        assert alone <= split < 1.05 * alone


@pytest.mark.slow
def test_in_a_process_with_two_devices():
    said = in_a_process_with(2, __file__, "test_split")
    assert "skipped" not in said, said


@pytest.mark.parametrize("states", [4, 8, None])
@pytest.mark.parametrize("make", ["elman", "lstm"])
def test_operations_of_checkpointed_are_those_of_the_steps_that_it_runs_again(make, states):
    """A full gradient and the steps that `revolve` runs twice. Control: the dearer branch for each is more."""
    steps, size = 64, 8
    problem = bs.Problem(
        getattr(bs.cells, make)(16, 32), bs.readouts.linear(32, 16), bs.losses.cross_entropy
    )
    params, ones = problem.init(jax.random.key(0)), jnp.ones((steps, size))
    batch = bs.Batch(ones.astype(int), ones.astype(int), ones)
    state = problem.cell.zeros(size)

    def count(strategy):
        return measure.arithmetic(strategy.estimate, params, state, batch, jax.random.key(0))

    full = count(bs.strategies.full(problem))
    once = measure.arithmetic(partial(states_of, problem.cell), params["cell"], state, batch.inputs)
    unit, places = revolve.layout(steps, states or 16)
    again = unit * revolve.forward_steps(steps // unit, places) - steps
    found = count(bs.strategies.checkpointed(problem, states))
    assert found == pytest.approx(full + again / steps * once, rel=0.03)
    assert found < full * (1 + again / steps) * 0.9


@pytest.mark.parametrize(
    ("shape", "kernel", "layout", "settings"),
    [
        ((2, 3, 7), (4, 3, 3), None, {"padding": "SAME"}),
        ((2, 6, 5, 3), (3, 2, 3, 4), ("NHWC", "HWIO", "NHWC"), {"padding": "VALID"}),
        (
            (2, 4, 9),
            (6, 2, 3),
            None,
            {"padding": [(2, 1)], "window_strides": (2,), "feature_group_count": 2},
        ),
        ((4, 3, 5), (2, 3, 2), None, {"padding": [(1, 3)], "batch_group_count": 2}),
        ((1, 2, 4), (2, 2, 3), None, {"padding": [(2, 2)], "lhs_dilation": (3,)}),
        ((1, 2, 9), (2, 2, 3), None, {"padding": [(-1, 4)], "rhs_dilation": (2,)}),
    ],
)
def test_operations_of_a_convolution(shape, kernel, layout, settings):
    """Of ones with ones, each product adds 1 to the result."""
    settings = {"window_strides": (1,) * (len(shape) - 2)} | settings

    def convolve(x, w):
        return jax.lax.conv_general_dilated(x, w, dimension_numbers=layout, **settings)

    x, w = jnp.ones(shape), jnp.ones(kernel)
    products = int(convolve(x, w).sum())
    assert measure.arithmetic(convolve, x, w) == 2 * products
    # each product takes part in one product of each of the two gradients
    y, pullback = jax.vjp(convolve, x, w)
    assert measure.arithmetic(lambda y: pullback(y)[0], y) == 2 * products
    assert measure.arithmetic(lambda y: pullback(y)[1], y) == 2 * products


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda x: (x + 1j) @ x, "add. of complex128"),
        (lambda x: jnp.fft.fft(x).real, "fft. of complex128"),
        (lambda x: jax.lax.reduce(x, 1.0, lambda a, b: a * jnp.tanh(b), [0]), "reduce. of float64"),
        (
            lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, (2, 2), (1, 1), "SAME"),
            "window_sum",
        ),
    ],
)
def test_operations_without_a_count_are_refused(f, name):
    with pytest.raises(SettingError, match=f"`fn` must be free of operations .*{name}"):
        measure.arithmetic(f, jnp.ones((3, 3)))


ROWS = np.arange(12).reshape(3, 4) % 5  # rows of a table of five, some of them several times


@pytest.mark.parametrize(
    ("change", "each"),
    [
        (lambda x: x.at[ROWS].apply(jnp.sin), 1),
        (lambda x: x.at[ROWS].apply(lambda y: jnp.sin(y) + 2 * y), 3),
        (lambda x: x.at[ROWS].multiply(3.0), 1),
        (lambda x: x.at[ROWS].max(x[ROWS]), 1),
        (lambda x: jax.ops.segment_prod(x[ROWS.ravel()], ROWS.ravel(), 5), 1),
        (lambda x: x.at[ROWS].set(3.0), 0),
    ],
)
def test_operations_on_numbers_of_a_table(change, each):
    """Each number that is changed counts, however large the table; ROWS names 12 rows of two numbers."""
    assert measure.arithmetic(change, jnp.ones((5, 2))) == each * 24


@pytest.mark.parametrize(
    "add",
    [
        lambda x: x.at[ROWS].add(3.0),
        lambda x: x.at[ROWS].subtract(3.0),
        lambda x: jax.ops.segment_sum(x[ROWS.ravel()], ROWS.ravel(), 5),
        jax.grad(lambda x: x[ROWS].sum()),
    ],
)
def test_what_is_added_to_a_table_counts_one(add):
    assert measure.arithmetic(add, jnp.ones((5, 2))) == 1


def test_operations_of_a_while_loop_are_those_of_its_turns():
    """Also behind another one and in a scan; the arguments decide. Control: under vmap it is refused."""

    def doubled(x, least=9):
        return jax.lax.while_loop(lambda y: y[0] < least, lambda y: y + y, x + 1)

    def twice(x):
        return doubled(doubled(x), 50)

    ones = jnp.ones(5)
    assert measure.arithmetic(doubled, ones) == 5 + 3 * 5  # 2, 4, 8, 16
    assert measure.arithmetic(doubled, 5 * ones) == 5 + 5
    assert measure.arithmetic(doubled, 9 * ones) == 5
    assert measure.arithmetic(twice, ones) == 5 + 3 * 5 + 5 + 2 * 5  # 17, 34, 68
    both = jnp.stack([ones, 5 * ones])
    assert measure.arithmetic(lambda x: jax.lax.map(jax.jit(doubled), x), both) == 4 * 5 + 2 * 5

    def chosen(x):
        def turn(y):
            return jax.lax.cond(y.sum() > 9, jnp.sin, lambda y: y + y, y)

        return jax.lax.while_loop(lambda y: y[0] < 9, turn, x)

    for many in (
        jax.vmap(doubled),
        lambda x: jax.lax.map(jax.vmap(doubled), x[None]),
        jax.vmap(chosen),
    ):
        with pytest.raises(SettingError, match="while"):
            measure.arithmetic(many, both)


def test_turns_with_constants_and_with_operations_of_the_condition():
    def grown(x, least, more):
        return jax.lax.while_loop(lambda y: y.sum() < least, lambda y: y + more, x)

    assert measure.arithmetic(grown, jnp.ones(5), 45.0, jnp.ones(5)) == 8 * 5 + 9 * 5

    def sought(x):
        return jax.lax.while_loop(lambda n: (x * n).sum() < 9, lambda n: n + 1, 0)

    assert measure.arithmetic(sought, jnp.ones(5)) == 3 * (5 + 5)  # 0, 1, 2


def sized(steps, window=None):
    """An estimate of an elman cell, D = 4, H = 32, B = 3, and its arguments."""
    problem = bs.Problem(bs.cells.elman(4, 32), bs.readouts.linear(32, 2), bs.losses.squared_error)
    shape = (steps, 3)
    batch = bs.Batch(jnp.ones((*shape, 4)), jnp.ones((*shape, 2)), jnp.ones(shape))
    params, window = problem.init(jax.random.key(0)), window or steps
    strategy = bs.strategies.fixed(problem, window)
    return partial(strategy.estimate, key=jax.random.key(0)), (params, problem.cell.zeros(3), batch)


def test_operations_of_an_estimate_grow_with_time():
    """Near the count by hand of its matrix products, and linear in T; XLA's count is not."""
    counts = {}
    for steps in (16, 32, 64):
        estimate, arguments = sized(steps)
        counts[steps] = measure.arithmetic(estimate, *arguments)
        # forward, adjoint and gradient: 3 products with W_hh, 2 with W_xh, 3 with W_hq
        products = 2 * 3 * steps * (3 * 32 * 32 + 2 * 4 * 32 + 3 * 32 * 2)
        assert products < counts[steps] < 1.2 * products
    assert counts[64] - counts[32] == pytest.approx(2 * (counts[32] - counts[16]), rel=1e-2)
    estimate, arguments = sized(64)
    xla = jax.jit(estimate).lower(*arguments).compile().cost_analysis()["flops"]
    assert xla < 0.8 * counts[64]


def test_operations_of_one_step_are_near_xlas():
    """Without loops XLA counts right: an unrolled recursion, forward and gradient."""

    def loss(W, x):
        for _ in range(4):
            x = jnp.tanh(x @ W)
        return jnp.sum(x * x)

    arguments = jnp.ones((16, 16)) / 16, jnp.ones((8, 16))
    xla = jax.jit(jax.grad(loss)).lower(*arguments).compile().cost_analysis()["flops"]
    assert measure.arithmetic(jax.grad(loss), *arguments) == pytest.approx(xla, rel=0.1)


def test_temporary_bytes_grow_with_the_states():
    """The compiler holds the T·B·H states of float64 at least; twice the steps, about twice the bytes."""
    short, long = (measure.temporary_bytes(f, *a) for f, a in map(sized, (64, 128)))
    assert short > 64 * 3 * 32 * 8
    assert 1.6 < long / short < 2.4


def test_quality_of_complex_gradients_counts_both_parts():
    rng = np.random.default_rng(0)
    real = rng.standard_normal((9, 6))
    exact = rng.standard_normal(6)
    found = measure.compare(real[:, :3] + 1j * real[:, 3:], exact[:3] + 1j * exact[3:])
    assert found == measure.compare(real, exact)


def test_what_no_instrument_takes_is_named(key):
    ex = examples.example("linear")
    full = bs.strategies.full(ex.problem)
    for draws in (0, -1, 1.5):
        with pytest.raises(SettingError, match="`draws` must be a whole number"):
            measure.gradient_norms(full, ex.params, ex.batch, key, draws)
    for made in (
        bs.strategies.dni(ex.problem, block=2),
        bs.strategies.adaptive(ex.problem, delta=0.5),
        bs.strategies.rtrl(ex.problem, carried=False),
    ):
        with pytest.raises(SettingError, match="`state` must be None for a strategy that carries"):
            measure.quality(made, ex.problem, ex.params, ex.batch, key, 3, ex.state)
    with pytest.raises(SettingError, match=r"`batches` must be N batches, .* of shape \[7, 2\]"):
        measure.over_batches(full, ex.problem, ex.params, ex.batch, key)
    for run in (measure.quality, measure.over_batches):
        with pytest.raises(SettingError, match=r"`strategy` must be a Strategy .*; got a function"):
            run(bs.strategies.full, ex.problem, ex.params, ex.batch, key)
