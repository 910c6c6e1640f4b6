"""The one line of a sweep that runs: what it counts, and how it looks with and without a terminal."""

import io
import json
import logging
import sys
import time
from contextlib import ExitStack

import pytest

from bptt_study import files
from bptt_study.runner import progress, run_folder
from bptt_study.runner.locks import lock
from bptt_study.runner.progress import AboveBar, SweepProgress
from bptt_study.runner.run_folder import RunPaths, Sweep


@pytest.fixture
def sweep(tmp_path) -> Sweep:
    """Six runs, of which a is finished."""
    entry = {"overrides": [], "corpus_sha256": None}
    found = Sweep(tmp_path, "mine", None, dict.fromkeys("abcdef", entry))
    leave(found.paths("a"))
    return found


def leave(paths: RunPaths, diverged: int = 0) -> None:
    about = {"run": paths.run, "rows": 1, "diverged": diverged, "corpus_sha256": None}
    about = json.dumps(about | {"code": {}, "format": run_folder.FORMAT})
    files.write_folder(paths.folder, {run_folder.ABOUT: about.encode()})


def progress_of(sweep: Sweep, todo: str) -> SweepProgress:
    return SweepProgress(sweep, sweep.states(), todo)


@pytest.fixture
def clock(monkeypatch):
    """A function that sets it."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_the_line_counts_what_becomes_of_every_run(sweep, clock, capsys):
    found = progress_of(sweep, "bcdef")
    assert found.line() == "1 done, 0 running, 0 failed, 0 diverged, 5 left"
    leave(sweep.paths("b"))
    leave(sweep.paths("c"), diverged=2)
    files.write(sweep.paths("d").failure, "MemoryError: no 12 GiB\n\nTraceback …")
    clock(3600)
    with ExitStack() as stack:
        stack.enter_context(lock(sweep.paths("e").lock, wait=False))
        found.update()
        said = "3 done, 1 running, 1 failed, 1 diverged, 1 left; ready in 1:00:00"
        assert found.line() == said
    found.update()
    assert "3 done, 0 running, 1 failed, 1 diverged, 2 left" in found.line()
    (failed, where) = capsys.readouterr().out.splitlines()
    assert failed.endswith("failed: d (): MemoryError: no 12 GiB")
    assert where == f"  traceback: {sweep.paths('d').failure}"


def test_what_is_to_be_done_again_is_not_done_yet(sweep, clock):
    """Though what it left the last time is still there; nor is what is damaged."""
    found = progress_of(sweep, "abcdef")
    found.update()
    assert found.line() == "0 done, 0 running, 0 failed, 0 diverged, 6 left"
    leave(sweep.paths("a"))
    found.update()
    assert found.line().startswith("1 done, 0 running, 0 failed, 0 diverged, 5 left")


def test_what_another_process_finished_after_all_has_not_failed(sweep):
    found = progress_of(sweep, "b")
    found.fail("b", "its worker died")
    leave(sweep.paths("b"))
    found.update()
    assert (found.done, found.failed) == ({"b"}, {})


class Terminal(io.StringIO):
    """What is seen in the end: a carriage return begins the line again."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        return [line.rpartition("\r")[2] for line in self.getvalue().split("\n")]


def wait_for(happens) -> None:
    until = time.monotonic() + 10
    while not happens() and time.monotonic() < until:
        time.sleep(0.01)
    assert happens()


def test_on_a_terminal_it_stays_below_what_is_said(sweep, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    said = "1 done, 0 running, 0 failed, 0 diverged, 5 left"
    with progress.show_progress(progress_of(sweep, "bcdef")):
        wait_for(lambda: said in screen.lines()[-1])
        assert screen.lines()[-1].count("done") == 1
        AboveBar().emit(logging.makeLogRecord({"msg": "epoch"}))
        leave(sweep.paths("b"))
        wait_for(lambda: "2 done" in screen.lines()[-1])
    assert "epoch" in screen.lines(), "on a line of its own"
    assert not screen.lines()[-1].strip(), "it is gone in the end"


def test_without_a_terminal_it_is_a_line_now_and_then(sweep, monkeypatch, capsys):
    """When there is something new."""
    monkeypatch.setattr(progress, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.05)
    said: list[str] = []

    def heard(words):
        said.extend(capsys.readouterr().out.splitlines())
        return any(words in line for line in said)

    with progress.show_progress(progress_of(sweep, "bcdef")):
        wait_for(lambda: heard("5 left"))
        time.sleep(0.2)
        leave(sweep.paths("b"))
        wait_for(lambda: heard("4 left"))
    assert sum("5 left" in line for line in said) == 1
    assert not capsys.readouterr().err
