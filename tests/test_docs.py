"""The pages of docs/ and the README do what they say: their code runs as it is written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest
from matplotlib import pyplot
from support import STRATEGY_FILES, configured

import bptt_study as bs
from bptt_study.testing.check_strategy import properties

CHECKOUT = Path(__file__).parents[1]
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def page(name):
    return (CHECKOUT / name).read_text(encoding="utf-8")


@pytest.fixture
def double():
    """Undo what a page does to JAX's settings."""
    yield
    jax.config.update("jax_enable_x64", True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/own_code.md", "docs/instruments.md"])
def test_the_code_of_a_page_runs(name, double):
    pytest.importorskip("equinox")
    symbols = jax.random.randint(jax.random.key(9), (65, 32), 0, 28)
    signal = jnp.sin(jnp.arange(64.0))[:, None] * jnp.ones(8)
    seen = {"inputs": symbols[:-1], "targets": symbols[1:], "mask": jnp.ones((64, 32))}
    seen |= {"signal": signal, "wanted": jnp.zeros((64, 16))}
    blocks = [text for kind, text in BLOCK.findall(page(name)) if kind == "python"]
    assert blocks
    for block in blocks:
        exec(block, seen)
    if name == "README.md":
        assert seen["estimate"].metrics["adjoint_norms"].shape == (64, 32)
        assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(seen["grads"]))
    if name == "docs/instruments.md":
        expected = lost_by(seen["strategy"], seen["problem"], seen["params"], seen["batch"])
        np.testing.assert_allclose(seen["bias"], expected, rtol=1e-6)


def lost_by(strategy, problem, params, batch):
    """‖∇L - ĝ‖ of a strategy without draws, from the estimates themselves."""
    ways = (bs.strategies.full(problem), strategy)
    exact, found = (
        s.estimate(params, s.init(params, batch.mask.shape[1]), batch, jax.random.key(0))[0].grads
        for s in ways
    )
    return optax.tree.norm(jax.tree.map(jnp.subtract, exact["cell"], found["cell"]))


def test_a_link_of_a_page_leads_somewhere():
    for file in [
        CHECKOUT / "README.md",
        *CHECKOUT.glob("docs/*.md"),
        *CHECKOUT.glob("*/*/README.md"),
    ]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


@pytest.mark.slow
def test_extending_works_as_written(tmp_path):
    """Every file that the page shows is written, every command is run, in an empty folder."""
    commands = []
    for kind, text in BLOCK.findall(page("docs/extending.md")):
        if kind == "sh":
            commands += text.splitlines()
            continue
        name = next(re.finditer(r"^# (\S+\.(?:py|yaml))$", text, re.MULTILINE))[1]
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert len(commands) == 10
    assert len((tmp_path / "reach.py").read_text(encoding="utf-8").splitlines()) <= 40
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "MPLBACKEND": "agg"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "results" / "reach" / "share.png").is_file()
    shown = (tmp_path / "results" / "reach" / "report.html").read_text(encoding="utf-8")
    assert "How long must the window be to carry a symbol" in shown
    assert (tmp_path / "results" / "looked" / "state_norms.csv.gz").is_file()
    assert "damped" in set(bs.results.load(tmp_path / "results" / "mine").table["strategy"])


def test_the_tables_of_strategies_are_theirs():
    """docs/strategies.md lists every strategy, with what it claims."""
    text = page("docs/strategies.md")
    problem = bs.Problem(bs.cells.linear(3, 3), bs.readouts.linear(3, 3), bs.losses.squared_error)
    strategies = {file.stem: configured(file)(problem) for file in STRATEGY_FILES}
    strategies["forward_errors"] = bs.strategies.forward_errors(problem)
    assert properties(dict(sorted(strategies.items()))) in text
    laws = {"Law", "constant", "power_law", "randomized_constant", "telescope_constant"}
    assert set(bs.strategies.__all__) - set(strategies) == laws
    for name in strategies:
        assert f"`{name}`" in text.split("## What each promises")[0], name


@pytest.mark.slow
def test_the_minimal_program_has_the_gradient_of_the_fast_path():
    """Textbook chunked BPTT of docs/minimal.py; a window one step longer is told apart."""
    sys.path.insert(0, str(CHECKOUT / "docs"))
    import minimal

    text = jax.random.randint(jax.random.key(1), (42, 4), 0, 5)
    params, state = minimal.init(jax.random.key(0), 5, 8), 0.1 * jnp.ones((4, 8))
    loss, grads, last = minimal.loss_and_gradient(params, state, text[:-1], text[1:], window=8)
    cell, readout = bs.cells.elman(5, 8), bs.readouts.linear(8, 5)
    problem = bs.Problem(cell, readout, bs.losses.cross_entropy)
    ours = {
        "cell": {name: params[name] for name in ("W_xh", "W_hh", "b_h")},
        "readout": {name: params[name] for name in ("W_hq", "b_q")},
    }
    batch = bs.Batch(text[:-1], text[1:], jnp.ones((41, 4)))

    def found(window):
        strategy = bs.strategies.fixed(problem, window)
        return strategy.estimate(ours, state, batch, jax.random.key(0))

    estimate, after = found(8)
    np.testing.assert_allclose(estimate.loss, loss, rtol=1e-14)
    np.testing.assert_allclose(after, last, rtol=1e-14)
    flat = {**estimate.grads["cell"], **estimate.grads["readout"]}
    for name, grad in grads.items():
        np.testing.assert_allclose(flat[name], grad, atol=1e-15)
    assert np.abs(found(9)[0].grads["cell"]["W_hh"] - grads["W_hh"]).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first_comparison", "lag_profile"])
def test_the_cells_of_a_notebook_run(name, tmp_path, monkeypatch, caplog):
    """The cells run as they stand, but for the length of the training."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    cells = json.loads(page(f"docs/notebooks/{name}.ipynb"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert sum("budget.updates=300" in source for source in sources) == 1
    found: dict = {}
    for source in sources:
        exec(source.replace("budget.updates=300", "budget.updates=4"), found)
    pyplot.close("all")
    assert (tmp_path / "results" / "runs" / name).is_dir()
    assert "is not used" not in caplog.text
    (said,) = re.findall(r"`[0-2]{2}(·+\?+)`", str(cells))
    for run in found.get("runs", [found.get("run")]):
        shown = "".join("012·?"[i] for i in run.batch.inputs[:, 0])
        assert shown[2:] == said
        lengths = run.table["truncation_length"][run.table["strategy"] == "fixed"]
        assert (lengths < len(shown)).all(), "chunks of all steps are full BPTT"
    for window, bias in found.get("bias", {}).items():
        chunks = bs.strategies.fixed(found["run"].problem, window)
        expected = lost_by(chunks, found["run"].problem, found["start"], found["run"].batch)
        np.testing.assert_allclose(bias, expected, atol=1e-6)
