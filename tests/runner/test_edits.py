"""Edits within one process, as in a notebook: a run is made of the code and the text that it says."""

import hashlib
import importlib
import json
import logging
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from omegaconf import OmegaConf

import bptt_study as bs
from bptt_study import files
from bptt_study.runner import configure, environment, own_code, progress, run_folder
from bptt_study.runner import run as run_module
from bptt_study.runner.array_files import UnusableError
from bptt_study.validation import SettingError

OWN = """
from bptt_study import Task, tasks

def own() -> Task:
    return tasks.copy(lag=3, length=2, symbols={symbols})
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write `edited_task` with so many symbols; Python reads its source each time."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(symbols: int) -> None:
        (tmp_path / "edited_task.py").write_text(OWN.format(symbols=symbols))

    yield write
    sys.modules.pop("edited_task", None)


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Import modules of the test's folder; no compiled file stays, and no module."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = []

    def get(name: str) -> types.ModuleType:
        names.append(name)
        return importlib.import_module(name)

    yield get
    for name in names:
        del sys.modules[name]


NODE = {"_target_": "edited_task.own"}


def made() -> tuple[int, str]:
    """The symbols of the task that a run would have, and the checksum that it would state."""
    return configure.build("task", NODE).outputs, own_code.code(NODE)["edited_task"]


def test_code_that_was_edited_runs_once_it_is_reloaded(module, caplog):
    module(4)
    first = made()
    assert first[0] == 4
    assert configure.build("task", NODE) is configure.build("task", NODE)

    module(6)  # an edit without a reload: the run is what it says, and it says so once
    with caplog.at_level(logging.WARNING):
        assert made() == made() == first
    (said,) = caplog.messages
    assert "edited_task.py has changed since edited_task was imported" in said

    importlib.reload(sys.modules["edited_task"])
    second = made()
    assert second[0] == 6
    assert second[1] != first[1]

    module(8)
    del sys.modules["edited_task"]
    assert made()[0] == 8

    module(4)
    importlib.reload(sys.modules["edited_task"])
    assert made() == first
    assert len(caplog.messages) == 1


def test_a_factory_in_a_module_without_a_file_is_refused(monkeypatch):
    """As in a notebook's own namespace: nobody could tell whether its code has changed since a run."""
    own = types.ModuleType("by_hand")
    own.mine = lambda: bs.tasks.copy(3, 2)
    monkeypatch.setitem(sys.modules, "by_hand", own)
    with pytest.raises(
        SettingError, match=r"`task._target_` must be a factory in a module that has a file"
    ):
        configure.build("task", {"_target_": "by_hand.mine"})


def test_the_code_of_a_script_counts(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("SHIFT = 1\n")
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    main.SHIFT = 1
    monkeypatch.setitem(sys.modules, "__main__", main)
    first = own_code.code({"_target_": "__main__.mine"})
    script.write_text("SHIFT = 2\n")
    own_code._imported.clear()  # as in another process
    main.SHIFT = 2
    second = own_code.code({"_target_": "__main__.mine"})
    assert [*first] == [*second] == ["__main__"]
    assert first != second


def test_what_is_nested_is_made_anew_as_well(module):
    """Such as a transform of an optimizer."""
    module(4)
    node = json.dumps({"of": NODE | {"_partial_": True}})

    def nested():
        return configure._instantiated("x", node, own_code.made_from(json.loads(node)))["of"]

    first = nested()
    assert nested() is first
    module(6)
    importlib.reload(sys.modules["edited_task"])
    assert nested()().outputs == 6


def test_a_file_of_a_package_counts_as_it_was_imported(tmp_path, monkeypatch):
    """Each by itself: an edit of one is seen when that one is reloaded, not another."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    folder = tmp_path / "edited_package"
    folder.mkdir()
    for name in ("__init__", "a", "b"):
        (folder / f"{name}.py").write_text("x = 1\n")
    a = importlib.import_module("edited_package.a")
    first = own_code.fingerprint("edited_package")
    (folder / "a.py").write_text("x = 2\n")
    assert own_code.fingerprint("edited_package") == first
    (folder / "b.py").write_text("x = 2\n")  # nobody has imported it yet
    second = own_code.fingerprint("edited_package")
    assert second != first
    importlib.reload(sys.modules["edited_package"])
    assert own_code.fingerprint("edited_package") == second
    importlib.reload(a)
    assert own_code.fingerprint("edited_package") not in (first, second)
    for name in ("edited_package", "edited_package.a"):
        del sys.modules[name]


def test_code_that_own_code_imports_counts_as_well(tmp_path, monkeypatch):
    """Another module or package, directly or through one, at its head or in a function."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    main = "import os, jax, pandas as pd\nfrom own_helper.parts import x\nimport own_main\n"
    (tmp_path / "own_main.py").write_text(main + OWN.format(symbols=4))
    (tmp_path / "own_helper").mkdir()
    (tmp_path / "own_helper" / "__init__.py").write_text("from . import parts\n")
    parts = tmp_path / "own_helper" / "parts.py"
    parts.write_text("def x():\n    import own_far\n\n    return own_far\n")
    (tmp_path / "own_far.py").write_text("x = 1\n")
    (tmp_path / "own_other.py").write_text("import own_main\n")
    node = {"_target_": "own_main.own"}
    first = own_code.code(node)
    assert sorted(first) == ["own_far", "own_helper", "own_main"]
    (tmp_path / "own_far.py").write_text("x = 2\n")
    second = own_code.code(node)
    assert {n for n, found in second.items() if found != first[n]} == {"own_far"}
    parts.write_text("def x(:\n")  # nobody could import it
    assert sorted(own_code.code(node)) == ["own_helper", "own_main"]


@pytest.mark.parametrize(
    "by_text",
    [
        "import importlib\nx = importlib.import_module('own_far.parts')",
        "from importlib import import_module as get\nx = [get(f'own_far.{n}') for n in ['parts']]",
        "x = __import__('own_far')",
        "from hydra.utils import get_class\nNAME = 'own_far.parts.A'\nx = lambda: get_class(NAME)",
    ],
)
def test_code_that_own_code_imports_by_a_text_counts(tmp_path, monkeypatch, by_text):
    """After an edit runs were found finished. The controls: texts in code that imports none, folders."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own_far").mkdir()
    (tmp_path / "own_far" / "__init__.py").touch()
    (tmp_path / "own_far" / "parts.py").write_text("class A:\n    pass\n")
    (tmp_path / "some_results").mkdir()
    text = "FOLDER, OTHER = 'some_results', ['own_far.parts', '', '.', 'a b', '\\0', 'os', 'jax']\n"
    (tmp_path / "own_main.py").write_text(text + OWN.format(symbols=4))
    node = {"_target_": "own_main.own"}
    assert sorted(own_code.code(node)) == ["own_main"]
    (tmp_path / "own_main.py").write_text(f"{by_text}\n{text}{OWN.format(symbols=4)}")
    assert sorted(own_code.code(node)) == ["own_far", "own_main"]


def test_a_namespace_package_that_is_twice_on_the_path_is_one(tmp_path, monkeypatch):
    """As it is for a script in the folder that PYTHONPATH names: unchanged code counted as changed."""
    (tmp_path / "own_space").mkdir()
    (tmp_path / "own_space" / "a.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    once = own_code.fingerprint("own_space")
    monkeypatch.syspath_prepend(tmp_path / "own_space" / "..")
    assert own_code.fingerprint("own_space") == once
    (tmp_path / "other" / "own_space").mkdir(parents=True)
    (tmp_path / "other" / "own_space" / "b.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path / "other")
    assert own_code.fingerprint("own_space") != once


def test_data_within_an_own_package_count(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "own_pack"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("x = 1\n")
    first = own_code.fingerprint("own_pack")
    for name, counts in (("data/shift.txt", True), (".hidden", False), ("weights.npz", True)):
        (folder / name).write_text("1")
        second = own_code.fingerprint("own_pack")
        assert (second != first) == counts, name
        first = second
    (folder / "data" / "shift.txt").write_text("2")
    assert own_code.fingerprint("own_pack") != first


def test_the_commit_is_the_package_s_own(tmp_path, monkeypatch):
    """Not that of a repository that happens to lie around it."""
    (tmp_path / "lib").mkdir()
    file = tmp_path / "lib" / "run.py"
    file.write_text("")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@x"]
    (tmp_path / ".gitignore").write_text("lib\n")
    for line in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *line], check=True)
    monkeypatch.setattr(run_module, "__file__", str(file))
    assert run_module._commit.__wrapped__() is None
    subprocess.run([*git, "add", "-f", "lib/run.py"], check=True)
    assert run_module._commit.__wrapped__().endswith("+")


EDITS = {
    "a function": ("def f():\n    return 1\n", "def f():\n    return 2\n"),
    "a method": ("class A:\n    def f(self):\n        return 1\n",) * 2,
    "a constant": ("X = 1\n", "X = 2\n"),
    "a tuple": ("X: tuple = (1, -2)\n", "X: tuple = (1, -3)\n"),
    "in wrappers": (
        "import functools, jax\n\n@jax.jit\n@functools.cache\ndef f():\n    return 1\n# \\d\n",
    )
    * 2,
    "what nobody could import": ("X = 1\n", "X = = 1\n"),
}


@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_between_the_import_and_the_first_run_is_seen(kind, tmp_path, imported, caplog):
    """From what is in memory: no compiled file is there, or another process has compiled the new one."""
    old, new = EDITS[kind]
    new = new if new != old else old.replace("return 1", "return 2")
    file = tmp_path / "early.py"
    file.write_text(old)
    fresh = own_code.fingerprint("early")
    module = imported("early")
    assert own_code.fingerprint("early") == fresh
    own_code._imported.clear()  # as if it had not been seen
    file.write_text(new)
    edited = own_code.fingerprint("early")
    (said,) = caplog.messages
    assert "early.py has changed since early was imported" in said
    assert own_code.fingerprint("early") == edited
    if "could" not in kind:
        importlib.reload(module)
    reloaded = own_code.fingerprint("early") if "could" not in kind else None
    assert len({fresh, edited, reloaded}) == 3
    assert len(caplog.messages) == 1


def test_what_a_module_changes_itself_is_no_edit(tmp_path, imported, caplog):
    (tmp_path / "busy.py").write_text(
        "from dataclasses import dataclass\n\nX = 1\nX = 2\nY = [1]\nY.append(2)\nZ = 0\nfor Z in range(3):\n"
        "    pass\nW = 5\n\n\ndef set_it():\n    global W\n    W = 6\n\n\nset_it()\nf = lambda: 3\n\n\n"
        "@dataclass\nclass A:\n    x: int = 3\n\n    @property\n    def y(self):\n        return f()\n"
    )
    fresh = own_code.fingerprint("busy")
    imported("busy")
    assert own_code.fingerprint("busy") == fresh
    assert not caplog.messages


def test_a_module_that_was_reloaded_under_another_is_told(tmp_path, imported, caplog):
    """`from hlp import f` keeps the old f until the module that says so is reloaded, too."""
    (tmp_path / "user.py").write_text("from hlp import f as g, X\n")
    (tmp_path / "hlp.py").write_text("X = 1000\n\n\ndef f():\n    return 1\n")
    user, hlp = map(imported, ("user", "hlp"))
    node = {"_target_": "user.g"}
    first = own_code.code(node)
    (tmp_path / "hlp.py").write_text("X = 1000\n\n\ndef f():\n    return 2\n")
    importlib.reload(hlp)
    second = own_code.code(node)
    assert first["hlp"] != second["hlp"]
    assert first["user"] != second["user"]
    (said,) = caplog.messages
    assert "user.py uses g" in said
    assert "reload user, too" in said
    importlib.reload(user)
    third = own_code.code(node)
    assert (third["user"], third["hlp"]) == (first["user"], second["hlp"])
    assert len(caplog.messages) == 1


def test_files_that_settings_name_count(tmp_path):
    file = tmp_path / "shift.txt"
    file.write_text("0")
    node = {"_target_": "bptt_study.tasks.char_lm", "own": {"path": str(file), "kind": "shift.tx"}}
    first = own_code.code(node)
    assert [*first] == [f"file {file}"]
    file.write_text("2")
    second = own_code.code(node)
    (said,) = run_folder.changes({"code": first}, None, second)
    assert said == f"the file {file} has changed since it ran"
    (said,) = run_folder.changes({"code": first | {"own": "1"}}, None, second | {"own": "2"})
    assert said == f"the code of own and the file {file} have changed since it ran"
    assert own_code.made_from(node) != own_code.made_from({**node, "own": {}})


def test_a_large_file_is_refused_before_it_is_read(command, tmp_path, monkeypatch):
    """A checksum of 40 GiB takes more than half a minute."""
    monkeypatch.setattr(own_code, "_file_sha256", lambda *_: pytest.fail("it was read"))
    file = tmp_path / "large.txt"
    with file.open("wb") as out:
        out.truncate(2**31)
    code, _, err = command("task=char_lm", f"task.path={file}")
    assert code == 2
    assert "`task.path` must be a file of at most 1073741824 bytes" in err


def test_what_takes_more_than_seconds_before_a_run_says_so(module, tmp_path, monkeypatch, capsys):
    """The checksum of a large file, and a task that is made of one."""
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    file = tmp_path / "data.txt"
    file.write_text("long")
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: time.sleep(0.5) or hashlib.sha256())
    own_code.code({"_target_": "bptt_study.tasks.char_lm", "path": str(file)})
    slow = OWN.format(symbols=4).replace("return", "import time; time.sleep(0.5); return")
    (tmp_path / "edited_task.py").write_text(slow)
    configure.build("task", NODE)
    said = capsys.readouterr().out
    assert f"computes the checksum of {file}" in said
    assert "makes the task, edited_task.own" in said


def test_code_that_a_text_names_counts(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_part.py").write_text("x = 1\n")
    node = {"_target_": "bptt_study.tasks.copy", "f": {"_target_": "hydra.utils.get_method"}}
    node["f"]["path"] = "my_part.two"
    assert "my_part" in own_code.code(node)


@pytest.mark.slow
def test_data_are_made_anew_under_other_settings_of_jax(monkeypatch):
    """Validation parts, and programs that have drawn with another kind of keys."""

    def drawn():
        cfg = bs.compose("task=copy", "size=smoke")
        own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        config = configure.configure(own, cfg.hydra.runtime.choices)
        return np.asarray(jax.random.key_data(run_module._keys(np.arange(2)))), config

    first, config = drawn()
    with jax.default_prng_impl("rbg"):
        other, elsewhere = drawn()
    again, back = drawn()
    assert other.shape != first.shape
    assert (first == again).all()
    assert elsewhere.identity != config.identity == back.identity
    assert json.loads(elsewhere.settings["environment"])["default_prng_impl"] == "rbg"
    assert elsewhere.problem is not config.problem


TEXT = "the quick brown fox jumps over the lazy dog " * 40


def finished(folder, config) -> bs.results.Run:
    """A run that was finished when code and text were as they are."""
    task = configure.build("task", config["task"])
    about = {"rows": 1, "diverged": 0, "code": own_code.code(config)}
    about["corpus_sha256"] = task.facts.get("corpus_sha256")
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "machine.json").write_text(json.dumps(environment.environment()))
    return bs.results.Run(folder.name, folder)


PARTS = {
    "cell": {"_target_": "bptt_study.cells.elman", "hidden": 3},
    "strategy": {"_target_": "bptt_study.strategies.full"},
    "budget": {"steps": 8, "batch_size": 2},
    "first_seed": 0,
    "seeds": 1,
    "probes": {},
}


def test_a_text_that_was_edited_is_read_again(tmp_path):
    """And what was trained on the other text is not looked at with this one."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT)
    config = PARTS | {"task": {"_target_": "bptt_study.tasks.char_lm", "path": str(corpus)}}
    first = finished(tmp_path / "first", config)
    assert first.task is configure.build("task", config["task"])

    corpus.write_text(TEXT.replace("fox", "cat"))
    second = finished(tmp_path / "second", config)
    assert second.task.facts["corpus_sha256"] != first.task.facts["corpus_sha256"]
    old = bs.results.Run("first", first.folder)
    for look in (lambda: old.task, lambda: old.batch, lambda: old.problem, lambda: old.strategy):
        with pytest.raises(UnusableError, match="run first: its corpus had SHA-256"):
            look()


def test_a_run_that_was_made_anew_is_another(tmp_path):
    """Tables that were read before stay. Files read later would be those of the new run, and are refused."""

    def make(loss):
        contents = {
            "rows.csv": f"run,seed,validation_loss\nx,0,{loss}\n",
            "config.yaml": "seeds: 1\n",
        }
        files.write_folder(tmp_path / "x", {n: text.encode() for n, text in contents.items()})

    make(1.5)
    old, read = (bs.results.Run("x", tmp_path / "x") for _ in range(2))
    assert read.table["validation_loss"].tolist() == [1.5]
    (tmp_path / "x").rename(tmp_path / "aside")
    make(2.5)
    assert read.table["validation_loss"].tolist() == [1.5]
    for look in (lambda: old.table, lambda: old.config, lambda: read.config):
        with pytest.raises(UnusableError, match="run x: it has been made anew or removed since"):
            look()
    assert bs.results.Run("x", tmp_path / "x").table["validation_loss"].tolist() == [2.5]


@pytest.mark.parametrize(
    ("name", "content"),
    [*(("config.yaml", c) for c in ("", "[]", "a: [", "seeds: 1", "[" * 5000, "\xff")),
     *(("machine.json", c) for c in ("", "[]", "[" * 10**5, "\xff"))],
    ids=lambda text: text[:10],
)  # fmt: skip
def test_a_file_of_a_run_that_is_foreign_is_named(tmp_path, name, content):
    run = finished(tmp_path / "x", PARTS | {"task": {"_target_": "bptt_study.tasks.copy"}})
    (run.folder / name).write_text(content, encoding="latin-1")
    with pytest.raises(UnusableError, match=f"run x: {name} is not "):
        _ = run.problem


def test_a_configuration_of_a_run_holds_what_its_factories_take(tmp_path):
    dated = {"_target_": "bptt_study.tasks.copy", "length": "DATE"}
    run = finished(tmp_path / "x", PARTS | {"task": {"_target_": "bptt_study.tasks.copy"}})
    config = json.dumps(PARTS | {"task": dated}).replace('"DATE"', "2020-01-01")
    (run.folder / "config.yaml").write_text(config)
    with pytest.raises(
        UnusableError, match=r"run x: config\.yaml is not the configuration of a run"
    ):
        _ = run.task


CALLED = """
from bptt_study.strategies import full
def own(problem, file):
    open(file, "w").close()
    return full(problem)
"""


@pytest.mark.parametrize("changed", [False, True])
def test_a_configuration_in_a_results_folder_calls_no_code_but_that_of_the_run(
    tmp_path, monkeypatch, changed
):
    """Neither a callable below a factory nor a module of other code has run when the run is refused."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / f"called_{changed}.py").write_text(CALLED)
    saved = {"file": str(tmp_path / "saved.npy"), "arr": [1]}
    law = {"_target_": "numpy.save", **saved}
    other = {"_target_": f"called_{changed}.own", "file": saved["file"]}
    random = {"_target_": "bptt_study.strategies.randomized", "law": law}
    strategy = other if changed else random
    config = PARTS | {"task": {"_target_": "bptt_study.tasks.copy"}, "strategy": strategy}
    run = finished(tmp_path / "first", config)
    about = json.loads((run.folder / "run.json").read_text())
    about["code"] |= {"called_True": "0123456789ab"} if changed else {}
    (run.folder / "run.json").write_text(json.dumps(about))
    why = "the code of called_True has changed" if changed else r"`strategy.law._target_` must be"
    with pytest.raises(ValueError, match=why):
        _ = run.problem
    assert not Path(saved["file"]).exists()


def test_a_run_of_other_code_is_not_looked_at_with_this_one(module, tmp_path):
    module(4)
    config = PARTS | {"task": NODE}
    first = finished(tmp_path / "first", config)
    about = json.loads((first.folder / "run.json").read_text())
    about["code"]["my_probe"] = "0123456789ab"  # whose code decides nothing here
    (first.folder / "run.json").write_text(json.dumps(about))
    assert first.problem is first.problem
    module(6)
    importlib.reload(sys.modules["edited_task"])
    with pytest.raises(UnusableError, match="the code of edited_task has changed since it ran"):
        _ = bs.results.Run("first", first.folder).strategy
