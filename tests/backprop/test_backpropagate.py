"""The forward scan and the backward recursion against the table of single losses, built by hand."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from support import agrees, by_hand, flat_grads, flat_state, how, table_of

from bptt_study.backprop.backpropagate import backpropagate
from bptt_study.backprop.forward import evaluate, states
from bptt_study.backprop.schedules import per_segment
from bptt_study.testing import examples
from bptt_study.validation import SettingError

T, B = examples.T, examples.B
CELLS = list(examples.CELLS)


def estimate(ex, **settings):
    """One program: op by op its loops alone would compile for as long (test_numbers has it so)."""
    weights = settings.pop("link_weights", None)
    run = lambda *a, w: backpropagate(ex.problem, *a, *how(link_weights=w, **settings))  # noqa: E731
    return jax.jit(run)(ex.params, ex.state, ex.batch, w=weights)


@pytest.mark.parametrize("name", CELLS)
def test_forward_states(name):
    ex = examples.example(name)
    found = states(ex.problem.cell, ex.params["cell"], ex.state, ex.batch.inputs)
    np.testing.assert_allclose(flat_state(found), table_of(name).states, atol=1e-14)


PAIRS = [(k1, k2) for k2 in range(1, T + 3) for k1 in range(1, k2 + 1)]
SOME = np.random.default_rng(1).permutation(len(PAIRS))[:10]


@pytest.mark.parametrize(("stride", "window"), [PAIRS[n] for n in sorted(SOME)])
def test_tbptt_of_random_settings(stride, window):
    """T = 7 is a multiple of few strides."""
    actual, _ = estimate(examples.example("elman_tanh"), stride=stride, window=window)
    agrees(actual, table_of("elman_tanh"), oracles.tbptt(T, stride, window))


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(("stride", "window"), [(1, 3), (2, 5), (3, 3)])
def test_tbptt_on_every_cell(name, stride, window):
    """Negative control: settings off by one are told apart."""
    actual, last = estimate(examples.example(name), stride=stride, window=window)
    agrees(actual, table_of(name), oracles.tbptt(T, stride, window))
    np.testing.assert_allclose(flat_state(last), table_of(name).states[-1], atol=1e-14)
    cell, _ = flat_grads(actual)
    neighbours = [(stride, window + 1), (stride + 1, window + 1), (max(1, stride - 1), window - 1)]
    for k1, k2 in neighbours if name != "mlp" else ():
        wrong = oracles.weighted(table_of(name), oracles.tbptt(T, k1, k2))
        assert np.abs(cell - wrong).max() > 1e-4 * np.abs(cell).max()


@pytest.mark.parametrize("name", CELLS)
def test_gates_multiply_links(name, rng):
    xi = rng.uniform(-1, 2, size=(T, B))
    actual, _ = estimate(examples.example(name), link_weights=jnp.asarray(xi))
    agrees(actual, table_of(name), oracles.gated(xi))


@pytest.mark.parametrize(("stride", "window"), [(3, 3), (1, 3), (2, 5)])
def test_gates_and_windows_together(rng, stride, window):
    xi = rng.uniform(0, 2, size=(T, B)) * (rng.random((T, B)) < 0.8)
    actual, _ = estimate(
        examples.example("elman_tanh"), link_weights=jnp.asarray(xi), stride=stride, window=window
    )
    weights = oracles.gated(xi) * oracles.tbptt(T, stride, window)[..., None]
    agrees(actual, table_of("elman_tanh"), weights)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("stride", "window"), [(None, None), (1, 2), (2, 3)])
def test_one_sequence_and_few_steps(steps, stride, window):
    ex = examples.example("elman_tanh", steps=steps, sequences=1, seed=3)
    mask = jnp.ones((steps, 1))
    ex = ex._replace(batch=ex.batch._replace(mask=mask))
    weights = oracles.tbptt(steps, stride or steps, window or steps)
    actual, _ = estimate(ex, stride=stride, window=window)
    agrees(actual, by_hand("elman_tanh", ex), weights)


@pytest.mark.parametrize("name", ["elman_tanh", "lstm"])
def test_adjoint_norms_by_perturbing_the_states(name):
    """‖∂L/∂h_t‖, for the LSTM of the pair (h, c)."""
    problem, params, _, batch, state = examples.example(name)

    def loss(nudges):
        h, outputs = state, []
        for t in range(T):
            h = problem.cell.step(params["cell"], h, batch.inputs[t])
            h = jax.tree.map(lambda a, n, t=t: a + n[t], h, nudges)
            outputs.append(problem.readout.apply(params["readout"], problem.cell.read(h)))
        tokens = problem.loss(jnp.stack(outputs), batch.targets)
        return (tokens * batch.mask).sum() / batch.mask.sum()

    adjoints = jax.grad(loss)(jax.tree.map(lambda s: jnp.zeros((T, *s.shape)), state))
    expected = np.linalg.norm(flat_state(adjoints), axis=-1)
    assert expected.min() > 1e-3
    actual, _ = estimate(examples.example(name))
    np.testing.assert_allclose(actual.metrics["adjoint_norms"], expected, atol=1e-14)


def test_gradient_is_affine_in_every_single_gate(rng):
    """Negative control: it is not affine in two gates at once."""
    ex = examples.example("elman_tanh")
    many = jax.jit(jax.vmap(lambda xi: oracles_layout(estimate(ex, link_weights=xi)[0])))
    base = rng.uniform(0.5, 1.5, size=(T, B))

    def curvature(*links):
        at = np.stack([base] * 3)
        for t in links:
            at[:, t, 0] = [0.0, 1.0, 3.7]
        zero, one, far = np.asarray(many(jnp.asarray(at)))
        assert np.abs(one - zero).max() > 1e-3
        return np.abs(far - (zero + 3.7 * (one - zero))).max()

    for t in range(1, T):
        assert curvature(t) < 1e-14
    assert curvature(4, 5) > 1e-4


def oracles_layout(estimate):
    return jnp.concatenate([jnp.ravel(g) for g in jax.tree.leaves(estimate.grads)])


def test_mask_is_needed():
    """Negative control: the oracle with all tokens counted differs."""
    ex = examples.example("elman_tanh")
    unmasked = ex._replace(batch=ex.batch._replace(mask=jnp.ones((T, B))))
    cell, _ = flat_grads(estimate(ex)[0])
    wrong = oracles.weighted(by_hand("elman_tanh", unmasked), oracles.full(T))
    assert np.abs(cell - wrong).max() > 1e-3


@pytest.mark.parametrize("name", ["elman_tanh", "lstm"])
def test_evaluation_starts_from_zero(name):
    """Loss as by hand from h_0 = 0; accuracy, for classes only, by the mask."""
    ex = examples.example(name)
    table = by_hand(name, ex._replace(state=jax.tree.map(jnp.zeros_like, ex.state)))
    scores = evaluate(ex.problem, ex.params, ex.batch)
    np.testing.assert_allclose(scores["validation_loss"], table.loss, rtol=1e-13)
    assert abs(table.loss - table_of(name).loss) > 1e-4
    assert ("accuracy" in scores) == (name == "elman_tanh")
    if name == "elman_tanh":
        readout, mask = ex.params["readout"], np.asarray(ex.batch.mask)
        outputs = table.states @ np.asarray(readout["W_hq"]) + np.asarray(readout["b_q"])
        hits = outputs.argmax(-1) == np.asarray(ex.batch.targets)
        expected = (hits * mask).sum() / mask.sum()
        np.testing.assert_allclose(scores["accuracy"], expected)
        assert abs(expected - hits.mean()) > 1e-3


LONG = 12


@cache
def long_example(name):
    """T = 12 at a size where segments of several lengths fit, with a remainder for some."""
    ex = examples.example(name, steps=LONG)
    return ex, lambda **settings: jax.jit(
        lambda p, s, b: backpropagate(ex.problem, p, s, b, *how(**settings))
    )(ex.params, ex.state, ex.batch)


def close(actual, expected):
    examples.close((actual[0], actual[1]), (expected[0], expected[1]))


@pytest.mark.parametrize("name", ["elman_tanh", "lstm"])
@pytest.mark.parametrize("segment", [1, 5, 6])
def test_segments_of_a_full_pass(name, segment):
    _, run = long_example(name)
    close(run(segment=segment), run(segment=LONG))


@pytest.mark.parametrize(("window", "stride"), [(3, None), (5, None), (3, 1), (5, 3)])
@pytest.mark.parametrize("segment", [1, 4])
def test_segments_of_a_truncated_pass_are_the_gates(window, stride, segment):
    """Chunks cut by gates, all steps stored; sliding windows as one segment. Control: one off by one."""
    _, run = long_example("elman_tanh")
    gates = jnp.broadcast_to(1.0 * (jnp.arange(LONG) % window > 0)[:, None], (LONG, B))
    whole = run(window=window, stride=stride, segment=LONG) if stride else run(link_weights=gates)
    actual = run(window=window, stride=stride, segment=segment)
    examples.close((actual[0].grads, actual[1]), (whole[0].grads, whole[1]))
    examples.close(actual[0].metrics["adjoint_norms"], whole[0].metrics["adjoint_norms"])
    wrong = run(window=window + 1, stride=stride, segment=segment)[0].grads["cell"]
    with pytest.raises(AssertionError):
        examples.close(wrong, whole[0].grads["cell"], 1e-4)


def test_segments_of_drawn_gates(rng):
    gates = jnp.asarray(rng.uniform(0, 2, size=(3, LONG, B)))
    _, run = long_example("elman_tanh")
    close(run(link_weights=gates, segment=5), run(link_weights=gates, segment=LONG))
    close(run(link_weights=gates, states=5), run(link_weights=gates, segment=LONG))
    close(
        run(link_weights=gates, window=3, segment=3),
        run(link_weights=gates, window=3, segment=LONG),
    )


@pytest.mark.parametrize("name", ["elman_tanh", "lstm"])
@pytest.mark.parametrize("states", [2, 3, 5, 11])
def test_states_computed_again_change_nothing(name, states):
    _, run = long_example(name)
    close(run(states=states), run())


CUT = 67  # steps, no multiple of a segment's


def drawn(rng, cuts):
    """Gates with a cut every 1/cuts steps on average; the first may be one, it means nothing."""
    return jnp.asarray(rng.uniform(0.5, 1.2, size=(CUT, B)) * (rng.random((CUT, B)) > cuts))


def from_cut_to_cut(name, gates, **settings):
    ex = examples.example(name, steps=CUT, sequences=B)
    settings = {"reach": 8, "segment": 1} | settings

    def run(gates, **settings):
        return backpropagate(
            ex.problem, ex.params, ex.state, ex.batch, *how(link_weights=gates, **settings)
        )

    def both(gates):
        return run(gates, **settings), run(gates)

    return jax.jit(both), str(jax.make_jaxpr(lambda g: run(g, **settings))(gates))


@pytest.mark.parametrize("name", ["mlp", "elman_tanh", "gru", "lstm"])
@pytest.mark.parametrize("reach", [2, 5, 8])
def test_each_sequence_from_cut_to_cut(name, reach, rng):
    """One program for many draws. Control: what is drawn matters."""
    gates = [drawn(rng, 0.7) for _ in range(4)]
    run, said = from_cut_to_cut(name, gates[0], reach=reach)
    assert "while" in said
    traced = []

    def counted(xi):
        traced.append(xi)
        return run(xi)

    program = jax.jit(counted)
    found = [program(xi) for xi in gates]
    for actual, expected in found:
        close(actual, expected)
        examples.close(actual[0].metrics["adjoint_norms"], expected[0].metrics["adjoint_norms"])
    assert len(traced) == 1
    if name != "mlp":
        with pytest.raises(AssertionError):
            close(found[0][0], found[1][1])


@pytest.mark.parametrize("cuts", [0.0, 0.02, 0.2])
def test_segments_beyond_the_reach_are_exact_all_the_same(cuts, rng):
    """Sequences without a cut for longer than a segment, alone and beside others under vmap."""
    run, _ = from_cut_to_cut("elman_tanh", drawn(rng, cuts), reach=4)
    close(*run(drawn(rng, cuts)))
    some = jnp.stack([drawn(rng, 0.7), drawn(rng, cuts), drawn(rng, 0.7)])
    close(*jax.vmap(run)(some))


def test_short_sequences_and_many_draws_are_stored_whole(rng):
    _, program = from_cut_to_cut("elman_tanh", drawn(rng, 0.5), reach=9)  # 8 · 9 > 67
    assert "while" not in program
    draws = jnp.stack([drawn(rng, 0.5)] * 2)
    assert "while" not in from_cut_to_cut("elman_tanh", draws)[1]


@pytest.mark.slow
def test_what_goes_from_cut_to_cut_is_not_done_again(monkeypatch):
    """A sequence that is through waits for the others; a segment may be as long as the reach."""
    again = per_segment.recompute
    monkeypatch.setattr(
        per_segment, "recompute", lambda *a: jax.tree.map(lambda x: x + jnp.nan, again(*a))
    )
    gates = jnp.ones((CUT, B)).at[::8, 0].set(0).at[::5, 1].set(0)
    close(*from_cut_to_cut("elman_tanh", gates, reach=8)[0](gates))
    with pytest.raises(AssertionError):
        close(*from_cut_to_cut("elman_tanh", gates, reach=7)[0](gates))


@pytest.mark.parametrize(("window", "stride"), [(4, 2), (4, 1), (3, 3), (5, 2)])
def test_a_derivative_that_divides(window, stride):
    """Softsign a/(1 + |a|): where steps are made up, nothing is 0/0."""
    ex = examples.example("elman_tanh", steps=13)

    def update(projected, recurred, state):
        a = projected + recurred
        return a / (1 + jnp.abs(a))

    affine = ex.problem.cell.affine._replace(update=update, derivative=None)
    cell = ex.problem.cell._replace(step=affine.step, affine=affine)
    ex = ex._replace(problem=ex.problem._replace(cell=cell))
    found, _ = estimate(ex, window=window, stride=stride, segment=4)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(found.grads))


@pytest.mark.parametrize("reach", [0, 2.5])
def test_bad_reach(reach):
    with pytest.raises(SettingError, match=f"`reach` must be .*; got {reach}"):
        estimate(examples.example("elman_tanh"), link_weights=jnp.ones((T, B)), reach=reach)


def test_steps_made_up_beyond_the_end_divide_by_nothing(rng):
    """A cell that normalises its input: an input of zeros is 0/0."""
    ex = examples.example("linear", steps=CUT)

    def step(params, h, x):
        return jnp.tanh(x / jnp.linalg.norm(x, axis=-1, keepdims=True) @ params["W_xh"] + h)

    own = {"W_xh": ex.params["cell"]["W_xh"]}
    cell = ex.problem.cell._replace(init=lambda key: own, step=step, affine=None)
    problem = ex.problem._replace(cell=cell)
    params = {"cell": own, "readout": ex.params["readout"]}
    gates = drawn(rng, 0.7)

    def run(**settings):
        how_ = how(link_weights=gates, **settings)
        return backpropagate(problem, params, ex.state, ex.batch, *how_)

    actual, expected = run(reach=8, segment=1), run()
    close(actual, expected)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(actual[0].grads))
