"""A sweep that is killed, whose files are corrupted and whose disk is full: does it end as an undisturbed one?

`python tests/chaos.py` does it at full size, with progress; test_chaos.py at a size that CI bears.
"""

import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

SETTINGS = [
    *("task=copy", "size=smoke", "cell.hidden=4", "task.lag=3", "task.length=2", "study=chaos"),
    *("budget.updates=6000", "budget.logs=3", "checkpoint_seconds=0.2"),
]
FULL = [
    "strategy=fixed,sliding,randomized,randomized_power_law",
    "truncation=2,3,4,5,6,7",
]  # 24 runs


def chaos(
    folder: Path, grid: list[str], kills: int, seed: int, say: Callable[[str], None] = print
) -> None:
    """Compare the sweep, killed `kills` times at random moments, with an undisturbed one.

    After every kill it is started again; two files of finished runs are corrupted on the way, and once no
    file can grow beyond 200 bytes, which is what a full disk does to it. AssertionError where the tables
    differ in a byte.
    """
    rng = random.Random(seed)
    begun = time.monotonic()
    sweep(folder / "whole", grid)
    seconds = time.monotonic() - begun
    say(f"undisturbed: {seconds:.0f} s")
    corrupted = 0
    for kill in range(kills):
        wait = rng.uniform(0.3, 0.9) * seconds
        words, status = sweep(folder / "killed", grid, until=wait)
        finished = sorted(folder.glob("killed/runs/chaos/*/SHA256SUMS"))
        if corrupted < 2 and finished:
            file = rng.choice(finished).with_name(rng.choice(["rows.csv", "params.npz"]))
            file.write_bytes(file.read_bytes()[:-10])
            corrupted += 1
        say(f"kill {kill + 1} after {wait:.1f} s: {len(finished)} runs finished, status {status}")
    words, status = sweep(folder / "killed", [*grid, "overwrite=true"], full=True)
    assert status != 0, "a full disk went by unnoticed"
    assert "File too large; nothing finished is lost" in words, words
    assert "Traceback" not in words, words
    words, status = sweep(folder / "killed", grid)
    assert status == 0, words
    assert corrupted, "nothing was finished before the last kill: nothing was corrupted"
    for name in ("table.csv", "summary.csv"):
        whole, killed = (folder / w / "chaos" / name for w in ("whole", "killed"))
        assert whole.read_bytes() == killed.read_bytes(), f"{name} differs"
    say("the same tables, byte for byte")


def sweep(
    results: Path, grid: list[str], until: float | None = None, full: bool = False
) -> tuple[str, int]:
    """What it says and its status; killed with -9 after `until` seconds if it has not ended by then."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))

    program = [sys.executable, "-m", "bptt_study", "-m", *SETTINGS, *grid, f"results_dir={results}"]
    process = subprocess.Popen(
        program,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=limit if full else None,
    )
    try:
        words, _ = process.communicate(timeout=until)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        words, _ = process.communicate()
    return words, process.returncode


if __name__ == "__main__":
    given = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    with tempfile.TemporaryDirectory() as place:
        chaos(Path(place), FULL, kills=10, seed=given)
