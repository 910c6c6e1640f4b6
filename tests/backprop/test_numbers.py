"""Ids that do not exist, targets that are not numbers, short floats, NumPy's arrays: right, or one line."""

import math
from collections import OrderedDict
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import STRATEGY_FILES, configured

import bptt_study as bs
from bptt_study.backprop.forward import count_tokens, evaluate, token_count
from bptt_study.backprop.schedules import revolve
from bptt_study.instruments import measure
from bptt_study.testing import errors, examples
from bptt_study.validation import SettingError

T, B, H, Q = 6, 2, 4, 4
CELL = bs.cells.elman(Q, H)
PROBLEM = bs.Problem(CELL, bs.readouts.linear(H, Q), bs.losses.cross_entropy)
PARAMS = PROBLEM.init(jax.random.key(0))
IDS = jnp.arange(T * B).reshape(T, B) % Q
BATCH = bs.Batch(IDS, IDS[::-1], jnp.ones((T, B)))
KEY = jax.random.key(1)
LAW = bs.strategies.constant(2.0)
STRATEGIES = {
    "full": bs.strategies.full,
    "chunks": lambda p: bs.strategies.fixed(p, 2),
    "sliding": lambda p: bs.strategies.fixed(p, 3, 1),
    "randomized": lambda p: bs.strategies.randomized(p, LAW),
    "draws": lambda p: bs.strategies.randomized(p, LAW, draws=2),
    "discounted": lambda p: bs.strategies.discounted(p, 3.0),
    "checkpointed": lambda p: bs.strategies.checkpointed(p, 2),
    "telescope": lambda p: bs.strategies.telescope(p, law=LAW),
    "forward_gradient": bs.strategies.forward_gradient,
    "full_es": lambda p: bs.strategies.full_es(p, 0.1),
    "pes": lambda p: bs.strategies.pes(p, hold=2),
    "nres": lambda p: bs.strategies.nres(p, None),
    "rtrl": lambda p: bs.strategies.rtrl(p, 2),
    "uoro": bs.strategies.uoro,
    "rflo": bs.strategies.rflo,
    "rflo_random": lambda p: bs.strategies.rflo(p, "random"),
}
STRATEGIES |= {f.stem: configured(f) for f in STRATEGY_FILES if f.stem not in STRATEGIES}
SHORT = [(name, "float16") for name in STRATEGIES]
SHORT += [
    (name, kind)
    for name in ("full", "pes", "rtrl", "pp_prop", "ok", "sketched")
    for kind in ("bfloat16", "float32")
]


def call(name, params=PARAMS, batch=BATCH, key=None, state=None, problem=PROBLEM):
    strategy = STRATEGIES[name](problem)
    state = strategy.init(params, B) if state is None else state
    return strategy.estimate(params, state, batch, jax.random.key(1) if key is None else key)


def of_type(kind, tree):
    return jax.tree.map(lambda a: a.astype(kind) if a.dtype == float else a, tree)


def turning(real_parameters=True):
    """The linear recurrent unit of the paper: a complex state, h ← exp(-exp ν + iθ) h + B x."""

    def step(params, h, x):
        return jnp.exp(-jnp.exp(params["nu"]) + 1j * params["theta"]) * h + params["B"][x]

    def init(key):
        numbers = jax.random.normal(key, (Q + 2, H)) * (1 if real_parameters else 1 + 1j)
        return {"nu": numbers[0].real, "theta": numbers[1].real, "B": numbers[2:]}

    zeros = lambda size: jnp.zeros((size, H), complex)  # noqa: E731
    return bs.Cell(init, zeros, step, lambda h: h.real + h.imag)


REAL = {"rtrl", "uoro", "snap", "eprop", "rflo", "rflo_random", "kf_rtrl", "reverse_kf", "ok"}
REAL |= {"sketched", "pp_prop", "forward_gradient", "full_es", "truncated_es", "pes", "nres"}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("real_parameters", [True, False])
def test_complex_states_and_parameters(name, real_parameters):
    """An estimator that sends 1 for each unit sends nothing for its imaginary part: it refuses the cell."""
    problem = PROBLEM._replace(cell=turning(real_parameters))
    if name in REAL:
        with pytest.raises(SettingError, match=r"cell` must be one .*(real|affine form)"):
            STRATEGIES[name](problem)
        return
    strategy = STRATEGIES[name](problem)
    if strategy.claim.exact:
        params = problem.init(jax.random.key(2))
        found, _ = call(name, params, problem=problem)
        oracle = jax.grad(lambda p: loop_loss(problem, p))(params)
        errors.close(found.grads, oracle, 1e-12)
        with nullcontext() if real_parameters else pytest.raises(errors.CheckError):  # the control
            errors.close(jax.tree.map(lambda a: a.real, found.grads), oracle, 1e-12)


def loop_loss(problem, params):
    h, total = problem.cell.zeros(B), 0.0
    for x, y, m in zip(BATCH.inputs, BATCH.targets, BATCH.mask, strict=True):
        h = problem.cell.step(params["cell"], h, x)
        outputs = problem.readout.apply(params["readout"], problem.cell.read(h))
        total += (problem.loss(outputs[None], y[None])[0] * m).sum()
    return total / BATCH.mask.sum()


WITHIN_JIT = ["full", "sliding", "randomized", "telescope", "rtrl", "uoro", "pes"]


def with_number(name, number, batch=BATCH):
    return batch._replace(**{name: getattr(batch, name).at[2, 1].set(number)})


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHIN_JIT)
def test_within_jit_loss_and_gradient_are_both_nan_or_both_as_if_masked(name):
    """For ids that do not exist and wrong weights; a masked token's target may be any."""
    estimate = jax.jit(lambda batch: call(name, batch=batch)[0])
    wrong = [(field, id) for field in ("inputs", "targets") for id in (-1, Q)]
    wrong += [("mask", weight) for weight in (-1, jnp.nan, jnp.inf)]
    for field, number in wrong:
        found = estimate(with_number(field, number))
        for leaf in jax.tree.leaves((found.loss, found.grads)):
            assert np.isnan(leaf).any(), (field, number)
    masked = with_number("mask", 0)
    clean, odd = estimate(masked), estimate(with_number("targets", -1, masked))
    jax.tree.map(np.testing.assert_array_equal, odd, clean)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((clean.loss, clean.grads)))


@pytest.mark.parametrize("field", ["inputs", "targets", "mask"])
def test_the_search_for_nan_names_the_array_within_jit(field):
    """As docs/own_code.md says: JAX calls the function without jit, where the check sees the number."""
    estimate = jax.jit(lambda batch: call("full", batch=batch)[0].loss)
    with jax.debug_nans(True):
        assert np.isfinite(estimate(BATCH))
        with pytest.raises(SettingError, match=rf"`batch\.{field}` .* got (the id|a weight of) -1"):
            estimate(with_number(field, -1))


@pytest.mark.parametrize("name", ["inputs", "targets"])
@pytest.mark.parametrize("wrong", [-1, Q])
def test_ids_that_do_not_exist(name, wrong):
    batch = with_number(name, wrong)
    for strategy in ("full", "pes", "telescope"):
        with pytest.raises(SettingError, match=rf"batch\.{name}.* got the id {wrong}\."):
            call(strategy, batch=batch)


def three(batch):
    return jax.tree.map(lambda a: jnp.stack([a] * 3), batch)


INSTRUMENTS = {
    "gradients": lambda s, batch, problem: bs.lags.gradients(problem, PARAMS, batch, T),
    "variance": lambda s, batch, problem: bs.lags.variance(
        s, bs.lags.flows(problem, PARAMS, batch)
    ),
    "exact_quality": lambda s, batch, problem: measure.exact_quality(s, problem, PARAMS, batch),
    "quality": lambda s, batch, problem: measure.quality(s, problem, PARAMS, batch, KEY, 3),
    "gradient_norms": lambda s, batch, problem: measure.gradient_norms(s, PARAMS, batch, KEY, 2),
    "over_batches": lambda s, batch, problem: measure.over_batches(
        s, problem, PARAMS, three(batch), KEY
    ),
}


@pytest.mark.parametrize("run", INSTRUMENTS)
@pytest.mark.parametrize("name", ["inputs", "targets", "mask"])
def test_instruments_refuse_ids_and_weights_that_do_not_exist(run, name):
    batch, strategy = with_number(name, -1), STRATEGIES["randomized"](PROBLEM)
    with pytest.raises(SettingError, match=rf"`batch\.{name}` .* got (the id|a weight of) -1"):
        INSTRUMENTS[run](strategy, batch, PROBLEM)


@pytest.mark.slow
def test_a_class_of_a_masked_token_may_be_any():
    batch = BATCH._replace(mask=BATCH.mask.at[2, 1].set(0))
    same = batch._replace(targets=batch.targets.at[2, 1].set(-100))
    for name in ("full", "pes"):
        a, b = (call(name, batch=each)[0] for each in (batch, same))
        jax.tree.map(np.testing.assert_array_equal, (a.loss, a.grads), (b.loss, b.grads))


@pytest.mark.parametrize("name", ["full", "sliding", "checkpointed", "telescope", "pes", "rtrl"])
def test_masked_targets_that_are_not_numbers(name):
    problem = PROBLEM._replace(loss=bs.losses.squared_error)
    targets = jnp.ones((T, B, Q))
    batch = BATCH._replace(targets=targets, mask=BATCH.mask.at[2, 1].set(0))
    unknown = batch._replace(targets=targets.at[2, 1].set(jnp.nan))
    a, b = (call(name, batch=each, problem=problem)[0] for each in (batch, unknown))
    jax.tree.map(np.testing.assert_array_equal, (a.loss, a.grads), (b.loss, b.grads))
    scores = [evaluate(problem, PARAMS, each)["validation_loss"] for each in (batch, unknown)]
    assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.parametrize("run", INSTRUMENTS)
@pytest.mark.parametrize(
    ("loss", "targets", "odd"),
    [
        (bs.losses.squared_error, jnp.ones((T, B, Q)), jnp.nan),
        (bs.losses.cross_entropy, IDS, Q),
    ],
)
def test_masked_targets_of_instruments_may_be_anything(run, loss, targets, odd):
    """The numbers are those of clean targets, and finite; control: unmasked, another target shows."""
    problem = PROBLEM._replace(loss=loss)
    strategy = STRATEGIES["randomized"](problem)
    batch = with_number("mask", 0, BATCH._replace(targets=targets))
    clean, found, other = (
        INSTRUMENTS[run](strategy, each, problem)
        for each in (
            batch,
            with_number("targets", odd, batch),
            batch._replace(targets=targets.at[-1, 0].add(1)),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, found, clean)
    leaves = jax.tree.leaves(clean)
    assert all(np.isfinite(leaf).all() for leaf in leaves)
    assert any(
        (a != b).any() for a, b in zip(map(np.asarray, jax.tree.leaves(other)), leaves, strict=True)
    )


@pytest.mark.parametrize(("name", "kind"), SHORT)
def test_parameters_of_another_type(name, kind):
    """The state has to be of that type, too; the loss is then a float32, the gradient like the parameters."""
    params = of_type(kind, PARAMS)
    with pytest.raises(SettingError, match=rf"`state.*` must be of the parameters' type, {kind}"):
        jax.eval_shape(lambda: call(name, params, state=STRATEGIES[name](PROBLEM).init(PARAMS, B)))
    state = of_type(kind, STRATEGIES[name](PROBLEM).init(params, B))
    found, after = jax.eval_shape(lambda: call(name, params, state=state))
    assert found.loss.dtype == "float32"
    assert {a.dtype.name for a in jax.tree.leaves(found.grads)} == {kind}
    shapes = lambda tree: [(a.shape, a.dtype) for a in jax.tree.leaves(tree)]  # noqa: E731
    assert shapes(after) == shapes(state)


@pytest.mark.parametrize(  # others draw, or turn, by the cell's precision
    ("name", "tolerance"), [("uoro", 1e-5), ("rtrl", 1e-5), ("rflo_random", 10), ("ok", 10)]
)
def test_a_short_cell_below_a_long_readout(name, tolerance):
    params = PARAMS | {"cell": of_type("float32", PARAMS["cell"])}
    problem = PROBLEM._replace(
        cell=CELL._replace(zeros=lambda size: jnp.zeros((size, H), "float32"))
    )
    state = STRATEGIES[name](problem).init(params, B)
    found, after = call(name, params, problem=problem)
    kinds = lambda tree: [a.dtype for a in jax.tree.leaves(tree)]  # noqa: E731
    assert kinds((found.grads, after)) == kinds((params, state))
    long = call(name)[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 0, tolerance), found.grads, long.grads
    )


OF_EACH_KIND = [
    "full",
    "sliding",
    "randomized",
    "telescope",
    "rtrl",
    "uoro",
    "kf_rtrl",
    "pes",
    "full_es",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", [*OF_EACH_KIND, "forward_gradient"])
def test_a_short_gradient_is_the_long_one(name, kind):
    """Within 1 ε of the loss, and 4 ε of the largest number, of float32; draws are the same."""

    def found(kind):
        params = of_type(kind, PARAMS)
        state = of_type(kind, STRATEGIES[name](PROBLEM).init(params, B))
        made = jax.jit(lambda params, state: call(name, params, state=state)[0])(params, state)
        return float(made.loss), errors.vector(jax.tree.map(lambda g: g.astype(float), made.grads))

    (loss, grads), (long_loss, long_grads) = found(kind), found("float32")
    epsilon = float(jnp.finfo(kind).eps)
    np.testing.assert_allclose(loss, long_loss, rtol=epsilon)
    np.testing.assert_allclose(grads, long_grads, 0, 4 * epsilon * np.abs(long_grads).max())


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "bool", "int8", "float32"])
def test_tokens_are_counted_beyond_the_largest_short_float(kind):
    mask = jnp.ones((1024, 65), kind)
    assert count_tokens(mask) == 1024 * 65
    batch = bs.Batch(mask, mask, mask)
    assert token_count(of_type("float16", PARAMS), batch) == 1024 * 65


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_a_mean_over_more_tokens_than_the_largest_short_float(kind):
    """Loss and gradient of 66,560 tokens, parameters and mask of 16 bits, against float64.

    An adjoint is a multiple of the least number of its type. That of float16 is so coarse that it shows in sums
    over so many tokens of the mean loss, at each step and once more over time: docs/own_code.md says so.
    """
    ids = jax.random.randint(jax.random.key(2), (64, 1040), 0, Q)

    def found(kind):
        params, state = of_type(kind, (PARAMS, CELL.zeros(1040)))
        batch = bs.Batch(ids, ids[::-1], jnp.ones(ids.shape, kind))
        made, _ = jax.jit(bs.strategies.full(PROBLEM).estimate)(params, state, batch, None)
        return float(made.loss), errors.vector(jax.tree.map(lambda g: g.astype(float), made.grads))

    (loss, grads), (long_loss, long_grads) = found(kind), found(float)
    epsilon, least = float(jnp.finfo(kind).eps), float(jnp.finfo(kind).smallest_subnormal)
    np.testing.assert_allclose(loss, long_loss, rtol=epsilon)
    allowed = 4 * epsilon * np.abs(long_grads).max() + 2 * ids.size * least
    np.testing.assert_allclose(grads, long_grads, 0, allowed)


@pytest.mark.parametrize(("window", "stride"), [(1999, None), (2000, None), (2000, 1), (5000, 7)])
@pytest.mark.parametrize("init", [jnp.bfloat16, float])
def test_a_window_adds_up_in_float32_however_long_it_is(window, stride, init):
    """One that held the sequence had the gradient of `lax.scan`: 256 for the sum of 2,000 ones."""
    ones = jnp.ones(2000, jnp.bfloat16)

    def total(w):
        f = lambda h, x: (0 * h, w * x)  # noqa: E731
        return bs.scan(f, jnp.zeros((), init), ones, window, stride)[1].astype(float).sum()

    one = jnp.ones((), jnp.bfloat16)
    assert jax.grad(total)(one) == 2000
    assert jax.jit(jax.grad(total))(one) == 2000
    assert total(one) == 2000


@pytest.mark.parametrize("name", STRATEGIES)
def test_arrays_of_numpy_and_keys_of_old(name):
    """Parameters as they are loaded from a file, and a key of two words."""
    numbers = jax.tree.map(np.asarray, (PARAMS, BATCH))
    key = jax.random.PRNGKey(1)
    jax.eval_shape(lambda: call(name, *numbers, key=key))
    other = OrderedDict(PARAMS)
    with pytest.raises(SettingError, match=r"`params` must be a dict .* got a OrderedDict"):
        jax.eval_shape(lambda: call(name, other))


OTHER_CELLS = {
    "leaky": bs.cells.leaky,
    "lru": bs.cells.lru,
    "min_gru": bs.cells.min_gru,
    "stack": lambda d, h: bs.cells.stack([bs.cells.gru(d, h), bs.cells.mlp(h, h)]),
    "influence": lambda d, h: bs.cells.influence(1, h, 1, theta=0.1),
}


@pytest.mark.slow
@pytest.mark.parametrize("cell", [*examples.CELLS, *OTHER_CELLS])
def test_without_jit(cell):
    problem = PROBLEM._replace(cell=(OTHER_CELLS | examples.CELLS)[cell](Q, H))
    params = problem.init(jax.random.key(0))
    small = jax.tree.map(lambda a: a[:3], BATCH)
    if cell == "influence":  # it takes a number, not a symbol
        small = small._replace(inputs=jnp.ones((3, B, 1)))
    with jax.disable_jit():
        found = [call(name, params, small, problem=problem)[0].loss for name in ("full", "sliding")]
    assert np.isfinite(found).all() and found[0] == found[1]
    compiled = jax.jit(lambda: call("full", params, small, problem=problem)[0].loss)()
    np.testing.assert_allclose(found[0], compiled, rtol=1e-12)


def test_recomputation_takes_three_steps_for_one_at_most():
    """`checkpointed` with 2√T states; its docstring says so. Twice does not hold: T may be a prime."""
    cost = {}
    for steps in range(1, 1200):
        length, places = revolve.layout(steps, 2 * max(1, math.isqrt(steps)))
        cost[steps] = length * revolve.forward_steps(steps // length, places) / steps
    assert 2.9 < max(cost.values()) <= 3
    assert cost[1021] == max(cost[t] for t in range(1, 1024) if t in cost)
    assert all(cost[n * n] <= 2 for n in range(2, 34))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (jax.numpy_dtype_promotion("strict"), "dtype_promotion` must be standard; got strict"),
        (jax.numpy_rank_promotion("raise"), "rank_promotion` must be allow; got raise"),
    ],
)
def test_another_promotion_is_refused(name, setting, said):
    strategy = STRATEGIES[name](PROBLEM)
    state = strategy.init(PARAMS, B)
    with setting, pytest.raises(SettingError, match=said):
        strategy.estimate(PARAMS, state, BATCH, jax.random.key(0))
