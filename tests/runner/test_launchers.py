"""Sweeps by joblib, submitit's local executor and a local Ray: what one process leaves, byte for byte.

They need the extras; `make test-launchers` brings them, and there nothing is skipped.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bptt_study.report import provenance

PLUGINS = {f"hydra_plugins.hydra_{extra}_launcher" for extra in ("joblib", "submitit", "ray")}
LAUNCHERS = {
    "processes": ["hydra.launcher.n_jobs=2"],
    "slurm_local": [],
    "ray_cluster": ["hydra.launcher.ray.init.num_cpus=2"],
}
GRID = ["size=smoke", "cell.hidden=4", "budget.updates=4", "truncation=3", "study=mine"]
OWN = """
import os, pathlib, signal
from bptt_study.runner.run_checkpoint import RunCheckpoint
from bptt_study.strategies import full

def in_worker():
    armed = pathlib.Path("armed")  # the test's process, whose child is the sweep that checks
    return armed.exists() and armed.read_text() != str(os.getppid())

def breaks(problem):
    def estimate(*args):
        raise RuntimeError("broken on purpose")
    return full(problem)._replace(estimate=estimate)

def dies(problem):
    def estimate(*args):
        if in_worker():
            pathlib.Path("armed").unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return full(problem).estimate(*args)
    return full(problem)._replace(estimate=estimate)

def preempted(problem):
    pause = RunCheckpoint.pause
    def paused(self, trained):
        RunCheckpoint.pause = pause
        pause(self, trained)
        os.kill(os.getpid(), signal.SIGTERM)
    if in_worker():
        RunCheckpoint.pause = paused
    return full(problem)

class Odd(Exception):
    def __init__(self, one, two):  # it cannot be unpickled
        super().__init__(f"{one} {two}")

def odd(problem):
    if in_worker():
        raise Odd("broken", "before it trains")
    return full(problem)
"""


def sweep(folder: Path, *arguments: str) -> tuple[int, str]:
    """`bptt-study -m` in that folder; status, and all that was printed."""
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(OWN)
    (folder / "conf" / "strategy").mkdir(parents=True, exist_ok=True)
    for name in ("breaks", "dies", "preempted", "odd"):
        (folder / "conf" / "strategy" / f"{name}.yaml").write_text(f"_target_: own.{name}\n")
    done = subprocess.run(
        [sys.executable, "-m", "bptt_study", "-m", "--config-dir", "conf", *GRID, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f".:{os.environ.get('PYTHONPATH', '')}", "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory, request):
    """The study's folder as one process leaves it."""
    missing = sorted(plugin for plugin in PLUGINS if find_spec(plugin) is None)
    if missing and request.config.option.markexpr != "launchers":
        pytest.skip(f"make test-launchers has what is missing: {', '.join(missing)}")
    folder = tmp_path_factory.mktemp("alone")
    status, out = sweep(folder, "strategy=full,fixed,dies")
    assert status == 0, out
    return folder / "results" / "mine"


@pytest.mark.launchers
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_survives_what_fails_and_dies_and_leaves_the_same_tables(
    launcher, alone, tmp_path
):
    settings = [f"hydra/launcher={launcher}", *LAUNCHERS[launcher]]
    (tmp_path / "armed").write_text(str(os.getpid()))
    status, out = sweep(tmp_path, *settings, "strategy=full,breaks,dies,fixed")
    assert status == 1, out
    assert not (tmp_path / "armed").exists()
    assert "strategy=breaks" in out
    assert "broken on purpose" in out

    status, out = sweep(tmp_path, *settings, "strategy=full,fixed,dies")
    assert status == 0, out
    mine = tmp_path / "results" / "mine"
    assert sorted(f.name for f in mine.iterdir()) == sorted(f.name for f in alone.iterdir())
    for file in alone.iterdir():
        if file.name != provenance.FILE:
            assert (mine / file.name).read_bytes() == file.read_bytes(), file.name
    costs = provenance.read(mine)
    assert set(costs["launcher"]) == {launcher}
    assert set(costs["devices"]) == {1}, "a core for each of the runs side by side"
    here = {f.name for f in tmp_path.iterdir()} - {"__pycache__"}
    assert here == {"conf", "own.py", "results"}, "nothing beside the results"


@pytest.mark.launchers
@pytest.mark.parametrize("launcher", ["processes", "slurm_local"])
def test_no_reason_of_a_worker_is_lost(launcher, alone, tmp_path):
    (tmp_path / "armed").write_text(str(os.getpid()))
    settings = [f"hydra/launcher={launcher}", *LAUNCHERS[launcher], "checkpoint_seconds=9"]
    status, out = sweep(tmp_path, *settings, "strategy=odd,preempted")
    assert status == 1, out
    assert "Odd: broken before it trains" in out
    assert "SIGTERM ended it; the same command goes on with it" in out
    assert "ended without a message" not in out
    assert len([*(tmp_path / "results" / "runs" / "mine").glob("*.checkpoint.npz")]) == 1


PRESETS = {
    "processes": "joblib",
    "slurm": "submitit",
    "slurm_local": "submitit",
    "ray_cluster": "ray",
}


@pytest.mark.parametrize(
    ("launcher", "extra", "sweeper"),
    [(*preset, sweeper) for preset in PRESETS.items() for sweeper in ("bptt_study", "basic")],
)
def test_a_launcher_that_is_not_installed_names_its_extra(launcher, extra, sweeper, tmp_path):
    program = (
        f"import sys; sys.modules['hydra_plugins.hydra_{extra}_launcher'] = None\n"
        "import warnings; warnings.simplefilter('ignore')  # Hydra's, that it could not be loaded\n"
        f"sys.argv = ['bptt-study', '-m', 'size=smoke', 'hydra/launcher={launcher}',"
        f" 'hydra/sweeper={sweeper}']\n"
        "from bptt_study.runner.cli import main; main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    said = f"`hydra/launcher` must be installed; got {launcher}. For {launcher}: "
    assert done.stderr == f"bptt-study: {said}pip install -e '.[{extra}]'.\n"
    assert done.returncode == 2
    assert not list(tmp_path.iterdir())
