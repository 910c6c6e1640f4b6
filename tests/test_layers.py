"""Rooms and the order in which they may import each other, read from the source; no import of it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bptt_study

PACKAGE = Path(__file__).parent.parent / "bptt_study"

# From the bottom up. A module imports from rooms below its own; the rooms of one line know nothing of
# each other.
ORDER = [
    ["types", "validation", "paths", "files", "known", "signals"],
    ["backprop", "readouts", "losses", "optimizers"],
    ["influence", "cells", "tasks", "report"],
    ["strategies"],
    ["instruments"],
    ["training", "probes", "testing"],
    ["runner", "__main__"],
]
PUBLIC = {**bptt_study.MODULES, **bptt_study.ATTRIBUTES}
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
ONLY = {  # room -> the only rooms of the package it may import, beside itself
    "types": set(),
    "validation": set(),
    "paths": set(),
    "signals": set(),
    "known": set(),
    "backprop": {"types", "validation", "known"},
    "tasks": {"types", "validation", "losses"},
}
ONLY_IN = {  # package -> the only rooms that may import it
    "hydra": {"runner"},
    "omegaconf": {"runner"},
    "optax": {"training", "optimizers"},
}
NOT_IN = {  # room -> packages it may not import
    "report": {"jax"},
    "strategies": {"optax", "hydra", "pandas"},
    "backprop": {"optax", "hydra", "pandas", "pathlib"},
}


def imports(source: str) -> Iterator[str]:
    """Full names that a module imports, inside functions too; `if TYPE_CHECKING` is not counted.

    `import bptt_study as bs` counts by what is taken from it: `bs.cells` imports bptt_study.cells.
    """
    tree = ast.parse(source)
    typing = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and getattr(branch.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(branch)
    }
    nodes = [node for node in ast.walk(tree) if id(node) not in typing]
    plain = [alias for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    package = {alias.asname or "bptt_study" for alias in plain if alias.name == "bptt_study"}
    yield from (alias.name for alias in plain if alias.name != "bptt_study")
    for node in nodes:
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in package:
            yield f"bptt_study.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where an arrow goes"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(room: str, source: str) -> list[str]:
    """What a module in `room` imports against the rules."""
    found = []
    if room not in LEVEL:
        return [f"{room}: not in the list of rooms"]
    for name in imports(source):
        top, *rest = name.split(".")
        if top == "bptt_study":
            other = PUBLIC.get(rest[0], rest[0]).split(".")[0]
            if other in ("__version__", room):
                continue
            other = "types" if other[0].isupper() else other  # bs.Batch
            if other not in LEVEL:
                found.append(f"{room} imports {name}: not in the list of rooms")
            elif LEVEL[other] >= LEVEL[room]:
                found.append(f"{room} imports {name}: backwards")
            elif room in ONLY and other not in ONLY[room]:
                found.append(f"{room} imports {name}: only {sorted(ONLY[room])}")
        elif room not in ONLY_IN.get(top, {room}):
            found.append(f"{room} imports {name}: only {sorted(ONLY_IN[top])} may")
        elif top in NOT_IN.get(room, ()):
            found.append(f"{room} imports {name}: not there")
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_arrow_runs_backwards(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert violations(room, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("backprop", "from bptt_study.strategies import full"),
        ("backprop", "from bptt_study import strategies"),
        ("backprop", "import bptt_study as bs\nprint(bs.strategies.full)"),
        ("backprop", "def f():\n    import bptt_study.training.train"),
        ("backprop", "from pathlib import Path"),
        ("cells", "from bptt_study.instruments import lags"),
        ("types", "from bptt_study.validation import whole"),
        ("tasks", "from bptt_study.backprop.forward import forward"),
        ("strategies", "import optax"),
        ("strategies", "import pandas as pd"),
        ("instruments", "from optax import sgd"),
        ("training", "from omegaconf import OmegaConf"),
        ("report", "import hydra.utils"),
        ("report", "import jax.numpy as jnp"),
        ("report", "from bptt_study.runner.run_folder import RunPaths"),
        ("novelty", "import numpy"),
        ("runner", "from bptt_study.novelty import x"),
    ],
)
def test_planted_arrow_is_found(room, line):
    assert len(violations(room, f"import numpy as np\n\n{line}\n")) == 1


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("strategies", "from bptt_study.backprop.backpropagate import backpropagate"),
        ("strategies", "from bptt_study.strategies.full import full"),
        ("training", "import optax"),
        ("runner", "import hydra"),
        ("runner", "import bptt_study\nprint(bptt_study.__version__)"),
        ("report", "import pandas as pd"),
        ("report", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax"),
    ],
)
def test_forward_arrows_pass(room, line):
    assert violations(room, line) == []


MATHEMATICS = ("backprop", "influence", "cells", "strategies", "instruments", "testing")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_of_the_mathematics_and_all_functions_are_short(path):
    source = path.read_text(encoding="utf-8")
    if path.relative_to(PACKAGE).parts[0] in MATHEMATICS:
        assert len(source.splitlines()) <= 250
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef)]
    assert [n.name for n in functions if lines_of_code(n) > 50] == []


def lines_of_code(function):
    text = ast.get_docstring(function, clean=False) or ""
    return function.end_lineno - function.lineno + 1 - len(text.splitlines())


def test_relative_imports_are_found():
    with pytest.raises(AssertionError, match="relative"):
        violations("training", "from . import plots")


@pytest.mark.parametrize("heavy", ["jax", "optax", "pandas", "hydra", "matplotlib"])
def test_importing_the_package_imports_nothing_heavy(heavy):
    """So that `--help` and tab completion are quick; modules load when they are named."""
    code = f"import sys, bptt_study; print(bptt_study.__version__, '{heavy}' in sys.modules)"
    if heavy == "jax":  # negative control: naming a module loads it
        code += "; bptt_study.losses; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout.split()[1:] == (["False", "True"] if heavy == "jax" else ["False"])


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'tusks'"):
        bptt_study.tusks  # noqa: B018
    assert set(bptt_study.__all__) >= {"Batch", "Problem", "cells", "losses", "strategies"}
