"""`bs.testing.check_cell`: cells that hold, and one planted fault for each check that a run does not do."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_any_cell import CELLS

import bptt_study as bs
from bptt_study.backprop.promises import vouch
from bptt_study.backprop.repeats import say
from bptt_study.testing.errors import CheckError

D, H = 3, 4
ELMAN, FORM = bs.cells.elman(D, H), bs.cells.elman(D, H).affine


def stepping(step, **parts):
    return ELMAN._replace(affine=None, step=step, **parts)


def numbered(p, x):
    """As project does it, and with a step's number where there are several."""
    numbers = jnp.arange(len(x))[:, None, None] if x.ndim == 3 else 0
    return FORM.project(p, x) + p["b_h"] * numbers


def drawn_elsewhere(key):
    draw = lambda leaf: jnp.asarray(np.random.default_rng().normal(size=leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, jax.eval_shape(ELMAN.init, key))


def frozen(p, x):
    """As project does it, and without a derivative where there are several steps."""
    return FORM.project(jax.lax.stop_gradient(p) if x.ndim == 3 else p, x)


def of_form(**parts):
    affine = FORM._replace(derivative=None, **parts)
    return ELMAN._replace(step=affine.step, affine=affine)


@pytest.mark.parametrize("name", ["gru", "lru", "gru_and_step_only", "dropout", "counting"])
def test_cells_that_hold(name):
    bs.testing.check_cell(CELLS[name])


def test_a_cell_that_is_nan_at_random_numbers():
    """Where a Cholesky factor is nan, the parameters that `init` makes are tried."""
    recur = lambda p, h: h @ jnp.linalg.cholesky(p["W_hh"]).T  # noqa: E731
    init = lambda key: ELMAN.init(key) | {"W_hh": jnp.eye(H) + 0.5}  # noqa: E731
    cell = of_form(recur=recur)._replace(init=init)
    bs.testing.check_cell(cell, D)
    other = of_form(recur=recur, project=numbered)._replace(init=init)
    with pytest.raises(CheckError, match=r"cell.affine on \[T, B, …\]"):
        bs.testing.check_cell(other, D)


def of_float32(cell):
    """A cell as flax makes it: its parameters are float32 whatever `jax_enable_x64` says."""
    return cell._replace(init=lambda key: jax.tree.map(jnp.float32, cell.init(key)))


def in_float32(cell):
    """A cell that computes in float32 whatever it is given."""
    short = partial(jax.tree.map, jnp.float32)
    return of_float32(cell)._replace(
        zeros=lambda size: jnp.float32(cell.zeros(size)),
        step=lambda p, h, x: cell.step(*map(short, (p, h, x))),
        affine=None,
    )


@pytest.mark.parametrize("kind", [of_float32, in_float32])
def test_parameters_of_float32(kind, monkeypatch):
    """They were refused for the rounding of float32. The control: a derivative that is off by a thousandth."""
    bs.testing.check_cell(kind(ELMAN), D)
    full = bs.strategies.full

    def off(problem):
        honest = full(problem)

        def estimate(*given):
            found, state = honest.estimate(*given)
            return found._replace(grads=jax.tree.map(lambda g: 1.001 * g, found.grads)), state

        return honest._replace(estimate=estimate)

    monkeypatch.setattr(bs.strategies, "full", off)
    with pytest.raises(CheckError, match=r"full BPTT's \(loss, gradient\)\[1\].* is off by"):
        bs.testing.check_cell(kind(ELMAN), D)


def test_inputs_are_found_or_given():
    symbols = stepping(lambda params, h, x: jnp.tanh(params["W_xh"][x] + h @ params["W_hh"]))
    symbols = symbols._replace(init=lambda key: {k: ELMAN.init(key)[k] for k in ("W_xh", "W_hh")})
    for inputs in (None, np.array([0, 2, 1, 1])):
        bs.testing.check_cell(symbols, inputs)
    bs.testing.check_cell(ELMAN, inputs=D)
    bs.testing.check_cell(ELMAN, inputs=np.ones((2, D), np.float32))
    with pytest.raises(CheckError, match=r"takes no inputs of 1, 3, 4 features"):
        bs.testing.check_cell(stepping(lambda params, h, x: 1 / 0))
    with pytest.raises(CheckError, match=r"inputs are \[B, D\] or \[B\]; got \(\)"):
        bs.testing.check_cell(ELMAN, inputs=np.float32(3))
    with pytest.raises(CheckError, match=r"step with inputs float64\[3, 5\]: TypeError"):
        bs.testing.check_cell(ELMAN, inputs=5)


FAULTS = {
    "no cell": (FORM, "a bptt_study.Cell; got a Affine"),
    "recur": (of_form(recur=lambda p, h: jnp.tanh(h @ p["W_hh"])), "recur` must be affine in h"),
    "zeros": (
        ELMAN._replace(zeros=lambda size: jnp.zeros((2, H))),
        r"zeros\(3\) is float64\[2, 4\]; zeros\(1\) is float64\[2, 4\]",
    ),
    "zeros of several sizes": (
        ELMAN._replace(zeros=lambda size: jnp.full((size, H), size - 1.0)),
        "`cell.zeros` must be the same for each sequence; got",
    ),
    "zeros that tell rows apart": (
        ELMAN._replace(zeros=lambda size: jnp.arange(size)[:, None] * jnp.ones(H)),
        "`cell.zeros` must be the same for each sequence; got",
    ),
    "zeros that are drawn": (
        ELMAN._replace(
            zeros=lambda size: jnp.asarray(np.random.default_rng().normal(size=(size, H)))
        ),
        "`cell.zeros` must be a function of its arguments alone; got",
    ),
    "init that draws without its key": (
        ELMAN._replace(init=drawn_elsewhere),
        "`cell.init` must be a function of its arguments alone; got one whose numbers differ",
    ),
    "init of a layer": (
        bs.cells.stack([ELMAN._replace(init=drawn_elsewhere)]),
        "`cell.init` must be a function of its arguments alone",
    ),
    "init of a layer without a form": (
        bs.cells.stack([ELMAN._replace(init=drawn_elsewhere, affine=None)]),
        "`cell.init` must be a function of its arguments alone",
    ),
    "read": (ELMAN._replace(read=lambda h: h[..., 0]), r"read returns float64\[3\]; .*\[3, H\]"),
    "a parameter that nothing uses": (
        ELMAN._replace(init=lambda key: ELMAN.init(key) | {"spare": jnp.ones(2)}),
        r"params\['spare'\] float64\[2\]: acts on no state, so that its gradient is 0",
    ),
    "parameters that nothing uses": (
        ELMAN._replace(init=lambda key: ELMAN.init(key) | {"a": jnp.ones(2), "b": jnp.ones(3)}),
        r"params\['b'\] float64\[3\]: act on no state, so that their gradients are 0",
    ),
    "float32": (
        stepping(lambda p, h, x: ELMAN.step(p, h, x) + jnp.zeros(H, jnp.float64)),
        r"a state of float32\[3, 4\] to float64\[3, 4\]",
    ),
    "x64": (
        ELMAN._replace(init=lambda key: jax.tree.map(np.float64, WEIGHTS)),
        r"make .*float64\[.* without jax_enable_x64",
    ),
    "leading axes": (
        of_form(project=lambda p, x: numbered(p, x)),
        r"on \[T, B, …\]",
    ),
    "the derivative on leading axes": (
        of_form(project=frozen),
        r"the derivative of cell.affine on \[T, B, …\]",
    ),
}
WEIGHTS = jax.tree.map(np.asarray, ELMAN.init(jax.random.key(0)))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault):
    cell, said = FAULTS[fault]
    with pytest.raises(CheckError, match=said):
        bs.testing.check_cell(cell)


@pytest.mark.parametrize(
    ("init", "lines"),
    [
        (lambda key: ELMAN.init(key), 0),
        (lambda key: ELMAN.init(jax.random.key(3)), 1),
        (lambda key: jax.tree.map(jnp.ones_like, ELMAN.init(key)), 0),
        (lambda key: ELMAN.init(jax.random.key(3)) | {"W_hh": ELMAN.init(key)["W_hh"]}, 0),
    ],
)
def test_a_line_says_that_init_ignores_its_key(init, lines, caplog):
    say.cache_clear()
    for _ in range(2):
        bs.testing.check_cell(ELMAN._replace(init=init), D)
    assert [r.getMessage() for r in caplog.records] == lines * [
        "cell.init gives the same weights for every key, so all seeds start from them"
    ]


def test_importing_the_checks_stays_light():
    code = "import sys, bptt_study; bptt_study.testing; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_the_gradient_is_the_last_check(monkeypatch):
    """What the checks of the promises would not notice, full BPTT's gradient shows."""
    module = sys.modules["bptt_study.testing.check_cell"]
    monkeypatch.setattr(module, "prove", lambda *_: None)
    cell = vouch(of_form(recur=lambda p, h: jnp.tanh(h @ p["W_hh"])))
    with pytest.raises(CheckError, match=r"full BPTT's \(loss, gradient\)\[1\].* is off by"):
        bs.testing.check_cell(cell)
