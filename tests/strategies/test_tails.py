"""Synthetic gradients and adaptive windows: true tails, zero tails, targets and learning by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import sgd, toy

import bptt_study as bs
from bptt_study.backprop.adjoint import adjoints
from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.backprop.forward import token_count
from bptt_study.backprop.forward_pass import forward_pass
from bptt_study.backprop.pytrees import zeros_like
from bptt_study.backprop.schedules.call import Call
from bptt_study.backprop.schedules.tails import Block, tailed
from bptt_study.strategies import bp_lambda, dni, fixed
from bptt_study.strategies.synthetic import Synthesiser, Synthetic, _weighted_returns
from bptt_study.testing import examples
from bptt_study.training import devices
from bptt_study.training.train import Budget, make_train
from bptt_study.types import Problem
from bptt_study.validation import SettingError

T, B = examples.T, examples.B
CELLS = [name for name in examples.CELLS if name != "elman_relu"]
MAKE = {"dni": dni, "bp_lambda": partial(bp_lambda, lam=0.7)}


def without_form(problem):
    return problem._replace(cell=problem.cell._replace(affine=None))


def true_adjoints(ex):
    """What each state h_0 … h_T gets from the steps after it, leaves [T + 1, B, H]."""
    run = forward_pass(ex.problem, ex.params, ex.state, ex.batch)
    none = zeros_like(jax.tree.map(lambda e: e[0], run.immediate))
    cell, theta = ex.problem.cell, ex.params["cell"]
    _, found = adjoints(cell, theta, run.residuals, run.immediate, None, none)
    sent = jax.vmap(run.step_vjp)(found, run.residuals)
    return jax.tree.map(lambda s, n: jnp.concatenate([s, n[None]]), sent, none)


def with_tails(ex, block, tails, learn=lambda learned, _: learned, learned=()):
    """Blocks that start from tails[t]."""
    tokens = token_count(ex.params, ex.batch)
    call = Call(ex.problem, ex.params, ex.batch, None, tokens, block, block)
    tail = lambda h, t: jax.tree.map(lambda a: a[t], tails)  # noqa: E731
    return tailed(call, ex.state, tail, learn, learned)


@pytest.mark.parametrize("form", [lambda p: p, without_form], ids=["affine", "step"])
@pytest.mark.parametrize("name", CELLS)
def test_true_tails_are_full_and_zero_tails_are_chunks(name, form):
    """T = 7 ends in a shorter block. The error is linear in the tails; those of a step later are wrong."""
    ex = examples.example(name)
    ex = ex._replace(problem=form(ex.problem))
    true, (loss, exact) = jax.jit(lambda: true_adjoints(ex))(), examples.reference(name)
    run = jax.jit(lambda tails: with_tails(ex, 3, tails)[0])
    found = run(true)
    examples.close(found.grads, exact)
    np.testing.assert_allclose(found.loss, loss, rtol=1e-13)
    full, last = jax.jit(partial(backpropagate, ex.problem))(ex.params, ex.state, ex.batch)
    examples.close(found.last, last)
    examples.close(found.adjoint_norms, full.metrics["adjoint_norms"])
    none = run(zeros_like(true))
    chunks = jax.jit(fixed(ex.problem, 3).estimate)(
        ex.params, ex.state, ex.batch, jax.random.key(0)
    )[0]
    examples.close(none.grads, chunks.grads)
    if name == "mlp":
        return
    off = [
        examples.vector(run(jax.tree.map(lambda a, c=c: a * c, true)).grads)
        - examples.vector(exact)
        for c in (1.5, 2.0)
    ]
    np.testing.assert_allclose(off[1], 2 * off[0], atol=1e-13)
    later = jax.tree.map(lambda a: jnp.roll(a, -1, axis=0), true)
    with pytest.raises(AssertionError):
        examples.close(run(later).grads, exact, 1e-3)


@pytest.mark.parametrize("name", ["linear", "gru", "lstm"])
def test_what_leaves_a_block_is_the_true_tail_if_its_own_is(name):
    ex, true = examples.example(name), None
    true = true_adjoints(ex)

    def remember(seen, block):
        return jax.tree.map(lambda s, a: s.at[block.begin].set(a), seen, block.leaving)

    _, seen = with_tails(ex, 3, true, remember, zeros_like(true))
    for begin in (0, 3, 6):
        pick = partial(jax.tree.map, lambda a, t=begin: a[t])
        examples.close(pick(seen), pick(true))


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("name", ["elman_tanh", "lstm"])
def test_targets_are_lambda_returns(name, lam):
    """The recursion is the λ-weighted mean of n-step returns, and for λ = 1 with a true tail the true one."""
    ex = examples.example(name)
    run = forward_pass(ex.problem, ex.params, ex.state, ex.batch)
    predict = partial(jax.tree.map, lambda h: 0.3 * h + 0.1)
    predicted = jax.vmap(predict)(run.residuals.after)

    def at(tree, t):
        return jax.tree.map(lambda a: a[t], tree)

    def targets(tail):
        block = Block(run, jnp.asarray(0), tail, None)
        states, found = _weighted_returns(lam, predict, block)
        examples.close(at(states, 0), ex.state)
        return found

    def n_step(t, n):
        """What h_{t-1} gets from n steps from t on, counted from 0, and from the prediction after them."""
        adjoint = at(predicted, t + n - 1)
        for s in range(t + n - 1, t - 1, -1):
            e = jax.tree.map(jnp.add, at(run.immediate, s), adjoint)
            adjoint = run.step_vjp(e, at(run.residuals, s))
        return adjoint

    found = targets(at(predicted, -1))
    for t in range(T):
        longest = T - t
        shares = [(1 - lam) * lam ** (n - 1) for n in range(1, longest)] + [lam ** (longest - 1)]
        returns = [n_step(t, n + 1) for n in range(longest)]
        examples.close(
            at(found, t),
            jax.tree.map(lambda *a, w=shares: sum(map(jnp.multiply, w, a)), *returns),
        )
    if lam == 1:
        true = jax.tree.map(lambda a: a[:-1], true_adjoints(ex))
        examples.close(targets(zeros_like(at(predicted, -1))), true)


@pytest.mark.parametrize("future", [True, False])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("name", ["elman_tanh", "lstm"])
def test_one_estimate_by_hand(name, make, future, rng):
    """Tails and lessons of a synthesiser at work: NumPy, block by block."""
    ex, rate, lam = examples.example(name), 0.3, 1.0 if make is dni else 0.7
    strategy = make(ex.problem, 3, rate=rate, future=future)
    n = sum(h.shape[1] for h in jax.tree.leaves(ex.state))
    W, b = 0.5 * rng.standard_normal((n, n)), 0.5 * rng.standard_normal(n)
    tokens = float(ex.batch.mask.sum())
    run = forward_pass(ex.problem, ex.params, ex.state, ex.batch)
    rows = lambda tree: np.concatenate(jax.tree.leaves(tree), axis=-1)  # noqa: E731

    def tree(row):
        parts = np.split(np.asarray(row), len(jax.tree.leaves(ex.state)), axis=-1)
        return jax.tree.unflatten(jax.tree.structure(ex.state), parts)

    before, after = rows(run.residuals.before), rows(run.residuals.after)
    e, predicted = rows(run.immediate), (after @ W + b) / tokens

    def back(t, adjoint):
        residuals = jax.tree.map(lambda a: a[t], run.residuals)
        return rows(run.step_vjp(tree(adjoint), residuals))

    adjoint, lessons = np.zeros_like(e), []
    for begin in (0, 3, 6):
        end = min(begin + 3, T)
        tail = predicted[end - 1] * (future or end < T)
        arriving = target = tail
        for t in reversed(range(begin, end)):
            adjoint[t] = e[t] + arriving
            arriving = back(t, adjoint[t])
            own = tail if t == end - 1 else predicted[t]
            target = back(t, e[t] + (1 - lam) * own + lam * target)
            if (t > 0 or future) and (make is not dni or t == begin):
                lessons.append((before[t], target))
    off = [h @ W + b - tokens * y for h, y in lessons]
    number = B * len(lessons)
    new = Synthesiser(
        W - rate * sum(h.T @ o for (h, _), o in zip(lessons, off, strict=True)) / number,
        b - rate * sum(o.sum(axis=0) for o in off) / number,
    )
    carried = Synthetic(ex.state, Synthesiser(jnp.asarray(W), jnp.asarray(b)))
    found, state = jax.jit(strategy.estimate)(ex.params, carried, ex.batch, jax.random.key(0))
    examples.close(found.grads["cell"], run.parameter_gradient(tree(adjoint)))
    examples.close(found.grads["readout"], run.readout_gradient)
    examples.close(tuple(state.synthesiser), tuple(new))
    norms = np.linalg.norm(adjoint, axis=-1)
    np.testing.assert_allclose(found.metrics["adjoint_norms"], norms, atol=1e-13)


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_fresh_sequences_keep_what_was_learned(make, key):
    ex = examples.example("lstm")
    strategy = make(ex.problem, 3)
    zero = strategy.init(ex.params, B)
    _, state = jax.jit(strategy.estimate)(ex.params, zero, ex.batch, key)
    assert examples.vector(state.synthesiser).any()
    renewed = strategy.renew(ex.params, state)
    examples.close(renewed.state, zero.state)
    examples.close(tuple(renewed.synthesiser), tuple(state.synthesiser))


@pytest.mark.parametrize("future", [True, False])
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_a_call_without_a_counted_token(make, future, key, rng):
    """Its gradient and its adjoints are 0, and it teaches nothing, whatever was learned before."""
    ex = examples.example("lstm")
    n = sum(h.shape[1] for h in jax.tree.leaves(ex.state))
    W, b = jnp.asarray(rng.standard_normal((n, n))), jnp.asarray(rng.standard_normal(n))
    carried = Synthetic(ex.state, Synthesiser(W, b))
    empty = ex.batch._replace(mask=jnp.zeros_like(ex.batch.mask))
    estimate = jax.jit(make(ex.problem, 3, rate=0.3, future=future).estimate)
    found, state = estimate(ex.params, carried, empty, key)
    assert found.loss == 0
    assert not examples.vector(found.grads).any()
    assert not found.metrics["adjoint_norms"].any()
    examples.close(tuple(state.synthesiser), (W, b))


@pytest.mark.slow
def test_a_true_prediction_shares_the_credit_by_tokens(key):
    """Two calls, of one counted token and of many: their mean, weighted by tokens, is the whole gradient."""
    ex, cut = examples.example("lstm", sequences=1), 4
    batch = ex.batch._replace(mask=ex.batch.mask.at[:cut].set(0).at[1].set(1))
    ex, tokens = ex._replace(batch=batch), batch.mask.sum()
    exact = jax.jit(bs.strategies.full(ex.problem).estimate)(ex.params, ex.state, batch, key)[0]
    rows = np.concatenate([a[cut, 0] for a in jax.tree.leaves(true_adjoints(ex))])
    strategy, state = dni(ex.problem, T), ex.state
    total = zeros_like(exact.grads)
    for part, b in ((slice(None, cut), tokens * rows), (slice(cut, None), 0 * rows)):
        call = jax.tree.map(lambda a, part=part: a[part], batch)
        carried = Synthetic(state, Synthesiser(jnp.zeros((len(b), len(b))), jnp.asarray(b)))
        found, (state, _) = jax.jit(strategy.estimate)(ex.params, carried, call, key)
        share = call.mask.sum() / tokens
        total = jax.tree.map(lambda a, g, share=share: a + share * g, total, found.grads)
    examples.close(total, exact.grads)


def test_learning_makes_the_error_smaller(key):
    """At fixed parameters the tails are learned: the call's gradient comes nearer than chunks."""
    ex, (_, exact) = examples.example("linear"), examples.reference("linear")
    strategy = dni(ex.problem, 3, rate=0.2, future=False)
    estimate = jax.jit(strategy.estimate)
    carried = strategy.init(ex.params, B)._replace(state=ex.state)
    errors = []
    for _ in range(300):
        found, after = estimate(ex.params, carried, ex.batch, key)
        off = examples.vector(found.grads) - examples.vector(exact)
        errors.append(np.linalg.norm(off))
        carried = carried._replace(synthesiser=after.synthesiser)
    chunks, _ = jax.jit(fixed(ex.problem, 3).estimate)(ex.params, ex.state, ex.batch, key)
    off = examples.vector(chunks.grads) - examples.vector(exact)
    assert errors[0] == pytest.approx(np.linalg.norm(off), rel=1e-12)
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_training(make, key):
    problem = Problem(bs.cells.elman(3, 3), bs.readouts.linear(3, 3), bs.losses.cross_entropy)
    budget = Budget(steps=6, batch_size=4, updates=5, logs=1)
    trained = make_train(problem, make(problem, 4), sgd(), budget, toy())(key)
    assert np.isfinite(trained.records[-1]["train_loss"]).all()


@pytest.mark.parametrize(
    ("make", "line"),
    [
        *[
            (lambda p, make=make, n=n: make(p, n), f"`block` must be .* got {n}")
            for make in (dni, bp_lambda)
            for n in (0, 1.5, None)
        ],
        *[
            (lambda p, make=make, r=r: make(p, 3, rate=r), f"`rate` must be .* got {r}")
            for make in (dni, bp_lambda)
            for r in (0, -1.0, float("inf"))
        ],
        (lambda p: dni(p, 3, future=None), "`future` must be .* got None"),
        *[
            (lambda p, x=x: bp_lambda(p, 3, lam=x), f"`lam` must be .* got {x}")
            for x in (-0.1, 1.1)
        ],
    ],
)
def test_bad_settings(make, line):
    with pytest.raises(SettingError, match=line):
        make(examples.problem_of("lstm"))


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("block", [T, T + 1])
def test_a_block_without_a_cut(make, block, key):
    """One line, unless it predicts at the end: then it is full at first."""
    ex = examples.example("gru")
    strategy = make(ex.problem, block, future=False)
    carried = strategy.init(ex.params, B)._replace(state=ex.state)
    with pytest.raises(SettingError, match=rf"`block` must be less than the {T} steps .* {block}"):
        jax.jit(strategy.estimate)(ex.params, carried, ex.batch, key)
    found, _ = jax.jit(make(ex.problem, block).estimate)(ex.params, carried, ex.batch, key)
    examples.close(found.grads, examples.reference("gru")[1])


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices: see test_two_devices.py")
@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_split_batch_is_one_device_s(make, key):
    ex = examples.example("gru", sequences=4)
    strategy = make(ex.problem, 3)
    estimate, state = jax.jit(strategy.estimate), strategy.init(ex.params, 4)
    for _ in range(2):
        with devices.split_batch(2):
            found = jax.device_get(estimate(ex.params, state, ex.batch, key))
        expected = jax.device_get(estimate(ex.params, state, ex.batch, key))
        examples.close(found, expected)
        state = expected[1]
