"""Sweeps in bad conditions: nothing finished is lost, and one line says what to do, without a traceback."""

import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import many
import numpy as np
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.plugins import Plugins
from support import SWEEP, TINY, contents, run_folders, run_here, stand_in

import bptt_study
from bptt_study import files
from bptt_study.report import csv_tables, figure_layout, tables
from bptt_study.runner import array_files, configure, gather, own_code, run, status, sweep
from bptt_study.runner.locks import locked
from bptt_study.runner.run_checkpoint import RunCheckpoint
from bptt_study.training.train import Progress, Trained

RESULTS = Path("results")
RUNS = RESULTS / "runs" / "mine"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A results folder in which SWEEP is finished."""
    folder = tmp_path_factory.mktemp("finished")
    assert run_here(*SWEEP, f"results_dir={folder}/results") == 0
    return folder / "results"


def half(finished: Path, folder: Path = RESULTS) -> Path:
    """A copy in which one of the two runs is missing; returns the folder of the other."""
    shutil.copytree(finished, folder)
    kept, gone = run_folders(folder / "runs" / "mine")
    shutil.rmtree(gone)
    shutil.rmtree(folder / "mine")
    return kept


def stamps(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in folder.iterdir()}


def same(folder: Path, finished: Path) -> None:
    """Its tables are those of the undisturbed sweep."""
    assert contents(folder / "mine") == contents(finished / "mine")


def nothing() -> None:
    pass


def around_run(
    monkeypatch,
    perform: Callable[..., Any],
    before: Callable[[], Any] = nothing,
    after: Callable[[], Any] = nothing,
) -> list[str]:
    """Let this happen before and after the first run that is done; returns those done, which grows."""
    done: list[str] = []

    def watched(one, *arguments, **settings):
        done.append(one.identity)
        if len(done) > 1:
            return perform(one, *arguments, **settings)
        before()
        rows = perform(one, *arguments, **settings)
        after()
        return rows

    monkeypatch.setattr(run, "perform", watched)
    return done


@pytest.fixture
def quick(finished) -> Callable[..., Any]:
    """A `perform` that takes no time."""
    return stand_in(finished / "runs" / "mine")


def interrupt() -> None:
    """Ctrl-C, which a process that a shell has started in the background ignores."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)


def raising(error: BaseException) -> Callable[[], None]:
    def happens() -> None:
        raise error

    return happens


def what_status_says(folder: Path, capsys, *how: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        status.main([str(folder), *how])
    return stop.value.code, capsys.readouterr().out


def says_what_to_do(code: int, out: str, err: str) -> None:
    """A status other than 0, no traceback, and one line of what to do."""
    assert code != 0
    assert "Traceback (most recent call last)" not in out + err
    assert sum("the same command" in line.lower() for line in (out + err).splitlines()) == 1, (
        out + err
    )


# ---- disks


class Disk(NamedTuple):
    """A folder on a small disk of its own; `shell` runs a command where it is mounted as $DISK."""

    folder: Path
    shell: Callable[[str], str]


@pytest.fixture
def disk(tmp_path) -> Iterator[Disk | None]:
    """A tmpfs in a user namespace, seen from outside through /proc; None where that is not allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    with subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh"],
        env={**os.environ, "DISK": str(place)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as holder:

        def shell(line: str) -> str:
            assert holder.stdin is not None
            assert holder.stdout is not None
            with suppress(BrokenPipeError):
                holder.stdin.write(f"{line} && echo done\n")
                holder.stdin.flush()
            return holder.stdout.readline()

        allowed = shell("mount -t tmpfs -o size=1m bptt $DISK") == "done\n"
        yield Disk(Path(f"/proc/{holder.pid}/root{place}"), shell) if allowed else None
        holder.kill()


def fill(disk: Disk | None) -> Callable[[], None]:
    """Leave no space; without a disk no file can grow, which does the same to it. Returns how to undo it."""
    if disk:
        there = os.statvfs(disk.folder)
        ballast = disk.folder / "ballast"
        ballast.write_bytes(bytes(there.f_bavail * there.f_frsize))
        return ballast.unlink
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["start", "before", "after"])
def test_a_full_disk(command, finished, quick, disk, tmp_path, monkeypatch, moment):
    """Full when the sweep starts, when it trains, and when its tables are due."""
    results = (disk.folder if disk else tmp_path) / "results"
    kept = half(finished, results)
    known = stamps(kept)
    sweep = [*SWEEP, f"results_dir={results}"]
    undo = []

    def full():
        undo.append(fill(disk))

    around_run(monkeypatch, quick, **({} if moment == "start" else {moment: full}))
    if moment == "start":
        full()
    code, out, err = command(*sweep)
    undo[0]()
    says_what_to_do(code, out, err)
    assert "No space left on device" in out + err or "File too large" in out + err
    assert stamps(kept) == known
    assert not list((results / "runs" / "mine").glob(".*-*")), "nothing half-written"

    code, out, err = command(*sweep)
    assert code == 0, err
    assert f"{1 + (moment == 'after')} of 2 runs finished already" in out
    same(results, finished)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(command, finished, monkeypatch):
    half(finished)
    monkeypatch.setattr(array_files, "save", lambda *_: raising(OSError(28, "No space left"))())
    code, out, err = command(*SWEEP, "checkpoint_seconds=0")
    assert code == 0, err
    assert "no checkpoint was written: [Errno 28] No space left; the run continues" in out
    same(RESULTS, finished)


def test_results_that_cannot_be_written(command, finished, disk, tmp_path, capsys):
    """Below a regular file, in /proc, and on a disk that is mounted for reading only: root is not spared."""
    (tmp_path / "file").touch()
    places = [tmp_path / "file" / "results", Path("/proc/results")]
    if disk:
        shutil.copytree(finished, disk.folder / "results")
        assert disk.shell("mount -o remount,ro $DISK") == "done\n"
        places.append(disk.folder / "results")
        code, out = what_status_says(places[-1], capsys)
        assert code == 0
        assert "2 finished; complete" in out
    for place in places:
        code, out, err = command(*SWEEP, f"results_dir={place}")
        assert code == 2
        (line,) = err.splitlines()
        assert line.startswith("bptt-study: `results_dir` must be a folder that can be written to")
        assert f"; got {place}." in line


def test_one_run_alone_on_a_full_disk(command, quick, disk, tmp_path, monkeypatch):
    results = (disk.folder if disk else tmp_path) / "results"
    undo = []
    around_run(monkeypatch, quick, lambda: undo.append(fill(disk)))
    code, out, err = command(*TINY, "study=mine", f"results_dir={results}")
    undo[0]()
    assert code == 2
    says_what_to_do(code, out, err)
    assert not run_folders(results / "runs" / "mine")


def test_tables_that_status_cannot_write(finished, monkeypatch, capsys):
    monkeypatch.setattr(csv_tables, "write_table", lambda *_: raising(OSError(30, "Read-only"))())
    with pytest.raises(SystemExit) as stop:
        status.main([str(finished / "mine"), "--gather"])
    err = capsys.readouterr().err
    says_what_to_do(stop.value.code, "", err)
    assert err.startswith("bptt-study-status: [Errno 30] Read-only. No finished run is lost")


@pytest.mark.parametrize("content", ["[]", "", '{"experiment": null, "runs": {}}'])
def test_what_a_sweep_wrote_down_and_was_edited(command, finished, quick, capsys, content):
    half(finished)
    (noted,) = (f for f in (RUNS / "sweeps").iterdir() if f.name != "latest.json")
    noted.write_text(content)
    with pytest.raises(SystemExit) as stop:
        status.main([str(RESULTS / "mine")])
    err = capsys.readouterr().err
    says_what_to_do(stop.value.code, "", err)
    assert f"{noted.name} is missing, truncated or edited" in err


@pytest.mark.parametrize(
    "content",
    [
        "",
        '"5f0c',
        "[]",
        '""',
        "\xff",
        '"gone.json"',
        '{"a": 1}',
        '".."',
        f'"{"a" * 300}"',
        "[" * 10**5,
    ],
    ids=lambda content: content[:9],
)
def test_a_garbled_note_of_the_latest_sweep(command, finished, quick, capsys, content):
    """What to do mends it."""
    shutil.copytree(finished, RESULTS)
    latest = RUNS / "sweeps" / "latest.json"
    latest.write_text(content, encoding="latin-1")
    with pytest.raises(SystemExit) as stop:
        status.main([str(RESULTS / "mine")])
    err = capsys.readouterr().err
    says_what_to_do(stop.value.code, "", err)
    named = "gone.json" if "gone" in content else "latest.json"
    assert f"{latest.with_name(named).absolute()} is missing, truncated or edited" in err
    assert command(*SWEEP)[0] == 0
    assert what_status_says(RESULTS / "mine", capsys)[0] == 0


def test_one_of_a_kind_is_called_so(command, monkeypatch, capsys):
    code, out, err = command("-m", *TINY, "study=mine", "seeds=1")
    assert code == 0, err
    assert "(median of 1 seed)" in out
    assert "of 1 run, as expected" in out
    out += what_status_says(RESULTS / "mine", capsys)[1]
    assert "mine: 1 run: 1 finished; complete" in out
    around_run(monkeypatch, run.perform, interrupt)
    code, more, err = command("-m", *TINY, "study=mine", "seeds=1", "overwrite=true")
    assert "1 of 1 run finished and kept" in err
    assert not re.search(r"\b1 (runs|rows|seeds)\b", out + more + err)


@pytest.mark.slow
def test_a_sweep_that_is_stopped_after_its_runs_says_so(command, monkeypatch):
    """Its table may be written already, and is then not that of an earlier sweep."""
    gathered = gather.gather

    def stopped(*arguments):
        gathered(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(gather, "gather", stopped)
    code, _, err = command("-m", *TINY, "study=mine", "seeds=1")
    assert code == 130
    assert (RESULTS / "mine" / "table.csv.gz").is_file()
    assert "1 of 1 run finished and kept. `bptt-study-status " in err
    assert "missing, incomplete or those of an earlier sweep" in err
    assert "The same command" not in err and "is still that of an earlier sweep" not in err


def test_results_that_become_read_only(command, finished, quick, disk, monkeypatch):
    """Without a disk to mount, the folder moves below a file."""
    results = disk.folder / "results" if disk else RESULTS
    kept = half(finished, results)

    def protect():
        if disk:
            disk.shell("mount -o remount,ro $DISK")
        else:
            results.rename("moved")
            results.touch()

    around_run(monkeypatch, quick, protect)
    code, out, err = command(*SWEEP, f"results_dir={results}")
    says_what_to_do(code, out, err)
    if disk:
        assert disk.shell("mount -o remount,rw $DISK") == "done\n"
    else:
        results.unlink()
        Path("moved").rename(results)
    assert files.damage(kept) == []
    code, out, err = command(*SWEEP, f"results_dir={results}")
    assert code == 0, err
    same(results, finished)


@pytest.mark.parametrize("folder", [RESULTS, RUNS])
def test_results_deleted_while_a_sweep_runs(command, finished, quick, monkeypatch, folder):
    half(finished)
    trained = around_run(monkeypatch, quick, lambda: shutil.rmtree(folder))
    code, out, err = command(*SWEEP)
    says_what_to_do(code, out, err)
    assert [f.name for f in run_folders(RUNS)] == trained, "what was finished after it is there"
    code, out, err = command(*SWEEP)
    assert code == 0, err
    assert len(trained) == 2
    same(RESULTS, finished)


# ---- what a run was made from


@pytest.mark.slow
def test_a_corpus_that_changes(command, quick, tmp_path, monkeypatch):
    """What was made from the other text is named, kept aside, and made again; nothing is mixed.

    Not even in the process that has read the other text.
    """
    monkeypatch.setattr(run, "perform", quick)
    text = "the quick brown fox jumps over the lazy dog " * 40
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(text)
    sweep = ["-m", "size=smoke", f"task.path={corpus}", "budget.updates=2", "cell.hidden=4"]
    sweep += ["task.corpus=null", "study=mine", "truncation=2", "strategy=fixed", "budget.steps=8"]
    code, out, err = command(*sweep)
    assert code == 0, out + err
    corpus.write_text(text.replace("fox", "cat"))
    code, out, err = command(*sweep)
    assert code == 0, err
    assert out.count("its corpus had SHA-256") == 2, "at the start, at the run"
    assert len(list(RUNS.glob("*.aside-1"))) == 1
    rows = csv_tables.read_table(RESULTS / "mine" / "table.csv.gz")
    assert len(set(rows["corpus_sha256"])) == 1


@pytest.mark.slow
def test_a_corpus_that_changes_while_a_sweep_runs(command, quick, tmp_path, monkeypatch):
    """Later runs have the other text, so no table is made; the next sweep does the earlier ones again."""
    text = "the quick brown fox jumps over the lazy dog " * 40
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(text)
    edit = lambda: corpus.write_text(text.replace("fox", "cat"))  # noqa: E731
    done = around_run(monkeypatch, quick, after=edit)
    sweep = ["-m", "size=smoke", f"task.path={corpus}", "budget.updates=2", "cell.hidden=4"]
    sweep += ["study=mine", "truncation=2", "strategy=fixed", "budget.steps=8", "first_seed=0,5"]
    code, _, err = command(*sweep)
    assert code == 2
    assert "Missing is 1 of 2 runs" in err
    assert "its corpus had SHA-256" in err
    code, _, err = command(*sweep)
    assert code == 0, err
    assert len(done) == 3
    rows = csv_tables.read_table(RESULTS / "mine" / "table.csv.gz")
    assert len(set(rows["corpus_sha256"])) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "0.0.9"}, "its version is 0.0.9, and that of this run is 0.1.0"),
        ({"corpus_sha256": "e3b0"}, "its corpus_sha256 is e3b0, and that of this run is None"),
        ({"format": 0}, "its format is 0; this version reads 1"),
        ({}, None),
    ],
)
def test_a_checkpoint_of_another_version_or_corpus(tmp_path, monkeypatch, caplog, change, reason):
    """It is named, set aside, and the run starts from zero; as it was it would have been gone on from."""
    at = jnp.zeros(1, jnp.int32)
    key = jax.random.key(0)
    start = Progress({"W": jnp.ones((1, 2))}, (), (), at, at, key, key)
    about = {"version": "0.1.0", "corpus_sha256": None}
    file = tmp_path / "abc.checkpoint.npz"
    with monkeypatch.context() as patch:
        patch.setattr(array_files, "FORMAT", change.pop("format", array_files.FORMAT))
        writer = RunCheckpoint(file, about | change, seconds=0, probed={})
        writer.pause(Trained(start._replace(update=at + 7), [{"update": np.array([5])}]))
    with caplog.at_level(logging.INFO):
        trained = RunCheckpoint(file, about, seconds=None, probed={}).restore(start)
    if reason:
        assert f"{file} cannot be used: {reason}; it is kept as {file.name}.aside-1" in caplog.text
        assert (trained.progress.update[0], trained.records) == (0, [])
        assert [f.name for f in tmp_path.iterdir()] == [f"{file.name}.aside-1"]
    else:
        assert "continues from update 7" in caplog.text
        assert (trained.progress.update[0], len(trained.records)) == (7, 1)


def test_a_checkpoint_says_what_its_run_was_made_by():
    one = SimpleNamespace(identity="abc", corpus="e3b0", code={"mine": "1"})
    assert run._about(one) == {
        "run": "abc",
        "version": bptt_study.__version__,
        "jax": jax.__version__,
        "platform": jax.default_backend(),
        "corpus_sha256": "e3b0",
        "code": {"mine": "1", "bptt_study": own_code.fingerprint("bptt_study")},
    }


@pytest.mark.slow
@pytest.mark.parametrize("edited", [True, False])
def test_a_checkpoint_of_other_code_of_the_package(command, monkeypatch, edited):
    """It is set aside, and the run ends as an undisturbed one. Control: of the same code it is gone on from."""
    sweep = ["-m", *TINY, "seeds=1", "study=mine", "checkpoint_seconds=0"]
    assert command(*sweep, "results_dir=whole")[0] == 0
    with monkeypatch.context() as patch:
        pause = RunCheckpoint.pause
        patch.setattr(RunCheckpoint, "pause", lambda *given: (pause(*given), interrupt()))
        assert command(*sweep)[0] == 130
    if edited:
        monkeypatch.setattr(own_code, "fingerprint", lambda _: "edited")
    code, out, err = command(*sweep)
    assert code == 0, err
    assert ("cannot be used: its code is {'bptt_study': " in out) == edited
    assert ("continues from update" in out) == (not edited)
    same(RESULTS, Path("whole"))


@pytest.mark.slow
def test_a_config_file_edited_while_a_sweep_runs(command, quick, tmp_path, monkeypatch):
    """The sweep goes on with what it was started with; the edited one is other runs, beside the first."""
    strategy = tmp_path / "conf" / "strategy" / "own.yaml"
    strategy.parent.mkdir(parents=True)

    def edit(window: int) -> None:
        strategy.write_text(
            f"_target_: bptt_study.strategies.fixed\nwindow: {window}\nstride: {window}\n"
        )

    edit(2)
    trained = around_run(monkeypatch, quick, lambda: edit(3))
    sweep = ["-m", "--config-dir", "conf", *TINY, "strategy=own", "study=mine", "first_seed=0,5"]
    code, out, err = command(*sweep)
    assert code == 0, err
    rows = csv_tables.read_table(RESULTS / "mine" / "table.csv.gz")
    assert set(rows["window"]) == {2}
    known = {folder: stamps(folder) for folder in run_folders(RUNS)}

    code, out, err = command(*sweep)
    assert code == 0, err
    assert "0 of 2 runs finished already" in out
    assert set(csv_tables.read_table(RESULTS / "mine" / "table.csv.gz")["window"]) == {2, 3}
    assert len(set(trained)) == 4
    assert {folder: stamps(folder) for folder in known} == known


def test_a_clock_that_is_set_back(command, finished, monkeypatch):
    """What there is lies in the future, or before 1970, and the clock runs backwards."""
    half(finished)
    (RUNS / ".locks").mkdir(exist_ok=True)
    for number, path in enumerate(sorted(RESULTS.rglob("*"))):
        when = 4e9 if number % 2 else -4e8
        os.utime(path, (when, when))
    clock = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    trained = around_run(monkeypatch, run.perform)
    code, out, err = command(*SWEEP, "checkpoint_seconds=0")
    assert code == 0, err
    assert "1 of 2 runs finished already" in out
    assert len(trained) == 1
    same(RESULTS, finished)


# ---- processes


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no 12 GiB"),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 12 GiB"),
    ],
)
def test_a_run_for_which_memory_does_not_suffice(
    command, finished, quick, monkeypatch, capsys, error
):
    trained = around_run(monkeypatch, quick, raising(error))
    code, out, err = command(*SWEEP)
    says_what_to_do(code, out, err)
    reason = f"{type(error).__name__}: {error}"
    assert err.count(reason) == 1, "in the summary"
    assert f"failed: {trained[0]}" in out, "when it happens"
    code, said = what_status_says(RESULTS / "mine", capsys)
    assert code == 1
    assert "1 finished, 1 failed; unfinished" in said
    assert reason in said
    code, out, err = command(*SWEEP)
    assert code == 0, err
    assert len(set(trained)) == 2
    same(RESULTS, finished)


def test_one_run_alone_for_which_memory_does_not_suffice(command, quick, monkeypatch):
    around_run(monkeypatch, quick, raising(MemoryError("no 12 GiB")))
    code, _, err = command(*TINY, "study=mine")
    assert code == 1
    assert err.startswith("failed: copy elman full")
    said, _, where = err.strip().partition("\n  traceback: ")
    assert said.endswith(": MemoryError: no 12 GiB")
    assert "MemoryError: no 12 GiB" in Path(where).read_text()


@pytest.mark.slow
def test_a_failure_says_where_its_traceback_and_which_table_lie(
    command, finished, quick, monkeypatch
):
    """The disk's folder too, where the error itself names none; the table of before is called so."""
    around_run(monkeypatch, quick, raising(OSError(28, "No space left on device")))
    code, _, err = command(*SWEEP)
    assert code == 1
    summary = err.partition("failed:")[2]
    assert "No space left on device: 'results/runs/mine'" in summary
    where = summary.partition("traceback: ")[2].splitlines()[0]
    assert "No space left" in Path(where).read_text()
    assert "table.csv.gz is still that of an earlier sweep" not in summary, "there is none"
    assert command(*SWEEP)[0] == 0
    around_run(monkeypatch, quick, raising(MemoryError()))
    code, out, err = command(*SWEEP, "overwrite=true")
    assert code == 1
    assert ", all repeated (overwrite=true)" in out
    assert "Without overwrite=true the same command does the missing runs" in err
    assert f"{RESULTS / 'mine' / 'table.csv.gz'} is still that of an earlier sweep" in err


def test_a_run_says_that_it_diverged(command):
    rate = ["optimizer=sgd", "optimizer.learning_rate=1e9"]
    code, out, _ = command(*TINY, *rate, "seeds=2", "snapshots=2", "study=lost")
    assert code == 0
    assert (
        "validation inf nats (median of 2 seeds); 2 of them diverged, the first at update " in out
    )
    (folder,) = run_folders(RESULTS / "runs" / "lost")
    probed = csv_tables.read_table(folder / "gradient_norms.csv.gz")
    of_end = probed["update"] > 0
    assert probed.loc[of_end, "stopped"].all() and probed.loc[~of_end, "stopped"].isna().all()
    table = tables.aggregate(probed[of_end], ["run", "axis", "step"], "gradient_norm")
    assert set(table["low"]) == {np.inf}


def test_a_run_whose_validation_loss_alone_is_not_finite_goes_on(command):
    """Its states overflow in the longer validation part. What probes measured counted as diverged, as inf."""
    own = ["task=add", "task.t1=1", "task.t2=2", "cell=linear", "spectral_radius=5", "hidden=4"]
    own += ["budget.steps=12", "budget.reset_every=12", "budget.batch_size=4", "budget.updates=2"]
    own += ["budget.divergence_bound=null"]
    code, out, _ = command("size=smoke", *own, "seeds=2", "snapshots=2", "study=long")
    assert code == 0
    assert "; the validation loss of 2 of them is not finite" in out
    (folder,) = run_folders(RESULTS / "runs" / "long")
    probed = csv_tables.read_table(folder / "gradient_norms.csv.gz")
    assert "stopped" not in probed and np.isfinite(probed["gradient_norm"]).all()
    rows = csv_tables.read_table(folder / "rows.csv")
    assert rows["diverged"].all() and rows["diverged_at"].isna().all()


@pytest.mark.slow
def test_a_sweep_whose_seeds_all_diverge(command, painted_figures, capsys):
    """It ends with tables and a summary, and says why each figure is left out; so does gathering them again."""
    own = [
        setting for setting in SWEEP if "task.lag" not in setting
    ]  # states grow threefold a step
    code, out, err = command(
        *own, "cell=linear", "spectral_radius=3", "task.lag=700", "seeds=2", "snapshots=2"
    )
    assert code == 0, err
    mine = RESULTS / "mine"
    rows = csv_tables.read_rows(mine)
    assert rows["diverged"].all() and rows["diverged_at"].notna().equals(rows["update"] > 0)
    summary = csv_tables.read_table(mine / "summary.csv")
    assert [*summary["n"], *summary["diverged"]] == [2, 2, 2, 2]
    assert np.isinf(summary["validation_loss"]).all()
    whole = [line for line in out.splitlines() if "diverged " in line or "left out: figure" in line]
    assert len(whole) == 3 + 6 and "no score is finite" in out and "FAILED" not in out
    made = {file.name: file.read_bytes() for file in mine.iterdir()}
    code, out = what_status_says(mine, capsys, "--gather")
    assert code == 0 and {*whole} <= {*out.splitlines()}
    assert {name: (mine / name).read_bytes() for name in made} == made


@pytest.mark.slow
def test_a_run_that_is_larger_than_memory(command, finished, quick, monkeypatch):
    """Not a stand-in for it: XLA asks for 8 GB, of which this process may not have 4."""
    whole = run.perform
    large = 10_000_000

    def perform(one, *arguments, **settings):
        return (whole if one.budget.batch_size == large else quick)(one, *arguments, **settings)

    monkeypatch.setattr(run, "perform", perform)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30, hard))
    try:
        code, out, err = command("-m", *TINY, f"budget.batch_size={large},4", "study=mine")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    says_what_to_do(code, out, err)
    assert "RESOURCE_EXHAUSTED: Out of memory allocating" in err
    assert "1 of 2 runs finished and kept" in err


def test_a_run_that_kills_its_worker_takes_no_other_with_it(command, quick, monkeypatch):
    """It strikes before any other is finished, and a launcher drops all that it was given."""
    launcher_of = Plugins.instantiate_launcher

    def frail(*arguments, **settings):
        launcher = launcher_of(*arguments, **settings)
        launch = launcher.launch

        def dying(lines, initial_job_idx):
            if any("first_seed=0" in line for line in lines):
                raise RuntimeError("a worker was killed")
            return launch(lines, initial_job_idx)

        launcher.launch = dying
        return launcher

    monkeypatch.setattr(run, "perform", quick)
    monkeypatch.setattr(Plugins, "instantiate_launcher", frail)
    code, out, err = command(*many.sweep(5))
    says_what_to_do(code, out, err)
    assert err.count("it may have been killed for lack of memory") == 1
    assert "4 of 5 runs finished and kept" in err


def test_a_run_that_kills_all_is_tried_last_the_next_time(command, quick, monkeypatch, capsys):
    """Until then, the status says that it was started."""

    def killed():
        raise KeyboardInterrupt  # which leaves as little as kill -9

    first = around_run(monkeypatch, quick, killed)
    assert command(*SWEEP)[0] == 130
    code, said = what_status_says(RESULTS / "mine", capsys)
    assert code == 1
    assert said.count("started; its process was stopped or killed, perhaps for lack of memory") == 1
    again = around_run(monkeypatch, quick)
    code, _, err = command(*SWEEP)
    assert code == 0, err
    assert again[1] == first[0]


@pytest.mark.slow
def test_two_sweeps_of_the_same_runs_share_them(command, quick, monkeypatch, painted_figures):
    """Every run is trained once, though both sweeps want all; each makes the same tables and figures."""
    assert command(*SWEEP, "results_dir=alone")[0] == 0
    other = subprocess.Popen(
        [sys.executable, "-m", "bptt_study", *SWEEP],
        env={**os.environ, "JAX_ENABLE_X64": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def until_the_other_has_one():
        while other.poll() is None and not (run_folders(RUNS) or len(held()) > 1):
            time.sleep(0.05)

    def held():
        return [file for file in RUNS.glob(".locks/*.lock") if locked(file)]

    trained = around_run(monkeypatch, quick, until_the_other_has_one)
    code, _, err = command(*SWEEP)
    words, _ = other.communicate(timeout=60)
    assert (code, other.returncode) == (0, 0), err + words
    assert len(trained) == 1
    assert words.count("(median of") == 1
    same(RESULTS, Path("alone"))


@pytest.mark.parametrize("mode", [["-m"], []])
def test_ctrl_c(command, finished, quick, monkeypatch, mode):
    """It stops at once, keeps what is finished, says how to go on; status 130."""
    kept = half(finished)
    known = stamps(kept)
    trained = around_run(monkeypatch, quick, interrupt)
    there = csv_tables.read_table(kept / "rows.csv")["strategy"][0]
    missing = "full" if there == "fixed" else "fixed"
    sweep = SWEEP if mode else [*TINY, f"strategy={missing}", "truncation=2", "study=mine"]
    code, out, err = command(*sweep)
    assert code == 130
    says_what_to_do(code, out, err)
    assert ("1 of 2 runs finished and kept" in err) == bool(mode)
    assert stamps(kept) == known
    code, out, err = command(*SWEEP)
    assert code == 0, err
    assert len(trained) == 2
    same(RESULTS, finished)


@pytest.mark.slow
def test_tables_and_figures_of_an_unfinished_sweep_say_so(command, monkeypatch, capsys):
    sweep = ["-m", "experiment=compare_strategies", *TINY, "seeds=2", "study=mine"]
    sweep += ["strategy=full,fixed", "truncation=2", "cell=elman"]
    titles: dict[str, str] = {}
    save = figure_layout.save

    def seen(figure, folder, name):
        titles[name] = figure.texts[0].get_text()
        return save(figure, folder, name)

    monkeypatch.setattr(figure_layout, "save", seen)
    around_run(monkeypatch, run.perform, after=interrupt)
    code, _, _ = command(*sweep)
    assert code == 130
    mine = RESULTS / "mine"
    said = "unfinished: 1 of 2 runs"
    with pytest.raises(SystemExit) as stop:
        status.main([str(mine), "--gather"])
    assert stop.value.code == 1
    assert said in capsys.readouterr().out
    assert said in (mine / "unfinished.txt").read_text()
    assert titles
    assert all(said in " ".join(title.split()) for title in titles.values())

    code, out, err = command(*sweep)
    assert code == 0, err
    assert "census: 12 rows of 2 runs, as expected" in out
    assert not (mine / "unfinished.txt").exists()
    assert not any("unfinished" in title for title in titles.values())


@pytest.mark.slow
def test_work_grows_with_the_runs_and_no_faster(command, quick, monkeypatch, capsys):
    """Compositions, checks, checksums and tables read, of a sweep, the same again, and its status.

    `python tools/many.py` shows the seconds of 250, 500 and 1,000 runs.
    """
    counted: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def counting(*arguments, **settings):
            counted[name] += 1
            return call(*arguments, **settings)

        monkeypatch.setattr(owner, name, counting)

    count(ConfigLoaderImpl, "load_sweep_config")
    for owner, name in [(configure, "configure"), (files, "damage"), (csv_tables, "read_table")]:
        count(owner, name)
    monkeypatch.setattr(run, "perform", quick)
    found = []
    for runs_of in (2, 4, 6):
        counted.clear()
        sweep = [*many.STUDY, f"first_seed=range({runs_of})", f"results_dir=of_{runs_of}"]
        for _ in range(2):
            code, _, err = command(*sweep)
            assert code == 0, err
        assert what_status_says(Path(f"of_{runs_of}", "many"), capsys)[0] == 0
        found.append(dict(counted))
    two, four, six = found
    assert two["load_sweep_config"] == six["load_sweep_config"], "composed once, not for every run"
    assert {n: six[n] - four[n] for n in six} == {n: four[n] - two[n] for n in two}
    assert six["configure"] == 3 * 6, "in both sweeps and by the run itself"


@pytest.mark.parametrize(("seconds", "lines"), [(-1, [*range(5)]), (600, [])])
def test_a_large_sweep_says_how_many_runs_it_has_checked(
    command, quick, monkeypatch, seconds, lines
):
    """To check 20,000 runs takes minutes, in which it would seem to hang."""
    monkeypatch.setattr(run, "perform", quick)
    monkeypatch.setattr(sweep, "SECONDS_BETWEEN_LINES", seconds)
    code, out, _ = command(*many.sweep(5))
    assert code == 0
    assert [int(n) for n in re.findall(r"checked (\d+) runs?$", out, re.MULTILINE)] == lines


def test_a_run_alone_is_the_same_as_in_a_sweep(command, quick, monkeypatch):
    """Though a sweep composes groups once and sets plain settings afterwards."""
    monkeypatch.setattr(run, "perform", quick)
    own = [*TINY, "strategy=fixed", "truncation=3", "study=mine", "optimizer.learning_rate=0.5"]
    own += ["optimizer/schedule=cosine", "budget={batch_size: 3}", "++cell.hidden=5"]
    assert command("-m", *own)[0] == 0
    code, out, err = command(*own)
    assert code == 0, err
    assert "finished already" in out
