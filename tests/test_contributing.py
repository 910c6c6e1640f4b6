"""CONTRIBUTING.md's walk through a strategy of one's own, done to the letter outside the package."""

import os
import re
import subprocess
import sys
from pathlib import Path

from bptt_study.report import records

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def test_the_walk_through_works_as_written(tmp_path):
    blocks = re.findall(r"```(\w+)\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    for language, text in blocks:
        if language in ("python", "yaml"):
            file = tmp_path / text.splitlines()[0].removeprefix("# ")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    commands = [line for kind, text in blocks if kind == "sh" for line in text.splitlines()]
    assert len(commands) == 3

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for command in commands:
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    table = records.read_table(tmp_path / "results" / "mine" / "table.csv")
    assert set(table["strategy"]) == {"damped", "full"}
    gamma = table.drop_duplicates("strategy").set_index("strategy")["strategy.gamma"]
    assert gamma["damped"] == 0.9
    assert gamma.isna()["full"]
