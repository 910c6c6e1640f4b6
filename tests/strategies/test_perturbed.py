"""Perturbed passes: moments of all signs in closed form, against JAX through the plain loop.

As far as products of two signs go, columns of a Hadamard matrix are as good as all signs: its n rows as n
pairs give the mean over all of them in one estimate. The variance needs products of four: tiny cells.
"""

from functools import cache, partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from scipy.linalg import hadamard
from test_train import sgd, toy

import bptt_study as bs
from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.backprop.forward import evaluate
from bptt_study.backprop.perturbed import TANGENTS, Course, accumulate
from bptt_study.backprop.pytrees import zeros_like
from bptt_study.strategies import forward_gradient, full_es, nres, pes, truncated_es
from bptt_study.strategies.perturbed import of_course
from bptt_study.testing import examples, loops
from bptt_study.training import devices
from bptt_study.training.train import Budget, make_train
from bptt_study.types import Batch, Cell, Problem
from bptt_study.validation import SettingError

T, B = examples.T, examples.B
CELLS = [name for name in examples.CELLS if name != "elman_relu"]
MAKE = {
    "forward_gradient": forward_gradient,
    "pes": partial(pes, hold=3),
    "nres": nres,
    "truncated_es": partial(truncated_es, hold=3),
}


def without_form(problem):
    """The same cell without its affine form."""
    return problem._replace(cell=problem.cell._replace(affine=None))


def shapes_of(strategy, steps, params):
    return strategy.claim.noise(steps, B, params)


def pairwise_independent(strategy_of, problem, params, steps):
    """The strategy with n pairs, and n signs for each number of its noise, each two of which are orthogonal."""
    shapes = shapes_of(strategy_of(1), steps, params)
    count = sum(s.size for s in jax.tree.leaves(shapes))
    signs = hadamard(n := 2 ** int(np.ceil(np.log2(count + 1)))).astype(float)
    leaves, structure, used = *jax.tree.flatten(shapes), 1
    found = []
    for leaf in leaves:
        blocks, _, *shape = leaf.shape
        own = signs[:, used : used + leaf.size].reshape(n, blocks, *shape)
        found.append(jnp.asarray(np.swapaxes(own, 0, 1)))
        used += leaf.size
    return strategy_of(n), structure.unflatten(found)


def stream_gradient(ex, problem=None):
    """Of the second batch's loss through both batches, from the zero state."""
    problem = problem or ex.problem

    def loss(params):
        state = problem.cell.zeros(B)
        _, state = loops.plain_loss(problem, params, state, ex.earlier)
        return loops.plain_loss(problem, params, state, ex.batch)[0]

    return jax.jit(jax.grad(loss))(ex.params)


def both(tree, other):
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), tree, other)


# Means


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("form", [lambda p: p, without_form], ids=["affine", "step"])
def test_forward_gradient_is_the_gradient_on_average(name, form):
    ex = examples.example(name)
    problem = form(ex.problem)
    make = partial(forward_gradient, problem)
    strategy, noise = pairwise_independent(make, problem, ex.params, T)
    estimate, last = jax.jit(strategy.given)(ex.params, ex.state, ex.batch, noise)
    loss, grads = examples.reference(name)
    examples.close(estimate.grads, grads)
    np.testing.assert_allclose(estimate.loss, loss, rtol=1e-13)
    expected = loops.looped_loss(ex.problem, ex.params, ex.state, ex.batch)[1]
    examples.close(last, expected)
    once = jax.tree.map(lambda v: v.at[:, 0].set(v[:, 1]), noise)
    off = jax.jit(strategy.given)(ex.params, ex.state, ex.batch, once)[0]
    with pytest.raises(AssertionError):
        examples.close(off.grads, grads)


@cache
def carried(name, make):
    """(estimate of the second call, both calls' noise) of a strategy that answers to the stream."""
    ex = examples.example(name)
    strategy, noise = pairwise_independent(
        partial(make, ex.problem, None), ex.problem, ex.params, 2 * T
    )
    blocks = len(jax.tree.leaves(noise)[0]) // 2 or 1
    calls = [jax.tree.map(lambda v: v[:blocks], noise), jax.tree.map(lambda v: v[-blocks:], noise)]

    @jax.jit
    def run(state, noise):
        _, state = strategy.given(ex.params, state, ex.earlier, noise[0])
        return strategy.given(ex.params, state, ex.batch, noise[1])[0]

    return run(strategy.init(ex.params, B), calls)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("make", [partial(pes, hold=T), nres], ids=["pes", "nres"])
def test_what_is_carried_answers_to_the_stream(name, make):
    """Two calls: the second estimate is the gradient through both; the call's alone is another."""
    ex, (_, call) = examples.example(name), examples.reference(name)
    expected = stream_gradient(ex)
    examples.close(carried(name, make).grads, expected)
    if name != "mlp":  # which knows no past
        with pytest.raises(AssertionError):
            examples.close(expected, call, 1e-2)


@pytest.mark.parametrize("hold", [1, 2, 3, T, T + 5])
@pytest.mark.parametrize("name", ["elman_tanh", "lstm"])
def test_pes_of_any_hold(name, hold):
    """The last block is shorter where the hold does not divide the steps."""
    ex = examples.example(name)
    make = lambda pairs: pes(ex.problem, None, pairs, hold)  # noqa: E731
    strategy, noise = pairwise_independent(make, ex.problem, ex.params, T)
    state = strategy.init(ex.params, B)._replace(state=ex.state)
    estimate, _ = jax.jit(strategy.given)(ex.params, state, ex.batch, noise)
    examples.close(estimate.grads, examples.reference(name)[1])


@pytest.mark.parametrize("name", CELLS)
def test_truncated_es_is_chunks_on_average(name):
    ex = examples.example(name)
    make = lambda pairs: truncated_es(ex.problem, None, pairs, 3)  # noqa: E731
    strategy, noise = pairwise_independent(make, ex.problem, ex.params, T)
    estimate, _ = jax.jit(strategy.given)(ex.params, ex.state, ex.batch, noise)
    chunks = bs.strategies.fixed(ex.problem, 3)
    expected, _ = jax.jit(chunks.estimate)(ex.params, ex.state, ex.batch, jax.random.key(0))
    examples.close(estimate.grads, expected.grads)
    np.testing.assert_array_equal(bs.lags.window(strategy, 5), bs.lags.window(chunks, 5))


def test_without_accumulation_pes_is_far_off():
    """The control: particles go on, and answer to the last perturbation alone."""
    ex = examples.example("elman_tanh")

    def forget(particles, v, fresh):
        return accumulate(particles, v, fresh)[0]._replace(drawn=v), v

    def make(pairs):
        course = Course(TANGENTS, 3, forget)
        return of_course(ex.problem, course, pairs, "", carried=True)

    strategy, noise = pairwise_independent(make, ex.problem, ex.params, T)
    state = strategy.init(ex.params, B)._replace(state=ex.state)
    estimate, _ = jax.jit(strategy.given)(ex.params, state, ex.batch, noise)
    exact = examples.vector(examples.reference("elman_tanh")[1])
    off = np.linalg.norm(examples.vector(estimate.grads) - exact) / np.linalg.norm(exact)
    assert 0.05 < off < 1


# All signs


@cache
def tiny(cell=bs.cells.elman, steps=3, seed=0):
    """One unit, one input, one output, two sequences; h_0 = 0, as where the particles are fresh."""
    rng = np.random.default_rng(seed)
    problem = Problem(cell(1, 1), bs.readouts.linear(1, 1), bs.losses.squared_error)
    params = jax.tree.map(
        lambda p: p + 0.5 * rng.standard_normal(p.shape), problem.init(jax.random.key(seed))
    )
    inputs, targets = (jnp.asarray(rng.standard_normal((steps, B, 1))) for _ in range(2))
    mask = jnp.asarray(rng.uniform(0.2, 1, (steps, B)))
    return problem, params, Batch(inputs, targets, mask)


def every_sign(strategy, params, batch):
    """Estimates of the cell's gradient for all signs [N, P], and of the readout's for one of them."""
    shapes = shapes_of(strategy, len(batch.mask), params)
    leaves, structure = jax.tree.flatten(shapes)
    signs = np.array(list(product([-1.0, 1.0], repeat=sum(s.size for s in leaves))))
    ends = np.cumsum([s.size for s in leaves])[:-1]
    parts = [p.reshape(-1, *s.shape) for p, s in zip(np.split(signs, ends, 1), leaves, strict=True)]
    state = strategy.init(params, B)

    @jax.jit
    def run(noise):
        return jax.vmap(lambda v: strategy.given(params, state, batch, v)[0].grads)(noise)

    return run(structure.unflatten([jnp.asarray(p) for p in parts]))


def moments(grads):
    rows = np.concatenate([np.reshape(g, (len(g), -1)) for g in jax.tree.leaves(grads)], axis=1)
    return rows.mean(axis=0), rows.var(axis=0).sum()


@pytest.mark.parametrize(
    ("make", "cell"),
    [
        (forward_gradient, bs.cells.elman),
        (forward_gradient, bs.cells.gru),
        (partial(forward_gradient, tangents=3), bs.cells.elman),
        (partial(pes, sigma=None, hold=1), bs.cells.elman),
        (partial(pes, sigma=None, hold=2), bs.cells.elman),
        (partial(pes, sigma=None, hold=9), bs.cells.linear),
        (partial(nres, sigma=None), bs.cells.elman),
        (partial(pes, sigma=None, pairs=2, hold=2), bs.cells.elman),
    ],
)
def test_mean_and_variance_of_all_signs(make, cell):
    """The table's formula; negative controls: the sequences apart, and P + 1 for P - 1."""
    problem, params, batch = tiny(cell)
    strategy = make(problem)
    mean, variance = moments(every_sign(strategy, params, batch))
    exact = examples.vector(
        jax.grad(lambda p: loops.looped_loss(problem, p, problem.cell.zeros(B), batch)[0])(params)
    )
    np.testing.assert_allclose(mean, exact, atol=1e-12)
    flows = bs.lags.shared_flows(problem, params, batch)
    found = bs.lags.variance(strategy, flows, table="shared_flows")
    assert found == pytest.approx(variance, rel=1e-9)
    apart = bs.lags.flows(problem, params, batch)
    with pytest.raises(SettingError, match=r"`table` must be shared_flows.*got flows"):
        bs.lags.variance(strategy, apart)
    assert bs.lags.variance(strategy, apart, table="shared_flows") != pytest.approx(found, rel=1e-2)


def test_one_perturbation_has_p_minus_one_times_the_squared_gradient():
    """Stated once by hand, and the same for noise that is kept; sums of lags are no patterns to enumerate."""
    problem, params, batch = tiny(bs.cells.lstm)
    grads, _ = backpropagate(problem, params, problem.cell.zeros(B), batch)
    squared = sum(float((g**2).sum()) for g in jax.tree.leaves(grads.grads["cell"]))
    flows = bs.lags.shared_flows(problem, params, batch)
    for strategy in (forward_gradient(problem), nres(problem, None), pes(problem, None, hold=9)):
        found = bs.lags.variance(strategy, flows, table="shared_flows")
        assert found == pytest.approx(11 * squared, rel=1e-12)
        with pytest.raises(SettingError, match="must be one that draws lag weights"):
            bs.measure.exact_quality(strategy, problem, params, batch)


@pytest.mark.parametrize("tangents", [1, 4, 12])
def test_orthogonal_tangents(tangents, key):
    """P/N - 1 times the squared gradient, and at N = P the gradient."""
    problem, params, batch = tiny(bs.cells.lstm)
    strategy = forward_gradient(problem, tangents, orthogonal=True)
    exact, _ = backpropagate(problem, params, problem.cell.zeros(B), batch)
    exact = examples.vector(exact.grads)
    state = strategy.init(params, B)

    @jax.jit
    def run(keys):
        return jax.lax.map(lambda key: strategy.estimate(params, state, batch, key)[0].grads, keys)

    mean, variance = moments(run(jax.random.split(key, 3000)))
    flows = bs.lags.shared_flows(problem, params, batch)
    expected = bs.lags.variance(strategy, flows, table="shared_flows")
    assert variance == pytest.approx(expected, rel=0.1, abs=1e-20)
    assert np.linalg.norm(mean - exact) <= 4 * np.sqrt(variance / 3000) + 1e-12
    assert strategy.claim.exact == (tangents == 12)


@pytest.mark.parametrize("make", [partial(pes, hold=1), nres, full_es])
def test_bias_is_quadratic_in_sigma(make):
    """All parameters are perturbed, the readout's too; a hundredth of the bias at a tenth of σ."""
    problem, params, batch = tiny(steps=2, seed=1)
    exact = examples.vector(
        jax.grad(lambda p: loops.looped_loss(problem, p, problem.cell.zeros(B), batch)[0])(params)
    )
    bias = [
        np.linalg.norm(moments(every_sign(make(problem, sigma=s), params, batch))[0] - exact)
        for s in (0.1, 0.01)
    ]
    assert 97 < bias[0] / bias[1] < 103
    assert 1e-4 < bias[0] / np.linalg.norm(exact) < 0.1


# The mean over all signs


@pytest.mark.parametrize(("make", "hold"), [(full_es, 4), (nres, 4), (partial(pes, hold=2), 2)])
def test_the_mean_of_all_signs_is_the_derivative_smoothed_parameter_by_parameter(make, hold, key):
    """By each parameter of each block, over a uniform change of its own up to σ, and over ±σ in all others.

    The control: the gradient of the loss averaged over all signs, for which none of them is unbiased.
    """
    sigma, steps = 0.5, 4
    ex = examples.example("linear", steps=steps, sequences=1, inputs=1, hidden=1, outputs=1)
    flat, unravel = ravel_pytree(ex.params)
    zero, weights = ex.problem.cell.zeros(1), ex.batch.mask / ex.batch.mask.sum()
    blocks, count = steps // hold, flat.size * (steps // hold)

    def loss(copies):
        h, total = zero, 0.0
        for t in range(steps):
            p = unravel(copies[t // hold])
            h = ex.problem.cell.step(p["cell"], h, ex.batch.inputs[t])
            out = ex.problem.readout.apply(p["readout"], h[None])
            total += jnp.sum(weights[t] * ex.problem.loss(out, ex.batch.targets[t][None])[0])
        return total

    slope = jax.grad(lambda change: loss(flat + sigma * change.reshape(blocks, -1)))
    signs = 1.0 - 2.0 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    nodes, shares = np.polynomial.legendre.leggauss(8)

    def smoothed(i):
        own = lambda u, s: slope(s.at[i].set(u))[i] / sigma  # noqa: E731
        by_node = jax.vmap(lambda u: jax.vmap(partial(own, u))(jnp.asarray(signs)).mean())
        return by_node(nodes) @ shares / 2

    expected = jax.lax.map(smoothed, jnp.arange(count)).reshape(blocks, -1).sum(axis=0)
    averaged = jax.jit(jax.vmap(slope))(signs).mean(axis=0).reshape(blocks, -1).sum(axis=0) / sigma
    strategy = make(ex.problem, sigma)
    each = jax.vmap(lambda s: jax.vmap(unravel)(s.reshape(blocks, -1)))(jnp.asarray(signs))
    noise = jax.tree.map(lambda a: a[:, :, None], each)  # one pair
    start = strategy.init(ex.params, 1)
    run = lambda v: ravel_pytree(strategy.given(ex.params, start, ex.batch, v)[0].grads)[0]  # noqa: E731
    found = jax.jit(jax.vmap(run))(noise).mean(axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert np.linalg.norm(found - averaged) > 0.1 * np.linalg.norm(found)


# What is carried


@pytest.mark.parametrize("sigma", [None, 0.1])
def test_noise_is_kept_until_the_sequences_are_fresh(sigma, key):
    ex = examples.example("lstm")
    strategy = nres(ex.problem, sigma, pairs=2)
    keys, run = jax.random.split(key, 3), jax.jit(strategy.estimate)
    zero = strategy.init(ex.params, B)
    _, first = run(ex.params, zero, ex.earlier, keys[0])
    _, then = run(ex.params, first, ex.batch, keys[1])
    _, anew = run(ex.params, zero, ex.batch, keys[2])
    drawn = [examples.vector(particles.drawn) for particles in (first, then, anew)]
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[2] != drawn[0]).any()


@pytest.mark.parametrize("make", [partial(pes, hold=2), nres])
@pytest.mark.parametrize("sigma", [None, 0.1])
def test_two_calls_of_six_steps_are_one_of_twelve(make, sigma, key):
    """The token-weighted mean, the noise handed over; chunks, the control, are off."""
    ex = examples.example("gru", steps=12)
    halves = [jax.tree.map(lambda a, s=s: a[s], ex.batch) for s in (slice(6), slice(6, 12))]
    shares = [half.mask.sum() / ex.batch.mask.sum() for half in halves]

    def composed(strategy, noises):
        state, total = strategy.init(ex.params, B), zeros_like(ex.params)
        for half, share, noise in zip(halves, shares, noises, strict=True):
            estimate, state = jax.jit(strategy.given)(ex.params, state, half, noise)
            total = jax.tree.map(lambda a, g, s=share: a + s * g, total, estimate.grads)
        return total

    strategy = make(ex.problem, sigma, 3)
    shapes = shapes_of(strategy, 12, ex.params)
    keys = iter(jax.random.split(key, 9))
    noise = jax.tree.map(lambda s: jax.random.rademacher(next(keys), s.shape, s.dtype), shapes)
    blocks = len(jax.tree.leaves(noise)[0]) // 2
    parts = [
        jax.tree.map(lambda v: v[: blocks or 1], noise),
        jax.tree.map(lambda v: v[blocks:], noise),
    ]
    start = strategy.init(ex.params, B)
    whole, _ = jax.jit(strategy.given)(ex.params, start, ex.batch, noise)
    examples.close(composed(strategy, parts), whole.grads)
    control = truncated_es(ex.problem, sigma, 3, 12)
    whole, _ = jax.jit(control.given)(ex.params, ex.problem.cell.zeros(B), ex.batch, parts[0])
    with pytest.raises(AssertionError):
        examples.close(composed(control, [parts[0]] * 2), whole.grads, 1e-2)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_numbers_kept(make):
    """As counted by the leaves of the state of one sequence, beside the hidden state."""
    problem = examples.problem_of("lstm")
    params, claim = problem.init(jax.random.key(0)), make(problem).claim
    numbers = [sum(a.size for a in jax.tree.leaves(make(problem).init(params, b))) for b in (1, 2)]
    hidden = sum(a.size for a in jax.tree.leaves(problem.cell.zeros(1)))
    assert numbers[0] - hidden == (claim.numbers or 0)
    assert numbers[1] - numbers[0] in (hidden, 3 * hidden)


# Which derivatives are taken


def no_way_back(rule):
    """An Elman cell whose tanh has this derivative in forward mode."""

    @jax.custom_jvp
    def phi(x):
        return jnp.tanh(x)

    phi.defjvp(rule)
    plain = bs.cells.elman(examples.D, examples.H)

    def step(params, h, x):
        return phi(params["W_xh"][x] + h @ params["W_hh"] + params["b_h"])

    return Cell(plain.init, plain.zeros, step, plain.read)


def by_a_loop(primals, tangents):
    """As it should be, by a while loop, which JAX cannot transpose."""
    y = jnp.tanh(primals[0])
    once = jax.lax.while_loop(
        lambda c: c[0] < 1, lambda c: (c[0] + 1, tangents[0] * (1 - y * y)), (0, 0 * y)
    )
    return y, once[1]


def never(primals, tangents):
    raise RuntimeError("differentiated")


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (forward_gradient, by_a_loop),
        (partial(pes, sigma=None), by_a_loop),
        *[(make, never) for make in (partial(full_es, sigma=0.1), pes, nres, truncated_es)],
    ],
)
def test_nothing_goes_back_through_the_cell(make, rule, key):
    """Full, the control, cannot be computed on it."""
    ex = examples.example("elman_tanh")
    problem = ex.problem._replace(cell=no_way_back(rule))
    strategy, same = make(problem), make(ex.problem)
    passes = "forward" if rule is by_a_loop else "evaluations"
    assert strategy.claim.passes == passes
    state = strategy.init(ex.params, B)
    found, _ = jax.jit(strategy.estimate)(ex.params, state, ex.batch, key)
    examples.close(found, jax.jit(same.estimate)(ex.params, state, ex.batch, key)[0])
    assert found.metrics == {}
    with pytest.raises((RuntimeError, ValueError)):
        backpropagate(problem, ex.params, ex.state, ex.batch)


# Where they run


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices: see test_two_devices.py")
@pytest.mark.parametrize("sigma", [None, 0.1])
@pytest.mark.parametrize("make", [pes, nres, truncated_es])
def test_split_batch_is_one_device_s(make, sigma, key):
    ex = examples.example("gru", sequences=4)
    strategy = make(ex.problem, sigma, 2)
    estimate, state = jax.jit(strategy.estimate), strategy.init(ex.params, 4)
    for _ in range(2):
        with devices.split_batch(2):
            found = jax.device_get(estimate(ex.params, state, ex.batch, key))
        expected = jax.device_get(estimate(ex.params, state, ex.batch, key))
        examples.close(found, expected)
        state = expected[1]


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices: see test_two_devices.py")
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_split_batch_of_training_is_one_device_s(make, key):
    problem = Problem(bs.cells.elman(3, 3), bs.readouts.linear(3, 3), bs.losses.cross_entropy)
    budgets = (Budget(steps=6, batch_size=4, updates=3, logs=1, split=split) for split in (1, 2))
    one, two = (make_train(problem, make(problem), sgd(), b, toy())(key) for b in budgets)
    assert two.records[-1]["train_loss"] == pytest.approx(one.records[-1]["train_loss"], rel=1e-9)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_training(make, key):
    """The state is closed, and a fresh sequence starts anew."""
    problem = Problem(bs.cells.elman(3, 3), bs.readouts.linear(3, 3), bs.losses.cross_entropy)
    budget = Budget(steps=6, batch_size=4, updates=5, logs=1)
    trained = make_train(problem, make(problem), sgd(), budget, toy())(key)
    assert np.isfinite(trained.records[-1]["train_loss"]).all()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda p: forward_gradient(p, 0), "`tangents` must be .* got 0"),
        (lambda p: forward_gradient(p, 1.5), "`tangents` must be .* got 1.5"),
        (
            lambda p: forward_gradient(p, 85, orthogonal=True),
            "`tangents` must be at most 84, the number of the cell.s parameters; got 85",
        ),
        (lambda p: forward_gradient(p, orthogonal=1), "`orthogonal` must be .* got 1"),
        (lambda p: full_es(p, None), "`sigma` must be .* got None"),
        *[
            (lambda p, make=make, s=s: make(p, s), f"`sigma` must be .* got .?{s}")
            for make in (pes, nres, truncated_es, full_es)
            for s in (0, -0.1, float("nan"), "a")
        ],
        *[
            (lambda p, make=make, n=n: make(p, 0.1, n), f"`pairs` must be .* got .?{n}")
            for make in (pes, nres, truncated_es, full_es)
            for n in (0, -1, 2.5, True)
        ],
        *[
            (lambda p, make=make, h=h: make(p, 0.1, 1, h), f"`hold` must be .* got .?{h}")
            for make in (pes, truncated_es)
            for h in (0, 1.5, None)
        ],
    ],
)
def test_bad_settings(make, line):
    with pytest.raises(SettingError, match=line):
        make(examples.problem_of("lstm"))


@pytest.mark.slow
@pytest.mark.parametrize(("make", "sigma", "dtype"), [(full_es, 1e-20, float), (pes, 1e-7, "f4")])
def test_a_sigma_that_rounding_drops_is_refused_and_in_jit_the_gradient_is_nan(
    make, sigma, dtype, key
):
    """θ ± σv is θ, so the loss would be right and the gradient 0."""
    ex = examples.example("linear")
    cast = partial(jax.tree.map, lambda a: jnp.asarray(a, dtype))
    strategy, params = make(ex.problem, sigma), cast(ex.params)
    arguments = params, cast(strategy.init(params, B)), cast(ex.batch), key
    with pytest.raises(
        SettingError, match=r"`sigma` must be so large that θ ± σ is not rounded to θ, float"
    ):
        strategy.estimate(*arguments)
    found = jax.jit(strategy.estimate)(*arguments)[0]
    assert jnp.isfinite(found.loss)
    assert all(jnp.isnan(g).all() for g in jax.tree.leaves(found.grads))


# Influence balancing (Tallec & Ollivier 2017; Vicol et al. 2021)


@pytest.mark.parametrize(
    ("make", "rate", "bounds"),
    [
        (partial(truncated_es, pairs=20), 1e-4, (20, np.inf)),
        (partial(pes, pairs=400), 1e-4, (0, 0.05)),
        (partial(nres, pairs=100), 1e-4, (0, 0.05)),
    ],
    ids=["truncated_es", "pes", "nres"],
)
def test_influence_balancing(make, rate, bounds, key):
    """An update at every step from θ = ½: the loss is ½ where θ = 0. Truncation leads away from the optimum."""
    task = bs.tasks.influence_balancing()
    cell = bs.cells.influence(1, 23, 10)
    problem = Problem(cell, task.readout, task.loss)
    strategy, sampler = make(problem), task.sampler(1, 1)
    params = {"cell": {"theta": jnp.asarray(0.5)}, "readout": {}}
    batch, _ = sampler.sample(sampler.data, key, 1)
    ones = strategy.init(params, 1)

    def update(carry, key):
        params, state = carry
        estimate, state = jax.jit(strategy.estimate)(params, state, batch, key)
        return (jax.tree.map(lambda p, g: p - rate * g, params, estimate.grads), state), None

    (params, _), _ = jax.jit(partial(jax.lax.scan, update))(
        (params, ones), jax.random.split(key, 1500)
    )
    final = evaluate(problem, params, task.validation)["validation_loss"]
    assert bounds[0] < final < bounds[1], final
