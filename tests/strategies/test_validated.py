"""Arguments of another kind are refused in one line by every strategy, before anything is computed."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import in_a_process_with

import bptt_study as bs
from bptt_study.training.parallel import over_seeds
from bptt_study.validation import SettingError

S = bs.strategies
T, B, D, H, Q = 5, 2, 3, 4, 2
CELL = bs.cells.elman(D, H)
PROBLEM = bs.Problem(CELL, bs.readouts.linear(H, Q), bs.losses.squared_error)
PARAMS = PROBLEM.init(jax.random.key(0))
RNG = np.random.default_rng(0)
BATCH = bs.Batch(
    jnp.asarray(RNG.standard_normal((T, B, D))),
    jnp.asarray(RNG.standard_normal((T, B, Q))),
    jnp.ones((T, B)),
)
SETTINGS = {
    "adaptive": {"delta": 0.5},
    "bp_lambda": {"block": 2},
    "discounted": {"mean_length": 3},
    "dni": {"block": 2},
    "fixed": {"window": 3},
    "full_es": {"sigma": 0.1},
    "ok": {"rank": 2},
    "randomized": {"law": S.constant(3)},
    "randomized_constant": {"mean_length": 3},
    "randomized_power_law": {"mean_length": 3},
    "sketched": {"rank": 1},
    "telescope": {"law": S.constant(3)},
    "telescope_constant": {"mean_length": 3},
}
NAMES = sorted(set(S.__all__) - {"Law", "constant", "power_law"})


def make(name, problem=PROBLEM):
    return getattr(S, name)(problem, **SETTINGS.get(name, {}))


def estimate(name="full", params=PARAMS, batch=BATCH, state=None):
    strategy = make(name)
    state = strategy.init(PARAMS, B) if state is None else state
    return strategy.estimate(params, state, batch, jax.random.key(1))


def without(part, name):
    return {**PARAMS, part: {k: v for k, v in PARAMS[part].items() if k != name}}


def with_leaf(name, leaf):
    return {**PARAMS, "cell": {**PARAMS["cell"], name: leaf}}


@pytest.mark.parametrize("name", NAMES)
def test_every_strategy_names_what_does_not_fit(name):
    for problem in (None, CELL, make("full"), bs.Problem):
        with pytest.raises(SettingError, match="`problem` must be a Problem of bptt_study; got"):
            make(name, problem)
    strategy = make(name)
    for size in (0, -1, 2.0):
        with pytest.raises(SettingError, match="`batch_size` must be a whole number"):
            strategy.init(PARAMS, size)
    for line, changed in {
        "`batch` must be a Batch": {"batch": tuple(BATCH)},
        "`batch.mask` must be an array; got a NoneType": {"batch": BATCH._replace(mask=None)},
        r"`batch.mask` must be of shape \[T, B\].*got shape \[\]": {
            "batch": BATCH._replace(mask=1.0)
        },
        r"`params\['cell'\]\['b_h'\]` must be of shape \[4\].*got none": {
            "params": without("cell", "b_h")
        },
        "`state` must be like that of the strategy's init": {"state": {"h": CELL.zeros(B)}},
    }.items():
        with pytest.raises(SettingError, match=line):
            estimate(name, **changed)
        with pytest.raises(SettingError, match=r"`batch.inputs` must be an array; got a str"):
            estimate(name, batch=BATCH._replace(inputs="text"))


@pytest.mark.parametrize("name", ["full", "randomized_constant", "rtrl", "pes", "adaptive"])
def test_lists_are_arrays(name):
    lists = bs.Batch(*(a.tolist() for a in BATCH))
    for actual, expected in zip(
        jax.tree.leaves(estimate(name, batch=lists)), jax.tree.leaves(estimate(name)), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize(
    ("params", "line"),
    [
        (3, "`params` must be a dict"),
        (PARAMS["cell"], "`params` must be a dict.*a dict of W_hh"),
        (
            without("readout", "W_hq"),
            r"`params\['readout'\]\['W_hq'\]` must be of shape .*got none",
        ),
        (
            with_leaf("perm", jnp.arange(3)),
            r"`params\['cell'\]\['perm'\]` must be floats; got .*int",
        ),
        (with_leaf("b_h", jnp.zeros(H, int)), r"`params\['cell'\]\['b_h'\]` must be floats"),
        (
            with_leaf("b_h", jnp.zeros(H, complex)),
            r"\['b_h'\]` must be of the same kind; got complex",
        ),
        (with_leaf("b_h", [0.0] * H), r"`params\['cell'\]\['b_h'\]` must be of shape .*got none"),
        (with_leaf("b_h", "text"), r"`params\['cell'\]\['b_h'\]` must be an array; got a str"),
    ],
)
def test_parameters_that_are_missing_or_no_floats(params, line):
    for _ in range(2):  # a check that failed is not remembered
        with pytest.raises(SettingError, match=line):
            estimate(params=params)
    with pytest.raises(SettingError, match=line):
        bs.lags.gradients(PROBLEM, params, BATCH, 2)


def test_parameters_beside_those_of_init_may_be_there():
    assert jnp.isfinite(estimate(params=with_leaf("more", jnp.ones(2)))[0].loss)


@pytest.mark.parametrize(
    "inputs", [jnp.ones((T, B, D + 1)), jnp.ones((T, B)), jnp.ones((T, B, D, 1))]
)
def test_inputs_that_the_cell_does_not_take(inputs):
    with pytest.raises(
        SettingError, match=r"^`batch.inputs` must be inputs that the cell takes; got"
    ):
        estimate(batch=BATCH._replace(inputs=inputs))


PAST = make("rtrl").init(PARAMS, B)


@pytest.mark.parametrize(
    ("name", "state", "line"),
    [
        ("rtrl", make("full").init(PARAMS, B), "`state` must be like that of the strategy's init"),
        ("rtrl", make("snap").init(PARAMS, B), "`state"),
        ("pes", make("full").init(PARAMS, B), "`state` must be"),
        ("rtrl", make("rtrl").init(PARAMS, B + 1), r"`state.hidden` must be float64\[2, 4\]"),
        (
            "rtrl",  # sums of two precisions would come out
            PAST._replace(past=jax.tree.map(lambda a: a.astype("f4"), PAST.past)),
            r"`state.past.* must be of the parameters' type, float64; got float32",
        ),
        (
            "adaptive",
            make("adaptive").init(PARAMS, B)._replace(choice=0.0),
            "`state.choice` must be",
        ),
    ],
)
def test_states_of_others(name, state, line):
    with pytest.raises(SettingError, match=line):
        estimate(name, state=state)
    with pytest.raises(SettingError, match=line):
        jax.jit(make(name).estimate)(PARAMS, state, BATCH, jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "telescope", "rtrl", "pes", "dni"])
@pytest.mark.parametrize("axis", ["data", "batch", "seeds"])
def test_layouts_over_devices_that_scans_from_constants_do_not_have(name, axis):
    """One line with the way out, which works: Auto axes, and `check_vma=False`."""
    P, key, strategy = jax.sharding.PartitionSpec, jax.random.key(0), make(name)
    count = math.gcd(B, jax.device_count())
    state, of_time = strategy.init(PARAMS, B), P(None, axis)
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-15)

    def run(batch):
        state = strategy.init(PARAMS, batch.mask.shape[1])
        return strategy.estimate(PARAMS, state, batch, key)[0].grads

    for kind in ("Explicit", "Auto"):
        mesh = jax.make_mesh((count,), (axis,), (getattr(jax.sharding.AxisType, kind),))
        batch = jax.device_put(BATCH, jax.sharding.NamedSharding(mesh, of_time))
        if kind == "Explicit":
            with pytest.raises(
                SettingError, match=rf"`batch.inputs` must .* Explicit .*@{axis}.*Auto"
            ):
                strategy.estimate(PARAMS, state, batch, key)
        else:
            found = jax.jit(strategy.estimate)(PARAMS, state, batch, key)[0].grads
            jax.tree.map(close, found, jax.jit(run)(BATCH))
    averaged = lambda batch: jax.lax.pmean(run(batch), axis)  # noqa: E731
    parts = partial(jax.shard_map, averaged, mesh=mesh, in_specs=(of_time,), out_specs=P())
    with pytest.raises(SettingError, match=r"`batch.inputs` must .* shard_map .* check_vma=False"):
        jax.jit(parts())(BATCH)
    # the gradient of a device is that of its own sequences
    alone = [
        jax.tree.map(lambda a, i=i: jnp.split(a, count, axis=1)[i], BATCH) for i in range(count)
    ]
    expected = jax.tree.map(lambda *grads: sum(grads) / count, *map(jax.jit(run), alone))
    jax.tree.map(close, jax.jit(parts(check_vma=False))(BATCH), expected)


def test_the_seeds_of_a_run_are_on_no_axis_of_a_user():
    """A mean over an axis called `seeds` in a task or an optimizer would be one over other runs."""
    f = lambda data, scalar, seed: jax.lax.psum(seed, "seeds")  # noqa: E731
    with pytest.raises(NameError, match="seeds"):
        over_seeds(f, 2)((), jnp.zeros(()), jnp.arange(2.0))


@pytest.mark.slow
def test_in_a_process_with_two_devices():
    assert "skipped" not in in_a_process_with(2, __file__, "layouts_over or axis_of_a_user")


def test_a_law_that_is_none():
    for law in (16, "constant", S.constant, None):
        with pytest.raises(SettingError, match="`law` must be a Law of bptt_study; got"):
            S.randomized(PROBLEM, law)


class Scaled:
    """A step without a hash, as that of a dataclass with arrays."""

    __hash__ = None

    def __init__(self, scale):
        self.scale = scale

    def __call__(self, params, h, x):
        return self.scale * CELL.step(params, h, x)


@pytest.mark.slow
def test_a_step_without_a_hash_is_not_remembered():
    """Its numbers may change, and so may those of the tables."""
    step = Scaled(0.5)
    problem = PROBLEM._replace(cell=CELL._replace(step=step, affine=None))
    for scale in (0.5, 0.25):
        step.scale = scale
        plain = PROBLEM._replace(
            cell=CELL._replace(
                step=lambda p, h, x, scale=scale: scale * CELL.step(p, h, x), affine=None
            )
        )
        for run in (
            lambda problem: make("full", problem).estimate(
                PARAMS, CELL.zeros(B), BATCH, jax.random.key(0)
            ),
            lambda problem: bs.lags.gradients(problem, PARAMS, BATCH, 2),
            lambda problem: bs.lags.norms(problem, PARAMS, BATCH, 2),
        ):
            jax.tree.map(np.testing.assert_array_equal, run(problem), run(plain))
