"""The README's code runs as it is written."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from support import STRATEGY_FILES, configured

from bptt_study import battery

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


def test_the_readmes_table_of_strategies_says_what_they_claim():
    table = README.split("## Strategies")[1].split("##")[0]
    rows = [re.split(r" *\| *", line)[1:-1] for line in table.splitlines() if "| `" in line]
    said = {row[0].strip("`"): row[-1] for row in rows[1:]}  # without the head
    problem = battery.problem_of("linear")
    claims = {file.stem: configured(file)(problem).claim for file in STRATEGY_FILES}
    assert said == {
        name: "exact" if c.exact else "unbiased" if c.unbiased else "biased"
        for name, c in claims.items()
    }
