"""Every promise of a cell, broken on purpose: an error that names it, with its size, and no gradient."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_study as bs
from bptt_study import known
from bptt_study.backprop import promises
from bptt_study.influence.units import check_units
from bptt_study.validation import SettingError

T, B, D, H = 3, 2, 3, 4
GRU, ELMAN, LSTM = bs.cells.gru(D, H), bs.cells.elman(D, H), bs.cells.lstm(D, H)
RNG = np.random.default_rng(0)
BATCH = bs.Batch(
    jnp.asarray(RNG.standard_normal((T, B, D))),
    jnp.asarray(RNG.integers(2, size=(T, B))),
    jnp.ones((T, B)),
)


def estimate(cell: bs.Cell, jit: bool = False):
    """Of full BPTT."""
    problem = bs.Problem(cell, bs.readouts.linear(H, 2), bs.losses.cross_entropy)
    params, strategy = problem.init(jax.random.key(0)), bs.strategies.full(problem)
    run = jax.jit(strategy.estimate) if jit else strategy.estimate
    return run(params, strategy.init(params, B), BATCH, jax.random.key(0))


def of_form(affine: bs.Affine, like: bs.Cell) -> bs.Cell:
    """A cell that is its form."""
    return like._replace(step=affine.step, affine=affine)


def reset_before_the_product(params, h):
    r, z, n = jnp.split(params["W_hh"], 3, axis=-1)
    return [h @ r, h @ z, (jax.nn.sigmoid(h @ r) * h) @ n]


def layer_norm(params, h):
    a = h @ params["W_hh"]
    a = a - a.mean(axis=-1, keepdims=True)
    return a / jnp.sqrt(jnp.mean(a**2, axis=-1, keepdims=True))


def recurring(recur, like: bs.Cell = ELMAN) -> bs.Cell:
    return of_form(like.affine._replace(recur=recur), like)


def deriving(derivative: bs.Derivative) -> bs.Cell:
    return ELMAN._replace(affine=ELMAN.affine._replace(derivative=derivative))


def stepping(step, **parts) -> bs.Cell:
    return ELMAN._replace(affine=None, step=step, **parts)


def centred_over_the_batch(params, h, x):
    a = ELMAN.step(params, h, x)
    return a - a.mean(axis=0)


def clipped(params, h, x):
    return jnp.clip(x @ params["W_xh"] + h @ params["W_hh"] + params["b_h"], -30, 30)


def dropping(params, state, x):
    """Units dropped by keys of a generator that the state's keys name."""
    h, keys = state
    drop = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (H,)))(keys)
    return ELMAN.step(params, h, x) * drop, jax.vmap(lambda key: jax.random.split(key)[0])(keys)


def with_keys(kind: str) -> bs.Cell:
    return stepping(
        dropping,
        zeros=lambda size: (
            ELMAN.zeros(size),
            jax.random.split(jax.random.key(0, impl=kind), size),
        ),
        read=lambda state: state[0],
    )


OWN = ELMAN.affine.derivative
COUNTING = bs.Affine(
    ELMAN.affine.project,
    recur=lambda params, state: state[0] @ params["W_hh"],
    update=lambda x, h, state: (jnp.tanh(x + h), state[1] + 1),
)
FAULTS = {
    "reset gate in recur": (recurring(reset_before_the_product, GRU), "recur` must be affine in h"),
    "tanh in recur": (recurring(lambda p, h: jnp.tanh(h @ p["W_hh"])), "recur` must be affine"),
    "relu in recur": (recurring(lambda p, h: jax.nn.relu(h) @ p["W_hh"]), "recur` must be affine"),
    "layer norm in recur": (recurring(layer_norm), "recur` must be affine in h"),
    "slightly bent recur": (
        recurring(lambda p, h: h @ p["W_hh"] + 1e-9 * jnp.sin(h)),
        "recur` must be affine in h",
    ),
    "another update": (
        GRU._replace(affine=GRU.affine._replace(update=lambda x, h, state: state)),
        "cell.step` must be equal to the parts of `cell.affine`",
    ),
    "another step": (
        LSTM._replace(step=lambda p, h, x: LSTM.step(p, jax.tree.map(lambda a: 0.9 * a, h), x)),
        "cell.step` must be equal to the parts",
    ),
    "a derivative of another function": (
        deriving(bs.Derivative(OWN.forward, lambda kept, sent: (sent, sent, 0 * sent))),
        "derivative.vjp` must be the VJP of `cell.affine.update`; got .* by",
    ),
    "a forward of another function": (
        deriving(bs.Derivative(lambda x, h, s: (jnp.sin(x + h), ()), OWN.vjp)),
        "derivative.forward` must be equal to `cell.affine.update`",
    ),
    "another dtype": (
        stepping(lambda p, h, x: ELMAN.step(p, h, x).astype(jnp.float32)),
        r"cell.step` must be .* like the one before, float64\[4, 4\]; got .* float32\[4, 4\]",
    ),
    "another shape": (
        stepping(lambda p, h, x: ELMAN.step(p, h, x)[..., :2]),
        r"got one that returns float64\[4, 2\]",
    ),
    "parts that equal the step near 0 alone": (
        ELMAN._replace(
            step=clipped,
            affine=ELMAN.affine._replace(update=lambda x, h, _: x + h, derivative=None),
        ),
        "cell.step` must be equal to the parts of `cell.affine`",
    ),
    "outputs that mix": (
        ELMAN._replace(affine=None, read=lambda h: h - h.mean(axis=0)),
        "cell.read` must be a function of each sequence alone",
    ),
    "keys whose numbers change beside others": (
        with_keys("rbg"),
        "cell.step` must be one whose keys are threefry2x32",
    ),
    "sequences that mix": (
        stepping(centred_over_the_batch),
        "cell.step` must be a function of each sequence alone; .* changes the others by",
    ),
    "a derivative that holds near 0 alone": (
        of_form(
            ELMAN.affine._replace(
                update=lambda x, h, _: jnp.clip(x + h, -3, 3),
                derivative=bs.Derivative(
                    lambda x, h, _: (jnp.clip(x + h, -3, 3), ()),
                    lambda kept, sent: (sent, sent, jnp.zeros_like(sent)),
                ),
            ),
            ELMAN,
        ),
        "derivative.vjp` must be the VJP of `cell.affine.update`; got .* by",
    ),
    "sequences that are alone near 0 only": (
        stepping(lambda p, h, x: ELMAN.step(p, h, x) / jnp.maximum(1, jnp.abs(h).max() / 3)),
        "cell.step` must be a function of each sequence alone",
    ),
    "sequences that mix after six steps": (
        ELMAN._replace(
            zeros=lambda size: (ELMAN.zeros(size), jnp.zeros(size, int)),
            step=lambda p, s, x: (
                jnp.where(
                    (s[1] >= 6)[:, None], centred_over_the_batch(p, s[0], x), ELMAN.step(p, s[0], x)
                ),
                s[1] + 1,
            ),
            read=lambda s: s[0],
            affine=None,
        ),
        "cell.step` must be a function of each sequence alone; .* changes the others by",
    ),
    "sequences that see the next one": (
        stepping(lambda p, h, x: ELMAN.step(p, jnp.concatenate([h[1:], h[-1:]]), x)),
        "cell.step` must be a function of each sequence alone",
    ),
    "sequences that see the last one": (
        stepping(lambda p, h, x: ELMAN.step(p, h + h[-1:], x)),
        "cell.step` must be a function of each sequence alone",
    ),
    "another read of a cell that is known": (
        ELMAN._replace(read=lambda h: h - h.mean(axis=0)),
        "cell.read` must be a function of each sequence alone",
    ),
    "keys as numbers": (
        stepping(
            lambda p, h, x: (
                ELMAN.step(p, h[0], x) * jax.vmap(lambda k: jax.random.bernoulli(k))(h[1])[:, None],
                jax.vmap(lambda k: jax.random.split(k)[0])(h[1]),
            ),
            zeros=lambda size: (ELMAN.zeros(size), jax.random.split(jax.random.PRNGKey(0), size)),
            read=lambda h: h[0],
        ),
        "cell.zeros` must be a function whose random keys are those of `jax.random.key`",
    ),
    "one key for all sequences": (
        stepping(
            lambda p, h, x: (ELMAN.step(p, h[0], x), h[1]),
            zeros=lambda size: (ELMAN.zeros(size), jax.random.key(0)),
            read=lambda h: h[0],
        ),
        "cell.zeros` must be .* leading axis B = 2; .* a key for each sequence",
    ),
    "a form with an integer in the state": (
        of_form(COUNTING, ELMAN)._replace(
            zeros=lambda size: (ELMAN.zeros(size), jnp.zeros(size, int)), read=lambda h: h[0]
        ),
        "cell.affine` must be None where the state has integers",
    ),
}


@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_promise_is_an_error_that_names_it(fault, jit):
    cell, said = FAULTS[fault]
    with pytest.raises(SettingError, match=said):
        estimate(cell, jit)


def test_the_message_has_the_size_of_a_change_far_from_0():
    """Random states are small; there, this function is the identity."""
    cell = recurring(lambda p, h: jnp.clip(h, -3, 3) @ p["W_hh"])
    with pytest.raises(SettingError, match=r"changes by \d\d+% from"):
        estimate(cell)


def test_within_a_stack_too():
    stack = bs.cells.stack([bs.cells.mlp(D, D), FAULTS["tanh in recur"][0]])
    with pytest.raises(SettingError, match="recur` must be affine in h"):
        estimate(stack)


def with_scale(scale, part: str) -> bs.Cell:
    """tanh(scale (x + h)), where one part of the form closes over the scale."""
    form = bs.cells.elman(D, H).affine._replace(
        update=lambda x, h, _: jnp.tanh(x + h), derivative=None
    )
    own = getattr(form, part)
    form = form._replace(**{part: lambda *a: jax.tree.map(lambda v: scale * v, own(*a))})
    return of_form(form, ELMAN)


@pytest.mark.parametrize("part", ["project", "recur", "update"])
@pytest.mark.parametrize("transform", [jax.grad, jax.jit, jax.vmap])
def test_a_part_that_closes_over_a_traced_value(part, transform):
    def loss(scale):
        return estimate(with_scale(scale, part))[0].loss

    argument = jnp.ones(2) if transform is jax.vmap else 1.0
    with pytest.raises(SettingError, match=f"cell.affine.{part}` .*closes over a traced value"):
        transform(loss)(argument)
    assert jnp.isfinite(loss(0.5))  # a number is none


def test_a_step_that_closes_over_a_traced_value():
    with pytest.raises(SettingError, match=r"cell.step` .*closes over a traced value"):
        jax.grad(lambda a: estimate(stepping(lambda p, h, x: a * ELMAN.step(p, h, x)))[0].loss)(1.0)


@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
def test_an_update_that_closes_over_a_parameter(jit):
    """The parameters hold it too, nothing uses it there, and the loss is right."""
    trained = ELMAN.init(jax.random.key(1)) | {"scale": jnp.full(H, 0.5)}
    form = ELMAN.affine._replace(
        update=lambda x, h, _: trained["scale"] * jnp.tanh(x + h), derivative=None
    )
    cell = of_form(form, ELMAN)._replace(init=lambda key: trained)
    with pytest.raises(SettingError, match=r"affine.update` .* like params\['scale'\], .* unused"):
        estimate(cell, jit)


def stepping_with(state, like: bs.Cell = GRU) -> bs.Cell:
    """The cell with its form, and a step that first changes the state to state(parameters, h, x)."""
    return like._replace(step=lambda p, h, x: like.step(p, state(p, h, x), x))


H0 = GRU._replace(init=lambda key: GRU.init(key) | {"h0": jnp.full(H, 0.5)})
TURNS = {
    "a flag of 1 resets": stepping_with(lambda p, h, x: jnp.where(x[:, -1:] == 1, 0, h)),
    "a flag of -7.5 resets": stepping_with(lambda p, h, x: jnp.where(x[:, -1:] == -7.5, 0, h)),
    "inputs of 0 keep": stepping_with(
        lambda p, h, x: jnp.where((x == 0).all(-1, keepdims=True), 2 * h, h)
    ),
    "a unit at 0 starts anew": stepping_with(lambda p, h, x: jnp.where(h == 0, p["h0"], h), H0),
    "a state of 0 starts anew": stepping_with(
        lambda p, h, x: jnp.where((h == 0).all(-1, keepdims=True), p["h0"], h), H0
    ),
}


@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
@pytest.mark.parametrize("name", TURNS)
def test_a_step_that_leaves_its_form_at_exact_numbers(name, jit):
    with pytest.raises(SettingError, match=r"cell.step` must be equal .* that, at the (num|stat)"):
        estimate(TURNS[name], jit)


@pytest.mark.parametrize("symbol", [3, 10, 27, 1000, jnp.array([-1, 300])])
def test_a_symbol_that_resets(symbol):
    """Random ids are few; those of the table and those that the step names are tried, too."""
    gru = bs.cells.gru(28, H)
    resets = lambda x: jnp.isin(x, symbol)[:, None]  # noqa: E731
    cell = stepping_with(lambda p, h, x: jnp.where(resets(x), 0, h), gru)
    given = gru.init(jax.random.key(0)), gru.zeros(B), jnp.zeros((T, B), int)
    if np.max(symbol) < 28:
        with pytest.raises(SettingError, match=r"cell.step` must be equal to the parts"):
            promises.prove(cell, *given)
    else:  # what is nan in one of them does not exist
        promises.prove(cell, *given)


GOOD = {
    "a step of its own that takes ids as they are": GRU._replace(
        step=lambda p, h, x: GRU.step(p, h, x)
    ),
    "kinks at 0 and 1": of_form(
        ELMAN.affine._replace(
            update=lambda x, h, _: jnp.clip(jax.nn.relu(x + h), 0, 1),
            derivative=bs.Derivative(
                lambda x, h, _: ((a := jnp.clip(jax.nn.relu(x + h), 0, 1)), a),
                lambda kept, sent: (
                    (d := sent * ((kept[0] > 0) & (kept[0] < 1))),
                    d,
                    jnp.zeros_like(sent),
                ),
            ),
        ),
        ELMAN,
    ),
    "an affine recur with a constant": recurring(lambda p, h: h @ p["W_hh"] + 1.0),
    "a residual path": recurring(lambda p, h: h + jnp.roll(h @ p["W_hh"], 1, axis=-1)),
    "a compiled recur": recurring(jax.jit(lambda p, h: h @ p["W_hh"])),
    "no derivative": of_form(GRU.affine._replace(derivative=None), GRU),
    "an update that is normalised": of_form(
        ELMAN.affine._replace(
            update=lambda x, h, _: jax.nn.standardize(x + h, axis=-1), derivative=None
        ),
        ELMAN,
    ),
    "nothing but a step": GRU._replace(affine=None),
}


@pytest.mark.parametrize("name", GOOD)
def test_promises_that_hold(name):
    """Negative control: the gradient of the step alone, by which no promise is needed."""
    found, expected = (
        estimate(cell, jit=True)[0].grads for cell in (GOOD[name], GOOD[name]._replace(affine=None))
    )
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-14)


def test_a_broken_promise_would_be_a_wrong_gradient(monkeypatch):
    """Negative control: why it is an error."""
    cell = recurring(reset_before_the_product, GRU)
    expected, loss = (
        part(estimate(cell._replace(affine=None), jit=True)[0])
        for part in (lambda e: e.grads, lambda e: e.loss)
    )
    monkeypatch.setattr(promises, "_prove", lambda *_: None)
    wrong = estimate(cell, jit=True)[0]
    np.testing.assert_allclose(wrong.loss, loss, rtol=1e-14)
    off = np.abs(wrong.grads["cell"]["W_xh"] - expected["cell"]["W_xh"]).max()
    assert off > 1e-3 * np.abs(expected["cell"]["W_xh"]).max()


@pytest.mark.slow
def test_our_own_cells_keep_what_they_promise():
    """They are vouched for, so that no run checks them; here they are."""
    classes = jax.ShapeDtypeStruct((T, B), int)
    for name, make in bs.cells.LAYERS.items():
        cell = make(D, H)
        for inputs in (BATCH.inputs, classes):
            params = jax.eval_shape(cell.init, jax.random.key(0))
            promises.prove(cell, params, cell.zeros(B), inputs)
        assert (cell.step, cell.affine, cell.read) in known._known, name


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
@pytest.mark.parametrize("fault", ["another update", "centred over the batch"])
def test_short_floats_hide_no_broken_promise(fault, kind):
    """Their rounding alone would allow a difference of several times the largest number."""
    form = ELMAN.affine._replace(update=lambda x, h, _: jnp.tanh(x + 2 * h), derivative=None)
    cell = ELMAN._replace(affine=form)
    cell = cell if fault == "another update" else stepping(centred_over_the_batch)
    short = lambda tree: jax.tree.map(lambda a: a.astype(kind), tree)  # noqa: E731
    cell = cell._replace(zeros=lambda size: short(ELMAN.zeros(size)))
    params = short(cell.init(jax.random.key(0)))
    with pytest.raises(SettingError, match=r"cell.step` must be (equal|a function of each)"):
        promises.prove(cell, params, cell.zeros(B), short(BATCH.inputs))


def test_a_steep_step_breaks_no_promise():
    """Rounding of its argument alone moves it, and rounding differs between a batch and a sequence."""
    wide = bs.cells.elman(D, 64)
    form = wide.affine._replace(update=lambda x, h, _: jnp.sin(300 * (x + h)), derivative=None)
    for cell in (of_form(form, wide), wide._replace(affine=None, step=form.step)):
        promises.prove(cell, cell.init(jax.random.key(0)), cell.zeros(B), BATCH.inputs)
        bs.testing.check_cell(cell, inputs=D)


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float32"])
def test_a_cell_may_compute_in_shorter_floats(kind):
    """Mixed precision: rounding within the cell is no broken promise, but a wrong form is one."""
    short = lambda f: lambda *a: f(*jax.tree.map(lambda a: a.astype(kind), a)).astype(float)  # noqa: E731
    form = bs.Affine(
        short(lambda p, x: x @ p["W_xh"]),
        short(lambda p, h: h @ p["W_hh"]),
        lambda x, h, _: jnp.tanh(x + h),
    )
    wide = bs.cells.elman(D, 64)
    cell = of_form(form, wide)
    given = cell.init(jax.random.key(0)), cell.zeros(B), BATCH.inputs
    promises.prove(cell, *given)
    check_units(cell, "snap", given[0], BATCH.inputs)
    other = form._replace(update=lambda x, h, _: jnp.tanh(x + 1.2 * h))
    with pytest.raises(SettingError, match="equal to the parts"):
        promises.prove(cell._replace(affine=other), *given)


def test_random_numbers_that_overflow_are_no_error_of_the_user():
    def logistic(params, h, x):
        a = jnp.exp(2 * (x @ params["W_xh"] + h @ params["W_hh"]))
        return a / (1 + a)

    with jax.debug_nans(True), jax.debug_infs(True):
        promises.prove(
            stepping(logistic), ELMAN.init(jax.random.key(0)), ELMAN.zeros(B), BATCH.inputs
        )


@pytest.mark.parametrize("fault", ["another update", "centred over the batch"])
def test_numbers_outside_of_a_domain_hide_no_broken_promise(fault):
    """A Cholesky factor of random numbers is nan; then the parameters that `init` makes show the fault."""
    matrix = 2 * jnp.eye(H) + 0.5
    init = lambda key: ELMAN.init(key) | {"W_hh": matrix}  # noqa: E731
    recur = lambda p, h: h @ jnp.linalg.cholesky(p["W_hh"]).T  # noqa: E731
    form = ELMAN.affine._replace(recur=recur, update=lambda x, h, _: jnp.tanh(x + h))
    form = form._replace(derivative=None)
    cell = of_form(form, ELMAN)._replace(init=init)
    jax.block_until_ready(estimate(cell)[0].loss)
    if fault == "another update":
        other = form._replace(update=lambda x, h, _: jnp.tanh(x + 2 * h))
        cell = cell._replace(affine=other)
    else:
        centred = lambda *now: (h := form.step(*now)) - h.mean(axis=0)  # noqa: E731
        cell = cell._replace(affine=None, step=centred)
    with pytest.raises(SettingError, match=r"cell.step` must be (equal|a function of each)"):
        estimate(cell)


@pytest.mark.parametrize("fault", ["another recur", "centred over the batch"])
def test_weights_below_a_threshold_hide_no_broken_promise(fault):
    """Small random weights are all pruned; those that `init` makes are not."""
    init = lambda key: ELMAN.init(key) | {"W_hh": 2 * jnp.eye(H)}  # noqa: E731
    recur = lambda p, h: h @ jnp.where(jnp.abs(p["W_hh"]) > 1.5, p["W_hh"], 0)  # noqa: E731
    form = ELMAN.affine._replace(recur=recur)
    cell = of_form(form, ELMAN)._replace(init=init)
    jax.block_until_ready(estimate(cell)[0].loss)
    if fault == "another recur":
        cell = cell._replace(affine=form._replace(recur=lambda p, h: 2 * recur(p, h)))
    else:
        centred = lambda p, h, x: form.step(p, h - h.mean(axis=0), x)  # noqa: E731
        cell = cell._replace(affine=None, step=centred)
    with pytest.raises(SettingError, match=r"cell.step` must be (equal|a function of each)"):
        estimate(cell)


def test_the_checks_multiply_as_exactly_as_the_device_can():
    """By default a GPU rounds products to 11 bits, a batch's otherwise than a sequence's."""
    found = []

    def step(params, h, x):
        found.append(jax.config.jax_default_matmul_precision)
        return ELMAN.step(params, h, x)

    cell = stepping(step)
    promises.prove(cell, ELMAN.init(jax.random.key(0)), ELMAN.zeros(B), BATCH.inputs)
    assert "highest" in found


def test_one_sequence_does_not_vouch_for_several():
    """With one sequence nothing can mix; a batch of several comes later."""
    cell = stepping(centred_over_the_batch)
    problem = bs.Problem(cell, bs.readouts.linear(H, 2), bs.losses.cross_entropy)
    params, strategy = problem.init(jax.random.key(0)), bs.strategies.rtrl(problem, block=1)
    alone = jax.tree.map(lambda a: a[:, :1], BATCH)
    with pytest.raises(SettingError, match="a function of each sequence alone"):
        strategy.estimate(params, strategy.init(params, 1), alone, jax.random.key(0))


def test_inputs_of_one_type_do_not_vouch_for_another():
    def project(params, x):
        own = x[..., None] * 0.1 if jnp.issubdtype(x.dtype, jnp.integer) else x
        return ELMAN.affine.project(params, jnp.broadcast_to(own, (*own.shape[:-1], D)))

    cell = ELMAN._replace(affine=ELMAN.affine._replace(project=project))
    for inputs, right in ((BATCH.inputs, True), (jnp.zeros((T, B), int), False)):
        problem = bs.Problem(cell, bs.readouts.linear(H, 2), bs.losses.cross_entropy)
        params, strategy = problem.init(jax.random.key(0)), bs.strategies.full(problem)
        batch = BATCH._replace(inputs=inputs)
        with nullcontext() if right else pytest.raises(SettingError, match="equal to the parts"):
            strategy.estimate(params, strategy.init(params, B), batch, jax.random.key(0))


def test_a_form_that_holds_for_one_id_alone():
    def project(params, ids):
        return jnp.where((ids == 0)[..., None], 1.0, 1.5) * ELMAN.affine.project(params, ids)

    cell = ELMAN._replace(affine=ELMAN.affine._replace(project=project))
    problem = bs.Problem(cell, bs.readouts.linear(H, 2), bs.losses.cross_entropy)
    params, strategy = problem.init(jax.random.key(0)), bs.strategies.full(problem)
    batch = BATCH._replace(inputs=jnp.zeros((T, B), int))
    with pytest.raises(SettingError, match="equal to the parts"):
        strategy.estimate(params, strategy.init(params, B), batch, jax.random.key(0))


def test_keys_of_threefry_may_stand_in_a_state():
    assert jnp.isfinite(estimate(with_keys("threefry2x32"))[0].loss)


def test_a_cell_is_checked_once(monkeypatch):
    found = []
    own = promises._prove
    monkeypatch.setattr(promises, "_prove", lambda *a: found.append(1) or own(*a))
    cell = recurring(lambda p, h: h @ p["W_hh"] + 2.0)
    estimate(cell)
    estimate(cell, jit=True)
    assert len(found) == 1
    estimate(bs.cells.lstm(D, H))
    assert len(found) == 1
