"""The README's code runs as it is written."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from support import STRATEGY_FILES, configured

from bptt_study.testing import examples
from bptt_study.testing.check_strategy import properties

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_notebook_lines_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    symbols = jax.random.randint(jax.random.key(9), (65, 32), 0, 28)
    seen = {"inputs": symbols[:-1], "targets": symbols[1:], "mask": jnp.ones((64, 32))}
    for block in blocks:
        exec(block, seen)
    assert seen["estimate"].metrics["adjoint_norms"].shape == (64, 32)
    np.testing.assert_allclose(seen["window"][:3], [1, 15 / 16, 14 / 16])


def test_the_readmes_tables_of_strategies_are_theirs():
    tables = README.split("## Strategies")[1].split("##")[0]
    problem = examples.problem_of("linear")
    strategies = {file.stem: configured(file)(problem) for file in STRATEGY_FILES}
    assert properties(strategies) in tables
    described = re.findall(r"^\| `(\w+)` \|", tables.split("What they claim")[0], re.MULTILINE)
    assert sorted(described) == sorted(strategies)
