"""Edits within one process, as in a notebook: a run is made of the code and the text that it says."""

import importlib
import json
import logging
import sys

import pytest

import bptt_study as bs
from bptt_study.runner import configure, factories
from bptt_study.runner.array_files import UnusableError

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


NODE = {"_target_": "edited_task.own"}


def made() -> tuple[int, str]:
    """The symbols of the task that a run would have, and the checksum that it would state."""
    return configure.build("task", NODE).outputs, factories.code(NODE)["edited_task"]


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


def test_a_function_that_is_defined_anew_is_the_one_that_runs(monkeypatch):
    """In a notebook's own namespace, which has no file."""
    monkeypatch.setattr(sys.modules["__main__"], "mine", lambda: bs.tasks.copy(3, 2), raising=False)
    node = {"_target_": "__main__.mine"}
    assert configure.build("task", node).outputs == 8
    sys.modules["__main__"].mine = lambda: bs.tasks.copy(3, 2, symbols=5)
    assert configure.build("task", node).outputs == 5


def test_what_is_nested_is_made_anew_as_well(module):
    """Such as a transform of an optimizer."""
    module(4)
    node = json.dumps({"of": NODE | {"_partial_": True}})

    def nested():
        return configure._instantiated("x", node, factories.made_from(json.loads(node)))["of"]

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
    first = factories.fingerprint("edited_package")
    (folder / "a.py").write_text("x = 2\n")
    assert factories.fingerprint("edited_package") == first
    (folder / "b.py").write_text("x = 2\n")  # nobody has imported it yet
    second = factories.fingerprint("edited_package")
    assert second != first
    importlib.reload(sys.modules["edited_package"])
    assert factories.fingerprint("edited_package") == second
    importlib.reload(a)
    assert factories.fingerprint("edited_package") not in (first, second)
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
    first = factories.code(node)
    assert sorted(first) == ["own_far", "own_helper", "own_main"]
    (tmp_path / "own_far.py").write_text("x = 2\n")
    second = factories.code(node)
    assert {n for n, found in second.items() if found != first[n]} == {"own_far"}
    parts.write_text("def x(:\n")  # nobody could import it
    assert sorted(factories.code(node)) == ["own_helper", "own_main"]


def test_an_edit_between_the_import_and_the_first_run_is_seen(tmp_path, monkeypatch, caplog):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "early_task.py"
    file.write_text(OWN.format(symbols=4))
    fresh = factories.fingerprint("early_task")
    module = importlib.import_module("early_task")
    file.write_text(f"{OWN.format(symbols=6)}\n")
    edited = factories.fingerprint("early_task")
    (said,) = caplog.messages
    assert "early_task.py has changed since early_task was imported" in said
    assert factories.fingerprint("early_task") == edited
    importlib.reload(module)
    reloaded = factories.fingerprint("early_task")
    assert len({fresh, edited, reloaded}) == 3
    assert len(caplog.messages) == 1
    del sys.modules["early_task"]
    assert factories.fingerprint("early_task") == reloaded


TEXT = "the quick brown fox jumps over the lazy dog " * 40


def finished(folder, config) -> bs.results.Run:
    """A run that was finished when code and text were as they are."""
    task = configure.build("task", config["task"])
    about = {"rows": 1, "diverged": 0, "code": factories.code(config)}
    about["corpus_sha256"] = task.facts.get("corpus_sha256")
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(about))
    (folder / "config.yaml").write_text(json.dumps(config))
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
