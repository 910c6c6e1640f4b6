"""lru and min_gru: their equations in NumPy, and how they begin."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import bptt_study as bs
from bptt_study.backprop.forward import states
from bptt_study.validation import SettingError

T, B, D, H = 6, 2, 3, 4


def test_lru_is_a_complex_recurrence(rng, key):
    cell = bs.cells.lru(D, H)
    p = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape), cell.init(key))
    h = rng.standard_normal((B, H)) + 1j * rng.standard_normal((B, H))
    x = rng.standard_normal((T, B, D))
    found = states(cell, p, (jnp.asarray(h.real), jnp.asarray(h.imag)), jnp.asarray(x))
    lam = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    for t in range(T):
        h = lam * h + np.exp(p["gamma_log"]) * (x[t] @ (p["B_re"] + 1j * np.asarray(p["B_im"])))
        np.testing.assert_allclose(found[0][t] + 1j * np.asarray(found[1][t]), h, atol=1e-14)
    read = cell.read(jax.tree.map(lambda a: a[-1], found))
    np.testing.assert_allclose(read, h.real, atol=1e-14)


def test_min_gru_is_its_equation(rng, key):
    cell = bs.cells.min_gru(D, H)
    p = jax.tree.map(lambda a: a + 0.1 * rng.standard_normal(a.shape), cell.init(key))
    h, x = rng.standard_normal((B, H)), rng.standard_normal((T, B, D))
    found = states(cell, p, jnp.asarray(h), jnp.asarray(x))
    for t in range(T):
        a = x[t] @ p["W_xh"] + p["b_h"]
        z = oracles.sigmoid(a[:, :H])
        h = (1 - z) * h + z * a[:, H:]
        np.testing.assert_allclose(found[t], h, atol=1e-14)


@pytest.mark.parametrize("make", [bs.cells.lru, bs.cells.min_gru])
def test_integers_are_one_hot_vectors(make, rng, key):
    cell = make(D, H)
    p, classes = cell.init(key), rng.integers(D, size=B)
    hot = jnp.asarray(oracles.one_hot(classes, D))
    for a, e in zip(
        jax.tree.leaves(cell.step(p, cell.zeros(B), jnp.asarray(classes))),
        jax.tree.leaves(cell.step(p, cell.zeros(B), hot)),
        strict=True,
    ):
        np.testing.assert_allclose(a, e, atol=1e-15)


def eigenvalues(p):
    return np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))


def test_lru_begins_on_a_ring(key):
    p = bs.cells.lru(50, 20_000, r_min=0.5, r_max=0.9, max_phase=1.2).init(key)
    radius, phase = np.abs(eigenvalues(p)), np.angle(eigenvalues(p))
    assert 0.5 <= radius.min() < 0.502 and 0.898 < radius.max() <= 0.9
    assert 0 < phase.min() < 0.01 and 1.19 < phase.max() <= 1.2
    for uniform in ((radius**2 - 0.25) / (0.81 - 0.25), phase / 1.2):  # by area, and by angle
        np.testing.assert_allclose(
            np.quantile(uniform, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.02
        )
    np.testing.assert_allclose(np.exp(p["gamma_log"]), np.sqrt(1 - radius**2), rtol=1e-10)
    for B_part in (p["B_re"], p["B_im"]):
        np.testing.assert_allclose(np.std(B_part), 100**-0.5, rtol=0.01)
    assert abs(np.corrcoef(np.ravel(p["B_re"]), np.ravel(p["B_im"]))[0, 1]) < 0.01
    assert abs(np.corrcoef(radius, phase)[0, 1]) < 0.03


def test_lru_normalises_its_input(key):
    """Of white noise of variance 1, units have the variance 1 in the long run, whatever their radius."""
    p = bs.cells.lru(1, 200, r_min=0.3, r_max=0.95).init(key)
    power = np.exp(2 * p["gamma_log"]) / (1 - np.abs(eigenvalues(p)) ** 2)
    np.testing.assert_allclose(power, 1, rtol=1e-8)


@pytest.mark.parametrize("ring", [{}, {"r_min": 0.9999}, {"max_phase": 1e-3}, {"r_max": 1e-4}])
def test_lru_begins_finite_in_float32(ring):
    with jax.enable_x64(False):
        p = bs.cells.lru(1, 200_000, **ring).init(jax.random.key(0))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(p))
        assert p["nu_log"].dtype == np.float32
        assert np.exp(-np.exp(p["nu_log"])).max() <= 1


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (bs.cells.lru, {"hidden": 0}, "`hidden` must be a whole number of at least 1; got 0"),
        (bs.cells.lru, {"inputs": 1.5}, "`inputs` must be a whole number of at least 1; got 1.5"),
        (bs.cells.lru, {"r_max": 1.1}, "`r_max` must be a number above 0 and at most 1; got 1.1"),
        (bs.cells.lru, {"r_max": 0}, "`r_max` must be a number above 0 and at most 1; got 0"),
        (bs.cells.lru, {"r_min": 1}, r"`r_min` must be .* below r_max \(1\); got 1"),
        (bs.cells.lru, {"r_min": -0.1}, "`r_min` must be a number of at least 0"),
        (bs.cells.lru, {"max_phase": 0}, "`max_phase` must be .* greater than 0; got 0"),
        (bs.cells.min_gru, {"hidden": True}, "`hidden` must be a whole number"),
        (bs.cells.min_gru, {"inputs": 0}, "`inputs` must be a whole number"),
    ],
)
def test_bad_settings(make, settings, said):
    with pytest.raises(SettingError, match=said):
        make(**{"inputs": D, "hidden": H} | settings)
