"""Time all parts of a sweep except training: `python tools/many.py` times 250, 500 and 1,000 runs.

`python tools/many.py shapes 200` trains a sweep over 200 hidden sizes instead, and shows the memory maps and
the resident memory of the process after its runs: compiled programs must not pile up. `shapes 12 0.04` shows
the same with fewer runs: it lets go of programs at a tenth of the usual number of maps.

One run is trained. All others copy its files under their own names and seeds, so everything else happens as in
a real sweep. The seconds are processor time, which equals the wall clock of an idle machine.
"""

import io
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support import TINY, resident, run_here, stand_in

from bptt_study.runner import run, run_folder, status
from bptt_study.training import devices

STUDY = ["-m", *TINY, "strategy=fixed", "truncation=2", "study=many"]


def sweep(count: int) -> list[str]:
    """Make the arguments of a sweep of `count` runs."""
    return [*STUDY, f"first_seed=range({count})"]


def timed(results: Path, template: Path, count: int) -> dict[str, float]:
    """Time a sweep of `count` runs: start-up, each run, tables; the same sweep when finished; status.

    Args:
      results: The folder of results.
      template: The files of the run that all others copy.
      count: The number of runs.

    Returns:
      Seconds of processor time by part.
    """
    at: list[float] = []
    perform = stand_in(template)

    def watched(*arguments: Any, **settings: Any) -> Any:
        at.append(time.process_time())
        return perform(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "perform", watched)
        arguments = [*sweep(count), f"results_dir={results}"]
        begun = time.process_time()
        assert run_here(*arguments) == 0
        ended = time.process_time()
        assert len(at) == count
        assert run_here(*arguments) == 0
        again = time.process_time()
        with suppress(SystemExit):
            status.main([str(results / "many")])
    per_run = (at[-1] - at[0]) / (count - 1)
    return {
        "start-up": at[0] - begun,
        "a run beside its training": per_run,
        "tables": ended - at[-1] - per_run,
        "again, all finished": again - ended,
        "status": time.process_time() - again,
    }


def template(results: Path) -> Path:
    """Train the one run that all others copy, and return its folder."""
    assert run_here(*sweep(1), f"results_dir={results}") == 0
    return run_folder.runs_folder(results, "many")


def shapes(count: int, share: float = 0.4, say: Callable[[str], None] = print) -> None:
    """Train LSTMs of `count` sizes in one process; fail if maps or memory grow with their number.

    Args:
      count: The number of sizes.
      share: The share of the kernel's limit of maps from which programs are let go.
      say: The function that prints the table.

    Raises:
      AssertionError: If programs are let go at maps or memory that grow, or never.
    """
    seen: list[tuple[int, int]] = []
    peaks: list[tuple[int, int]] = []  # when programs are let go
    let_go = devices.let_go_of_programs

    def watched() -> bool:
        peak = devices.memory_maps(), resident()
        gone = let_go(share)
        peaks.extend([peak] * gone)
        seen.append((devices.memory_maps(), resident()))
        return gone

    sizes = ",".join(str(2 + n) for n in range(count))
    own = [setting for setting in TINY if "hidden" not in setting]
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "let_go_of_programs", watched)
        arguments = ["-m", *own, "cell=lstm", f"cell.hidden={sizes}", "study=shapes"]
        with redirect_stdout(io.StringIO()):
            assert run_here(*arguments, f"results_dir={place}") == 0
    say(f"{'runs':>6}{'memory maps':>14}{'resident MiB':>14}")
    for n in range(0, len(seen), max(1, len(seen) // 20)):
        say(f"{n + 1:6}{seen[n][0]:14,}{seen[n][1] / 2**20:14.0f}")
    for maps, held in peaks:
        say(f"let go{maps:14,}{held / 2**20:14.0f}")
    assert len(seen) == count
    assert peaks, "no programs were let go, so the runs were too few"
    assert all(maps < 1.2 * peaks[0][0] and held < 1.2 * peaks[0][1] for maps, held in peaks)


def main(say: Callable[[str], None] = print) -> None:
    with tempfile.TemporaryDirectory() as place, redirect_stdout(io.StringIO()):
        trained = template(Path(place, "template"))
        found = {n: timed(Path(place, str(n)), trained, n) for n in (250, 500, 1000)}
    say(f"{'seconds':28}" + "".join(f"{n:>9} runs" for n in found) + "   1,000 ÷ 250")
    for name in found[1000]:
        said = "".join(f"{seconds[name]:14.3f}" for seconds in found.values())
        say(f"{name:28}{said}{found[1000][name] / found[250][name]:14.1f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["shapes"]:
        shapes(int(sys.argv[2]), *map(float, sys.argv[3:]))
    else:
        main()
