"""Parameters of 16 bits: in bfloat16 a sum of equal numbers ends at 256 of them, so long sums are float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bptt_study as bs
from bptt_study.backprop.backpropagate import Memory, Truncation, backpropagate
from bptt_study.strategies.strategy_from import strategy_from
from bptt_study.types import Claim

S = bs.strategies
T, B, H, D = 2500, 2, 4, 3
LAW = S.constant(4.0)
pytestmark = pytest.mark.slow


def by_segments(**truncation):
    """The strategy whose segments are one step long."""

    def make(problem):
        def estimate(params, state, batch, key):
            cut = Truncation(**truncation)
            return backpropagate(problem, params, state, batch, cut, Memory(segment=1))

        return strategy_from(problem, estimate, Claim())

    return make


LINKS = jnp.broadcast_to((jnp.arange(T) % 3 > 0).astype(float)[:, None], (T, B))
STRATEGIES = {
    "full": S.full,
    "store_all": by_segments(),
    "windowed": by_segments(window=3, stride=1),
    "per_segment": by_segments(link_weights=LINKS, reach=3),
    "sliding": lambda p: S.fixed(p, 64, 1),
    "chunks": lambda p: S.fixed(p, 8),
    "discounted": lambda p: S.discounted(p, 4.0),
    "randomized": lambda p: S.randomized(p, LAW, draws=2),
    "telescope": lambda p: S.telescope(p, law=S.power_law(4.0)),
    "checkpointed": lambda p: S.checkpointed(p, 10),
    "dni": lambda p: S.dni(p, 4),
    "bp_lambda": lambda p: S.bp_lambda(p, 4),
    "rtrl": lambda p: S.rtrl(p, 1),
    "rtrl_blocks": lambda p: S.rtrl(p, 4),
    "snap": lambda p: S.snap(p, block=1),
    "eprop": lambda p: S.eprop(p, block=1),
    "rflo": lambda p: S.rflo(p, block=1, leak=0.1),
    "pp_prop": lambda p: S.pp_prop(p, 0.9),
    "sketched": lambda p: S.sketched(p, 1),
    "frozen": S.frozen,
    "uoro": S.uoro,
    "uoro_shared": lambda p: S.uoro(p, 2, shared=True),
    "kf_rtrl": S.kf_rtrl,
    "reverse_kf": S.reverse_kf,
    "ok": lambda p: S.ok(p, 1),
    "forward_gradient": lambda p: S.forward_gradient(p, 2),
    "truncated_es": lambda p: S.truncated_es(p, None, hold=2),
    "pes": lambda p: S.pes(p, None, hold=2),
    "nres": lambda p: S.nres(p, None),
}


def of_type(kind, tree):
    is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731
    return jax.tree.map(lambda a: a.astype(kind) if is_float(a) else a, tree)


def off(strategy, params, batch):
    """How far a gradient in bfloat16 is from that in float32 at the same parameters and draws, part by part."""

    def found(kind):
        theta, state = of_type(kind, (params, strategy.init(params, batch.mask.shape[1])))
        estimate, _ = jax.jit(strategy.estimate)(theta, state, batch, jax.random.key(0))
        assert {g.dtype for g in jax.tree.leaves(estimate.grads)} == {jnp.dtype(kind)}
        return [
            np.concatenate([np.ravel(g).astype(float) for g in jax.tree.leaves(part)])
            for part in (estimate.grads["cell"], estimate.grads["readout"])
        ]

    short, long = found(jnp.bfloat16), found(jnp.float32)
    norm = np.linalg.norm
    return [norm(a - b) / norm(b) for a, b in zip(short, long, strict=True) if norm(b)]


@pytest.mark.parametrize("name", STRATEGIES)
def test_gradients_over_many_steps(name):
    cell = bs.cells.elman(inputs=D, hidden=H)
    problem = bs.Problem(cell, bs.readouts.linear(H, D), bs.losses.cross_entropy)
    params = of_type(jnp.bfloat16, problem.init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    x = rng.integers(0, D, (T, B))
    y = np.where(rng.random((T, B)) < 0.7, np.roll(x, 1, 0), rng.integers(0, D, (T, B)))
    batch = bs.Batch(jnp.asarray(x), jnp.asarray(y), jnp.ones((T, B)))
    assert max(off(STRATEGIES[name](problem), params, batch)) < 0.025


# ---- a network that forgets nothing: h_t = h_{t-1} + a - b, where a = b, so that all states are 0


def unforgetting(steps, count):
    """The problem with its parameters in bfloat16, and a batch whose last `count` losses count."""
    ones = {name: jnp.ones(1) for name in "ab"}
    cell = bs.Cell(
        init=lambda key: ones,
        zeros=lambda size: jnp.zeros((size, 1)),
        step=lambda params, h, x: h + params["a"] - params["b"],
        read=lambda h: h,
    )
    problem = bs.Problem(cell, bs.readouts.linear(1, 1), bs.losses.squared_error)
    params = {"cell": ones, "readout": {"W_hq": jnp.ones((1, 1)), "b_q": jnp.zeros(1)}}
    counts = jnp.arange(steps)[:, None] >= steps - count
    nothing = jnp.zeros((steps, 1), jnp.int32)
    batch = bs.Batch(nothing, jnp.ones((steps, 1)), counts.astype(float))
    return problem, of_type(jnp.bfloat16, params), batch


@pytest.mark.parametrize("block", [1, 4])
def test_an_influence_that_only_grows(block):
    """M_t = ± t."""
    problem, params, batch = unforgetting(2048, 1)
    assert max(off(S.rtrl(problem, block), params, batch)) == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda p: S.fixed(p, 600, 1),
        lambda p: S.telescope(p, law=S.constant(1000.0)),
        lambda p: S.pes(p, None, pairs=2),
    ],
    ids=["sliding", "telescope", "pes"],
)
def test_sums_of_many_losses_or_draws(make):
    problem, params, batch = unforgetting(1024, 1024)
    assert max(off(make(problem), params, batch)) < 0.02


def test_scan_over_many_steps():
    """Sums within a block and over blocks, for what `f` closes over, the start and the inputs."""

    def loss(a, start, xs):
        step = lambda h, x: (h + a + x, h + a + x)  # noqa: E731
        return bs.scan(step, start, xs, window=600, stride=1)[1].sum()

    arguments = (*(jnp.zeros(shape, jnp.bfloat16) for shape in ((), (), 1024)),)
    short, long = (
        jax.grad(loss, (0, 1, 2))(*of_type(k, arguments)) for k in ("bfloat16", "float32")
    )
    for a, b in zip(short, long, strict=True):
        np.testing.assert_allclose(np.float32(a), b, rtol=0.01)
