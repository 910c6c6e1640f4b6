"""All tests run in float64. Compiling is most of their time, so XLA compiles quickly, not well.

XLA ends the process, without a word from pytest, at a flag it does not know: each version of jaxlib
gets the flags that it was tried with, and others none. One module of LLVM for each program, where the
default splits it into 32, saves a fifth of a compilation's processor time. Tracing makes
millions of objects that live on, through which the garbage collector would go again and again.

Compiled programs are kept in `.pytest_cache`, so a second `make test` compiles less. Each worker has a folder
of its own, since JAX writes a program while another process may read it. Child processes do not see this cache.
"""

import gc
import os
import sys
from importlib.metadata import version
from pathlib import Path

from groups import group_of, sample

PLAIN = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
ONE_MODULE = "--xla_cpu_parallel_codegen_split_count=1"
FLAGS = {"0.10": f"{PLAIN} {ONE_MODULE} --xla_cpu_use_fusion_emitters=false", "0.12": PLAIN}
flags = FLAGS.get(version("jaxlib")[:4], "")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl import logging as absl_logging  # noqa: E402 (optax imports it)

jax.config.update("jax_enable_x64", True)
PROGRAMS = Path(__file__).parents[1] / ".pytest_cache" / "programs"
jax.config.update(
    "jax_compilation_cache_dir", str(PROGRAMS / os.environ.get("PYTEST_XDIST_WORKER", "alone"))
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
gc.set_threshold(50_000, 20, 50)

# Hydra closes the log handlers that it finds, and absl's then closes its stream, which would be pytest's.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


def pytest_addoption(parser):
    parser.addoption("--sample", action="store_true", help="run √n of the n cases of each test")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    """The many small groups come last, so that no process idles at the end."""
    if config.getoption("sample"):
        kept = sample([item.nodeid for item in items])
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
        items[:] = [item for item in items if item.nodeid in kept]
    items.sort(key=lambda item: item.path.name == "test_check_strategy.py")


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_xdist_make_scheduler(config, log):
    """Spread groups over processes. xdist's own groups, by a mark, do nothing with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(nodeid)

    return Groups(config, log)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def kept(monkeypatch) -> dict:
    """The figures that are saved, by name; no file is written."""
    from bptt_study.report import figure_layout

    found: dict = {}

    def save(figure, folder, name):
        found[name] = figure
        return [folder / f"{name}.png"]

    monkeypatch.setattr(figure_layout, "save", save)
    return found


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run `bptt-study ARGUMENTS` in this process, in a folder of its own: status, output, errors."""
    from support import run_here

    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        return run_here(*arguments), *capsys.readouterr()

    return run
