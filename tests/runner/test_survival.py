"""Runs and sweeps that are killed, damaged or done twice: nothing finished is lost, and the end is the same."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from support import SWEEP, TINY, contents, run_folders

from bptt_study import files
from bptt_study.runner import array_files, cli, locks, run_folder, status, time_limit
from bptt_study.runner.locks import lock, locked
from bptt_study.runner.time_limit import OvertimeError, TimeLimit
from bptt_study.validation import SettingError

# ---- files


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    files.write(file, "before")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write(file, "after")
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]
    assert file.read_text() == "before"
    with pytest.raises(OSError, match="No space left"):
        files.write_folder(tmp_path / "run", {"rows.csv": b"1"})
    assert [f.name for f in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize(
    ("number", "works"), [(errno.EINVAL, True), (errno.ENOSYS, True), (errno.EIO, False)]
)
def test_a_disk_that_flushes_no_folders(tmp_path, monkeypatch, number, works):
    fsync = os.fsync

    def files_alone(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_alone)
    with nullcontext() if works else pytest.raises(OSError, match="Input/output"):
        files.write(tmp_path / "a.txt", "a")
        files.write_folder(tmp_path / "run", {"rows.csv": b"1"})
        assert files.damage(tmp_path / "run") == []


def test_what_killed_processes_left_half_written_is_removed(tmp_path, monkeypatch):
    """Not what a living process writes, nor a process of another host, nor what looks otherwise."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    monkeypatch.setattr(os, "getpid", lambda: dead.pid)
    for name in ("table.csv", "run"):
        left = files._beside(tmp_path / name)
        left.mkdir() if name == "run" else left.touch()
    monkeypatch.setattr(files, "HOST", "elsewhere")
    files._beside(tmp_path / "c").touch()
    monkeypatch.undo()
    files._beside(tmp_path / "d").touch()
    (tmp_path / ".hidden").touch()
    assert files.remove_leftovers(tmp_path) == [], "they may be being written, in another container"
    assert len(files.remove_leftovers(tmp_path, seconds=-1)) == 2
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "b").write_bytes(b"two!"), "b is truncated or edited"),
        (lambda f: (f / "b").unlink(), "b is missing"),
        (lambda f: (f / "c").write_bytes(b""), "c does not belong there"),
        (lambda f: (f / files.SEAL).unlink(), "SHA256SUMS is missing"),
        (lambda f: (f / files.SEAL).write_text("nothing"), "SHA256SUMS is truncated, edited"),
    ],
)
def test_a_sealed_folder_tells_what_is_wrong(tmp_path, spoil, message):
    folder = tmp_path / "run"
    files.write_folder(folder, {"a": b"one", "b": b"two"})
    assert files.damage(folder) == []
    spoil(folder)
    (wrong,) = files.damage(folder)
    assert message in wrong


def test_a_folder_under_another_runs_name_is_damaged(tmp_path):
    files.write_folder(tmp_path / "run", {"a": b"one"})
    (tmp_path / "run").rename(tmp_path / "other")
    assert "from another folder" in files.damage(tmp_path / "other")[0]


# ---- checkpoints


def test_a_checkpoint_gives_back_every_bit(tmp_path):
    tree = {
        "params": {"W": np.float32([[0.1, np.nan]])},
        "key": jax.random.key(3),
        "n": np.int32(7),
    }
    array_files.save(tmp_path / "c.npz", tree, {"run": "x"})
    leaves, about = array_files.read(tmp_path / "c.npz")
    assert about["run"] == "x"
    back = array_files.restore(leaves, tree)
    np.testing.assert_array_equal(back["params"]["W"], tree["params"]["W"])
    assert jax.random.key_data(back["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()
    assert array_files.load(tmp_path / "c.npz")["params"]["W"].dtype == np.float32
    with pytest.raises(array_files.UnusableError, match="its leaves differ: key"):
        array_files.restore({k: v for k, v in leaves.items() if k != "key"}, tree)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: data[: len(data) // 2], "cannot be read"),
        (lambda data: b"", "cannot be read"),
        (
            lambda data: data.replace(b"\x07\x00\x00\x00", b"\x08\x00\x00\x00"),
            "cannot be read|edited",
        ),
    ],
)
def test_a_spoilt_checkpoint_is_refused(tmp_path, spoil, message):
    file = tmp_path / "c.npz"
    array_files.save(file, {"n": np.int32([7, 7, 7])})
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(array_files.UnusableError, match=message):
        array_files.read(file)


def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(array_files, "FORMAT", 0)
    array_files.save(tmp_path / "c.npz", {"n": np.int32(1)})
    monkeypatch.undo()
    with pytest.raises(array_files.UnusableError, match="its format is 0; this version reads"):
        array_files.read(tmp_path / "c.npz")


# ---- locks


def test_a_lock_is_held_by_one_process_and_free_after_its_death(tmp_path):
    file = run_folder.run_paths(tmp_path, "mine", "abc").lock
    code = f"""
import pathlib, time
from bptt_study.runner.locks import lock
with lock(pathlib.Path({str(file)!r}), wait=True) as held:
    print(held, flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "True\n"
    assert locked(file)
    with lock(file, wait=False) as held:
        assert not held
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    assert not locked(file)
    with lock(file, wait=False) as held:
        assert held


def test_locks_of_the_version_before_are_understood(tmp_path):
    """Their folder had another name; who holds a lock in it holds it under the new name, too."""
    file = run_folder.run_paths(tmp_path, "mine", "abc").lock
    former = file.parent.with_name(".claims") / file.name
    with lock(former, wait=True), lock(file, wait=False) as held:
        assert not held
    with lock(file, wait=False) as held:
        assert held
    assert [f.name for f in file.parents[1].iterdir()] == [".locks"]


def refusing(number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    return flock


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO, errno.EOPNOTSUPP])
def test_a_disk_that_grants_no_locks(command, tmp_path, monkeypatch, number):
    """One line with the path and the way out, before anything runs."""
    monkeypatch.setattr("fcntl.flock", refusing(number))
    code, _, err = command(*TINY)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "`results_dir` must be a folder on a disk that grants locks; got results" in err
    said = r"A local, writable disk has locks: results_dir=FOLDER"
    with pytest.raises(SettingError, match=said), lock(tmp_path / "run.lock", wait=True):
        pass


HELD = """
import fcntl, os, pathlib, sys, time, warnings
warnings.simplefilter("ignore")
def flock(*_):
    raise OSError(38, "Function not implemented")
if {missing}:
    fcntl.flock = flock
from bptt_study.runner.locks import lock
with lock(pathlib.Path({file!r}), wait=True) as held:
    print(held, flush=True)
    time.sleep(60)
"""


def test_without_flock_the_lock_of_a_dead_process_is_taken_over(tmp_path, monkeypatch):
    file = tmp_path / "run.lock"
    program = HELD.format(missing=True, file=str(file))
    dead = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert dead.stdout is not None
    assert dead.stdout.readline() == "True\n"
    monkeypatch.setattr("fcntl.flock", refusing(errno.ENOSYS))
    warnings.simplefilter("ignore")  # filelock's, that it does without
    with lock(file, wait=False) as held:
        assert not held
    dead.kill()
    dead.communicate()
    assert file.exists()
    with lock(file, wait=True) as held:
        assert held


def test_a_run_that_stopped_is_shown_as_such(tmp_path, monkeypatch):
    """Its process holds the lock, and gives no sign of life: it is stopped, or its host is gone."""
    paths = run_folder.run_paths(tmp_path, "mine", "abc")
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    with lock(paths.lock, wait=True):
        time.sleep(0.7)
        assert run_folder.run_state(paths, None).kind == "running"
    monkeypatch.setattr(locks, "BEAT_SECONDS", 60)
    with lock(paths.lock, wait=True):
        time.sleep(0.7)
        state = run_folder.run_state(paths, None)
        assert state.kind == "stopped"
        who = (
            f"process {os.getpid()} on {socket.gethostname()}, whose last sign of life was 1 s ago"
        )
        assert state.why == f"{who}; if it is dead, remove {paths.lock}"
    assert run_folder.run_state(paths, None).kind == "missing"


@pytest.mark.parametrize(("host", "taken"), [("elsewhere", True), (socket.gethostname(), False)])
def test_a_lock_that_a_dead_host_left_is_taken_over(tmp_path, monkeypatch, host, taken):
    """On this host flock tells; another is dead once its lock has been silent for long."""
    file = tmp_path / "run.lock"
    program = HELD.format(missing=False, file=str(file))
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "True\n"
    file.write_text(f"{other.pid}\n{host}\n")
    monkeypatch.setattr(locks, "SILENT_SECONDS", 0.2)
    if taken:
        locks.wait_for_one([file], seconds=0.1)
        with lock(file, wait=False) as held:
            assert held
    else:
        silence = locks.Silence()
        silence.take_over(file)
        time.sleep(0.3)
        assert not silence.take_over(file)
        assert locked(file)
    other.kill()
    other.communicate()


# ---- sweeps


@pytest.mark.slow
def test_a_sweep_again_does_only_what_is_missing(command, tmp_path, capsys):
    code, out, err = command(*SWEEP)
    assert code == 0, err
    study = tmp_path / "results" / "runs" / "mine"
    first = {f.name: f.stat().st_mtime_ns for f in run_folders(study)}
    table = contents(tmp_path / "results" / "mine")
    code, out, _ = command(*SWEEP)
    assert code == 0
    assert "2 of 2 runs finished already" in out
    assert {f.name: f.stat().st_mtime_ns for f in run_folders(study)} == first
    assert contents(tmp_path / "results" / "mine") == table

    # edited, truncated: named, set aside, done again
    spoilt, cut = run_folders(study)
    (spoilt / "rows.csv").write_text("run,seed\n")
    (cut / "params.npz").write_bytes((cut / "params.npz").read_bytes()[:100])
    code, out, err = command(*SWEEP)
    assert code == 0
    assert "rows.csv is truncated or edited" in out + err
    assert "params.npz is truncated or edited" in out + err
    assert len(list(study.glob("*.aside-1"))) == 2
    assert contents(tmp_path / "results" / "mine") == table

    with pytest.raises(SystemExit) as stop:
        status.main([str(tmp_path / "results" / "mine")])
    assert stop.value.code == 0
    assert "2 finished" in capsys.readouterr().out

    # overwrite=true does them again, to the same rows
    code, out, _ = command(*SWEEP, "overwrite=true")
    assert code == 0
    assert contents(tmp_path / "results" / "mine") == table
    assert all((study / name).stat().st_mtime_ns > at for name, at in first.items())


def test_a_failed_run_is_shown_with_its_reason_and_the_others_go_on(
    command, tmp_path, capsys, monkeypatch
):
    from bptt_study.runner import run

    perform = run.perform

    def failing(one, *arguments, **settings):
        if one.settings["strategy"] == "fixed":
            raise RuntimeError("the moon is full")
        return perform(one, *arguments, **settings)

    monkeypatch.setattr(run, "perform", failing)
    code, out, err = command(*SWEEP)
    assert code != 0
    assert "the moon is full" in out + err
    study = tmp_path / "results" / "runs" / "mine"
    assert len(run_folders(study)) == 1
    assert "RuntimeError" in next(study.glob("*.failed.txt")).read_text()
    with pytest.raises(SystemExit) as stop:
        status.main([str(tmp_path / "results" / "mine")])
    said = capsys.readouterr().out
    assert stop.value.code == 1
    assert "1 finished, 1 failed" in said
    assert "the moon is full" in said

    monkeypatch.setattr(run, "perform", perform)
    code, out, _ = command(*SWEEP)
    assert code == 0
    assert "1 of 2 runs finished already" in out
    assert not list(study.glob("*.failed.txt"))


@pytest.mark.slow
def test_killed_at_a_checkpoint_a_run_ends_bit_for_bit_as_undisturbed(command, tmp_path):
    settings = [*TINY, "budget.updates=15000", "budget.logs=3", "strategy=randomized", "seeds=2"]
    settings += ["checkpoint_seconds=0", "study=mine", "budget.batch_size=4", "snapshots=2"]
    program = [sys.executable, "-m", "bptt_study", *settings, "results_dir=killed"]

    def start():
        return subprocess.Popen(
            program,
            env={**os.environ, "JAX_ENABLE_X64": "1"},  # as here
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def checkpoint():
        return {f.stat().st_mtime_ns for f in tmp_path.glob("killed/runs/mine/*.checkpoint.npz")}

    kills = 0
    for wait in (0.0, 0.3):
        running, known = start(), checkpoint()
        while running.poll() is None and known >= checkpoint():
            time.sleep(0.02)
        time.sleep(wait)
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
            kills += 1
        running.communicate()
    words, _ = start().communicate(timeout=120)
    assert kills >= 1
    assert "continues from update" in words
    assert command(*settings, "results_dir=whole")[0] == 0, "undisturbed, and in this process"
    (killed,), (whole,) = (
        run_folders(tmp_path / name / "runs" / "mine") for name in ("killed", "whole")
    )
    assert contents(killed) == contents(whole)
    assert not list(tmp_path.glob("killed/runs/mine/*.checkpoint.npz"))


@pytest.mark.slow
def test_a_run_that_trains_too_long(command, tmp_path):
    """It has failed, and its checkpoint stays. Each start gets further, to the same rows."""
    own = [*TINY, "seeds=1", "budget.updates=8", "budget.logs=2", "study=mine"]
    runs, reached = tmp_path / "results" / "runs" / "mine", [0]
    while command(*own, "run_timeout=1e-9")[0] == 1:
        (left,) = runs.glob("*.checkpoint.npz")
        reached.append(int(array_files.read(left)[0]["progress/update"].max()))
        assert reached[-1] > reached[-2]
        (reason,) = runs.glob("*.failed.txt")
        said = "OvertimeError: it trained longer than run_timeout=1e-09 s; its checkpoint stays\n"
        assert reason.read_text().startswith(said)
    assert len(reached) > 2
    assert command(*own, "results_dir=whole")[0] == 0
    (cut,), (whole,) = run_folders(runs), run_folders(tmp_path / "whole" / "runs" / "mine")
    assert contents(cut) == contents(whole)


@pytest.mark.slow
def test_a_run_that_trains_too_long_without_checkpoints(command):
    code, _, err = command(*TINY, "run_timeout=1e-9", "checkpoint_seconds=null")
    assert code == 1
    said = "trained longer than run_timeout=1e-09 s; it has no checkpoint, so the next start begins anew"
    assert said in err


def test_the_limit_of_time(command, monkeypatch):
    """It counts from the first check on."""
    now = iter([1e6, 1e6 + 1, 1e6 + 2, 1e6 + 2.5])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    limit = TimeLimit(2)
    for _ in range(3):
        limit.check()
    with pytest.raises(OvertimeError, match="trained longer than run_timeout=2 s"):
        limit.check()
    monkeypatch.undo()
    code, _, err = command(*TINY, "run_timeout=0")
    assert code == 2
    assert "`run_timeout` must be a finite number greater than 0; got 0" in err


PARENT = """
import os, sys, time
from joblib import Parallel, delayed
def work(ignores):
    from bptt_study.runner.time_limit import end_with_parent
    end_with_parent()
    print(os.getpid(), flush=True)
    for _ in range(2):
        try:
            time.sleep(30)
        except KeyboardInterrupt:
            print("stopped as at Ctrl-C", flush=True)
            if not ignores:
                raise
Parallel(n_jobs=2)([delayed(work)(sys.argv[1] == "ignores")] * 2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["obeys", "ignores"])
def test_workers_end_with_their_parent(how):
    """A kill of the parent does not reach them, so they would train on for hours. Some ignore an interrupt."""
    program = [sys.executable, "-c", PARENT, how]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert all(parent.stdout.readline().strip().isdigit() for _ in range(2))
        parent.kill()
        patience = time_limit.POLL_SECONDS + time_limit.GRACE_SECONDS + 4
        said, _ = parent.communicate(timeout=patience)  # it ends when the workers have
    assert said.count("stopped as at Ctrl-C") == 2


def test_every_run_asks_whether_its_parent_is_gone(command, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "end_with_parent", lambda: asked.append(True))
    assert command(*TINY, "seeds=1", "study=mine")[0] == 0
    assert asked == [True]
