"""What several test files need: the oracle's view of an example, and estimates computed once."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import oracles
import pandas as pd
import pytest
from omegaconf import OmegaConf

import bptt_study as bs
from bptt_study import __main__ as shell
from bptt_study import files
from bptt_study.backprop.backpropagate import Memory, Truncation
from bptt_study.paths import shipped
from bptt_study.report import csv_tables, provenance
from bptt_study.runner import run_folder
from bptt_study.runner.configure import build
from bptt_study.testing import examples
from bptt_study.testing.subject import MakeStrategy

TINY = [
    "task=copy",
    "size=smoke",
    "cell.hidden=4",
    "task.lag=3",
    "task.length=2",
    "budget.updates=4",
]
SWEEP = ["-m", *TINY, "strategy=full,fixed", "truncation=2", "study=mine"]
STRATEGY_FILES = sorted((shipped("conf", "config.yaml") / "strategy").glob("*.yaml"))


def in_a_process_with(devices: int, file: str, chosen: str) -> str:
    """What pytest prints for the chosen tests of a file, all passed, where a CPU is so many devices."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-v", file, "-k", chosen],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def configured(file: Path) -> MakeStrategy:
    """The strategy of a configuration file, truncated at 3 steps: what is added there is tested here.

    A rank is 2, as the cells have three units.
    """
    node = OmegaConf.create({"truncation": 3, "strategy": OmegaConf.load(file)})
    settings = OmegaConf.to_container(node, resolve=True)["strategy"]
    settings |= {"rank": 2} if "rank" in settings else {}
    return lambda problem: build("strategy", settings, problem)


def how(
    states: int | None = None, segment: int | None = None, **truncation: Any
) -> tuple[Truncation, Memory]:
    """The last two arguments of `backpropagate`."""
    return Truncation(**truncation), Memory(states, segment)


def flat_state(state: Any) -> np.ndarray:
    return np.concatenate(jax.tree.leaves(state), axis=-1)


def by_hand(name: str, ex: examples.Example) -> oracles.Table:
    """The oracle's table for an example on cell `name`."""
    inputs = np.asarray(ex.batch.inputs)
    return oracles.table(
        name,
        jax.tree.map(np.asarray, ex.params),
        flat_state(ex.state),
        oracles.one_hot(inputs, examples.D) if inputs.ndim == 2 else inputs,
        np.asarray(ex.batch.targets),
        np.asarray(ex.batch.mask),
        examples.LOSSES.get(name, "cross_entropy"),
    )


@cache
def table_of(name: str) -> oracles.Table:
    return by_hand(name, examples.example(name))


def flat_grads(estimate: Any) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of cell and readout as the oracle lays them out."""
    return oracles.flat(estimate.grads["cell"]), oracles.flat(estimate.grads["readout"])


@cache
def full_estimate(name: str) -> Any:
    ex = examples.example(name)
    strategy = bs.strategies.full(ex.problem)
    return jax.jit(strategy.estimate)(ex.params, ex.state, ex.batch, jax.random.key(0))


def agrees(estimate: Any, table: oracles.Table, weights: np.ndarray) -> None:
    """Loss, gradients and adjoint norms are the oracle's under these weights."""
    cell, readout = flat_grads(estimate)
    expected = oracles.weighted(table, weights)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(cell, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    np.testing.assert_allclose(readout, table.readout, atol=1e-13)
    np.testing.assert_allclose(estimate.loss, table.loss, rtol=1e-13)
    norms = np.linalg.norm(oracles.weighted_adjoints(table, weights), axis=-1)
    np.testing.assert_allclose(estimate.metrics["adjoint_norms"], norms, atol=1e-13)


def resident() -> int:
    """Read the bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run_folders(study: Path) -> list[Path]:
    """Of finished runs."""
    return sorted(seal.parent for seal in study.glob("*/SHA256SUMS"))


def run_here(*arguments: str) -> int:
    """Status of `bptt-study ARGUMENTS` in this process and folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bptt-study", *arguments])
        try:
            shell.run("bptt_study.runner.cli")
            return 0
        except SystemExit as stop:
            return int(stop.code or 0)


def stand_in(study: Path) -> Callable[..., pd.DataFrame]:
    """A `run.perform` that trains nothing, where only what is around it is tested.

    It leaves what the run of the same name left in this folder of runs, or, under the new run's name,
    settings and seeds, what the first run there left.
    """
    found = {folder.name: folder for folder in run_folders(study)}

    def perform(config: Any, paths: run_folder.RunPaths, *_: Any, **__: Any) -> pd.DataFrame:
        made = found.get(config.identity, next(iter(found.values())))
        left = {f.name: f.read_bytes() for f in made.iterdir() if f.name != files.SEAL}
        rows = csv_tables.read_table(made / "rows.csv")
        if made.name != config.identity:
            about = json.loads(left[run_folder.ABOUT]) | {
                "run": config.identity,
                "corpus_sha256": config.corpus,
                "code": config.code,
            }
            left[run_folder.ABOUT] = json.dumps(about).encode()
            own = {name: config.settings[name] for name in ("study", "run")}
            for name, settings in (("rows.csv", config.settings), ("costs.csv", own)):
                table = csv_tables.read_table(made / name)
                table = table.assign(
                    seed=table["seed"] % config.seeds + config.first_seed, **settings
                )
                left[name] = csv_tables.packed(table, name)
        files.write_folder(paths.folder, left)
        return rows

    return perform


def contents(folder: Path) -> dict[str, bytes]:
    """What a run or study leaves, but for clock and machine."""
    clock = {"costs.csv", "machine.json", provenance.FILE, files.SEAL}
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.name not in clock and f.is_file()}


def without_metrics(strategy):
    """The estimate of a strategy as training uses it: loss, gradient and next state."""

    def estimate(*arguments):
        found, state = strategy.estimate(*arguments)
        return found.loss, found.grads, state

    return estimate
