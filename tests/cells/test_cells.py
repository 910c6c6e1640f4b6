"""Cells: forward and gradients against NumPy loops with derivatives by hand; initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from support import by_hand, flat_grads, full_estimate

import bptt_study as bs
from bptt_study.cells import parts
from bptt_study.testing import examples
from bptt_study.validation import SettingError

RECURRENT = {name: make for name, make in examples.CELLS.items() if name != "mlp"}
BLOCKS = {"linear": 1, "elman_tanh": 1, "gru": 3, "lstm": 4}
FACTORIES = [bs.cells.mlp, bs.cells.elman, bs.cells.linear, bs.cells.gru, bs.cells.lstm]


@pytest.mark.parametrize(
    ("activation", "phi"), [("tanh", np.tanh), ("relu", lambda a: a * (a > 0))]
)
def test_elman_step_is_one_product_with_the_stacked_weights(rng, activation, phi):
    cell = bs.cells.elman(inputs=3, hidden=4, activation=activation)
    W_xh, W_hh, b_h = (rng.standard_normal(s) for s in [(3, 4), (4, 4), (4,)])
    x, h = rng.standard_normal((5, 3)), rng.standard_normal((5, 4))
    actual = cell.step({"W_xh": W_xh, "W_hh": W_hh, "b_h": b_h}, h, x)
    expected = phi(np.concatenate([x, h], axis=1) @ np.concatenate([W_xh, W_hh]) + b_h)
    np.testing.assert_allclose(actual, expected, atol=1e-15)


@pytest.mark.parametrize("name", examples.CELLS)
def test_forward_and_gradients_equal_those_by_hand(name):
    ex = examples.example(name)
    table = by_hand(name, ex)
    estimate, last = full_estimate(name)
    np.testing.assert_allclose(estimate.loss, table.loss, rtol=1e-13)
    np.testing.assert_allclose(
        np.concatenate(jax.tree.leaves(last), -1), table.states[-1], atol=1e-14
    )
    cell, readout = flat_grads(estimate)
    expected = oracles.weighted(table, oracles.full(examples.T))
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(cell, expected, atol=1e-13)
    np.testing.assert_allclose(readout, table.readout, atol=1e-13)


@pytest.mark.parametrize("name", RECURRENT)
def test_gradients_without_the_initial_state_differ(name):
    """Negative control: an oracle that starts from h_0 = 0 is noticed."""
    ex = examples.example(name)
    from_zero = by_hand(name, ex._replace(state=jax.tree.map(jnp.zeros_like, ex.state)))
    cell, _ = flat_grads(full_estimate(name)[0])
    wrong = oracles.weighted(from_zero, oracles.full(examples.T))
    assert np.abs(cell - wrong).max() > 1e-3 * np.abs(cell).max()


def test_gru_reset_before_the_product_differs(rng):
    """Negative control: the other convention, r applied to h before W_hh, is noticed."""
    ex = examples.example("gru")
    p, h, x = ex.params["cell"], np.asarray(ex.state), rng.standard_normal((2, 3))
    gi = x @ p["W_xh"] + p["b_h"]
    gh = h @ p["W_hh"] + p["b_hh"]
    r, z = oracles.sigmoid(gi + gh)[:, :3], oracles.sigmoid(gi + gh)[:, 3:6]
    wrong = np.tanh(gi[:, 6:] + (r * h) @ p["W_hh"][:, 6:] + p["b_hh"][6:])
    actual = ex.problem.cell.step(p, ex.state, x)
    right = oracles.step("gru", {k: np.asarray(v) for k, v in p.items()}, h, x)[0]
    np.testing.assert_allclose(actual, right, atol=1e-14)
    assert np.abs(actual - ((1 - z) * wrong + z * h)).max() > 1e-3


@pytest.mark.parametrize("name", examples.CELLS)
def test_integers_are_one_hot_vectors(name, rng):
    ex = examples.example(name)
    classes = rng.integers(3, size=(5, 2))
    project = ex.problem.cell.affine.project
    hot = oracles.one_hot(classes, 3)
    np.testing.assert_allclose(
        project(ex.params["cell"], jnp.asarray(classes)),
        project(ex.params["cell"], hot),
        atol=1e-15,
    )


@pytest.mark.parametrize("name", examples.CELLS)
@pytest.mark.parametrize("lead", [(), (2,), (4, 2)])
def test_parts_take_any_leading_axes(name, lead, rng):
    cell, p = examples.problem_of(name).cell, examples.example(name).params["cell"]
    state = jax.tree.map(
        lambda z: jnp.asarray(rng.standard_normal((*lead, *z.shape[1:]))), cell.zeros(1)
    )
    new = cell.step(p, state, rng.standard_normal((*lead, examples.D)))
    assert [a.shape for a in jax.tree.leaves(new)] == [a.shape for a in jax.tree.leaves(state)]
    assert cell.read(new).shape == (*lead, examples.H)


@pytest.mark.parametrize("name", BLOCKS)
def test_spectral_radius_is_set_in_every_gate(name, key):
    factory = bs.cells.elman if name == "elman_tanh" else getattr(bs.cells, name)
    W_hh = factory(3, 6, spectral_radius=0.8).init(key)["W_hh"]
    assert W_hh.shape == (6, 6 * BLOCKS[name])
    for block in np.split(np.asarray(W_hh), BLOCKS[name], axis=1):
        np.testing.assert_allclose(np.abs(np.linalg.eigvals(block)).max(), 0.8, rtol=1e-6)
    free = np.asarray(factory(3, 6).init(key)["W_hh"])[:, :6]
    assert abs(np.abs(np.linalg.eigvals(free)).max() - 0.8) > 1e-3


def triangular(n: int) -> dict[str, np.ndarray]:
    """Matrices with one eigenvalue, n times in a Jordan block: beside what lies off it, powers lose it."""
    below = np.tril(np.random.default_rng(n).standard_normal((n, n)), -1)
    return {
        "chain": np.eye(n) + 0.05 * np.eye(n, k=-1),
        "half": (np.eye(n) + np.eye(n, k=1)) / 2,
        "full": np.eye(n) + below,
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_spectral_radius_of_any_matrix(rng, dtype):
    turn = 2.5 * np.array([[0.6, -0.8], [0.8, 0.6]])  # a complex pair
    shear = np.array([[0.5, 1.0], [0.0, 0.5]])  # not diagonalisable
    random = [rng.standard_normal((n, n)) for n in (1, 3, 10, 40)]
    apart = np.diag([1e-3, 1.0, 1e3]) @ random[1] @ np.diag([1e3, 1.0, 1e-3])
    for matrix in [turn, shear, *random, 1e-30 * random[1], 1e30 * random[1], apart]:
        expected = np.abs(np.linalg.eigvals(matrix)).max()
        found = jax.jit(bs.cells.spectral_radius)(jnp.asarray(matrix, dtype))
        assert found.dtype == dtype
        np.testing.assert_allclose(found, expected, rtol=1e-12 if dtype is np.float64 else 1e-5)
    for n in (2, 5, 16, 64):
        for matrix in triangular(n).values():
            found = jax.vmap(bs.cells.spectral_radius)(jnp.asarray(matrix, dtype)[None])
            np.testing.assert_allclose(found, [matrix[0, 0]], rtol=1e-6)
    assert bs.cells.spectral_radius(jnp.asarray([[0.0, 1.0], [0.0, 0.0]], dtype)) == 0
    assert bs.cells.spectral_radius(jnp.zeros((2, 2), dtype)) == 0


def test_the_spectral_radius_of_complex_and_of_short_numbers():
    matrix = np.array([[1 + 2j, 3.0], [0.0, 0.5j]])
    np.testing.assert_allclose(bs.cells.spectral_radius(jnp.asarray(matrix)), 5**0.5)
    short = jnp.asarray([[0.5, 1.0], [0.25, 0.5]], jnp.bfloat16)
    assert bs.cells.spectral_radius(short) == 1
    assert bs.cells.spectral_radius(jnp.asarray([[2, 1], [0, 3]])) == 3


def test_the_spectral_radius_of_a_draw_is_as_exact_in_float32(rng):
    """That by which cells scale their draws: repeated squaring, which runs on every device."""
    for n in (1, 3, 10, 40, 200):
        matrix = rng.standard_normal((n, n)).astype(np.float32)
        expected = np.abs(np.linalg.eigvals(matrix.astype(float))).max()
        with jax.enable_x64(False):
            found = parts._radius_of_a_draw(jnp.asarray(matrix))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("factory", FACTORIES)
def test_scale_of_the_initial_weights(factory, key):
    p = factory(50, 100).init(key)
    np.testing.assert_allclose(np.std(p["W_xh"]), 50**-0.5, rtol=0.05)
    assert abs(np.mean(p["W_xh"])) < 0.01
    if "W_hh" in p:
        blocks = np.split(np.asarray(p["W_hh"]), p["W_hh"].shape[1] // 100, axis=1)
        for block in blocks:
            np.testing.assert_allclose(np.std(block), 100**-0.5, rtol=0.05)
            assert abs(np.corrcoef(block.ravel(), blocks[0].ravel())[0, 1]) < 0.05 or (
                block is blocks[0]
            )
    ones = np.zeros(p["b_h"].shape)
    if factory is bs.cells.lstm:
        ones[100:200] = 1  # the forget gate
    np.testing.assert_array_equal(p["b_h"], ones)
    assert not p.get("b_hh", np.zeros(1)).any()


def test_keys_make_the_weights():
    init = bs.cells.elman(3, 4).init
    one, again, other = (init(jax.random.key(n))["W_hh"] for n in (1, 1, 2))
    assert (one == again).all()
    assert (one != other).all()


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize(
    ("setting", "value"),
    [("hidden", 0), ("hidden", 2.5), ("hidden", True), ("inputs", 0), ("inputs", -1)],
)
def test_bad_sizes(factory, setting, value, key):
    settings = {"inputs": 3, "hidden": 4} | {setting: value}
    with pytest.raises(
        SettingError, match=f"`{setting}` must be a whole number of at least 1; got {value}"
    ):
        factory(**settings).init(key)


def test_the_scale_of_the_input_weights(key):
    drawn, scaled = (bs.cells.elman(3, 500, input_scale=s).init(key) for s in (None, 0.1))
    assert np.std(scaled["W_xh"]) == pytest.approx(0.1, rel=0.1)
    np.testing.assert_allclose(scaled["W_xh"], 0.1 * np.sqrt(3) * drawn["W_xh"], rtol=1e-6)
    np.testing.assert_array_equal(scaled["W_hh"], drawn["W_hh"])
    with pytest.raises(SettingError, match=r"`input_scale` must be .* of at least 0; got -1"):
        bs.cells.elman(3, 4, input_scale=-1)


@pytest.mark.parametrize("factory", [bs.cells.mlp, bs.cells.elman])
def test_bad_activation(factory):
    with pytest.raises(SettingError, match="`activation` must be one of tanh, relu; got sine"):
        factory(3, 4, activation="sine")


@pytest.mark.parametrize("factory", FACTORIES[1:])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "1"])
def test_bad_spectral_radius(factory, value):
    with pytest.raises(
        SettingError, match=f"`spectral_radius` must be .* of at least 0; got .?{value}"
    ):
        factory(3, 4, spectral_radius=value)


@pytest.mark.parametrize("setting", ["hidden", "outputs"])
def test_bad_readout(setting):
    with pytest.raises(SettingError, match=f"`{setting}` .*; got 0"):
        bs.readouts.linear(**({"hidden": 3, "outputs": 2} | {setting: 0}))


def test_readout_is_affine(rng, key):
    readout = bs.readouts.linear(hidden=400, outputs=5)
    p = readout.init(key)
    np.testing.assert_allclose(np.std(p["W_hq"]), 400**-0.5, rtol=0.1)
    h, b_q = rng.standard_normal((3, 2, 400)), rng.standard_normal(5)
    np.testing.assert_allclose(
        readout.apply(p | {"b_q": b_q}, h), h @ np.asarray(p["W_hq"]) + b_q, atol=1e-13
    )


@pytest.mark.parametrize("name", ["elman_tanh", "elman_relu", "gru", "lstm"])
def test_the_derivative_by_hand_is_that_of_the_update(name, key):
    """At random pre-activations and states, for random adjoints; with a shifted state it is not."""
    factory, _, activation = name.partition("_")
    settings = {"activation": activation} if activation else {}
    cell = getattr(bs.cells, factory)(3, 4, **settings)
    h, adjoint = (
        jax.tree.map(lambda a, k=k: jax.random.normal(k, a.shape), cell.zeros(5))
        for k in jax.random.split(key)
    )
    params = cell.init(key)
    form = cell.affine
    x = form.project(params, jax.random.normal(key, (5, 3)))
    recurred = form.recur(params, h)
    after, pull = jax.vjp(form.update, x, recurred, h)
    stepped, kept = form.derivative.forward(x, recurred, h)
    examples.close(stepped, after)
    examples.close(form.derivative.vjp((kept, h, after), adjoint), pull(adjoint))
    shifted = jax.tree.map(lambda a: a + 0.1 * jnp.sign(a), (kept, h, after))
    if name != "elman_relu":  # whose slope is that of the sign
        with pytest.raises(AssertionError):
            examples.close(form.derivative.vjp(shifted, adjoint), pull(adjoint), 1e-3)
