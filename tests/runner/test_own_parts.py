"""Own tasks, cells and probes: what a run cannot keep apart or write down is named before it trains."""

import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from support import TINY

import bptt_study as bs
from bptt_study import probes
from bptt_study.backprop.repeats import say
from bptt_study.probes import Probe
from bptt_study.report import columns, csv_tables
from bptt_study.runner import array_files, configure, own_code, results
from bptt_study.runner import run as run_module
from bptt_study.runner.run_checkpoint import RunCheckpoint, plain
from bptt_study.training.train import Progress
from bptt_study.validation import SettingError

COPY = bs.tasks.copy(lag=3, length=2)
SNAPSHOT = probes.Snapshot(None, None, COPY, {}, None, None, None)
NAMED = {"task": "own", "lag": None, "hidden": 4, "learning_rate": 0.1, "task.mine": 2}


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"facts": {"learning_rate": 5}}, r"facts\.learning_rate` must be named otherwise; got 5"),
        ({"facts": {"window": 7}}, r"facts\.window` must be named otherwise"),
        ({"facts": {"truncation_length": 7}}, r"facts\.truncation_length` must be named"),
        ({"facts": {"task": "mine"}}, r"facts\.task` must be named otherwise; got mine"),
        ({"facts": {"task.mine": 3}}, r"facts\.task\.mine` must be named otherwise; got 3"),
        ({"facts": {"strategy.gamma": 3}}, r"facts\.strategy\.gamma` must be named otherwise"),
        ({"facts": {"seed": 9}}, r"facts\.seed` must be named otherwise"),
        ({"facts": {"low": 9}}, r"facts\.low` must be named otherwise"),  # of an interval
        ({"facts": {"validation_loss": 0.1}}, r"facts\.validation_loss` must be named"),
        ({"facts": {"seconds": 0.1}}, r"facts\.seconds` must be named"),
        ({"facts": {"uniform_loss": 1}}, r"references\.uniform_loss` must be named otherwise"),
        ({"facts": {"x": [1, 2]}}, r"facts\.x` must be a number, a text, .*; got \[1, 2\]"),
        (
            {"facts": {"x": [[1], [1, 2]]}},
            r"facts\.x` must be a number, .*; got \[\[1\], \[1, 2\]\]",
        ),
        ({"facts": {"x": jnp.ones(2)}}, r"facts\.x` must be a number, a text, .*; got \[1. 1.\]"),
        ({"facts": {"x": {"a": 1}}}, r"facts\.x` must be a number, a text, a flag or null"),
        ({"references": {"validation": 0.1}}, r"references\.validation_loss` must be named"),
        ({"references": {"uniform": "abc"}}, r"references\.uniform` must be a finite number"),
        ({"references": {"uniform": np.nan}}, r"references\.uniform` must be a finite number"),
        ({"chance_accuracy": "abc"}, r"chance_accuracy` must be a finite number; got abc"),
        ({"chance_accuracy": 25}, r"chance_accuracy` must be a share from 0 to 1; got 25"),
        ({"chance_accuracy": -0.1}, r"chance_accuracy` must be a share from 0 to 1; got -0.1"),
    ],
)
def test_a_task_says_nothing_about_anything_else(own, said):
    with pytest.raises(SettingError, match=rf"`task\.{said}"):
        configure._with_facts(NAMED, COPY._replace(**own))


def test_what_no_table_holds_as_it_is_is_refused_before_the_run():
    for value in ("é", 3, None, 2**53, str(2**60), [2**60], True, np.inf):
        columns.check_cell("task.label", value)
    with pytest.raises(SettingError, match=r"`task.label` must be a text in UTF-8; got 'a\\udce9'"):
        columns.check_cell("task.label", "a\udce9")
    with pytest.raises(
        SettingError, match=r"`task.label` must be a whole number of at most 2\*\*53, or a text"
    ):
        columns.check_cell("task.label", -(2**53) - 1)


def test_the_columns_that_a_task_may_bring():
    facts = {"lag": 3, "noise_level": np.float32(0.5), "long": True, "name": "x", "none": None}
    references = {"uniform": jnp.log(2.0), "mine": -8.6}
    found = configure._with_facts(NAMED, COPY._replace(facts=facts, references=references))
    assert found["lag"] == 3, "it was empty"
    assert type(found["noise_level"]) is type(found["uniform_loss"]) is float
    assert (found["long"], found["name"], found["none"]) == (True, "x", None)
    assert (found["mine_loss"], found["hidden"], found["chance_accuracy"]) == (-8.6, 4, 1 / 8)


def test_a_score_of_a_level_is_not_named_like_a_measured_one():
    columns.brought("task", {"longest": np.nan, "mine": np.nan}, NAMED)
    with pytest.raises(SettingError, match=r"accuracy` must be named otherwise"):
        columns.brought("task", {"accuracy": np.nan}, NAMED)


OWN_TASK = """
import jax
import jax.numpy as jnp
import numpy as np
from bptt_study import Task, tasks
from bptt_study.types import Level

def own(shift: int = 0, part: str = "validation", score: str = "mine") -> Task:
    made = tasks.copy(lag=3, length=2)

    def shifted(batch):
        return batch._replace(inputs=batch.inputs + shift)

    if part.endswith("long"):
        longer = jax.tree.map(lambda a: jnp.concatenate([a, a]), made.validation)
        return made._replace(**{part.split()[0]: longer})
    if part == "validation":
        return made._replace(validation=shifted(made.validation))

    def sampler(steps, size):
        found = made.sampler(steps, size)

        def sample(data, key, update, *level):
            if part == "error":
                raise KeyError("no such file")
            if part == "drawn":
                update = update + np.random.randint(2**20)
            if part == "key ignored":
                key = jax.random.key(0)
            batch, fresh = found.sample(data, key, update)
            if part == "twice":
                batch = jax.tree.map(lambda a: jnp.concatenate([a, a], axis=1), batch)
            if part == "turned":
                batch = jax.tree.map(jnp.transpose, batch)
            if part == "never fresh":
                fresh = jnp.asarray(False)
            if part == "once fresh":
                fresh = update == 0
            if part == "each fresh":
                fresh = jnp.ones(size, bool)
            return shifted(batch), fresh

        first = jnp.zeros(())
        parts = {
            "no start": ((first,),),
            "start without tuple": (lambda: first,),
            "two levels": (lambda: (first,), lambda level, metrics: (first, first)),
            "longer level": (lambda: (first,), lambda level, metrics: (jnp.zeros(2),)),
        }
        shape = (2,) if part == "two scores" else ()
        level = Level(*parts.get(part, ()), scores=lambda level: {score: jnp.zeros(shape)})
        return found._replace(sample=sample, level=level)

    return made._replace(sampler=sampler)
"""


@pytest.fixture
def own_task(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own_task_module.py").write_text(OWN_TASK)
    yaml = "# @package _global_\ntask: {_target_: own_task_module.own}\n"
    yaml += "budgets: {smoke: {batch_size: 2, updates: 2, logs: 1, steps: 5}}\n"
    (tmp_path / "conf" / "task").mkdir(parents=True)
    (tmp_path / "conf" / "task" / "own.yaml").write_text(yaml)
    yield ["--config-dir", str(tmp_path / "conf"), "task=own", "size=smoke", "cell.hidden=4"]
    sys.modules.pop("own_task_module", None)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["+task.shift=1"], "`task.validation.inputs` must be whole numbers 0 … 9"),
        (["+task.shift=1", "+task.part=training"], "`task.sampler.inputs` must be whole numbers"),
        (["+task.part=training", "+task.score=accuracy"], "level.scores.accuracy` must be named"),
        (["+task.part=validation long"], r"`task.validation` must be .* T = 5.*; got .* = \[10, "),
        (["+task.part=training long"], r"`task.training` must be .* T = 5.*; got .* = \[10, "),
        (
            ["+task.part=turned", "budget.batch_size=5"],
            r"`task.sampler` must be one of \[5, 4\].*; got .* = \[4, 5\]",
        ),
        (["+task.part=twice"], r"`task.sampler` must be one of \[5, 2\].*; got .* = \[5, 4\]"),
        (["+task.part=drawn"], "`task.sampler` must be a function of its arguments alone; got"),
        (["+task.part=no start"], r"`task.sampler.level.start` must be a function; got \(Array"),
        (["+task.part=start without tuple"], "level.start` must be .* tuple .*; got .*"),
        (["+task.part=two levels"], "level.advance` must be .*; got .*"),
        (["+task.part=longer level"], "level.advance` must be .*; got .*"),
        (["+task.part=two scores"], "level.scores` must be .*; got .*"),
        (["+task.part=error"], "`task.sampler` must be .* Reason: KeyError: 'no such file'."),
        (
            ["+task.part=never fresh"],
            "`task.sampler` must be .* continues=False .*; got .* fresh=False",
        ),
        (
            ["+task.part=once fresh"],
            "`task.sampler` must be .* continues=False .*; got .* fresh=False",
        ),
        (["+task.part=each fresh"], r"`task.sampler` must be .* one flag fresh; got .* bool\[2\]"),
    ],
)
def test_an_own_task_is_checked_before_it_trains(own_task, command, settings, said):
    code, _, err = command(*own_task, *settings)
    assert code == 2
    assert len(err.splitlines()) == 1, err
    assert re.search(said, err), err


def test_a_line_says_that_all_seeds_of_an_own_task_have_the_same_batches(own_task, command):
    say.cache_clear()
    code, said, err = command(*own_task, "+task.part=key ignored")
    assert code == 0, err
    assert said.count("task.sampler: all seeds have the same batches") == 1


@pytest.mark.parametrize("part", ["cell", "task.readout"])
def test_weights_that_are_drawn_without_the_key_are_refused(part):
    """All seeds had one initial network, and each strategy another."""

    def elsewhere(key):
        return {"W": jnp.asarray(np.random.default_rng().normal(size=(4, 4)))}

    cell = bs.cells.elman(4, 4)
    readout = bs.readouts.linear(4, 4)
    if part == "cell":
        cell = bs.Cell(elsewhere, cell.zeros, lambda p, h, x: jnp.tanh(h @ p["W"]), cell.read)
    else:
        readout = bs.Readout(elsewhere, lambda params, h: h @ params["W"])
    with pytest.raises(SettingError, match=rf"`{part}\.init` must be a function of its arguments"):
        configure._problem(cell, "mine", (4,), "float64", 4, readout, COPY.loss)


# ---- strategies


@pytest.mark.parametrize(
    ("named", "length"),
    [
        ({"window": 4}, 4),
        ({"mean_length": 2.5}, 2.5),
        ({"window": None, "mean_length": 3}, 3),
        ({"window": "auto"}, None),
        ({"window": "[1, 2]", "mean_length": 3}, 3),
        ({"window": True}, None),
        ({}, None),
    ],
)
def test_only_a_number_is_a_truncation_length(named, length):
    assert configure._truncation_length(named) == length


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["half", "True"], "object"),
        (["half", ""], "object"),
        ([0.5, True], "object"),
        ([0.5, 1], "float64"),
        ([True, False], "boolean"),
        ([True, None], "boolean"),
        ([None, None], "boolean"),
    ],
)
def test_a_setting_that_is_no_flag_is_read_as_what_it_is(values, kind, tmp_path):
    """A strategy of one's own may call a text, a list or a number `compensate`."""
    csv_tables.write_table(
        pd.DataFrame({"run": list("ab"), "compensate": values}), tmp_path / "t.csv"
    )
    table = csv_tables.read_table(tmp_path / "t.csv")
    found = results.typed(table)["compensate"]
    assert (found.dtype == "boolean") == (kind == "boolean")
    assert found.dropna().tolist() == table["compensate"].dropna().tolist()


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([True, False], "boolean"),
        ([True, None], "boolean"),
        ([False, False], "boolean"),
        ([1, 0], "other"),
        ([1.0, None], "other"),
        (["True", "half"], "other"),
        ([True, 2], "other"),
        ([None, None], "other"),
    ],
)
@pytest.mark.parametrize("name", ["distinct", "carried", "task.mine"])
def test_a_column_of_flags_is_one_by_its_values(values, kind, name, tmp_path):
    csv_tables.write_table(pd.DataFrame({"run": list("ab"), name: values}), tmp_path / "t.csv")
    table = csv_tables.read_table(tmp_path / "t.csv")
    found = results.typed(table)[name]
    assert (found.dtype == "boolean") == (kind == "boolean")
    assert found.dropna().tolist() == table[name].dropna().tolist()


def test_a_strategy_may_mean_its_own_by_the_words_of_others(command, monkeypatch, tmp_path):
    """A window that is a text has no length, and the study is read back."""
    monkeypatch.syspath_prepend(tmp_path)
    own = "import bptt_study as bs\n\ndef own(problem, window, compensate):\n"
    (tmp_path / "own_words_module.py").write_text(own + "    return bs.strategies.full(problem)\n")
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    node = "{_target_: own_words_module.own, window: auto, compensate: half}\n"
    (tmp_path / "conf" / "strategy" / "words.yaml").write_text(node)
    given = [f"--config-dir={tmp_path / 'conf'}", *TINY, "strategy=words", "study=words", "seeds=1"]
    code, _, err = command(*given, "-m")
    sys.modules.pop("own_words_module", None)
    assert code == 0, err
    table = results.load(tmp_path / "results" / "words").table
    assert table["truncation_length"].isna().all()
    assert set(table["window"]) == {"auto"} and set(table["compensate"]) == {"half"}


# ---- parameters


def test_parameters_whose_paths_are_equal_as_text_are_refused():
    """A file would hold one of both, and give it back as both."""
    tree = {"a/b": np.ones(2), "a": {"b": np.zeros(2)}}
    with pytest.raises(SettingError, match=r"must be one whose .*; got two leaves a/b"):
        array_files.dump(tree)
    cell = bs.cells.elman(4, 4)._replace(init=lambda key: tree)
    with pytest.raises(SettingError, match=r"`cell\.init` must be parameters whose paths differ"):
        configure._checked_names(bs.Problem(cell, bs.readouts.linear(4, 4), COPY.loss))


@pytest.mark.parametrize("name", ["file", "allow_pickle", "args", "kwds", "self"])
def test_leaves_may_have_any_name(tmp_path, name):
    tree = {name: np.arange(3), "number": 2.5}
    array_files.save(tmp_path / "x.npz", tree)
    back = array_files.load(tmp_path / "x.npz")
    assert back[name].tolist() == [0, 1, 2]
    assert back["number"] == 2.5


@pytest.mark.parametrize(
    "tree", [{"about.json": 1.0}, {"a": np.ones(1), "a/b": np.ones(1)}], ids=str
)
def test_leaves_that_could_not_be_read_back_are_refused(tree):
    with pytest.raises(
        SettingError, match=r"`tree` must be no about\.json, and of no leaf that is the"
    ):
        array_files.dump(tree)


@pytest.mark.parametrize(
    ("inner", "said"),
    [("b", "got two leaves strategy/a/b"), ("b/0", "got one with a leaf strategy/a/b")],
)
def test_a_strategy_whose_state_no_checkpoint_can_hold_is_refused_at_the_start(
    tmp_path, inner, said
):
    at = jnp.zeros(1, jnp.int32)
    start = Progress({}, (), {"a/b": at, "a": {inner: at}}, at, at, at, at)
    with pytest.raises(SettingError, match=said):
        RunCheckpoint(tmp_path / "x.npz", {}, None, {}).restore(start)


@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "int4", "float32"])
def test_numbers_that_numpy_does_not_know_are_read_back(tmp_path, kind):
    tree = {"W": np.arange(6).reshape(2, 3).astype(jnp.dtype(kind)), "b": np.array(2, kind)}
    array_files.save(tmp_path / "params.npz", tree, {"run": "abc"})
    leaves, about = array_files.read(tmp_path / "params.npz")
    assert ("dtypes" in about, about["run"]) == (kind != "float32", "abc")
    back = array_files.restore(leaves, tree)
    for name, leaf in tree.items():
        assert leaves[name].dtype == back[name].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(back[name], float), leaf.astype(float))


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_a_tree_is_restored_like_its_shapes(tmp_path, kind):
    tree = {"key": jax.random.split(jax.random.key(3, impl=kind), 2), "W": jnp.arange(3.0)}
    array_files.save(tmp_path / "tree.npz", tree, {})
    leaves, _ = array_files.read(tmp_path / "tree.npz")
    back = array_files.restore(leaves, jax.eval_shape(lambda: tree))
    assert jax.random.key_impl(back["key"]) == jax.random.key_impl(tree["key"])
    assert (jax.random.key_data(back["key"]) == jax.random.key_data(tree["key"])).all()
    assert (back["W"] == tree["W"]).all()


# ---- probes


def test_a_probe_s_changes_reach_no_other_probe():
    """Of the dicts of parameters; arrays cannot be changed."""
    snapshot = SNAPSHOT._replace(params={"cell": {"W": jnp.ones(2)}})

    def look(at):
        total = float(at.params["cell"]["W"].sum())
        at.params["cell"]["W"] *= 0
        return pd.DataFrame({"v": [total]})

    for _ in range(2):
        assert run_module._looked("mine", Probe(look), snapshot)["v"].tolist() == [2]
    assert snapshot.params["cell"]["W"].tolist() == [1, 1]


def looked(table) -> pd.DataFrame:
    return run_module._looked("mine", Probe(lambda snapshot: table), SNAPSHOT)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (None, "a table; got one that returns a NoneType"),
        ({"v": [1]}, "a table; got one that returns a dict"),
        (pd.DataFrame([[1, 2]], columns=["v", "v"]), "Reason: two columns have one name"),
        (pd.DataFrame([[1, 2]], columns=[1, "1"]), "Reason: two columns have one name"),
        (pd.DataFrame({"v": [{(1, 2): 3}]}), "of numbers, flags and texts"),
        *(
            (pd.DataFrame({"v": [1], name: [2]}), f"got one with {name}")
            for name in ("seed", "update", *columns.NORM_KEYS)
        ),
    ],
)
def test_a_table_of_a_probe_that_cannot_be_kept(table, said):
    with pytest.raises(SettingError, match=rf"`probes\.mine` must be a probe .*{said}"):
        looked(table)


@pytest.mark.parametrize(
    "values",
    [
        [(1, 2), np.float32(3)],
        [jnp.ones(2)[0], jnp.ones(2)],
        [pd.Timestamp("2020-01-01"), pd.NaT],
        pd.array([1, None], "Int64"),
        pd.Categorical(["b", "a"]),
        np.array([0.1, np.nan], np.float32),
        [None, "text"],
        [2**53 + 1, -1],
    ],
)
def test_a_table_of_a_probe_is_at_once_what_a_checkpoint_gives_back(values):
    first = looked(pd.DataFrame({"v": values, 3: [True, False]}))
    assert list(first) == ["v", "3"]
    pd.testing.assert_frame_equal(plain(first), first)


def test_packages_of_another_environment_are_not_ones_own(tmp_path, monkeypatch):
    """A probe that imported pandas from there made a sweep read and parse pandas, NumPy and SciPy."""
    for folder in ("lib/python3/site-packages", "mine"):
        (tmp_path / folder).mkdir(parents=True)
        module = f"of_{Path(folder).name.partition('-')[0]}"
        (tmp_path / folder / f"{module}.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path / folder)
    assert own_code._is_own("of_mine")
    assert not own_code._is_own("of_site")


def test_a_table_of_a_probe_keeps_its_index():
    found = pd.DataFrame({"v": [1, 2]}, index=["p", "q"])
    assert looked(found.rename_axis("who"))["who"].tolist() == ["p", "q"]
    with pytest.raises(
        SettingError, match=r"`probes\.mine` must be a table whose index has a name"
    ):
        looked(found)


@pytest.mark.parametrize("name", ["table", "rows", "cuts", "a b"])
def test_a_probe_is_not_named_like_another_table(name, command):
    probe = "{_target_: bptt_study.probes.gradient_norms}"
    code, _, err = command(*TINY, "snapshots=1", f"+probes={{{name}: {probe}}}")
    assert code == 2
    assert re.search(f"`probes` must be letters, .* none of costs, cuts, .*; got '{name}'", err), (
        err
    )


def test_a_table_that_cannot_be_kept_stops_a_run_before_it_trains(command, monkeypatch):
    monkeypatch.setattr(run_module, "plain", lambda table: plain(table.assign(run="mine")))
    arguments = [*TINY, "probe=[gradient_norms]", "snapshots=2", "seeds=1"]
    code, _, err = command(*arguments)
    assert code == 2
    assert "`probes.gradient_norms` must be a probe that returns a table without" in err
