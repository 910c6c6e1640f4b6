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
from bptt_study.validation import printable

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
shell._start()
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


@pytest.mark.slow
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
    assert "of 2 runs finished and kept. " in said
    assert "The same command does the others" in said or "--gather` makes tables" in said
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


def in_a_shell(folder: Path, line: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """What a shell line does, in which $MAIN stands for `bptt-study` and $STATUS for `bptt-study-status`."""
    start = f"{sys.executable} -c 'from bptt_study import __main__ as shell; shell.{{}}()'"
    for name in ("main", "status", "figures"):
        line = line.replace(f"${name.upper()}", start.format(name))
    environment = {**os.environ, "JAX_ENABLE_X64": "1", **environment}
    return subprocess.run(
        ["sh", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_streams_that_are_closed(tmp_path):
    """Where stdout was closed, a table would get its number, and other code would print into the table."""
    done = in_a_shell(tmp_path, f"$MAIN {' '.join(TINY)} study=mine seeds=1 <&- >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert run_folders(tmp_path / "results" / "runs" / "mine")
    assert in_a_shell(tmp_path, "$STATUS nowhere 2>&-").returncode == 2
    assert in_a_shell(tmp_path, "$MAIN --help >&-").returncode == 0


def test_a_stream_of_ascii_alone(tmp_path):
    done = in_a_shell(tmp_path, "$MAIN --help", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert r"copying, \u2026" in done.stdout
    done = in_a_shell(tmp_path, "$MAIN study=…", PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert r"\u2026" in done.stderr, done.stderr


def test_no_escape_sequence_is_printed_raw(tmp_path):
    """Neither from a setting, nor from what lies on disk, nor in the words of Hydra."""
    found = tmp_path / "results" / "runs" / "mi\x1b[31mne" / "sweeps"
    found.mkdir(parents=True)
    (found / "latest.json").write_text("")
    lines = ["$STATUS results", "$MAIN 'stu\x1b[31mdy=a'", "$STATUS 'a\x1b]0;owned\x07\u202eb'"]
    for line in lines:
        done = in_a_shell(tmp_path, line)
        assert done.returncode in (1, 2)
        said = done.stdout + done.stderr
        assert r"\x1b" in said
        assert not {"\x1b", "\x07", "\u202e"} & set(said)
    assert printable("a\tb\r\n\x9bc") == "a\tb\r\n\\x9bc"


def test_a_working_directory_that_was_deleted(tmp_path):
    for command in ("$MAIN", "$STATUS results"):
        done = in_a_shell(tmp_path, f"mkdir gone; cd gone; rmdir ../gone; {command}")
        assert done.returncode == 2
        assert done.stderr.startswith("the working directory must be one that exists")
        assert len(done.stderr.splitlines()) == 1


def test_the_backend_of_a_notebook(tmp_path):
    """It is in the environment of what a notebook starts, and needs the notebook."""
    backend = "module://matplotlib_inline.backend_inline"
    done = in_a_shell(tmp_path, "$FIGURES nowhere", MPLBACKEND=backend)
    assert done.returncode == 2
    assert done.stderr.startswith("bptt-study-figures: `FOLDER` must be a folder with a table.csv")
