"""The commands as a shell stops them: Ctrl-C at any time, and a reader that goes away; never a traceback."""

import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest
from support import SWEEP, TINY, run_folders

from bptt_study.runner import progress

COMMANDS = {"bptt-study": "main", "bptt-study-status": "status"}
# Ctrl-C in the middle of the import of a module
INTERRUPTED = """
import os, signal, sys, time
from bptt_study import __main__ as shell

class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            print("went on")

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
sys.argv = {argv!r}
shell.{function}()
"""


@pytest.mark.parametrize(
    ("module", "argv", "goes_on"),
    [
        ("hydra", ["bptt-study"], ""),
        ("jax", ["bptt-study", "size=smoke"], "went on\n"),  # to the end of the import
        ("filelock", ["bptt-study-status", "results"], ""),
    ],
)
def test_ctrl_c_while_a_command_starts(module, argv, goes_on, tmp_path):
    code = INTERRUPTED.format(module=module, argv=argv, function=COMMANDS[argv[0]])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stdout == goes_on
    assert done.stderr.startswith("stopped. No finished run is lost")
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def as_module(main: str) -> list[str]:
    """A command line that starts this `main` as a shell starts the commands."""
    code = f"""
import gc, os, signal, sys, time, types
from bptt_study import __main__ as shell

def main():
{textwrap.indent(textwrap.dedent(main), "    ")}
sys.modules["own"] = types.SimpleNamespace(main=main)
signal.signal(signal.SIGINT, signal.default_int_handler)
shell._install_handlers()
shell.run("own")
"""
    return [sys.executable, "-c", code]


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost():
    """Python drops what is raised there; in a short run of ours a quarter of all Ctrl-C fell there."""
    main = """
        def callback(*_):
            gc.callbacks.remove(callback)
            signal.raise_signal(signal.SIGINT)
        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(60)
        print("went on")
    """
    done = subprocess.run(as_module(main), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.startswith("stopped. No finished run is lost")
    assert len(done.stderr.splitlines()) == 1


def test_a_broken_pipe_to_a_worker_stops_nothing():
    main = """
        read, write = os.pipe()
        os.close(read)
        try:
            os.write(write, b"work")
        except BrokenPipeError:
            print("heard")
    """
    done = subprocess.run(as_module(main), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "heard\n", "")


def without_reader(
    folder: Path, *argv: str, until: str = "", **environment: str
) -> tuple[int, str]:
    """Status, as a shell has it, of a command whose stdout is read until these words; and its stderr."""
    code = f"from bptt_study import __main__ as shell; shell.{COMMANDS[argv[0]]}()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *argv[1:]],
        cwd=folder,
        env={**os.environ, "JAX_ENABLE_X64": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        while until and until not in process.stdout.readline():
            pass
        process.stdout.close()
        said = process.stderr.read()
        status = process.wait()
        return (status if status >= 0 else 128 - status), said


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "argv",
    [
        ["bptt-study", "--help"],
        ["bptt-study", "--cfg", "all"],
        ["bptt-study", *TINY],
        ["bptt-study-status", "--help"],
        ["bptt-study-status", "results/mine"],
    ],
    ids=" ".join,
)
def test_a_reader_that_goes_away_is_no_error(argv, unbuffered, swept, tmp_path):
    shutil.copytree(swept, tmp_path / "results")
    assert without_reader(tmp_path, *argv, PYTHONUNBUFFERED=unbuffered) == (141, "")


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """The results of a sweep whose reader goes away after the first run."""
    folder = tmp_path_factory.mktemp("swept")
    status, said = without_reader(folder, "bptt-study", *SWEEP, until="(median of")
    assert status in (130, 141), said
    assert said.startswith("stopped: ")
    assert "of 2 runs finished and kept. The same command does the others" in said
    assert len(said.splitlines()) == 1
    return folder / "results"


def test_a_sweep_whose_reader_goes_away_loses_nothing(swept, command, tmp_path):
    kept = run_folders(swept / "runs" / "mine")
    assert kept
    status, out, err = command(*SWEEP, f"results_dir={swept}")
    assert status == 0, err
    assert f"{len(kept)} of 2 runs finished already" in out


def test_what_a_sweep_says_is_in_its_log_at_once(tmp_path, monkeypatch):
    """Though the log is a file, of which Python writes 8 KB at a time."""
    with (tmp_path / "log").open("w", encoding="utf-8") as log:
        monkeypatch.setattr(sys, "stdout", log)
        progress.say("2 runs")
        assert (tmp_path / "log").read_text(encoding="utf-8").endswith(" 2 runs\n")


def test_a_log_that_cannot_be_written_is_no_failure(monkeypatch):
    with Path("/dev/full").open("w", encoding="utf-8") as log:
        monkeypatch.setattr(sys, "stdout", log)
        progress.say("2 runs")
        monkeypatch.undo()
        with suppress(OSError):
            log.close()
