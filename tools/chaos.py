"""Kill a sweep again and again, corrupt its files, fill its disk, race for its tables: they must not change.

`python tools/chaos.py SEED` runs at full size and prints its progress; test_chaos.py runs at a small size.
"""

import logging
import math
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bptt_study.runner.run_checkpoint import RunCheckpoint
from bptt_study.training.train import Progress, Trained

SETTINGS = [
    *("task=copy", "size=smoke", "cell.hidden=4", "task.lag=3", "task.length=2", "study=chaos"),
    *("budget.updates=6000", "budget.logs=3", "checkpoint_seconds=0.2"),
]
STRIKES = Path(__file__).with_name("strikes.py")
# of the small sweeps, each on a core; further seeds do the errors that one leaves out
HALVES = [("writes=1", "kill=1", "race=10"), ("error=2", "errors=4", "flips=90")]
FULL = [
    "strategy=fixed,sliding,randomized,randomized_power_law",
    "truncation=2,3,4,5,6,7",
]  # 24 runs


def chaos(
    folder: Path, grid: list[str], kills: int, seed: int, say: Callable[[str], None] = print
) -> None:
    """Compare a sweep that is killed `kills` times at random moments with an undisturbed one.

    Every kill must hit the sweep at work, on a fast and on a slow machine. So its moment is drawn as a number
    of finished runs and some seconds after them, but no later than the next finished run. Two files of finished
    runs are corrupted in between. Once, no file can grow beyond 200 bytes, as on a full disk.

    Args:
      folder: The folder of both sweeps.
      grid: The overrides of the sweep.
      kills: The number of kills.
      seed: The seed of the random moments.
      say: The function that prints progress.

    Raises:
      AssertionError: If a table differs in a byte.
    """
    rng = random.Random(seed)
    whole, killed = folder / "whole", folder / "killed"
    begun = time.monotonic()
    words, status = sweep(whole, grid)
    assert status == 0, words
    seconds = time.monotonic() - begun
    runs = len(sealed(whole))
    say(f"undisturbed: {runs} runs in {seconds:.0f} s")
    corrupted = 0
    for after in sorted(rng.sample(range(runs - 1), kills)):
        words, status = sweep(killed, grid, after, rng.uniform(0, seconds / runs))
        assert status == -signal.SIGKILL, words
        finished = sealed(killed)
        say(f"killed with {len(finished)} runs finished")
        if corrupted < 2 and finished:
            file = rng.choice(finished) / rng.choice(["rows.csv", "params.npz"])
            file.write_bytes(file.read_bytes()[:-10])
            corrupted += 1
    words, status = sweep(killed, [*grid, "overwrite=true"], full=True)
    assert status != 0, "the sweep did not notice a full disk"
    assert "File too large. No finished run is lost" in words, words
    assert "Traceback" not in words, words
    words, status = sweep(killed, grid)
    assert status == 0, words
    assert corrupted, "no run was finished before the last kill, so no file was corrupted"
    same(whole, killed)
    say("the same tables, byte for byte")


def same(one: Path, other: Path) -> None:
    """Compare the tables of two folders of results, byte for byte."""
    for name in ("table.csv.gz", "summary.csv"):
        contents = [(place / "chaos" / name).read_bytes() for place in (one, other)]
        assert contents[0] == contents[1], f"{name} differs"


def flip_bits(folder: Path, bits: Iterable[int] | None = None) -> int:
    """Flip single bits of a checkpoint, by default every one: it is restored as it was, or set aside.

    Args:
      folder: Where the checkpoint is written.
      bits: The numbers of the bits, taken modulo the size of the file.

    Returns:
      How many of the damaged files were set aside.

    Raises:
      AssertionError: If another state is restored.
    """
    now, key = jnp.zeros(1, jnp.int32), jax.random.key(0)
    start = Progress({"W": jnp.ones((1, 2))}, (), (), now, now, key, key)
    trained = Trained(start._replace(update=now + 7), [{"update": np.array([5])}])
    file, about = folder / "run.checkpoint.npz", {"version": "0.1.0", "corpus_sha256": None}
    writer = RunCheckpoint(file, about, 0, {})
    writer.pause(trained)
    whole = file.read_bytes()
    found = 0
    with disabled_logging():
        for bit in range(8 * len(whole)) if bits is None else bits:
            damaged = bytearray(whole)
            damaged[int(bit) // 8 % len(whole)] ^= 1 << int(bit) % 8
            file.write_bytes(damaged)
            back = RunCheckpoint(file, about, None, {}).restore(start)
            aside = folder / f"{file.name}.aside-1"
            expected = start if aside.exists() else trained.progress
            assert jax.tree.all(
                jax.tree.map(lambda a, b: bool((a == b).all()), back.progress, expected)
            )
            assert len(back.records) == (not aside.exists())
            found += aside.exists()
            aside.unlink(missing_ok=True)
    return found


def strikes(folder: Path, seed: int, *asked: str) -> str:
    """Do a small sweep again and again in a process of its own; see strikes.py.

    Args:
      folder: A folder that is made.
      seed: The seed.
      asked: What is done to the sweep, each with its amount, such as `kill=1`: at every so many changes of the
        disk `writes`, `kill`, `error`, `errors`; so many damaged files, `flips`; so many rounds, `race`.

    Returns:
      The findings, one line for each kind of work.

    Raises:
      AssertionError: If a sweep ends with another table than the undisturbed one.
    """
    command = [sys.executable, str(STRIKES), str(folder), str(seed), *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def races(
    folder: Path,
    grid: list[str],
    arrivals: int,
    rounds: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> None:
    """Let processes race for the tables of the study that `chaos` left in `whole`.

    First, processes make tables while a run goes and comes. Then two sweeps, one of them over a part of the
    grid, end at once, while the others go on. A last sweep over the grid makes the tables of `whole`.

    Args:
      folder: The folder that `chaos` used.
      grid: The overrides of the sweep.
      arrivals: How often a run comes.
      rounds: How often the two sweeps end.
      seed: The seed of the random moments.
      say: The function that prints progress.

    Raises:
      AssertionError: If a table lacks runs without a mark, or is not that of `whole` in the end, or a process
        ends with an error.
    """
    rng, raced, hidden = random.Random(seed), folder / "raced", folder / "hidden"
    parts = [grid, [*grid, f"strategy={grid[0].rpartition(',')[2]}"]]
    shutil.copytree(folder / "whole" / "runs", raced / "runs")
    (raced / "chaos").mkdir()
    hidden.mkdir()
    runs = sealed(raced)
    with gathering(raced / "chaos", folder / "stop", seed) as made:
        for run in rng.choices(runs, k=arrivals):
            run.rename(hidden / run.name)
            time.sleep(rng.uniform(0, 0.3))
            (hidden / run.name).rename(run)
            time.sleep(rng.uniform(0, 0.3))
        for _ in range(rounds):
            ends = [started(program(raced, part)) for part in parts]
            for end in ends:
                words = end.communicate()[1]
                assert end.returncode == 0, words
    status = [sys.executable, "-m", "bptt_study.runner.status", str(raced / "chaos")]
    done = subprocess.run(status, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    words, code = sweep(raced, grid)
    assert code == 0, words
    same(folder / "whole", raced)
    assert any(made), "no table was made in between"
    say(f"{sum(made)} tables made beside {rounds} ends of two sweeps")


@contextmanager
def gathering(study: Path, stop: Path, seed: int) -> Iterator[list[int]]:
    """Within this block, two processes make a study's tables; then the list says how often each has done so."""
    made: list[int] = []
    processes = [
        started([sys.executable, str(STRIKES), str(study), f"{seed} {n}", f"gather={stop}"])
        for n in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout and process.stdout.readline()
        yield made
    finally:
        stop.touch()
        ended = [process.communicate() for process in processes]
    for process, (count, words) in zip(processes, ended, strict=True):
        assert process.returncode == 0, words
        made.append(int(count))


def started(command: list[str]) -> subprocess.Popen[str]:
    """Start a process whose output and errors are read later."""
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


@contextmanager
def disabled_logging() -> Iterator[None]:
    """Within this block, nothing is logged."""
    logging.disable()
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def sealed(results: Path) -> list[Path]:
    """Find the folders of finished runs, including corrupted ones."""
    found = results.glob("runs/chaos/*/SHA256SUMS")
    return sorted(file.parent for file in found if ".aside" not in file.parent.name)


def program(results: Path, grid: list[str]) -> list[str]:
    """Return the command line of a sweep."""
    return [sys.executable, "-m", "bptt_study", "-m", *SETTINGS, *grid, f"results_dir={results}"]


def sweep(
    results: Path,
    grid: list[str],
    after: int | None = None,
    seconds: float = 0,
    full: bool = False,
) -> tuple[str, int]:
    """Run a sweep, and kill it with -9 `seconds` after `after` runs are finished.

    The kill comes before one more run is finished, because the next start finds compiled programs in the cache.
    With `full`, no file can grow beyond 200 bytes.

    Returns:
      The output and the exit status.
    """
    process = subprocess.Popen(
        program(results, grid),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if full:  # long before the process has started up
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200, 200))

    if after is not None:
        moment = math.inf
        while (finished := len(sealed(results))) <= after and time.monotonic() < moment:
            if finished == after:
                moment = min(moment, time.monotonic() + seconds)
            with suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=0.05)
                break
        process.kill()
    words, _ = process.communicate()
    return words, process.returncode


def main(seed: int) -> None:
    """Do all of it at full size."""
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(2) as pool:
        folder = Path(place)
        found = [pool.submit(strikes, folder / half[0], seed, *half) for half in HALVES]
        for half in found:
            print(half.result(), flush=True)
        print(f"{flip_bits(folder)} checkpoints with a flipped bit set aside, the others whole")
        chaos(folder, FULL, kills=10, seed=seed)
        races(folder, FULL, arrivals=100, rounds=10, seed=seed)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
