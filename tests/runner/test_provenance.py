"""What decides a run's numbers beside its configuration, and what of a results folder is believed."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from asyncio import CancelledError
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from hydra.types import RunMode
from support import TINY, run_folders

from bptt_study import files
from bptt_study.report import csv_tables
from bptt_study.runner import (
    callbacks,
    cli,
    configure,
    environment,
    factories,
    own_code,
    run_folder,
    status,
    stories,
)
from bptt_study.runner.locks import lock
from bptt_study.validation import SettingError

RUN = [*TINY, "study=mine", "results_dir=out"]


def the_run(folder: Path) -> Path:
    """The only run; a damaged one, which is kept aside, has a longer name."""
    runs = run_folders(folder / "out" / "runs" / "mine")
    (found,) = (run for run in runs if len(run.name) == 12)
    return found


@pytest.mark.slow
def test_another_precision_is_another_run(command, tmp_path):
    """In float64, as tests are, and in float32; each says of itself which it is."""
    assert command(*RUN)[0] == 0
    wide = the_run(tmp_path)
    assert json.loads((wide / "machine.json").read_text())["enable_x64"] is True
    other = [sys.executable, "-m", "bptt_study", *RUN]
    environ = {**os.environ, "JAX_ENABLE_X64": "0", "XLA_FLAGS": ""}
    subprocess.run(other, cwd=tmp_path, env=environ, check=True, capture_output=True)
    runs = set(run_folders(tmp_path / "out" / "runs" / "mine"))
    assert len(runs) == 2
    (narrow,) = runs - {wide}
    said = json.loads((narrow / "machine.json").read_text())
    assert said["enable_x64"] is False
    assert {said[name] for name in ("default_prng_impl", "platform")} == {"threefry2x32", "cpu"}
    assert said["threefry_partitionable"] is True


# in each of the first group, a run of digits had other rows after 400 updates; in the second, the same bytes
@pytest.mark.parametrize(
    ("flags", "counts"),
    [
        ("--xla_cpu_max_isa=AVX", ["--xla_cpu_max_isa=AVX"]),
        ("--xla_cpu_use_fusion_emitters=false", ["--xla_cpu_use_fusion_emitters=false"]),
        ("--xla_backend_optimization_level=0", ["--xla_backend_optimization_level=0"]),
        ("--xla_dump_to=x --xla_cpu_enable_fast_math=true", ["--xla_cpu_enable_fast_math=true"]),
        ("--xla_dump_to=x --xla_dump_hlo_as_text", []),
        ("--xla_backend_optimization_level=3", []),
        ("--xla_force_host_platform_device_count=2", []),
        ("--xla_cpu_max_isa=AVX --xla_cpu_max_isa=AVX2", ["--xla_cpu_max_isa=AVX2"]),
        ("--xla_cpu_max_isa=AVX2 --xla_cpu_max_isa=AVX", ["--xla_cpu_max_isa=AVX"]),
    ],
)
def test_a_flag_of_xla_that_changes_rows_is_part_of_the_name(
    flags, counts, monkeypatch, tmp_path, x64_off
):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert environment.uncommon() == ({"xla_flags": counts} if counts else {})
    assert ("XLA_FLAGS=" in environment.command()) == bool(counts)
    (tmp_path / "flags").write_text(flags + "\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))  # XLA reads a file, too
    assert environment.uncommon() == ({"xla_flags": counts} if counts else {})


@pytest.mark.parametrize("name", ["disable_jit", "disable_most_optimizations"])
def test_a_setting_of_jax_that_changes_rows_is_part_of_the_name(name, monkeypatch, x64_off):
    monkeypatch.setenv("XLA_FLAGS", "")
    usual = jax.config.values[f"jax_{name}"]
    jax.config.update(f"jax_{name}", True)
    try:
        assert environment.uncommon() == {name: True}
        assert f"JAX_{name.upper()}=True bptt-study" in environment.command()
    finally:
        jax.config.update(f"jax_{name}", usual)


def test_products_that_the_driver_rounds_in_another_way_are_part_of_the_name(monkeypatch, x64_off):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the command would begin with it
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert environment.uncommon() == {"nvidia_tf32_override": "0"}
    assert environment.command().startswith("NVIDIA_TF32_OVERRIDE=0 ")
    assert environment.variables(environment.uncommon()) == ["NVIDIA_TF32_OVERRIDE=0"]


@pytest.fixture
def x64_off():
    with jax.enable_x64(False):
        yield


def test_what_is_usual_leaves_the_name_as_it_was(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    with jax.enable_x64(False):
        assert environment.uncommon() == {}
        with jax.default_prng_impl("rbg"), jax.threefry_partitionable(False):
            found = environment.uncommon()
    assert found == {"default_prng_impl": "rbg", "threefry_partitionable": False}
    assert environment.uncommon() == {"enable_x64": True}
    jax.config.update("jax_random_seed_offset", 7)
    try:
        assert environment.uncommon() == {"enable_x64": True, "random_seed_offset": 7}
    finally:
        jax.config.update("jax_random_seed_offset", 0)
    jax.config.update("jax_high_dynamic_range_gumbel", True)  # other draws of random.categorical
    try:
        assert environment.uncommon()["high_dynamic_range_gumbel"] is True
        assert "JAX_HIGH_DYNAMIC_RANGE_GUMBEL=True bptt-study" in environment.command()
    finally:
        jax.config.update("jax_high_dynamic_range_gumbel", False)


OWN = (
    "from bptt_study.strategies import fixed\n\ndef own(problem):\n    return fixed(problem, {})\n"
)


@pytest.mark.slow
def test_code_from_outside_that_was_edited_is_run_again(command, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "conf" / "strategy").mkdir(parents=True)
    (tmp_path / "conf" / "strategy" / "own.yaml").write_text("_target_: edited_module.own\n")
    start = [*RUN, "strategy=own", "--config-dir", str(tmp_path / "conf")]

    def run(window: int) -> str:
        (tmp_path / "edited_module.py").write_text(OWN.format(window))
        sys.modules.pop("edited_module", None)
        code, out, err = command(*start)
        assert code == 0, err
        return out + err

    run(2)
    first = csv_tables.read_table(the_run(tmp_path) / "rows.csv")
    assert "finished already" in run(2)
    assert "the code of edited_module has changed since it ran" in run(3)
    second = csv_tables.read_table(the_run(tmp_path) / "rows.csv")
    assert not first["train_loss"].equals(second["train_loss"])
    about = run_folder.about(
        run_folder.RunPaths(tmp_path / "out/runs/mine", the_run(tmp_path).name)
    )
    assert list(about["code"]) == ["edited_module"]


def test_a_package_is_all_of_its_files(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "many_files" / "sub").mkdir(parents=True)
    for name in ("__init__.py", "a.py", "sub/b.py"):
        (tmp_path / "many_files" / name).write_text("")
    config = {"cell": {"_target_": "many_files.a.f"}, "task": {"_target_": "bptt_study.tasks.copy"}}
    first = own_code.code(config)
    (tmp_path / "many_files" / "sub" / "b.py").write_text("x = 1\n")
    assert list(first) == ["many_files"]
    assert own_code.code(config) != first


@pytest.mark.parametrize(
    "target",
    ["os.system", "posix.system", "subprocess.Popen", "builtins.eval", "builtins.print",
     "pandas.read_pickle", "pathlib.Path.unlink", "shutil.rmtree", "numpy.save"],
)  # fmt: skip
@pytest.mark.parametrize("group", ["task", "cell", "strategy", "optimizer", "probes.mine"])
def test_what_is_no_factory_is_not_called(group, target):
    with pytest.raises(SettingError, match=rf"`{group}\._target_` must be .*; got {target}"):
        factories.resolve(group, target)


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.print", "pathlib.Path.touch", "numpy.save", "hydra.utils.get_method",
     "jax.numpy.load", "optax.nothing", "bptt_study.files.write", "bptt_study.files.Path.touch",
     "bptt_study.strategies.${oc.env:HOME}"],
)  # fmt: skip
def test_what_is_no_part_is_not_called(target):
    """At any depth below a factory."""
    for setting, node in {"law": {}, "law.a.0": {"a": [{}]}}.items():
        value = json.loads(json.dumps(node).replace("{}", json.dumps({"_target_": target})))
        with pytest.raises(
            SettingError, match=rf"`strategy\.{setting}\._target_` must be .*; got "
        ):
            configure.build("strategy", RANDOM | {"law": value})
    made = "${oc.create:{_target_:pathlib.Path.touch}}"
    with pytest.raises(SettingError, match=r"`strategy\.law\.a` must be a text without \$\{; got"):
        configure.build("strategy", RANDOM | {"law": {"_target_": "optax.adam", "a": made}})


RANDOM = {"_target_": "bptt_study.strategies.randomized"}


@pytest.mark.parametrize("target", ["bptt_study.files.write", "asyncio.Task", "asyncio.tasks.Task"])
def test_a_factory_that_is_no_users_says_what_it_makes(target, tmp_path):
    with pytest.raises(
        SettingError, match=rf"`task\._target_` must be a factory of a Task; got {target}"
    ):
        configure.build("task", {"_target_": target, "file": str(tmp_path / "x"), "content": "?"})
    assert not (tmp_path / "x").exists()


def test_a_factory_of_another_kind():
    with pytest.raises(SettingError, match=r"must be a factory of a Cell.* which makes a Strategy"):
        factories.resolve("cell", "bptt_study.strategies.full")
    with pytest.raises(SettingError, match=r"must be a factory of a bptt_study\.Task.* a dict"):
        factories.check_made("task", "mine.task", {})


@pytest.mark.parametrize("experiment", ["../evil", "/tmp/evil", "x/../../evil", 3, ["a"]])
def test_an_experiment_of_a_note_is_a_plain_name(tmp_path, experiment, capsys, monkeypatch):
    """It would be run: a note that names a path is not believed."""
    folder = tmp_path / "results"
    ran = tmp_path / "ran"
    evil = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    for place in (tmp_path / "evil.py", Path(stories.__file__).parents[2] / "nowhere"):
        if place.parent == tmp_path:
            place.write_text(evil)
    run_folder.Sweep(folder, "mine", experiment, {}).save()
    with pytest.raises(SystemExit) as stop:
        status.main([str(folder / "mine"), "--gather"])
    assert stop.value.code == 2
    assert "was not written by this version of bptt-study" in capsys.readouterr().err
    assert stories.experiment_module(str(tmp_path / "evil")) is None
    assert not ran.exists()


@pytest.mark.parametrize("run", ["../../other", "/tmp", "", ".."])
def test_a_run_of_a_note_is_a_plain_name(tmp_path, run):
    entry = {"overrides": [], "rows": 1, "corpus_sha256": None, "config": {}, "choices": {}}
    run_folder.Sweep(tmp_path, "mine", None, {"abc": entry}).save()
    assert run_folder.latest_sweep(tmp_path, "mine").runs == {"abc": entry}
    run_folder.Sweep(tmp_path, "mine", None, {run: entry}).save()
    with pytest.raises(SettingError, match="was not written by this version of bptt-study"):
        run_folder.latest_sweep(tmp_path, "mine")


def test_a_refusal_goes_from_process_to_process():
    error = SettingError("strategy.window", 0, "a whole number of at least 1", "Or leave it out.")
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.value, type(back)) == (str(error), 0, SettingError)


OWN_ENDS = "def task():\n    raise SystemExit(0)\n"


def test_a_factory_that_ends_the_process(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "ending_module.py").write_text(OWN_ENDS)
    said = r"must be a factory that returns; got task, which called sys.exit\(0\)"
    with pytest.raises(SettingError, match=said):
        configure.build("task", {"_target_": "ending_module.task"})


@pytest.mark.parametrize(
    "stop", [SystemExit(0), OSError("no more"), ValueError("\udcff"), CancelledError("by whom?")]
)
def test_the_reason_of_a_failure_is_kept(command, monkeypatch, tmp_path, stop):
    from bptt_study.runner import run

    def ends(*_, **__):
        raise stop

    monkeypatch.setattr(run, "perform", ends)
    for stream in (sys.stdout, sys.stderr):  # as the command does
        stream.reconfigure(errors="backslashreplace")
    code, _, err = command("-m", *RUN)
    assert code == 1
    (failure,) = (tmp_path / "out" / "runs" / "mine").glob("*.failed.txt")
    reason = {"SystemExit": "sys.exit(0)", "OSError": "OSError: no more", "ValueError": r"\udcff"}
    reason["CancelledError"] = "CancelledError: by whom?"
    said = reason[type(stop).__name__]
    assert said in failure.read_text()
    assert said in err


class OddError(Exception):
    """It cannot be unpickled, as its arguments are not those of its message."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


class OddStop(BaseException):
    """Code that catches errors does not catch it."""


@pytest.mark.parametrize("stop", [OddError("too", "odd"), OddStop("too odd")])
@pytest.mark.parametrize("sweeper", [callbacks.OWN, "optuna"])
def test_any_reason_goes_from_process_to_process(stop, sweeper, tmp_path, monkeypatch):
    """A worker's error is a text, whatever was raised before the run trained."""

    def ends(*_):
        raise stop

    sweep = {"mode": RunMode.MULTIRUN, "sweeper": SimpleNamespace(_target_=sweeper)}
    sweep["runtime"] = SimpleNamespace(cwd=str(tmp_path), choices={})
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: SimpleNamespace(**sweep))
    monkeypatch.setattr(cli, "run_once", ends)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(cli.RunError) as raised:
        cli.one_run(None)
    assert str(pickle.loads(pickle.dumps(raised.value))).endswith(f"{type(stop).__name__}: too odd")


def hold(file: Path, seconds: float) -> None:
    with lock(file, wait=True):
        (file.parent / "held").touch()
        time.sleep(seconds)


@pytest.mark.slow
def test_gathering_waits_for_another(command, tmp_path, capsys):
    """Two processes that make the tables of a study do so one after the other."""
    assert command("-m", *RUN)[0] == 0
    file = tmp_path / "out" / "runs" / "mine" / ".locks" / "tables.lock"
    other = get_context("spawn").Process(target=hold, args=(file, 3))
    other.start()
    while not (file.parent / "held").exists():
        time.sleep(0.05)
    begun = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        status.main([str(tmp_path / "out" / "mine"), "--gather"])
    assert stop.value.code == 0
    assert time.monotonic() - begun > 1
    other.join()
    assert files.damage(the_run(tmp_path)) == []


SIGNALLED = """
import os, signal, sys
sys.argv = ["bptt-study", *{arguments!r}]
from bptt_study import __main__ as shell
from bptt_study.runner import run
from bptt_study.runner.run_checkpoint import RunCheckpoint
pause = RunCheckpoint.pause
def paused(self, trained):
    pause(self, trained)
    os.kill(os.getpid(), {number})
RunCheckpoint.pause = paused
shell.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"), [("SIGTERM", []), ("SIGTERM", ["-m"]), ("SIGHUP", ["-m"]), ("SIGUSR1", [])]
)
def test_a_signal_ends_a_run_or_a_sweep_as_ctrl_c_does(tmp_path, name, mode):
    number = getattr(signal, name)
    program = SIGNALLED.format(arguments=[*mode, *RUN], number=int(number))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 128 + number, done.stderr
    said = (
        "0 of 1 run finished and kept. The same command"
        if mode
        else "No finished run is lost; the same"
    )
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    (left,) = (tmp_path / "out" / "runs" / "mine").glob("*.checkpoint.npz")
    assert re.fullmatch(r"\w{12}\.checkpoint\.npz", left.name)


WORKER = """
import signal, sys
{before}
exec({program!r}.replace("shell.main()", "from bptt_study.runner.cli import main; main()"))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("SIGTERM", ""),
        ("SIGUSR1", "signal.signal(signal.SIGUSR1, lambda *_: print('the launcher knows'))"),
    ],
)
def test_a_signal_ends_the_run_of_a_worker(tmp_path, name, before):
    """A worker has the signals of its launcher. The run leaves a checkpoint and a reason, and goes on later."""
    number = int(getattr(signal, name))
    program = SIGNALLED.format(arguments=["-m", *RUN, "checkpoint_seconds=9"], number=number)
    worker = [sys.executable, "-c", WORKER.format(before=before, program=program)]
    done = subprocess.run(worker, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    said = f"{name} ended it; the same command goes on with it"
    assert said in done.stderr and "Traceback" not in done.stderr
    assert ("the launcher knows" in done.stdout) == bool(before)
    runs = tmp_path / "out" / "runs" / "mine"
    (failure,) = runs.glob("*.failed.txt")
    assert failure.read_text().startswith(f"RuntimeError: {said}\n")
    assert len([*runs.glob("*.checkpoint.npz")]) == 1
    again = [sys.executable, "-m", "bptt_study", "-m", *RUN]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "continues from update" in done.stdout
