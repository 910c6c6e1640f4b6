"""The README's code runs as it is written."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

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


def test_the_strategies_of_the_readme_are_those_there_are():
    table = README.split("## Strategies")[1].split("##")[0]
    named = set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))
    folder = Path(__file__).parents[1] / "conf" / "strategy"
    assert named == {file.stem for file in folder.glob("*.yaml")}
