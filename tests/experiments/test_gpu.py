"""`make gpu`: its whole path on a CPU, without what the lent machine lacks; on a GPU its first part in full."""

import os
import subprocess
import sys
from pathlib import Path

import gpu
import gpu_equal
import jax
import numpy as np
import pandas as pd
import pytest

import bptt_study as bs
from bptt_study.report.csv_tables import read_table

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def lacking(tmp_path):
    """An environment in which Hydra, OmegaConf and pooch cannot be imported, nor anything fetched."""
    for name in ("hydra", "omegaconf", "pooch"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not on that machine')")
    return os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{CHECKOUT}", "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_the_script_runs_on_a_cpu(lacking, tmp_path):
    done = subprocess.run(
        [sys.executable, gpu.__file__, tmp_path / "out", "--small"],
        env=lacking, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "out" / "gpu"
    names = {"machine.json", "summary.csv", "speed.png"}
    assert {file.name for file in folder.iterdir()} == names | {f"{p}.csv" for p in gpu.LIMITS}
    summary = read_table(folder / "summary.csv")
    assert set(summary["part"]) == set(gpu.LIMITS)
    assert summary.loc[summary["what"].str.contains("float64"), "value"].item() < 1e-12
    assert summary.loc[summary["what"].str.contains("pairs"), "value"].item() == 2
    bench = read_table(folder / "bench.csv")
    assert {"full", "chunks", "textbook", "full_associative"} <= set(bench["contender"])
    assert "error" not in bench, bench["error"].dropna()


def endless(rows):
    """A module of a part, `gpu_PART`."""
    return type(
        "module", (), {"rows": staticmethod(rows), "judged": staticmethod(lambda table: [])}
    )


def test_a_part_that_is_stopped_or_fails_leaves_what_it_found(monkeypatch, tmp_path):
    def rows(small):
        yield {"a": 1}
        raise ValueError("no memory")

    monkeypatch.setitem(sys.modules, "gpu_equal", endless(rows))
    with pytest.raises(ValueError, match="no memory"):
        gpu.run_part("equal", tmp_path, small=True)
    assert len(read_table(tmp_path / "equal.csv")) == 1
    forever = endless(lambda small: iter(lambda: {"a": 2}, None))
    monkeypatch.setitem(sys.modules, "gpu_equal", forever)
    monkeypatch.setitem(gpu.LIMITS, "equal", 0.1)
    with pytest.raises(SystemExit, match="limit"):
        gpu.run_part("equal", tmp_path, small=False)
    assert len(read_table(tmp_path / "equal.csv")) > 1


def test_the_parts_after_one_that_failed_are_run(monkeypatch, tmp_path, capsys):
    ran = []

    def started(part, folder, small):
        ran.append(part)
        return "ValueError: no memory" if part == "bench" else "complete"

    monkeypatch.setattr(gpu, "started", started)
    assert gpu.main(tmp_path, ["bench", "study"], small=True) == 1
    assert ran == ["bench", "study"]
    assert "no memory" in capsys.readouterr().out
    assert gpu.main(tmp_path, ["study"], small=True) == 0


def test_all_limits_together_are_less_than_six_minutes():
    assert sum(gpu.LIMITS.values()) + gpu.GRACE * len(gpu.LIMITS) < 360


@pytest.mark.slow
def test_a_wrong_schedule_does_not_hold(monkeypatch):
    asked, memory, _ = gpu_equal.SCHEDULES["chunks"]
    wrong = {"chunks": (asked, memory, {"window": 6}), "stored": gpu_equal.SCHEDULES["stored"]}
    monkeypatch.setattr(gpu_equal, "SCHEDULES", wrong)
    monkeypatch.setattr(gpu_equal, "STRATEGIES", {})
    (row, _) = gpu_equal._of_cell("elman", small=True)
    assert row["stored_error"] < 1e-12 < 1e-3 < row["chunks_error"]
    assert [line.get("holds") for line in gpu_equal.judged(pd.DataFrame([row]))] == [None, False]


def test_a_gradient_that_is_nan_does_not_hold():
    numbers = {"a": np.array([1.0, 2.0])}
    assert gpu_equal._apart({"a": np.array([1.0, np.nan])}, numbers) == np.inf
    assert gpu_equal._apart(numbers, numbers) == 0


def test_every_strategy_is_compared_with_the_cpu():
    """Laws are no strategies, and the constant and the power law stand for their wrappers."""
    wrapped = {"Law", "constant", "power_law", "randomized_constant", "randomized_power_law"}
    names = set(bs.strategies.__all__) - wrapped - {"fixed", "telescope_constant"}
    assert names <= set(gpu_equal.STRATEGIES)


@pytest.mark.gpu
def test_the_gradients_of_this_gpu():
    if jax.default_backend() != "gpu":
        pytest.skip("no GPU: JAX finds only a CPU here")
    table = pd.DataFrame(gpu_equal.rows(small=False))
    assert np.all([line["holds"] for line in gpu_equal.judged(table) if line.get("bound")])
