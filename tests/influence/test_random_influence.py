"""Random ways to hold the influence: over all signs the mean is the gradient; and how much noise they add."""

from functools import cache

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_study as bs
from bptt_study.backprop.one_by_one import eigenvectors
from bptt_study.influence.optimal import factor
from bptt_study.influence.rank_one import balance

S = bs.strategies
D = Q = 2


@cache
def example(name, steps, hidden=2, sequences=1):
    """A problem, its parameters and the steps of two calls."""
    rng = np.random.default_rng(1)
    cell = getattr(bs.cells, name)(D, hidden)
    problem = bs.Problem(cell, bs.readouts.linear(hidden, Q), bs.losses.cross_entropy)
    params = jax.tree.map(
        lambda p: p + 0.3 * rng.standard_normal(p.shape), problem.init(jax.random.key(1))
    )
    shape = (steps, sequences)
    batch = bs.Batch(
        jnp.asarray(rng.standard_normal((*shape, D))),
        jnp.asarray(rng.integers(Q, size=shape)),
        jnp.ones(shape),
    )
    return problem, params, batch


def calls(batch):
    half = len(batch.mask) // 2
    parts = slice(half), slice(half, None)
    return [jax.tree.map(lambda a, part=part: a[part], batch) for part in parts]


@cache
def exact(*arguments):
    """The second call's gradient through both."""
    problem, params, batch = example(*arguments)
    strategy = S.rtrl(problem)
    state = strategy.init(params, batch.mask.shape[1])
    estimate = jax.jit(strategy.estimate)
    for part in calls(batch):
        found, state = estimate(params, state, part, jax.random.key(0))
    return vector(found.grads)


def vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def estimates(make, *arguments):
    """The second call's gradient for all signs of both calls, [N, P], the first row with + alone."""
    problem, params, batch = example(*arguments)
    strategy, size = make(problem), batch.mask.shape[1]
    shapes = [strategy.claim.noise(len(part.mask), size, params) for part in calls(batch)]
    counts = [int(np.prod(shape)) for shape in shapes]
    signs = 1.0 - 2.0 * (np.arange(2 ** sum(counts))[:, None] >> np.arange(sum(counts)) & 1)
    assert len(signs) <= 2**13

    def run(signs):
        state = strategy.init(params, size)
        for part, noise, shape in zip(
            calls(batch), jnp.split(signs, counts[:1]), shapes, strict=True
        ):
            found, state = jax.jit(strategy.given)(params, state, part, noise.reshape(shape))
        return found.grads

    found = jax.jit(lambda rows: jax.lax.map(run, rows, batch_size=1024))(jnp.asarray(signs))
    return np.concatenate([np.reshape(g, (len(signs), -1)) for g in jax.tree.leaves(found)], axis=1)


def bias_and_variance(make, *arguments):
    found, expected = estimates(make, *arguments), exact(*arguments)
    error = found - expected
    scale = np.linalg.norm(expected)
    plus = np.linalg.norm(error[0]) / scale
    return np.linalg.norm(error.mean(axis=0)) / scale, (error**2).sum(1).mean() / scale**2, plus


WAYS = {
    "uoro": (S.uoro, [("elman", 4), ("gru", 4), ("lstm", 3), ("mlp", 3)]),
    "uoro_blocks_of_2": (lambda p: S.uoro(p, block=2), [("elman", 6), ("lstm", 4)]),
    "uoro_2_draws": (lambda p: S.uoro(p, draws=2), [("gru", 3)]),
    "uoro_shared": (lambda p: S.uoro(p, shared=True), [("gru", 3, 2, 2)]),
    "kf_rtrl": (S.kf_rtrl, [("elman", 5), ("gru", 4), ("lstm", 4), ("mlp", 4)]),
    "reverse_kf": (S.reverse_kf, [("elman", 3), ("gru", 2, 1)]),
    "ok_1": (lambda p: S.ok(p, rank=1), [("elman", 5), ("lstm", 4)]),
    "ok_2": (lambda p: S.ok(p, rank=2), [("gru", 3)]),
}
CASES = [
    pytest.param(make, case, id=f"{name}-{case[0]}")
    for name, (make, cases) in WAYS.items()
    for case in cases
]


@pytest.mark.parametrize(("make", "case"), CASES)
def test_the_mean_over_all_signs_is_the_gradient(make, case):
    bias, variance, plus = bias_and_variance(make, *case)
    assert bias < 1e-12
    if case[0] != "mlp":  # whose past counts nothing, so that products need no signs
        assert variance > 1e-5 and plus > 1e-3  # the control: one pattern is not the mean


def test_signs_that_come_again_bias_it():
    """The control of the enumeration: the same ν in every step, which a key used twice would give."""
    found = estimates(S.uoro, "elman", 4)
    bits = np.arange(len(found))[:, None] >> np.arange(8) & 1
    again = (bits.reshape(-1, 4, 2) == bits.reshape(-1, 4, 2)[:, :1]).all(axis=(1, 2))
    off = found[again].mean(axis=0) - exact("elman", 4)
    assert again.sum() == 4 and np.linalg.norm(off) > 0.1 * np.linalg.norm(exact("elman", 4))


def variance(make, *arguments):
    return bias_and_variance(make, *arguments)[1]


@pytest.mark.slow
def test_the_published_order_of_the_noise():
    """OK below KF below UORO, and reverse KF above KF (Mujika 2018, Benzing 2019, Marschall 2020)."""
    case = ("elman", 3)
    found = [variance(WAYS[name][0], *case) for name in ("ok_2", "ok_1", "kf_rtrl", "uoro")]
    assert found == sorted(found)
    assert variance(S.reverse_kf, *case) > found[2]
    assert 0.01 < found[2] < 10  # of the order of the gradient itself
    assert found[0] < 0.1 * found[1]


@pytest.mark.slow
def test_blocks_and_draws_have_less_noise_and_sharing_more():
    case = ("gru", 3)
    one = variance(S.uoro, *case)
    assert variance(lambda p: S.uoro(p, block=2), *case) < 0.5 * one
    two = estimates(lambda p: S.uoro(p, draws=2), *case) - exact(*case)
    scale = np.linalg.norm(exact(*case)) ** 2
    np.testing.assert_allclose((two**2).sum(1).mean() / scale, one / 2, rtol=1e-10)
    both = ("gru", 3, 2, 2)
    assert variance(lambda p: S.uoro(p, shared=True), *both) > 0
    assert S.uoro(example(*both)[0], shared=True).claim.numbers == 2 + 36


def test_flipping_all_signs_changes_nothing():
    """So antithetic pairs would be useless."""
    found = estimates(S.uoro, "elman", 3)
    np.testing.assert_allclose(found, found[::-1], rtol=0, atol=1e-13 * np.abs(found).max())


@pytest.mark.slow
def test_enough_products_are_exact():
    problem, params, batch = example("gru", 5)
    key = jax.random.key(5)
    for make, below in ((lambda p: S.ok(p, rank=5), 1e-7), (S.kf_rtrl, None)):
        strategy = make(problem)
        found, _ = jax.jit(strategy.estimate)(params, strategy.init(params, 1), batch, key)
        expected = vector(
            jax.jit(S.full(problem).estimate)(params, problem.cell.zeros(1), batch, key)[0].grads
        )
        off = np.linalg.norm(vector(found.grads) - expected) / np.linalg.norm(expected)
        assert off < below if below else off > 0.01


@pytest.mark.parametrize("name", ["uoro", "kf_rtrl", "ok_2"])
def test_an_estimate_is_one_of_the_patterns(name):
    case = ("elman", 3)
    make = WAYS[name][0]
    problem, params, batch = example(*case)
    strategy, rows = make(problem), estimates(make, *case)
    drawn = []
    for seed in range(4):
        state = strategy.init(params, 1)
        for n, part in enumerate(calls(batch)):
            key = jax.random.fold_in(jax.random.key(seed), n)
            found, state = jax.jit(strategy.estimate)(params, state, part, key)
        drawn.append(vector(found.grads))
        assert np.abs(rows - drawn[-1]).max(axis=1).min() < 1e-12
    assert np.ptp(drawn, axis=0).max() > 1e-6


def test_each_sequence_has_its_own_signs():
    problem, params, batch = example("elman", 4)
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a], axis=1), batch)
    strategy = S.uoro(problem)
    _, state = jax.jit(strategy.estimate)(
        params, strategy.init(params, 2), twice, jax.random.key(0)
    )
    influence = jnp.concatenate([jnp.ravel(a[0] * a[1]) for a in jax.tree.leaves(state.past[0])])
    for leaf in jax.tree.leaves(state.past[1]):
        assert not np.allclose(leaf[0], leaf[1])
    assert jnp.abs(influence).max() > 0
    a, b = (jax.tree.map(lambda leaf, n=n: leaf[n], state.hidden) for n in (0, 1))
    np.testing.assert_allclose(a, b)


@pytest.mark.parametrize(
    ("d", "rank", "expected"),
    [((5, 3, 2, 1), 3, 4), ((1, 1, 1), 2, 1.5), ((10, 1, 0.5), 2, 1), ((3, 2), 1, 12)],
)
def test_the_added_variance_is_the_least(d, rank, expected):
    """s²/q - Σ_{j>m} d_j² (Benzing et al. 2019)."""
    patterns = 1.0 - 2.0 * (np.arange(2**rank)[:, None] >> np.arange(rank + 1) & 1)
    W = np.stack([factor(jnp.array(d, float), jnp.asarray(signs)) for signs in patterns])
    assert W.shape[1:] == (rank + 1, rank)
    products = W @ W.swapaxes(1, 2)
    np.testing.assert_allclose(products.mean(axis=0), np.diag(d), atol=1e-12)
    added = ((products - np.diag(d)) ** 2).sum(axis=(1, 2)).mean()
    np.testing.assert_allclose(added, expected, rtol=1e-12)


def test_a_product_with_nothing_is_left_out():
    for of, by in ((0.0, 4.0), (4.0, 0.0), (0.0, 0.0)):
        assert np.all(np.asarray(balance(jnp.array(of), jnp.array(by))) == 0)
    np.testing.assert_allclose(balance(jnp.array(16.0), jnp.array(1.0)), [2, 0.5])


def primitives(jaxpr):
    """All equations of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from primitives(inner)


@pytest.mark.parametrize("name", ["ok", "sketched"])
def test_lapack_gets_one_matrix_at_a_time(name):
    """On a whole batch, two calls at once wait for each other for ever on two cores."""
    problem, params, batch = example("elman", 4, 2, 3)
    strategy = getattr(S, name)(problem, rank=1)
    state = strategy.init(params, 3)
    program = jax.make_jaxpr(strategy.estimate)(params, state, batch, jax.random.key(0))
    found = [e for e in primitives(program.jaxpr) if e.primitive.name == "eigh"]
    assert found
    assert all(equation.invars[0].aval.ndim == 2 for equation in found)


def test_eigenvectors_of_a_batch_are_those_of_each_matrix():
    """But for LAPACK's signs, which depend on rounding: in another program, OK would draw otherwise."""
    half = np.random.default_rng(0).standard_normal((3, 4, 4))
    grams = jnp.asarray(half @ half.swapaxes(1, 2))
    rows = np.asarray(jax.vmap(eigenvectors)(grams))
    expected = jnp.linalg.eigh(grams)[1].swapaxes(1, 2)
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=2)[..., None], axis=2)
    assert (largest > 0).all()
    signs = np.sign(np.sum(rows * expected, axis=2, keepdims=True))
    np.testing.assert_allclose(rows, signs * expected, rtol=1e-12)
