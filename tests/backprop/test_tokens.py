"""Readout and loss act on each token alone; estimates call them on parts, so one that does not is an error."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_study as bs
from bptt_study.validation import SettingError

T, B, D, H, Q = 6, 3, 2, 4, 3
RNG = np.random.default_rng(0)
BATCH = bs.Batch(
    jnp.asarray(RNG.standard_normal((T, B, D))),
    jnp.asarray(RNG.standard_normal((T, B, Q))),
    jnp.ones((T, B)),
)
SQUARED = bs.losses.squared_error
LINEAR = bs.readouts.linear(H, Q)
PROBLEM = bs.Problem(bs.cells.elman(D, H), LINEAR, SQUARED)


def estimate(problem=PROBLEM, batch=BATCH, jit=False):
    params, strategy = problem.init(jax.random.key(0)), bs.strategies.full(problem)
    run = jax.jit(strategy.estimate) if jit else strategy.estimate
    return run(params, strategy.init(params, B), batch, jax.random.key(0))[0]


def reading(apply):
    return PROBLEM._replace(readout=LINEAR._replace(apply=apply))


def losing(loss):
    return PROBLEM._replace(loss=loss)


def scaled(factor):
    """The loss, and its derivative times factor(targets)."""
    loss = jax.custom_vjp(SQUARED)
    vjp = lambda given, sent: jax.vjp(SQUARED, *given)[1](sent * factor(given[1]))  # noqa: E731
    loss.defvjp(lambda *given: (SQUARED(*given), given), vjp)
    return losing(loss)


def centred(h):
    """The identity, whose derivative takes the mean over the tokens away."""
    m = h.mean(axis=(0, 1))
    return h - (m - jax.lax.stop_gradient(m))


FAULTS = {
    "a derivative that is divided by their number": (
        scaled(lambda y: 1 / y[..., 0].size),
        r"problem\.loss` must be a function of each token alone; got .* whose derivative differs",
    ),
    "a derivative that is divided by the number that counts": (
        scaled(lambda y: jnp.where((y == 255).any(), 0.5, 1)),
        r"problem\.loss` must be a function of each token alone; got .* whose derivative differs",
    ),
    "a readout whose derivative is centred": (
        reading(lambda p, h: LINEAR.apply(p, centred(h))),
        r"problem\.readout\.apply` must be a function of each token .* whose derivative differs",
    ),
    "weights over time": (
        losing(lambda o, y: SQUARED(o, y) * 0.9 ** jnp.arange(len(o))[:, None]),
        r"problem\.loss` must be a function of each token alone.* belong into the mask",
    ),
    "scaled by their mean where it is large": (
        losing(lambda o, y: SQUARED(o, y) / jnp.maximum(1, SQUARED(o, y).mean() / 4)),
        r"problem\.loss` must be a function of each token alone",
    ),
    "the step to the next output": (
        losing(lambda o, y: SQUARED(o, y) + SQUARED(o, jnp.append(o[1:], o[-1:], axis=0))),
        r"problem\.loss` must be a function of each token alone",
    ),
    "what is still to come": (
        losing(lambda o, y: jnp.cumsum(SQUARED(o, y)[::-1], axis=0)[::-1]),
        r"problem\.loss` must be a function of each token alone",
    ),
    "tokens 20 steps later": (
        losing(lambda o, y: SQUARED(o, y).at[:-20].add(SQUARED(o, y)[20:])),
        r"problem\.loss` must be a function of each token alone",
    ),
    "the sequences behind": (
        losing(lambda o, y: jnp.cumsum(SQUARED(o, y)[:, ::-1], axis=1)[:, ::-1]),
        r"problem\.loss` must be a function of each token alone",
    ),
    "centred over the batch": (
        losing(lambda o, y: SQUARED(o - o.mean(axis=1, keepdims=True), y)),
        r"problem\.loss` must be a function of each token alone",
    ),
    "divided by their number": (
        losing(lambda o, y: SQUARED(o, y) / len(o)),
        r"problem\.loss` must be a function of each token alone",
    ),
    "a readout of what others are": (
        reading(lambda p, h: LINEAR.apply(p, h - h.mean(axis=0))),
        r"problem\.readout\.apply` must be a function of each token alone",
    ),
    "a readout that is nan at random numbers": (
        PROBLEM._replace(
            readout=bs.Readout(
                lambda key: LINEAR.init(key) | {"S": jnp.eye(Q)},
                lambda p, h: (h - h.mean(axis=0)) @ p["W_hq"] @ jnp.linalg.cholesky(p["S"]),
            )
        ),
        r"problem\.readout\.apply` must be a function of each token alone",
    ),
    "an array of weights": (
        losing(lambda o, y: SQUARED(o, y) * jnp.ones((T, 1))),
        r"problem\.loss` must be .* fails for .*\[40, 3, 3\].* belong into the mask",
    ),
    "hits": (
        losing(lambda o, y: jnp.argmax(o, axis=-1) == jnp.argmax(y, axis=-1)),
        r"problem\.loss` must be .* real numbers .*; got one that returns bool",
    ),
    "whole numbers": (
        losing(lambda o, y: jnp.argmax(o, axis=-1)),
        r"problem\.loss` must be .* real numbers",
    ),
    "complex numbers": (
        losing(lambda o, y: SQUARED(o, y) + 0j),
        r"problem\.loss` must be .* real numbers .*; got one that returns complex",
    ),
    "nothing": (losing(lambda o, y: None), r"problem\.loss` must be .* one loss per token"),
    "two": (losing(lambda o, y: (SQUARED(o, y), 1.0)), r"problem\.loss` must be .* one loss"),
    "one in an axis of its own": (
        losing(lambda o, y: SQUARED(o, y)[..., None]),
        r"problem\.loss` must be .* one loss per token.*; got .*\[6, 3, 1\]",
    ),
    "one for each output": (
        losing(lambda o, y: (o - y) ** 2),
        r"problem\.loss` must be .* one loss per token.*; got .*\[6, 3, 3\]",
    ),
}


@pytest.mark.parametrize("jit", [False, True], ids=["", "jit"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_token_that_depends_on_others(fault, jit):
    problem, said = FAULTS[fault]
    with pytest.raises(SettingError, match=said):
        estimate(problem, jit=jit)


def ignoring(marked, loss):
    """The mean over the tokens that are not marked, times the number of tokens."""

    def run(o, y):
        w = ~marked(y)
        losses = loss(o, jnp.where(w, y, 0)) * (w if w.ndim == 2 else w[..., 0])
        return losses * w.size / w.sum()

    return run


CLASSES = BATCH._replace(targets=jnp.argmax(BATCH.targets, axis=-1))
IGNORED = {
    "-100": (lambda y: y == -100, CLASSES),
    "-1": (lambda y: y < 0, CLASSES),
    "77": (lambda y: y == 77, CLASSES),
    "nan": (jnp.isnan, BATCH),
    "0": (lambda y: y == 0, BATCH),
    "-9999": (lambda y: y == -9999, BATCH),
}


@pytest.mark.parametrize("name", IGNORED)
def test_a_loss_that_counts_the_tokens_it_does_not_ignore(name):
    """It would be renormalised in each part of the batch."""
    marked, batch = IGNORED[name]
    loss = bs.losses.cross_entropy if batch is CLASSES else SQUARED
    with pytest.raises(SettingError, match=r"problem\.loss` .* token alone; .* beside targets of"):
        estimate(losing(ignoring(marked, loss)), batch)
    # without a count, each token may be ignored
    alone = lambda o, y: jnp.where(marked(y).reshape(*y.shape[:2], -1)[..., 0], 0, loss(o, y))  # noqa: E731
    assert jnp.isfinite(estimate(losing(alone), batch).loss)


def test_functions_of_each_token_pass():
    """With weights that belong to the token, and of classes."""
    half = 0.5 * estimate().loss
    np.testing.assert_allclose(estimate(losing(lambda o, y: 0.5 * SQUARED(o, y))).loss, half)
    by_class = lambda o, y: bs.losses.cross_entropy(o, y) * jnp.array([1.0, 2.0, 3.0])[y]  # noqa: E731
    classes = BATCH._replace(targets=jnp.argmax(BATCH.targets, axis=-1))
    assert jnp.isfinite(estimate(losing(by_class), classes).loss)


def tied(params):
    """A readout by the weights of the cell."""
    return reading(lambda p, h: h @ params["cell"]["W_xh"].T[:, :1] + p["b_q"])


def decayed(params):
    squares = lambda: sum(jnp.sum(a**2) for a in jax.tree.leaves(params))  # noqa: E731
    return losing(lambda o, y: SQUARED(o, y) + squares())


CLOSED = {"problem.readout.apply": tied, "problem.loss": decayed}
STRATEGIES = {
    "full": bs.strategies.full,
    "adaptive": lambda p: bs.strategies.adaptive(p, 0.5, windows=(2, 4)),
    "telescope": lambda p: bs.strategies.telescope_constant(p, 4),
    "dni": lambda p: bs.strategies.dni(p, 3),
    "rtrl": bs.strategies.rtrl,
    "pes": bs.strategies.pes,
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("setting", CLOSED)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.grad], ids=["", "jit", "grad"])
def test_a_function_that_closes_over_the_parameters(setting, name, transform):
    """The loss would be right, and that path's part of the gradient would be missing."""

    def loss(params):
        strategy = STRATEGIES[name](CLOSED[setting](params))
        state = STRATEGIES[name](PROBLEM).init(params, B)
        return strategy.estimate(params, state, BATCH, jax.random.key(0))[0].loss

    kind = "a parameter" if transform(loss) is loss else "a traced value"
    with pytest.raises(SettingError, match=f"`{setting}` must be .*; got one .* over {kind}"):
        transform(loss)(PROBLEM.init(jax.random.key(0)))


def test_a_function_that_closes_over_a_traced_value():
    """It may be made of the parameters."""

    def scaled(a):
        return estimate(losing(lambda o, y: a * SQUARED(o, y))).loss

    assert jnp.isfinite(scaled(0.5))
    for transform in (jax.jit, jax.grad):
        with pytest.raises(SettingError, match=r"problem\.loss` .* over a traced value"):
            transform(scaled)(0.5)


def test_the_squared_error_of_complex_numbers_is_their_distance():
    o, y = RNG.standard_normal((2, 5, 3)) + 1j * RNG.standard_normal((2, 5, 3))
    found = SQUARED(jnp.asarray(o)[None], jnp.asarray(y)[None])
    np.testing.assert_allclose(found[0], 0.5 * (np.abs(o - y) ** 2).sum(-1), rtol=1e-14)


@pytest.mark.parametrize(
    ("shape", "weight"),
    [
        ((60, 2), lambda t, b: t >= 50),
        ((60, 2), lambda t, b: t < 45),
        ((3, 12), lambda t, b: b < 9),
        ((41, 1), lambda t, b: 1 / jnp.where(len(t) > 40, 2, 1)),
    ],
)
@pytest.mark.parametrize("where", ["loss", "readout"])
def test_a_weight_that_only_far_places_have_is_refused(shape, weight, where):
    """A burn-in of 50 steps passed, and `checkpointed` gave a loss of 0. The control: a fair function."""

    def weighed(a):
        t, b = jnp.arange(a.shape[0])[:, None], jnp.arange(a.shape[1])
        return (weight(t, b) * jnp.ones(a.shape[:2])).reshape(*a.shape[:2], *[1] * (a.ndim - 2)) * a

    rng = np.random.default_rng(1)
    inputs, targets = (jnp.asarray(rng.standard_normal((*shape, n))) for n in (D, Q))
    batch = bs.Batch(inputs, targets, jnp.ones(shape))
    make = {
        "loss": lambda f: losing(lambda o, y: f(SQUARED(o, y))),
        "readout": lambda f: reading(lambda p, h: f(LINEAR.apply(p, h))),
    }[where]
    name = {"loss": r"problem\.loss", "readout": r"problem\.readout\.apply"}[where]
    for problem, fair in ((make(weighed), False), (make(lambda a: 2 * a), True)):
        params, strategy = problem.init(jax.random.key(0)), bs.strategies.checkpointed(problem)
        run = lambda: strategy.estimate(params, strategy.init(params, shape[1]), batch, None)  # noqa: B023, E731
        if fair:
            assert np.isfinite(run()[0].loss)
        else:
            with pytest.raises(
                SettingError, match=name + r"` must be a function of each token .* place in"
            ):
                run()


LONG = bs.Batch(
    *(jnp.concatenate([a] * 10) for a in BATCH)
)  # more steps than are tried with others


@pytest.mark.parametrize("fault", ["nothing", "two"])
def test_a_loss_that_returns_no_array_is_refused_in_a_long_batch_too(fault):
    problem, said = FAULTS[fault]
    with pytest.raises(SettingError, match=said):
        estimate(problem, LONG)


def test_a_readout_of_no_numbers_in_a_long_batch():
    """It has a bias alone."""
    cell = PROBLEM.cell._replace(read=lambda h: h[:, :0])
    bias = lambda p, h: jnp.sum(h, axis=-1, keepdims=True) + p["b"]  # noqa: E731
    readout = bs.Readout(lambda key: {"b": jnp.ones(Q)}, bias)
    found = estimate(bs.Problem(cell, readout, SQUARED), LONG)
    np.testing.assert_allclose(
        found.loss, SQUARED(jnp.ones_like(LONG.targets), LONG.targets).mean()
    )


@pytest.mark.parametrize(
    "weigh",
    [
        lambda y: y > 2,
        lambda y: jnp.isin(y, jnp.array([4, 5])),
        lambda y: jnp.array([0, 0, 0, 1.0, 1, 2])[y],
    ],
)
def test_a_mean_over_the_tokens_of_some_classes_is_refused(weigh):
    """As a weighted mean is; the random classes were 0 and 1. The control: the weights, but not their sum."""
    rng = np.random.default_rng(1)
    classes = jnp.asarray(rng.integers(0, 6, (T, B)))
    batch = bs.Batch(BATCH.inputs, classes, BATCH.mask)
    base = bs.Problem(bs.cells.elman(D, H), bs.readouts.linear(H, 6), bs.losses.cross_entropy)

    def loss(by_sum, o, y):
        w = weigh(y).astype(o.dtype)
        share = w.size / jnp.maximum(w.sum(), 1) if by_sum else 1.0
        return bs.losses.cross_entropy(o, y) * w * share

    assert np.isfinite(estimate(base._replace(loss=partial(loss, False)), batch).loss)
    with pytest.raises(
        SettingError, match=r"problem\.loss` must be a function of each token alone"
    ):
        estimate(base._replace(loss=partial(loss, True)), batch)
