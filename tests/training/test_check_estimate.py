"""A strategy's first estimate before a run: what JAX would broadcast, or sum, is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_study as bs
from bptt_study.training.check_estimate import check_estimate
from bptt_study.validation import SettingError

T, B = 6, 4
PROBLEM = bs.Problem(bs.cells.elman(5, 3), bs.readouts.linear(3, 5), bs.losses.cross_entropy)
SYMBOLS = jax.random.randint(jax.random.key(0), (T, B), 0, 5)
BATCH = bs.Batch(SYMBOLS, SYMBOLS, jnp.ones((T, B)).at[:2].set(0))
FULL = bs.strategies.full(PROBLEM)


def own(change, **fields):
    """A strategy whose estimate and state are those of full BPTT, changed."""

    def estimate(*arguments):
        return change(*FULL.estimate(*arguments))

    return FULL._replace(estimate=estimate, **fields)


def grads(f):
    return lambda e, s: (e._replace(grads=jax.tree.map(f, e.grads)), s)


def loss(f):
    return lambda e, s: (e._replace(loss=f(e.loss)), s)


def metrics(**others):
    return lambda e, s: (e._replace(metrics=others), s)


W_HH = (
    r"a gradient like the parameters: gradient\['cell'\]\['W_hh'\] float64\[3, 3\]; got one with "
)
WRONG = {
    "one column": (grads(lambda g: g[..., :1]), rf"{W_HH}gradient.* float64\[3, 1\]\."),
    "a number": (grads(jnp.mean), rf"{W_HH}gradient.* float64\[\]\."),
    "whole numbers": (grads(lambda g: g.astype(int)), rf"{W_HH}gradient.* int64\[3, 3\]\."),
    "16 bits": (grads(lambda g: g.astype("float16")), rf"{W_HH}gradient.* float16\[3, 3\]\."),
    "none": (grads(lambda g: None), rf"{W_HH}no gradient\['cell'\]\['W_hh'\]"),
    "a part": (
        lambda e, s: (e._replace(grads={"cell": e.grads["cell"]}), s),
        r"; got one with no gradient\['readout'\]",
    ),
    "more": (
        lambda e, s: (e._replace(grads=e.grads | {"x": e.loss}), s),
        r"like the parameters: no gradient\['x'\]; got one with gradient\['x'\] float64\[\]",
    ),
    "a loss for each sequence": (
        loss(lambda a: jnp.full(B, a)),
        r"a loss of one float.*; got one with the loss float64\[4\]",
    ),
    "a whole loss": (loss(lambda a: a.astype(int)), r"one float.* got one with the loss int64\[\]"),
    "two losses": (loss(lambda a: (a, a)), r"a loss of one float"),
    "a sum": (
        loss(lambda a: a * 16),
        r"the mean loss of a token that counts, 1\.\d+ in .*; got one with the loss 2\d\.\d+\.",
    ),
    "a mean over masked tokens": (loss(lambda a: a * 2 / 3), "the mean loss of a token"),
    "norms [B, T]": (
        metrics(adjoint_norms=jnp.ones((B, T))),
        r"adjoint_norms \[T, B\] = \[6, 4\], floats; got one with adjoint_norms float64\[4, 6\]",
    ),
    "three norms": (metrics(adjoint_norms=jnp.ones(3)), r"adjoint_norms \[T, B\]"),
    "cuts [T]": (metrics(cuts=jnp.zeros(T, bool)), r"cuts \[T, B\] = \[6, 4\], flags"),
    "cuts of floats": (
        metrics(cuts=jnp.zeros((T, B))),
        r"flags; got one with cuts float64\[6, 4\]",
    ),
    "no metrics": (lambda e, s: (e._replace(metrics=None), s), r"dict .*; got .* a NoneType"),
    "a longer state": (
        lambda e, s: (e, jnp.concatenate([s, s])),
        r"a state like the one before: state float64\[4, 3\]; got one with state float64\[8, 3\]",
    ),
    "another state": (lambda e, s: (e, {"h": s}), r"got one with no state"),
    "the loss and the gradient": (lambda e, s: (e.loss, e.grads), "an Estimate and a state"),
    "one thing": (lambda e, s: e, "an Estimate and a state"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_estimate_that_training_would_misread(name):
    change, said = WRONG[name]
    with pytest.raises(SettingError, match=rf"^`strategy` must be one whose estimate has .*{said}"):
        check_estimate(PROBLEM, own(change), BATCH)


def test_a_fresh_state_is_drawn_from_nowhere():
    """The state of fresh sequences differed from trace to trace."""
    init = lambda params, size: jnp.asarray(np.random.default_rng().normal(size=(size, 3)))  # noqa: E731
    with pytest.raises(SettingError, match=r"`strategy\.init` must be a function of its arguments"):
        check_estimate(PROBLEM, own(lambda e, s: (e, s), init=init), BATCH)


def test_a_renewed_state_is_like_the_one_before():
    with pytest.raises(SettingError, match=r"a renewed state like the one before"):
        check_estimate(PROBLEM, own(lambda e, s: (e, s), renew=lambda p, s: s[:2]), BATCH)


@pytest.mark.parametrize(
    "change",
    [
        lambda e, s: (e, s),
        metrics(),
        metrics(adjoint_norms=jnp.ones((T, B)), cuts=jnp.zeros((T, B), bool), mine=jnp.ones(3)),
        loss(lambda a: a * (1 + 1e-13)),
    ],
)
def test_an_estimate_of_ones_own_passes(change):
    check_estimate(PROBLEM, own(change), BATCH)
    check_estimate(PROBLEM, own(change), BATCH._replace(mask=jnp.zeros((T, B))))


def test_losses_that_cancel_are_held_to_their_sizes():
    """Losses of 0.7 - 0.7: the rounding of the mean is no fault, however small the mean."""
    signs = lambda o, y: bs.losses.cross_entropy(0 * o, y) * jnp.where(y % 2 == 0, 1, -1)  # noqa: E731
    problem = PROBLEM._replace(loss=signs)
    even = BATCH._replace(targets=jnp.arange(T * B).reshape(T, B) % 2)
    full = bs.strategies.full(problem)

    def estimate(*arguments):
        found, state = full.estimate(*arguments)
        return found._replace(loss=found.loss + 1e-16), state

    check_estimate(problem, full._replace(estimate=estimate), even)


def test_an_estimate_that_fails_is_left_to_training():
    """Training shows it with its place."""
    check_estimate(PROBLEM, own(lambda e, s: 1 / 0), BATCH)


def test_what_has_passed_is_traced_once():
    traced = []
    strategy = own(lambda e, s: (traced.append(1), (e, s))[1])
    for _ in range(3):
        check_estimate(PROBLEM, strategy, BATCH)
    assert len(traced) == 1


@pytest.mark.parametrize("name", ["pes", "uoro", "rtrl", "forward_gradient"])
def test_estimators_of_every_kind_pass(name):
    check_estimate(PROBLEM, getattr(bs.strategies, name)(PROBLEM), BATCH)
