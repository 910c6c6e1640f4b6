"""Cells from outside the package, by a yaml: they train, or one line says which promise they break."""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import TINY, run_folders
from test_any_cell import dropout

import bptt_study as bs
from bptt_study.optimizers import clipped
from bptt_study.report import csv_tables
from bptt_study.training.budget import Budget
from bptt_study.training.resets import reseed
from bptt_study.training.train import make_train
from bptt_study.types import Sampler, Task

EQUINOX = """
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    from bptt_study import Cell


    def eqx_gru(inputs: int, hidden: int) -> Cell:
        make = lambda key: eqx.nn.GRUCell(inputs, hidden, key=key)
        static = eqx.partition(eqx.filter_eval_shape(make, jax.random.key(0)), shaped)[1]

        def step(params, h, x):
            x = jax.nn.one_hot(x, inputs, dtype=h.dtype)
            return jax.vmap(eqx.combine(params, static))(x, h)

        return Cell(
            init=lambda key: eqx.partition(make(key), eqx.is_array)[0],
            zeros=lambda size: jnp.zeros((size, hidden)),
            step=step,
            read=lambda h: h,
        )


    def shaped(leaf):
        return isinstance(leaf, jax.ShapeDtypeStruct)
"""
# A module as such libraries have them: a tree whose leaves are its arrays, and everything else is static.
MODULE = """
    from dataclasses import dataclass
    from functools import partial

    import jax
    import jax.numpy as jnp

    from bptt_study import Cell


    @partial(jax.tree_util.register_dataclass, data_fields=["weight", "bias"], meta_fields=["size"])
    @dataclass
    class Module:
        weight: jax.Array
        bias: jax.Array | None
        size: int

        def __call__(self, x, h):
            return jnp.tanh(self.weight @ jnp.concatenate([jax.nn.one_hot(x, self.size), h]))


    def module(inputs: int, hidden: int) -> Cell:
        def init(key):
            return Module(0.3 * jax.random.normal(key, (hidden, inputs + hidden)), None, inputs)

        def step(params, h, x):
            return jax.vmap(params)(x, h)

        return Cell(init, lambda size: jnp.zeros((size, hidden)), step, lambda h: h)
"""
DROPOUT = """
    import jax
    import jax.numpy as jnp

    from bptt_study import Cell, cells


    def dropout(inputs: int, hidden: int, rate: float = 0.5) -> Cell:
        cell = cells.gru(inputs, hidden)

        def step(params, state, x):
            keys, h = state
            own, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (hidden,)))(own)
            return keys, cell.step(params, kept * h / (1 - rate), x)

        def zeros(size):
            return jax.random.split(jax.random.key(0), size), cell.zeros(size)

        return Cell(cell.init, zeros, step, lambda state: state[1])
"""
BROKEN = """
    import jax
    import jax.numpy as jnp

    from bptt_study import cells


    def bent(inputs: int, hidden: int):
        cell = cells.elman(inputs, hidden)
        form = cell.affine._replace(recur=lambda params, h: jnp.tanh(h @ params["W_hh"]))
        return cell._replace(step=form.step, affine=form)


    def float64(inputs: int, hidden: int):
        cell = cells.elman(inputs, hidden)
        step = lambda params, h, x: cell.step(params, h, x).astype(jnp.float16)
        return cell._replace(step=step, affine=None)


    def unfit(inputs: int, hidden: int):
        return cells.elman(inputs, hidden)._replace(
            zeros=lambda size: jnp.zeros((size, hidden + 1)), affine=None
        )


    def none(inputs: int, hidden: int):
        return None


    def flat(inputs: int, hidden: int):
        return cells.elman(inputs, hidden)._replace(read=lambda h: h[..., 0])
"""


@pytest.fixture
def mine(tmp_path, monkeypatch, command):
    """`bptt-study cell=NAME …` for a cell of the module `own_NAME`, in an empty folder."""

    def run(source, name, *arguments, of=None):
        of = of or name
        (tmp_path / f"own_{of}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        conf = tmp_path / "conf" / "cell" / f"{name}.yaml"
        conf.parent.mkdir(parents=True, exist_ok=True)
        conf.write_text(f"_target_: own_{of}.{name}\nhidden: ${{hidden}}\n", encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        folder = str(tmp_path / "conf")
        return command("--config-dir", folder, f"cell={name}", *TINY, "study=mine", *arguments)

    return run


def table(tmp_path):
    (folder,) = run_folders(tmp_path / "results" / "runs" / "mine")
    return csv_tables.read_table(folder / "rows.csv")


@pytest.mark.slow
def test_a_module_trains(mine, tmp_path):
    status, _, errors = mine(MODULE, "module", "strategy=randomized")
    assert status == 0, errors
    rows = table(tmp_path)
    assert np.isfinite(rows["validation_loss"]).all()
    assert rows["cell"].unique() == ["module"]
    (folder,) = run_folders(tmp_path / "results" / "runs" / "mine")
    params = bs.checkpoints.load(folder / "params.npz")
    assert {leaf.shape[1:] for leaf in jax.tree.leaves(params["cell"])} == {(4, 10 + 4)}


@pytest.mark.slow
def test_a_module_of_equinox_trains(mine, tmp_path):
    status, _, errors = mine(EQUINOX, "eqx_gru", "strategy=fixed")
    assert status == 0, errors
    rows = table(tmp_path)
    assert np.isfinite(rows["validation_loss"]).all()
    assert rows["cell"].unique() == ["eqx_gru"]


@pytest.mark.slow
def test_a_random_cell_trains(mine, tmp_path):
    status, _, errors = mine(DROPOUT, "dropout", "strategy=fixed")
    assert status == 0, errors
    assert np.isfinite(table(tmp_path)["validation_loss"]).all()


@pytest.mark.parametrize("random", [True, False])
def test_a_random_cell_draws_anew_at_every_update_and_seed(random):
    """Of one batch of fresh sequences, time and again and without learning; one that is not random does not."""
    D, H = 2, 3
    cell = dropout(bs.cells.elman(D, H)) if random else bs.cells.elman(D, H)
    cell = cell._replace(init=lambda key: bs.cells.elman(D, H).init(jax.random.key(0)))
    readout = bs.Readout(lambda key: {}, lambda params, h: h)
    problem = bs.Problem(cell, readout, bs.losses.squared_error)
    batch = bs.Batch(jnp.ones((6, 2, D)), jnp.ones((6, 2, H)), jnp.ones((6, 2)))
    sampler = Sampler((), lambda data, key, update: (batch, jnp.asarray(True)), continues=False)
    task = Task(D, H, problem.loss, None, lambda *_: sampler, batch, {}, None, {})
    train = make_train(
        problem,
        bs.strategies.full(problem),
        clipped(optax.sgd, learning_rate=1e-30, clip_norm=1.0),
        Budget(steps=6, batch_size=2, updates=3, logs=3),
        task,
    )
    records = train(jax.random.split(jax.random.key(1), 2)).records
    losses = [
        loss for record in records if record["update"][0] > 0 for loss in record["train_loss"]
    ]
    assert len(losses) == 6
    assert len(np.unique(np.round(losses, 9))) == (6 if random else 1)


def test_keys_are_seeded_anew_and_nothing_else_is(key):
    keys = jax.random.split(jax.random.key(5), 3)
    state = (keys, jnp.ones((3, 2)), jnp.arange(3))
    one, again, other = (reseed(state, jax.random.fold_in(key, n)) for n in (1, 1, 2))
    words = [np.asarray(jax.random.key_data(a[0])) for a in (state, one, again, other)]
    np.testing.assert_array_equal(words[1], words[2])
    assert len(np.unique(np.concatenate([words[0], words[1], words[3]]), axis=0)) == 9
    for a, b in zip(one[1:], state[1:], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "bent",
            "`cell.affine.recur` must be affine in h; got a function whose derivative changes",
        ),
        ("float64", "`cell.step` must be a function whose state is like the one before"),
        (
            "unfit",
            "`cell` must be a cell for inputs int32[2]; got own_unfit.unfit. Reason: TypeError",
        ),
        (
            "none",
            "`cell._target_` must be a factory of a bptt_study.Cell; got own_none.none, which",
        ),
        ("flat", "`cell.read` must be a function that returns floats [B, H]; got one"),
    ],
)
def test_a_broken_cell_is_one_line_before_the_run(mine, tmp_path, name, said):
    status, _, errors = mine(BROKEN, name)
    assert (status, len(errors.splitlines())) == (2, 1), errors
    assert said in errors
    assert not (tmp_path / "results" / "runs").exists()
