"""Functions with equal numbers and other derivatives: an error, and right cells that are none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bptt_study as bs
from bptt_study.backprop import promises, twice
from bptt_study.validation import SettingError

T, B, D, H = 3, 2, 3, 4
ELMAN = bs.cells.elman(D, H)
FORM = bs.Affine(ELMAN.affine.project, ELMAN.affine.recur, update=lambda x, h, _: jnp.tanh(x + h))
RNG = np.random.default_rng(0)
BATCH = bs.Batch(
    jnp.asarray(RNG.standard_normal((T, B, D))),
    jnp.asarray(RNG.integers(2, size=(T, B))),
    jnp.ones((T, B)),
)


def estimate(cell: bs.Cell):
    problem = bs.Problem(cell, bs.readouts.linear(H, 2), bs.losses.cross_entropy)
    params, strategy = problem.init(jax.random.key(0)), bs.strategies.full(problem)
    return strategy.estimate(params, strategy.init(params, B), BATCH, jax.random.key(0))[0]


def with_vjp(f, vjp):
    """The function f of one array, with another VJP: (its argument, the cotangent) -> a cotangent."""
    g = jax.custom_vjp(f)
    g.defvjp(lambda z: (f(z), z), lambda z, sent: (vjp(z, sent),))
    return g


def of(phi, form: bs.Affine = FORM) -> bs.Affine:
    return form._replace(update=lambda x, h, _: phi(x + h))


def by(step: bs.Affine, form: bs.Affine = FORM) -> bs.Cell:
    """A cell whose step and form are written by two."""
    own = lambda p, h, x: step.step(p, h, x)  # noqa: E731
    return ELMAN._replace(step=own, affine=form)


def centred(a):
    """The identity, whose derivative takes the mean over the batch away."""
    m = a.mean(axis=0)
    return a - (m - lax.stop_gradient(m))


def heaviside(z):
    return (z > 0).astype(z.dtype)


def resetting(flags) -> bs.Cell:
    """Where flags(x) is true, the step alone sends nothing back."""

    def step(params, h, x):
        return FORM.step(params, jnp.where(flags(x)[:, None], lax.stop_gradient(h), h), x)

    return ELMAN._replace(step=step, affine=FORM)


STOPPED = FORM._replace(recur=lambda p, h: lax.stop_gradient(h) @ p["W_hh"])
BIAS = FORM._replace(project=lambda p, x: x @ p["W_xh"] + lax.stop_gradient(p["b_h"]))
SPIKE = with_vjp(heaviside, lambda v, sent: sent / (1 + 10 * jnp.abs(v)) ** 2)
TWICE = of(with_vjp(jnp.tanh, lambda z, sent: 2 * sent))
STACK = bs.cells.stack([ELMAN, bs.cells.elman(H, H)])
PARTS, ALONE = "equal to the parts of `cell.affine`", "a function of each sequence alone"
FAULTS = {
    "a surrogate gradient in the step": (by(of(SPIKE), of(heaviside)), PARTS),
    "stop_gradient in recur": (by(FORM, STOPPED), PARTS),
    "stop_gradient in the step": (by(STOPPED), PARTS),
    "stop_gradient of a parameter": (by(FORM, BIAS), PARTS),
    "custom_vjp in update": (by(FORM, TWICE), PARTS),
    "custom_vjp in the step": (by(TWICE), PARTS),
    "straight through far from 0": (
        by(
            of(with_vjp(lambda z: jnp.clip(z, -30, 30), lambda z, sent: sent)),
            of(lambda z: jnp.clip(z, -30, 30)),
        ),
        PARTS,
    ),
    "a stack's step": (
        STACK._replace(step=lambda p, h, x: STACK.step(p, (lax.stop_gradient(h[0]), h[1]), x)),
        PARTS,
    ),
    "a flag of 1 stops": (resetting(lambda x: x[:, -1] == 1), PARTS),
    "sequences that mix": (
        ELMAN._replace(step=lambda p, h, x: ELMAN.step(p, centred(h), x), affine=None),
        ALONE,
    ),
    "outputs that mix": (ELMAN._replace(read=centred), ALONE),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_another_derivative_is_an_error(fault):
    cell, must = FAULTS[fault]
    with pytest.raises(SettingError, match=rf"cell\.\w+` must be {must}; got .* whose derivative"):
        estimate(cell)


@pytest.mark.parametrize("fault", ["stop_gradient of a parameter", "straight through far from 0"])
def test_float32_hides_no_other_derivative(fault):
    with jax.enable_x64(False):
        given = jax.eval_shape(lambda: (ELMAN.init(jax.random.key(0)), ELMAN.zeros(B)))
        with pytest.raises(SettingError, match=r"whose derivative"):
            promises.prove(FAULTS[fault][0], *given, jnp.zeros((T, B, D)))


def test_a_symbol_that_stops():
    wide = bs.cells.elman(28, H)
    cell = resetting(lambda x: x == 20)._replace(init=wide.init)
    with pytest.raises(SettingError, match=r"whose derivative, at the ids 20, 21, 22, 23, differs"):
        promises.prove(cell, wide.init(jax.random.key(0)), ELMAN.zeros(B), jnp.zeros((T, B), int))


def through(project=lambda x: x, recur=lambda h: h, form: bs.Affine = FORM) -> bs.Affine:
    """The form behind functions of x and of h."""
    return bs.Affine(
        lambda p, x: form.project(p, project(x)),
        form.recur,
        lambda x, h, before: form.update(x, h, before) + 0.1 * recur(before),
    )


def larger(z):
    return jnp.maximum(z, 0)


GOOD = {
    "one surrogate gradient": by(of(SPIKE), of(SPIKE)),
    "relu and max": by(of(jax.nn.relu), of(larger)),
    "relu and max of x": by(through(jax.nn.relu), through(larger)),
    "relu and max of h": by(through(recur=jax.nn.relu), through(recur=larger)),
    "relu and where": by(of(jax.nn.relu), of(lambda z: jnp.where(z >= 0, z, 0))),
    "clip and min": by(
        of(lambda z: jnp.clip(z, 0, 1)), of(lambda z: jnp.minimum(jnp.maximum(z, 0), 1))
    ),
    "clip and min of h": by(
        through(recur=lambda h: jnp.clip(h, -1, 1)),
        through(recur=lambda h: jnp.minimum(jnp.maximum(h, -1), 1)),
    ),
    "abs and a root": by(through(jnp.abs, jnp.abs), through(*[lambda z: jnp.sqrt(z * z)] * 2)),
    "a root that is nan below 0": by(of(lambda z: jnp.sqrt(z)), of(lambda z: z**0.5)),
    "a root behind where": by(
        of(lambda z: jnp.where(z > 0, jnp.sqrt(z), 0)),
        of(lambda z: jnp.where(z > 0, jnp.sqrt(jnp.where(z > 0, z, 1)), 0)),
    ),
    "a sigmoid that overflows": by(of(lambda z: 1 / (1 + jnp.exp(-z))), of(jax.nn.sigmoid)),
    "a steep function": by(of(lambda z: jnp.sin(300 * z)), of(lambda z: jnp.sin(z * 300.0))),
    "products in another order": by(
        FORM._replace(
            recur=lambda p, h: jnp.sum(h[..., :, None] * p["W_hh"], axis=-2),
            update=lambda x, h, _: jnp.sin(300 * (h + x)),
        ),
        of(lambda z: jnp.sin(300 * z)),
    ),
}


@pytest.mark.parametrize("wide", [True, False], ids=["", "float32"])
@pytest.mark.parametrize("name", GOOD)
def test_right_cells_that_are_written_in_two_ways(name, wide, monkeypatch):
    """At a kink, and where numbers overflow, right functions may have different derivatives, or none."""
    monkeypatch.setattr(twice, "SETS", "")  # compares the derivatives of all functions
    with jax.enable_x64(wide):
        given = jax.eval_shape(lambda: (ELMAN.init(jax.random.key(0)), ELMAN.zeros(B)))
        for inputs in (jnp.zeros((T, B, D)), jnp.zeros((T, B), int)):
            if inputs.ndim > 2 or GOOD[name].affine.project is FORM.project:
                promises.prove(GOOD[name], *given, inputs)


def test_a_step_without_a_derivative():
    """`lax.while_loop` has no VJP, and perturbations need none."""

    def step(params, h, x):
        once = lambda now: (now[0] + 1, FORM.step(params, now[1], x))  # noqa: E731
        return SPIKE(lax.while_loop(lambda now: now[0] < 1, once, (0, h))[1])

    cell = ELMAN._replace(step=step, affine=None)
    promises.prove(cell, ELMAN.init(jax.random.key(0)), ELMAN.zeros(B), BATCH.inputs)
