"""Credit carried forward: exact influence, and the deterministic ways that keep a part of it.

The oracle is JAX's derivative of a plain Python loop over `cell.step`, or a loop with dense Jacobians.
"""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import bptt_study as bs
from bptt_study.influence import carried
from bptt_study.influence import masked as masked_influence
from bptt_study.influence.kronecker import in_shape
from bptt_study.influence.traces import traces
from bptt_study.validation import SettingError

S = bs.strategies
D, H, Q, B = 3, 3, 3, 2


def leaky(inputs, hidden):
    return bs.cells.leaky(inputs, hidden, alpha=0.3)


def alone(inputs, hidden):
    """A GRU that offers its step and nothing else."""
    return bs.cells.gru(inputs, hidden)._replace(affine=None)


def ring(inputs, hidden):
    """An Elman cell, each of whose units listens to itself and to one neighbour."""
    listens = jnp.eye(hidden) + jnp.roll(jnp.eye(hidden), 1, axis=1)
    elman = bs.cells.elman(inputs, hidden)

    def recur(params, h):
        return h @ (params["W_hh"] * listens)

    affine = elman.affine._replace(recur=recur, derivative=None)
    return elman._replace(step=affine.step, affine=affine)


def stacked(inputs, hidden):
    return bs.cells.stack([bs.cells.gru(inputs, hidden), bs.cells.lstm(hidden, hidden)])


NAMES = ("mlp", "linear", "elman", "gru", "lstm", "lru", "min_gru")
CELLS = {name: getattr(bs.cells, name) for name in NAMES}
CELLS |= {"leaky": leaky, "alone": alone, "ring": ring, "stacked": stacked}
INTEGERS = ("elman", "gru")


class Example(NamedTuple):
    problem: bs.Problem
    params: dict
    earlier: bs.Batch
    batch: bs.Batch


@cache
def example(name, steps=5, hidden=H, sequences=B):
    rng = np.random.default_rng(0)
    cell = CELLS[name](D, hidden)
    problem = bs.Problem(cell, bs.readouts.linear(hidden, Q), bs.losses.cross_entropy)
    params = jax.tree.map(
        lambda p: p + 0.3 * rng.standard_normal(p.shape), problem.init(jax.random.key(0))
    )

    def batch():
        shape, whole = (steps, sequences), name in INTEGERS
        x = rng.integers(D, size=shape) if whole else rng.standard_normal((*shape, D))
        mask = rng.uniform(0.2, 1, shape) * (rng.uniform(size=shape) < 0.8)
        targets = jnp.asarray(rng.integers(Q, size=shape))
        return bs.Batch(jnp.asarray(x), targets, jnp.asarray(mask))

    return Example(problem, params, batch(), batch())


def loop(problem, params, state, batch, step=None):
    """Mean loss and last state, step by step."""
    step, total = step or problem.cell.step, 0.0
    for t in range(len(batch.mask)):
        state = step(params["cell"], state, batch.inputs[t])
        outputs = problem.readout.apply(params["readout"], problem.cell.read(state))
        total += jnp.sum(problem.loss(outputs[None], batch.targets[t][None]) * batch.mask[t])
    return total / batch.mask.sum(), state


@cache
def stream_gradient(name, step=None):
    """Of the batch's loss, through all steps since the state was fresh."""
    problem, params, earlier, batch = example(name)

    def loss(params):
        state = loop(problem, params, problem.cell.zeros(B), earlier, step)[1]
        return loop(problem, params, state, batch, step)[0]

    return jax.jit(jax.value_and_grad(loss))(params)


@cache
def call_gradient(name):
    problem, params, earlier, batch = example(name)
    state = loop(problem, params, problem.cell.zeros(B), earlier)[1]
    return jax.jit(jax.value_and_grad(lambda p: loop(problem, p, state, batch)[0]))(params)


def two_calls(strategy, ex, second=None):
    """What the second of two calls returns."""
    estimate, key = jax.jit(strategy.estimate), jax.random.key(3)
    _, state = estimate(ex.params, strategy.init(ex.params, B), ex.earlier, key)
    found, after = estimate(second or ex.params, state, ex.batch, key)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    return found


def vector(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def off(found, expected):
    """Relative to the expected gradient."""
    found, expected = vector(found), vector(expected)
    assert np.isfinite(found).all()
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def gates_in_one(stacks):
    """A GRU whose `project` and `recur` return all gates in one array, [B, 3H] or [B, 3, H]."""

    def gru(inputs, hidden):
        cell = bs.cells.gru(inputs, hidden)

        def recur(params, h):
            gates = jnp.concatenate(cell.affine.recur(params, h), axis=-1)
            return gates.reshape(len(h), 3, hidden) if stacks else gates

        def update(projected, recurred, state):
            apart = jnp.split(recurred.reshape(len(state), 3 * hidden), 3, axis=-1)
            return cell.affine.update(projected, apart, state)

        affine = bs.Affine(cell.affine.project, recur, update)
        return bs.Cell(cell.init, cell.zeros, affine.step, cell.read, affine)

    return gru


# ---- exact


@pytest.mark.parametrize("block", [None, 1, 2, 5])
@pytest.mark.parametrize("name", ["mlp", "gru", "lstm", "leaky", "alone", "stacked"])
def test_rtrl_is_the_gradient_of_the_stream(name, block):
    found = two_calls(S.rtrl(example(name).problem, block), example(name))
    loss, grads = stream_gradient(name)
    assert off(found.grads, grads) < 1e-12
    np.testing.assert_allclose(found.loss, loss, rtol=1e-13)
    if name != "mlp":  # the control: credit before the call is seen
        assert off(call_gradient(name)[1], grads) > 0.01


@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("name", ["elman", "lstm"])
def test_rtrl_that_starts_anew_is_the_gradient_of_the_call(name, block):
    strategy = S.rtrl(example(name).problem, block, carried=False)
    assert off(two_calls(strategy, example(name)).grads, call_gradient(name)[1]) < 1e-12


@pytest.mark.parametrize("name", ["elman", "gru"])
def test_after_an_update_rtrl_is_the_gradient_for_a_common_shift(name):
    ex = example(name)
    rng = np.random.default_rng(4)
    second = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape), ex.params)

    def shifted(delta):
        first, then = (jax.tree.map(jnp.add, p, delta) for p in (ex.params, second))
        state = loop(ex.problem, first, ex.problem.cell.zeros(B), ex.earlier)[1]
        return loop(ex.problem, then, state, ex.batch)[0]

    expected = jax.grad(shifted)(jax.tree.map(jnp.zeros_like, second))
    found = two_calls(S.rtrl(ex.problem), ex, second).grads
    assert off(found, expected) < 1e-12
    anew = ex._replace(params=second)
    assert off(two_calls(S.rtrl(ex.problem), anew).grads, expected) > 1e-3  # the control


@pytest.mark.slow
def test_rtrl_of_one_shared_parameter():
    cell = bs.cells.influence(1, states=4, positive=2)
    problem = bs.Problem(cell, bs.readouts.linear(4, 1), bs.losses.squared_error)
    params = problem.init(jax.random.key(0)) | {"cell": {"theta": jnp.array(0.5)}}
    batch = bs.Batch(jnp.ones((6, B, 1)), jnp.ones((6, B, 1)), jnp.ones((6, B)))
    strategy = S.rtrl(problem, block=2)
    found, _ = jax.jit(strategy.estimate)(
        params, strategy.init(params, B), batch, jax.random.key(0)
    )
    expected = jax.grad(lambda p: loop(problem, p, cell.zeros(B), batch)[0])(params)
    assert off(found.grads, expected) < 1e-12


def test_a_cell_without_parameters():
    """A fixed network whose readout is trained: nothing is carried, nothing of the cell perturbed."""
    rng = np.random.default_rng(0)
    x_to_h, h_to_h = 0.5 * rng.standard_normal((D, H)), 0.5 * rng.standard_normal((H, H))
    cell = bs.Cell(
        init=lambda key: {},
        zeros=lambda size: jnp.zeros((size, H)),
        step=lambda params, h, x: jnp.tanh(x @ x_to_h + h @ h_to_h),
        read=lambda h: h,
    )
    problem = bs.Problem(cell, bs.readouts.linear(H, 1), bs.losses.squared_error)
    params = problem.init(jax.random.key(0))
    batch = bs.Batch(jnp.ones((6, B, D)), jnp.ones((6, B, 1)), jnp.ones((6, B)))
    strategy = S.rtrl(problem, block=2)
    found, _ = strategy.estimate(params, strategy.init(params, B), batch, jax.random.key(0))
    expected = jax.grad(lambda p: loop(problem, p, cell.zeros(B), batch)[0])(params)
    assert off(found.grads["readout"], expected["readout"]) < 1e-12
    for make in (S.forward_gradient, partial(S.pes, sigma=None), partial(S.nres, sigma=None)):
        with pytest.raises(SettingError, match="`cell` must be one with parameters"):
            make(problem)
    np.testing.assert_array_equal(bs.lags.mass(bs.lags.gradients(problem, params, batch, 3)), 0)


# ---- a part of the influence


def owning(shapes, states):
    """[states · H, P]: whether the parameter belongs to the unit."""
    unit = jnp.tile(jnp.eye(H), (states, 1))
    return jnp.concatenate(
        [jnp.tile(unit, (1, p.size // H)) for p in jax.tree.leaves(shapes)], axis=1
    )


@cache
def by_dense_jacobians(name):
    """(J, I, e) of each step and sequence of both calls, and whether its loss is the second call's."""
    problem, params, earlier, batch = example(name)
    theta, structure = ravel_pytree(params["cell"])
    h, state = ravel_pytree(jax.tree.map(lambda h: h[0], problem.cell.zeros(1)))

    def step(theta, h, x):
        one = jax.tree.map(lambda a: a[None], state(h))
        return ravel_pytree(problem.cell.step(structure(theta), one, x[None]))[0]

    def loss(h, target):
        outputs = problem.readout.apply(params["readout"], problem.cell.read(state(h)))
        return problem.loss(outputs[None, None], target[None, None])[0, 0]

    both = jax.jit(lambda *a: (*jax.jacobian(step, argnums=(0, 1))(*a), step(*a)))
    sent, found = jax.jit(jax.grad(loss)), []
    for b in range(B):
        now, steps = h, []
        for counts, part in ((0, earlier), (1, batch)):
            weights = part.mask / part.mask.sum()
            for t in range(len(part.mask)):
                I, J, now = both(theta, now, part.inputs[t, b])  # noqa: E741
                steps.append((J, I, counts * weights[t, b] * sent(now, part.targets[t, b])))
        found.append(steps)
    return found


def kept_influence(name, keep_jacobian, keep_influence):
    """The cell's gradient of the second call where entries of J and of M are kept or not."""
    total = 0
    for steps in by_dense_jacobians(name):
        M = 0 * steps[0][1]
        for J, I, e in steps:  # noqa: E741
            M = keep_influence * (keep_jacobian * J @ M + I)
            total += e @ M
    return total


@pytest.mark.parametrize("block", [None, 1, 2])
@pytest.mark.parametrize("name", ["linear", "elman", "gru", "lstm", "leaky"])
def test_snap_keeps_the_entries_of_the_owning_unit(name, block):
    ex = example(name)
    states = len(jax.tree.leaves(ex.problem.cell.zeros(1)))
    mask = owning(ex.params["cell"], states)
    expected = kept_influence(name, jnp.tile(jnp.eye(H), (states, states)), 1)
    found = two_calls(S.snap(ex.problem, block=block), ex).grads["cell"]
    assert off(found, expected) < 1e-12
    assert off(kept_influence(name, 1, mask), expected) < 1e-12  # nothing else is ever filled
    assert off(kept_influence(name, 1, 1), expected) > 0.01  # the control


@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize("name", ["gru", "lstm", "leaky"])
def test_eprop_takes_no_path_through_recurrent_weights(name, block):
    ex = example(name)
    affine = ex.problem.cell.affine

    def step(params, h, x):
        recurred = affine.recur(params, jax.lax.stop_gradient(h))
        return affine.update(affine.project(params, x), recurred, h)

    found = two_calls(S.eprop(ex.problem, block), ex).grads
    assert off(found, stream_gradient(name, step)[1]) < 1e-12
    assert off(found, stream_gradient(name)[1]) > 0.01  # the control
    assert off(two_calls(S.rflo(ex.problem), ex).grads, found) < 1e-13


ONE_ARRAY = (S.snap, S.eprop, S.pp_prop, partial(S.sketched, rank=1), S.kf_rtrl)


@pytest.mark.parametrize("make", ONE_ARRAY, ids=["snap", "eprop", "pp_prop", "sketched", "kf_rtrl"])
@pytest.mark.parametrize("stacks", [False, True], ids=["in a row", "stacked"])
def test_gates_may_come_in_one_array(make, stacks):
    ex = example("gru")
    cell = gates_in_one(stacks)(D, H)
    problem = ex.problem._replace(cell=cell)
    found, expected = (two_calls(make(p), ex) for p in (problem, ex.problem))
    assert off(found.grads, expected.grads) < 1e-12


def test_gates_that_are_no_gates_times_units_are_refused():
    cell = gates_in_one(True)(D, H)
    turned = cell.affine._replace(
        recur=lambda p, h: jnp.swapaxes(cell.affine.recur(p, h), 1, 2)[..., :2],
        update=lambda x, r, h: cell.affine.update(x, r, h),
    )
    problem = example("gru").problem._replace(cell=cell._replace(affine=turned))
    with pytest.raises(SettingError, match=r"whose `recur` returns the shape \[3, 2\]"):
        S.snap(problem)


def test_eprop_of_elman_is_frozen():
    ex = example("elman")
    found = two_calls(S.eprop(ex.problem), ex).grads
    assert off(found, two_calls(S.frozen(ex.problem), ex).grads) < 1e-13


def test_a_trace_may_leak_otherwise_than_the_cell():
    """S ← (1 - leak) S + I, step by step: on leaky units with their own α it is rflo, on elman another rule."""
    own = example("leaky")  # α = 0.3
    found = two_calls(S.rflo(own.problem, leak=0.3), own).grads
    assert off(found, two_calls(S.rflo(own.problem), own).grads) < 1e-13

    ex = example("elman")
    p, mask = ex.params["cell"], ex.batch.mask
    strategy = S.rflo(ex.problem, leak=0.1)
    found, _ = jax.jit(strategy.estimate)(
        ex.params, strategy.init(ex.params, B), ex.batch, jax.random.key(0)
    )
    trace, h, total = np.zeros((B, H, H)), np.zeros((B, H)), 0
    for t, x in enumerate(ex.batch.inputs):
        before, h = h, np.asarray(ex.problem.cell.step(p, h, x))
        trace = 0.9 * trace + before[:, :, None] * (1 - h**2)[:, None]
        delta = jax.nn.softmax(ex.problem.readout.apply(ex.params["readout"], h))
        delta = delta - jax.nn.one_hot(ex.batch.targets[t], Q)
        e = (delta * mask[t][:, None] / mask.sum()) @ ex.params["readout"]["W_hq"].T
        total = total + np.einsum("bij,bj->ij", trace, e)
    assert off(found.grads["cell"]["W_hh"], total) < 1e-12
    frozen, _ = jax.jit(S.frozen(ex.problem).estimate)(
        ex.params, jnp.zeros((B, H)), ex.batch, jax.random.key(0)
    )
    assert off(frozen.grads["cell"]["W_hh"], total) > 0.1  # the control


def clipped_norm(x, r, h):
    new = x + r
    return new / jnp.maximum(1, jnp.linalg.norm(new, axis=-1, keepdims=True) / 2)


@pytest.mark.parametrize("name", ["snap", "eprop", "sketched", "kf_rtrl"])
def test_an_update_that_mixes_units_where_they_are_large_is_refused(name):
    elman, ex = bs.cells.elman(D, H), example("elman")
    affine = elman.affine._replace(update=clipped_norm, derivative=None)
    problem = ex.problem._replace(cell=elman._replace(step=affine.step, affine=affine))
    with pytest.raises(SettingError, match="update mixes units"):
        two_calls(ALL[name](problem), ex)


@pytest.mark.parametrize(
    "pruned",
    [lambda W: jnp.where(jnp.abs(W) > 1, W, 0), lambda W: jax.nn.relu(W - 0.8)],
    ids=["pruned", "thresholds"],
)
@pytest.mark.parametrize("make", [S.snap, S.eprop, S.rflo], ids=["snap", "eprop", "rflo"])
def test_weights_that_are_0_only_while_they_are_small_are_seen(make, pruned):
    """So that units that may listen to each other count as linked, and no claim is exact."""
    elman = bs.cells.elman(D, H)
    affine = elman.affine._replace(recur=lambda p, h: h @ pruned(p["W_hh"]), derivative=None)
    cell = elman._replace(step=affine.step, affine=affine)
    problem = example("elman").problem._replace(cell=cell)
    assert not make(problem).claim.exact


@pytest.mark.parametrize("name", ["snap", "eprop", "rflo_random", "sketched"])
def test_an_update_that_mixes_units_is_refused(name):
    """Their M has the entries of each unit alone; `full` takes such a cell."""
    elman = bs.cells.elman(D, H)
    affine = elman.affine._replace(
        update=lambda x, r, h: jnp.tanh(x + r + 0.9 * jnp.roll(h, 1, -1)), derivative=None
    )
    cell = elman._replace(step=affine.step, affine=affine)
    ex = example("elman")
    problem = ex.problem._replace(cell=cell)
    with pytest.raises(SettingError, match=r"update mixes units.*Use rtrl with this cell"):
        two_calls(ALL[name](problem), ex)
    assert jnp.isfinite(two_calls(S.full(problem), ex).loss)


def test_random_feedback_ignores_a_masked_target_and_takes_any_key():
    ex = example("leaky")
    problem = ex.problem._replace(loss=bs.losses.squared_error)
    targets = jnp.asarray(np.random.default_rng(0).standard_normal((*ex.batch.mask.shape, Q)))
    mask = ex.batch.mask.at[2, 1].set(0)
    strategy = S.rflo(problem, feedback="random")
    found = []
    for target in (0.0, jnp.nan):
        batch = bs.Batch(ex.batch.inputs, targets.at[2, 1].set(target), mask)
        state = strategy.init(ex.params, B)
        key = jax.random.key(0, impl="rbg")
        found.append(jax.jit(strategy.estimate)(ex.params, state, batch, key)[0])
    assert off(found[0], found[1]) == 0


def test_rflo_by_hand():
    """Murray's traces for W_hh: p ← (1 - α) p + α φ'(u) h_{t-1}."""
    ex = example("leaky")
    p, mask, alpha = ex.params["cell"], ex.batch.mask, 0.3
    strategy = S.rflo(ex.problem, feedback="random")
    start = strategy.init(ex.params, B)
    found, state = jax.jit(strategy.estimate)(ex.params, start, ex.batch, jax.random.key(0))
    draw = jax.random.wrap_key_data(state.feedback)
    back = jax.random.normal(draw, (Q, H)) / np.sqrt(H)
    trace, h, total = np.zeros((B, H, H)), np.zeros((B, H)), 0
    for t, x in enumerate(ex.batch.inputs):
        phi = np.tanh(x @ p["W_xh"] + h @ p["W_hh"] + p["b_h"])
        trace = (1 - alpha) * trace + alpha * h[:, :, None] * (1 - phi**2)[:, None]
        h = (1 - alpha) * h + alpha * phi
        outputs = ex.problem.readout.apply(ex.params["readout"], h)
        delta = jax.nn.softmax(outputs) - jax.nn.one_hot(ex.batch.targets[t], Q)
        e = (delta * mask[t][:, None] / mask.sum()) @ back
        total = total + np.einsum("bij,bj->ij", trace, e)
    assert off(found.grads["cell"]["W_hh"], total) < 1e-12
    exact = S.rflo(ex.problem)
    other, _ = jax.jit(exact.estimate)(
        ex.params, exact.init(ex.params, B), ex.batch, jax.random.key(0)
    )
    assert off(other.grads["cell"]["W_hh"], total) > 0.1  # the control
    assert off(other.grads["readout"], found.grads["readout"]) < 1e-13
    # the weights stay: over calls, and when sequences start afresh
    _, after = jax.jit(strategy.estimate)(ex.params, state, ex.batch, jax.random.key(1))
    fresh = strategy.renew(ex.params, after)
    for later in (after, fresh):
        np.testing.assert_array_equal(later.feedback, state.feedback)
    assert not vector(fresh.carried).any()


@pytest.mark.parametrize(("rank", "like"), [(0, S.snap), (H, S.rtrl)])
@pytest.mark.parametrize("name", ["elman", "gru"])
def test_sketched_lies_between_snap_and_rtrl(name, rank, like):
    ex = example(name)
    expected = two_calls(like(ex.problem), ex).grads
    assert off(two_calls(S.sketched(ex.problem, rank), ex).grads, expected) < 1e-12


def test_sketched_of_rank_one():
    ex = example("elman")
    exact = two_calls(S.rtrl(ex.problem), ex).grads
    errors = [off(two_calls(S.sketched(ex.problem, r), ex).grads, exact) for r in range(H + 1)]
    assert errors[0] > errors[1] > 1e-3 > 1e-12 > errors[H]


def test_pp_prop_by_hand():
    ex = example("leaky")
    p, decay = ex.params["cell"], 0.8
    strategy = S.pp_prop(ex.problem, decay)
    found, _ = jax.jit(strategy.estimate)(
        ex.params, strategy.init(ex.params, B), ex.batch, jax.random.key(0)
    )
    x_trace, (h_trace, f, h) = np.zeros((B, D)), np.zeros((3, B, H))
    total, inputs = 0, 0
    for t, x in enumerate(ex.batch.inputs):
        phi = np.tanh(x @ p["W_xh"] + h @ p["W_hh"] + p["b_h"])
        slope = 0.3 * (1 - phi**2)
        x_trace, h_trace = decay * x_trace + x, decay * h_trace + h
        f = decay * (0.7 + slope * np.diag(p["W_hh"])) * f + (1 - decay) * slope
        h = 0.7 * h + 0.3 * phi
        outputs = ex.problem.readout.apply(ex.params["readout"], h)
        delta = jax.nn.softmax(outputs) - jax.nn.one_hot(ex.batch.targets[t], Q)
        weight = ex.batch.mask[t][:, None] / ex.batch.mask.sum()
        e = (delta * weight) @ ex.params["readout"]["W_hq"].T * f
        total, inputs = total + h_trace.T @ e, inputs + x_trace.T @ e
    assert off(found.grads["cell"]["W_hh"], total) < 1e-12
    assert off(found.grads["cell"]["W_xh"], inputs) < 1e-12


def traces_by_dense_jacobians(ex, decay, b):
    """The gradient that sequence b's losses send through two traces, [F, K]; they go through both batches."""
    cell, p, total = ex.problem.cell, ex.params["cell"], 0.0
    h, state = ravel_pytree(cell.zeros(1))
    same_unit = np.arange(len(h))[:, None] % H == np.arange(len(h)) % H
    x_traces, f_traces = [0.0, 0.0], np.zeros((2, len(h), len(p["b_h"])))

    def step(h, x):
        return ravel_pytree(cell.step(p, state(h), x))[0]

    def loss(h, target):
        outputs = ex.problem.readout.apply(ex.params["readout"], cell.read(state(h)))
        return ex.problem.loss(outputs[None], target.reshape(1, 1))[0, 0]

    def gates(p, h, x):
        return cell.affine.project(p, x), cell.affine.recur(p, state(h))

    for part, weights in ((ex.earlier, 0 * ex.batch.mask), (ex.batch, ex.batch.mask)):
        for x, target, weight in zip(
            part.inputs[:, b], part.targets[:, b], weights[:, b], strict=True
        ):
            at, own = (h, x[None]), jax.jacobian(step)(h, x[None]) * same_unit
            slopes = jax.jacobian(lambda g, h=h: ravel_pytree(cell.affine.update(*g, state(h)))[0])(
                gates(p, *at)
            )
            for k in range(2):
                rows = jax.grad(lambda p, k=k, at=at: ravel_pytree(gates(p, *at)[k])[0][0])(p)
                x_traces[k] = decay * x_traces[k] + vector(jax.tree.map(lambda g: g[..., 0], rows))
                D = np.concatenate(
                    [d.reshape(len(h), -1) for d in jax.tree.leaves(slopes[k])], axis=1
                )
                f_traces[k] = decay * own @ f_traces[k] + (1 - decay) * D
            h = step(*at)
            e = weight * jax.grad(loss)(h, target)
            total += sum(np.outer(u, e @ f) for u, f in zip(x_traces, f_traces, strict=True))
    return total / ex.batch.mask.sum()


@pytest.mark.parametrize("name", ["elman", "gru", "lstm"])
def test_pp_prop_is_two_traces(name):
    ex = example(name)
    found = two_calls(S.pp_prop(ex.problem, 0.8), ex).grads["cell"]
    right, wrong = (
        in_shape(sum(traces_by_dense_jacobians(ex, decay, b) for b in range(B)), ex.params["cell"])
        for decay in (0.8, 0.7)
    )
    assert off(found, right) < 1e-12
    assert off(found, wrong) > 1e-3


@pytest.mark.parametrize("decay", [0.0, 0.8])
@pytest.mark.parametrize("name", ["elman", "leaky", "gru", "lstm", "min_gru"])
def test_all_steps_of_pp_prop_at_once(name, decay):
    """Against a past that each step rolls and sends, with segments that leave a rest."""
    ex = example(name)
    past = traces(ex.problem.cell, "pp_prop", decay)
    ways = [
        carried.strategy(ex.problem, p, bs.Claim(), 3, True)
        for p in (past, past._replace(all_steps=None))
    ]
    found, expected = (two_calls(way, ex).grads for way in ways)
    assert off(found, expected) < 1e-12
    assert off(two_calls(S.pp_prop(ex.problem, decay), ex).grads, expected) < 1e-12


@pytest.mark.parametrize(("kind", "most"), [("float16", 0.01), ("bfloat16", 0.03)])
def test_long_traces_in_short_floats(kind, most):
    """In bfloat16 α = 0.999 is 1."""
    ex = example("elman", steps=3200)
    strategy = S.pp_prop(ex.problem, decay=0.999)
    batch = ex.batch._replace(mask=jnp.ones(ex.batch.mask.shape))

    def found(kind):
        params, state = jax.tree.map(
            lambda a: a.astype(kind), (ex.params, strategy.init(ex.params, B))
        )
        estimate, _ = jax.jit(strategy.estimate)(params, state, batch, jax.random.key(0))
        return jax.tree.map(lambda g: g.astype(float), estimate.grads["cell"])

    assert off(found(kind), found("float32")) < most


# ---- sparse recurrent weights


@pytest.mark.slow
def test_snap_of_more_steps_on_a_ring():
    ex = example("ring", hidden=4)
    exact = two_calls(S.rtrl(ex.problem), ex).grads
    P = sum(p.size for p in jax.tree.leaves(ex.params["cell"]))
    strategies = [S.snap(ex.problem, n) for n in (1, 2, 3)]
    assert [s.claim.numbers for s in strategies] == [P, 2 * P, 3 * P]
    errors = [off(two_calls(s, ex).grads, exact) for s in strategies]
    assert errors[0] > errors[1] > errors[2] > 1e-9
    with pytest.raises(SettingError, match=r"snap\(4\) keeps all of M here and is RTRL; use rtrl"):
        S.snap(ex.problem, 4)


def test_snap_of_two_steps_by_dense_jacobians():
    name = "ring"
    ex = example(name)
    mask = jnp.asarray(masked_influence.pattern(ex.problem.cell, 2))
    if mask.all():
        pytest.skip("all units of a ring of three reach each other")
    expected = kept_influence(name, 1, mask)
    assert off(two_calls(S.snap(ex.problem, 2), ex).grads["cell"], expected) < 1e-12


def test_snap_of_two_steps_on_a_dense_cell_is_rtrl():
    assert masked_influence.pattern(example("gru").problem.cell, 2).all()
    with pytest.raises(SettingError, match=r"snap\(2\) keeps all of M here and is RTRL; use rtrl"):
        S.snap(example("gru").problem, 2)


# ---- the protocol


ALL = {
    "rtrl": S.rtrl,
    "rtrl_call": lambda p: S.rtrl(p, carried=False),
    "snap": S.snap,
    "eprop": S.eprop,
    "rflo_random": lambda p: S.rflo(p, feedback="random"),
    "uoro": S.uoro,
    "uoro_block": lambda p: S.uoro(p, block=2, draws=2),
    "uoro_shared": lambda p: S.uoro(p, shared=True),
    "kf_rtrl": S.kf_rtrl,
    "reverse_kf": S.reverse_kf,
    "ok": lambda p: S.ok(p, rank=2),
    "sketched": lambda p: S.sketched(p, rank=1),
    "pp_prop": S.pp_prop,
}


@pytest.mark.parametrize("name", ["mlp", "elman", "gru", "lstm", "leaky"])
@pytest.mark.parametrize("strategy", ALL)
def test_the_claim_counts_what_the_state_keeps(strategy, name):
    ex = example(name)
    made = ALL[strategy](ex.problem)
    kept = jax.eval_shape(lambda: made.init(ex.params, 1))
    hidden = jax.eval_shape(lambda: ex.problem.cell.zeros(1))
    floats = [sum(a.size for a in jax.tree.leaves(t) if a.dtype == float) for t in (kept, hidden)]
    assert floats[0] - floats[1] == made.claim.numbers
    after = jax.eval_shape(
        made.estimate, ex.params, made.init(ex.params, B), ex.batch, jax.random.key(0)
    )
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after[1]) == jax.tree.map(
        lambda a: (a.shape, a.dtype), made.init(ex.params, B)
    )
    assert after[0].metrics == {}  # ‖λ_t‖ as a block sees it would mean nothing beside others'


def test_numbers_of_the_papers():
    cell = bs.cells.elman(28, 64)
    problem = bs.Problem(cell, bs.readouts.linear(64, 28), bs.losses.cross_entropy)
    numbers = {name: make(problem).claim.numbers for name, make in ALL.items()}
    P, n, F = 5952, 64, 93
    assert numbers["rtrl"] == n * P == 380_928
    assert numbers["snap"] == numbers["eprop"] == P
    assert numbers["uoro"] == n + P == 6_016
    assert numbers["kf_rtrl"] == 2 * (F + n * 64) == 8_378
    assert numbers["ok"] == 2 * numbers["kf_rtrl"]
    assert numbers["sketched"] == P + n + P
    assert numbers["rtrl_call"] == 0


@pytest.mark.parametrize("name", ["rtrl", "snap", "eprop", "sketched", "pp_prop"])
def test_one_long_call_is_two_short_ones(name):
    ex = example("gru")
    strategy = ALL[name](ex.problem)
    assert strategy.claim.online
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ex.earlier, ex.batch)
    key, state = jax.random.key(0), strategy.init(ex.params, B)
    long, last = jax.jit(strategy.estimate)(ex.params, state, both, key)
    total = 0
    for part in (ex.earlier, ex.batch):
        found, state = jax.jit(strategy.estimate)(ex.params, state, part, key)
        total += vector(found.grads) * part.mask.sum()
    assert off(total / both.mask.sum(), long.grads) < 1e-12
    assert off(state, last) < 1e-12


@pytest.mark.parametrize(
    ("name", "snap", "eprop"),
    [("mlp", 1, 1), ("gru", 0, 0), ("leaky", 0, 0), ("lru", 1, 0), ("min_gru", 1, 1)],
)
def test_the_claim_is_exact_where_no_unit_reaches_another(name, snap, eprop):
    ex = example(name)
    expected = stream_gradient(name)[1]
    for make, exact in ((S.snap, snap), (S.eprop, eprop)):
        strategy = make(ex.problem)
        assert strategy.claim.exact == strategy.claim.unbiased == bool(exact)
        assert (off(two_calls(strategy, ex).grads, expected) < 1e-12) == bool(exact)


def test_parameters_that_overflow_show_no_link():
    """Of 64 units, some have random phases whose exponentials are infinite; infinity times 0 is nan."""
    cell = bs.cells.lru(2, 64)
    assert S.snap(bs.Problem(cell, bs.readouts.linear(64, 2), bs.losses.squared_error)).claim.exact


@pytest.mark.parametrize("exact", [True, False])
def test_parameters_outside_of_a_domain_hide_no_link(exact):
    """A root of random numbers is nan; then the parameters that `init` makes show the links."""
    like = bs.cells.elman(2, 40)
    weights = lambda p: p["W_hh"] * (jnp.eye(40) if exact else 1)  # noqa: E731
    form = bs.Affine(
        lambda p, x: x @ p["W_xh"],
        lambda p, h: jnp.sqrt(p["b_h"].min()) * (h @ weights(p)),
        lambda x, r, h: jnp.tanh(x + r),
    )
    init = lambda key: like.init(key) | {"b_h": jnp.ones(40)}  # noqa: E731
    cell = like._replace(init=init, step=form.step, affine=form)
    problem = bs.Problem(cell, bs.readouts.linear(40, 2), bs.losses.squared_error)
    assert S.snap(problem).claim.exact == exact
    assert not S.eprop(problem).claim.exact


def test_snap_of_an_lru_keeps_few_numbers():
    ex = example("lru")
    P = sum(p.size for p in jax.tree.leaves(ex.params["cell"]))
    assert S.snap(ex.problem).claim.numbers == 2 * P < S.rtrl(ex.problem).claim.numbers == 6 * P


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: S.rtrl(p, block=0), "block"),
        (lambda p: S.rtrl(p, carried=1), "carried"),
        (lambda p: S.snap(p, n=0), "n"),
        (lambda p: S.snap(p, block=1.5), "block"),
        (lambda p: S.eprop(p, block=-1), "block"),
        (lambda p: S.rflo(p, feedback="fixed"), "feedback"),
        (lambda p: S.rflo(p, leak=1.5), "leak"),
        (lambda p: S.rflo(p, leak=-0.1), "leak"),
        (lambda p: S.uoro(p, block=0), "block"),
        (lambda p: S.uoro(p, draws=0), "draws"),
        (lambda p: S.uoro(p, shared=2), "shared"),
        (lambda p: S.ok(p, rank=0), "rank"),
        (lambda p: S.sketched(p, rank=-1), "rank"),
        (lambda p: S.sketched(p, rank=4), "rank"),
        (lambda p: S.pp_prop(p, decay=1.0), "decay"),
        (lambda p: S.pp_prop(p, decay=-0.1), "decay"),
        (lambda p: bs.cells.leaky(3, 3, alpha=0), "alpha"),
        (lambda p: bs.cells.leaky(3, 3, alpha=1.1), "alpha"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(SettingError) as error:
        make(example("elman").problem)
    assert error.value.name == message
    assert "\n" not in str(error.value)


UNITS = ["snap", "eprop", "rflo_random", "sketched"]
PRODUCTS = ["kf_rtrl", "reverse_kf", "ok", "pp_prop"]


@pytest.mark.parametrize("name", UNITS + PRODUCTS)
def test_cells_without_units_are_refused(name):
    influence = bs.cells.influence(1, states=4, positive=2)
    for cell in (influence, alone(D, H), stacked(D, H)):
        problem = bs.Problem(cell, bs.readouts.linear(4, 1), bs.losses.squared_error)
        with pytest.raises(
            SettingError, match=r"affine form whose parameters end in gates × units"
        ) as error:
            ALL[name](problem)
        assert f"Use {'rtrl' if name in UNITS else 'uoro'}" in str(error.value)
        assert "\n" not in str(error.value)


def test_units_that_share_parameters_are_refused():
    """A product that mixes units behind each parameter: shapes do not tell."""
    elman = bs.cells.elman(D, H)
    mix = jnp.ones((H, H)) + jnp.eye(H)
    affine = elman.affine._replace(
        project=lambda params, x: elman.affine.project(params, x) @ mix, derivative=None
    )
    problem = example("leaky").problem._replace(
        cell=elman._replace(step=affine.step, affine=affine)
    )
    ex = example("leaky")
    for name in ("snap", "kf_rtrl"):
        strategy = ALL[name](problem)
        with pytest.raises(SettingError, match="units share parameters"):
            jax.jit(strategy.estimate)(
                ex.params, strategy.init(ex.params, B), ex.batch, jax.random.key(0)
            )


def without_inputs(inputs, hidden):
    """An affine cell whose `project` returns nothing, as min_gru's `recur` does."""

    def recur(params, h):
        return h @ params["W"] + params["b"]

    affine = bs.Affine(lambda params, x: (), recur, lambda x, r, h: jnp.tanh(r))
    init = lambda key: {"W": jax.random.normal(key, (hidden, hidden)), "b": jnp.ones(hidden)}  # noqa: E731
    zeros = lambda size: jnp.zeros((size, hidden))  # noqa: E731
    return bs.Cell(init, zeros, affine.step, lambda h: h, affine)


@pytest.mark.parametrize("name", ["full", "rtrl", "eprop"])
def test_a_cell_without_inputs(name):
    cell, ex = without_inputs(D, H), example("elman")
    estimates = []
    for own in (cell, cell._replace(affine=None)):
        problem = ex.problem._replace(cell=own)
        make = S.frozen if name == "eprop" and own is not cell else getattr(S, name)
        strategy, params = make(problem), problem.init(jax.random.key(0))
        estimates.append(
            strategy.estimate(params, strategy.init(params, B), ex.batch, jax.random.key(0))[0]
        )
    assert off(estimates[0].grads, estimates[1].grads) < 1e-14


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_need_inputs(name):
    ex = example("elman")
    problem = ex.problem._replace(cell=without_inputs(D, H))
    strategy, params = ALL[name](problem), problem.init(jax.random.key(0))
    with pytest.raises(SettingError, match="one whose `project` returns nothing"):
        strategy.estimate(params, strategy.init(params, B), ex.batch, jax.random.key(0))


def test_parameters_that_are_no_matrices_are_refused():
    """Gain of each unit: no features ⊗ gates."""
    elman = bs.cells.elman(D, H)

    def init(key):
        return elman.init(key) | {"gain": jnp.ones(H)}

    def recur(params, h):
        return elman.affine.recur(params, h) * params["gain"]

    affine = elman.affine._replace(recur=recur, derivative=None)
    cell = elman._replace(init=init, step=affine.step, affine=affine)
    problem = example("leaky").problem._replace(cell=cell)
    ex, params = example("leaky"), problem.init(jax.random.key(0))
    strategy = S.kf_rtrl(problem)
    with pytest.raises(SettingError, match=r"features × \(gates × units\).*Use uoro"):
        jax.jit(strategy.estimate)(params, strategy.init(params, B), ex.batch, jax.random.key(0))
    exact = S.rtrl(problem)
    found, _ = jax.jit(exact.estimate)(params, exact.init(params, B), ex.batch, jax.random.key(0))
    expected = jax.grad(lambda p: loop(problem, p, cell.zeros(B), ex.batch)[0])(params)
    assert off(found.grads, expected) < 1e-12


@pytest.mark.parametrize("name", ["rtrl", "snap", "uoro", "uoro_block", "kf_rtrl"])
def test_memory_does_not_grow_with_time(name):
    ex = example("leaky")
    strategy = ALL[name](ex.problem)

    def held(steps):
        def trained(*arguments):
            estimate, state = jax.jit(strategy.estimate)(*arguments)
            return estimate.loss, estimate.grads, state

        batch = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((steps, *a.shape[1:]), a.dtype), ex.batch
        )
        start = strategy.init(ex.params, B)
        return bs.measure.temporary_bytes(trained, ex.params, start, batch, jax.random.key(0))

    assert held(4096) == held(1024)
