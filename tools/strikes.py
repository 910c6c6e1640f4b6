"""A small sweep that is done hundreds of times: killed, given errors, with flipped files, and in races.

`python tools/strikes.py FOLDER SEED KIND=AMOUNT …` is a process of its own, which chaos.py starts. It imports
and composes everything once and forks a child for each time, whose training only counts. All else is real: the
validated runs, their checkpoints, folders and locks, the sweep's record, the tables and their census.
"""

import errno
import gzip
import io
import itertools
import os
import random
import re
import shutil
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bptt_study import __main__ as shell
from bptt_study import files
from bptt_study.report import csv_tables
from bptt_study.report.study import Made
from bptt_study.runner import census, cli, figures, gather, run, run_folder, status
from bptt_study.runner import sweep as sweeps
from bptt_study.training.train import Progress, Trained
from bptt_study.validation import SettingError

STUDY = "strikes"
SETTINGS = [
    *("task=copy", "size=smoke", "cell.hidden=4", "task.lag=3", "task.length=2", "seeds=2"),
    *("budget.updates=4", "budget.logs=2", "checkpoint_seconds=0", f"study={STUDY}"),
    *("strategy=fixed", "truncation=2,3"),
]
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
ERRORS = (errno.ENOSPC, errno.EIO)
HOWS = ("kill", "error", "errors")


def strike(folder: Path, at: int, how: str) -> None:
    """Strike this process at its `at`-th change of the folder, which includes each write and each flush.

    Of a write, the first half is done.

    Args:
      folder: The folder.
      at: The number of changes before the strike.
      how: `kill` with -9; `error`: that change fails; `errors`: all from then on fail, as on a broken disk.
    """
    count = itertools.count()

    def change(path: object, half: Callable[[], object] = lambda: None) -> None:
        if not str(path).startswith(f"{folder}/"):
            return
        number = next(count)
        if number == at or (number > at and how == "errors"):
            half()
            folder.with_name("struck").touch()
            if how == "kill":
                os.kill(os.getpid(), 9)
            error = ERRORS[at % 2]
            raise OSError(error, os.strerror(error))

    class Frail(io.FileIO):
        def write(self, data: Any) -> int:
            change(self.name, lambda: super(Frail, self).write(data[: len(data) // 2]))
            return super().write(data)

    def frail_open(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if not (set(mode) & set("wxa") and str(file).startswith(f"{folder}/")):
            return whole_open(file, mode, *rest, **named)
        out = io.BufferedWriter(Frail(file, mode.replace("b", "")))
        return out if "b" in mode else io.TextIOWrapper(out, encoding="utf-8")

    def frail_fsync(_: int) -> None:
        change(f"{folder}/")  # nothing is flushed, as no child cuts the power

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            change(arguments[0])

    whole_open = io.open
    io.open, os.fsync = frail_open, frail_fsync  # type: ignore[assignment]
    sys.addaudithook(hook)


class Child:
    """A forked process that does something, and what it says."""

    def __init__(self, do: Callable[[], object], said: Path) -> None:
        self.said = said
        self.number = os.fork()
        if self.number:
            return
        with said.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        code = 0
        try:
            sweeps._recorded.cache_clear()
            files.remove_leftovers.__defaults__ = (-1,)  # those of the children before it, at once
            with cli.one_line_errors():
                do()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:  # as Python would do
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def end(self) -> tuple[int, str]:
        """Wait for its end; return its exit status and what it said."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        words = self.said.read_text(errors="replace")
        assert "Traceback (most recent call last)" not in words, words
        return code, words


def counting(
    problem: Any, strategy: Any, optimizer: Any, budget: Any, task: Any
) -> Callable[..., Trained]:
    """Make a stand-in for `train`: its loss tells how many updates were counted since the start."""

    def train(keys: np.ndarray, watch: Any, pause: Any, restore: Any) -> Trained:
        none = np.zeros(len(keys), np.int32)
        start = Progress({"W": none * 0.0}, (), (), none, none, none, none)
        progress, records, *_ = restore(start)
        for point in budget.log_points[len(records) :]:
            since = int(progress.update[0])
            counted = progress.params["W"] + (point - since)
            progress = progress._replace(params={"W": counted}, update=none + point)
            scores = {"update": none + point, "validation_loss": 9.0 + keys - counted}
            lost = {"diverged": none > 0, "diverged_at": none * np.nan, "seconds": none * 0.0}
            records = [*records, scores | lost]
            watch(records[-1], progress)
            pause(Trained(progress, records))
        return Trained(progress, records)

    return train


def one_figure(story: object, folder: Path, *_: object) -> Made:
    """Make a stand-in for the figures of a study."""
    files.write(folder / "figure.png", b"blank")
    return Made([folder / "figure.png"], [], [])


class Small:
    """The small sweep in a folder.

    Args:
      folder: An empty folder. Its `results` are those of each time, `whole` those of the undisturbed sweep.
      do: The function that does the sweep.
    """

    def __init__(self, folder: Path, do: Callable[[], object]) -> None:
        self.results, self.whole, self.do = folder / "results", folder / "whole", do
        self.study, self.said = self.results / STUDY, folder / "said.txt"
        self.sweep()
        shutil.copytree(self.results, self.whole)
        self.table = self.rows(self.whole)
        self.before = self.interrupted(folder / "before")

    def start(self, do: Callable[[], object], name: str = "said.txt") -> Child:
        """Start a child that does something."""
        return Child(do, self.said.with_name(name))

    def sweep(self) -> str:
        """Do the sweep undisturbed; it ends well, and returns its words."""
        code, words = self.start(self.do).end()
        assert code == 0, words
        return words

    def gather(self) -> tuple[int, str]:
        """Make the tables of what is finished."""
        return self.start(lambda: status.main([str(self.study), "--gather"])).end()

    def again(self, before: Path) -> None:
        """Put the results back to what they were before."""
        shutil.rmtree(self.results)
        shutil.copytree(before, self.results)

    def part(self) -> None:
        """Check that the table holds rows of the undisturbed one, and is marked if it lacks some."""
        found = self.rows(self.results)
        assert {*found} <= {*self.table}, "the table has other rows"
        marked = (self.study / csv_tables.UNFINISHED).exists()
        assert found in ([], self.table) or marked, "a table that lacks rows is not marked"

    def finished(self) -> dict[Path, object]:
        """Find the intact finished runs, and what tells each from the same run made anew."""
        found = self.results.glob(f"runs/{STUDY}/*/{files.SEAL}")
        runs = (seal.parent for seal in found if ".aside" not in seal.parent.name)
        return {run: files.sealed_at(run) for run in runs if not files.damage(run)}

    def rows(self, results: Path) -> list[bytes]:
        """Read the rows of the table; none if there is no table."""
        file = results / STUDY / csv_tables.TABLE
        return gzip.decompress(file.read_bytes()).splitlines() if file.exists() else []

    def same(self) -> None:
        """Compare tables and figures with those of the undisturbed sweep, byte for byte."""
        for name in (csv_tables.TABLE, "summary.csv", "figure.png"):
            found, whole = (place / STUDY / name for place in (self.results, self.whole))
            assert found.read_bytes() == whole.read_bytes(), f"{name} differs"
        assert not (self.study / csv_tables.UNFINISHED).exists()
        assert not census.faults(self.study), census.faults(self.study)

    def interrupted(self, before: Path) -> Path:
        """Keep results as the sweep may find them in a folder, and return it.

        The first run is damaged, the second has a checkpoint and has failed, and the table is unfinished.
        """
        makes = run.make_train

        def failing(*parts: Any) -> Callable[..., Trained]:
            def train(keys: np.ndarray, watch: Any, *paused: Any) -> Trained:
                return makes(*parts)(keys, lambda *_: done.exists() and 1 / 0, *paused)

            return train

        def fails() -> None:
            run.make_train = failing
            self.do()

        done, *_ = sorted(self.finished())
        shutil.rmtree(self.results)
        assert self.start(fails).end()[0] == 1
        assert self.gather()[0] == 1
        (done / "rows.csv").write_bytes(b"")
        shutil.copytree(self.results, before)
        return before


def composed(folder: Path, work: Callable[[Small], object]) -> None:
    """Compose the small sweep in a folder, and do some work with it."""

    def instead(self: Any, grid: list[list[str]]) -> None:
        runs = self._validated(grid)
        self._validated = lambda _: runs
        work(Small(folder, lambda: whole_run(self, grid)))

    whole_run = sweeps.StudySweep.run
    sweeps.StudySweep.run = instead  # type: ignore[method-assign]
    run.make_train, run._keys, figures.make = counting, np.asarray, one_figure
    jax.device_put = lambda leaf, _: leaf  # no child computes with JAX
    folder.mkdir()
    sys.argv = ["bptt-study", "-m", *SETTINGS, f"results_dir='{folder / 'results'}'"]
    shell.run("bptt_study.runner.cli")


def at_each_change(how: str, small: Small, rng: random.Random, every: int) -> str:
    """Strike the sweep at each change of the disk, or at every so many: the next one ends as undisturbed."""
    struck = small.results.with_name("struck")
    ends: Counter[int] = Counter()
    for at in itertools.count(rng.randrange(every), every):
        small.again(small.before)
        struck.unlink(missing_ok=True)

        def disturbed(at: int = at) -> None:
            strike(small.results, at, how)
            small.do()

        code, words = small.start(disturbed).end()
        if not struck.exists():
            break
        ends[code] += 1
        small.part()
        if code == 0:
            small.same()
        elif how != "kill":
            assert re.search("same command|--gather|results_dir=FOLDER", words), words
        kept = small.finished()
        small.sweep()
        small.same()
        assert kept.items() <= small.finished().items(), "a finished run was made anew"
        left = [*small.study.glob(".*"), *small.study.parent.glob(f"runs/{STUDY}/**/.*.*")]
        assert not left, left
    said = ", ".join(f"{count} with status {code}" for code, count in sorted(ends.items()))
    return f"{how} at {ends.total()} changes of a sweep: it ended {said}, and the next one well"


def flips(small: Small, rng: random.Random, count: int) -> str:
    """Damage files of the finished sweep: tables of what is whole, then those of the undisturbed sweep."""
    found = (file for file in sorted(small.whole.rglob("*")) if file.is_file())
    names = [file.relative_to(small.whole) for file in found if file.suffix != ".lock"]
    rng.shuffle(names)
    ends: Counter[int] = Counter()
    for n in range(count):
        small.again(small.whole)
        file = small.results / names[n % len(names)]
        content = bytearray(file.read_bytes())
        for _ in range(rng.choice([1, 1, 2, 50])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(
            content[: rng.choice([len(content), len(content), rng.randrange(len(content))])]
        )
        code, words = small.gather()
        ends[code] += 1
        small.part()
        if code == 0:
            small.same()
        else:
            assert re.search("the same command|damaged|left out", words.lower()), words
        small.sweep()
        small.same()
    said = ", ".join(f"{count} with status {code}" for code, count in sorted(ends.items()))
    return f"{count} damaged files: tables made {said}, and the next sweep ended well"


def race(small: Small, rng: random.Random, rounds: int) -> str:
    """Let two sweeps and two processes that make tables start at once."""
    stop, made = small.results.with_name("stop"), 0
    for _ in range(rounds):
        small.again(small.before)
        stop.unlink(missing_ok=True)
        seeds = rng.sample(range(10**9), 2)
        gatherers = [
            small.start(lambda n=n: gather_often(small.study, stop, n), f"{n}") for n in seeds
        ]
        ends = [small.start(small.do, name).end for name in ("one", "other")]
        assert [end()[0] for end in ends] == [0, 0]
        stop.touch()
        for end in (gatherer.end() for gatherer in gatherers):
            assert end[0] == 0, end[1]
            made += int(end[1].splitlines()[-1])
        small.sweep()
        small.same()
    return f"{made} tables made beside {rounds} ends of two small sweeps"


def gather_often(study: Path, stop: Path, seed: object) -> None:
    """Make tables again and again, with those of a sweep's end among them, until the file `stop` is there.

    After each time, look under the lock: the table is marked as unfinished if it lacks runs, and only then.
    """
    rng, count = random.Random(str(seed)), 0
    figures.make = one_figure  # they take long, and are made under the same lock
    print("ready", flush=True)
    while not stop.exists():
        sweep = run_folder.latest_sweep(study.parent, study.name)
        try:
            rng.choice([gather.gather, gather.gather_finished])(sweep, None)
            count += 1
        except SettingError:  # runs are missing
            pass
        with census.only_writer(sweep.results_dir, sweep.study):
            if (study / csv_tables.TABLE).is_file():
                has = set(csv_tables.read_table(study / csv_tables.TABLE)["run"])
                marked = (study / csv_tables.UNFINISHED).is_file()
                lacks = set(sweep.runs) - has
                assert marked or not lacks, f"a table without {lacks} is not marked"
        time.sleep(rng.uniform(0, 0.02))
    print(count)


def writes(small: Small, _: random.Random, every: int) -> str:
    """Write a file and a run anew with strikes at every so many changes: old or new is found, whole."""
    folder = small.results.with_name("written")
    counts = [f"{how} at {_written(folder, how, every)}" for how in HOWS]
    return f"{', '.join(counts)} changes of a file and a run: each is found whole"


def _written(folder: Path, how: str, every: int) -> int:
    """Return the number of strikes."""
    run, note = folder / "run", folder / "latest.json"
    old, new = {"rows.csv": b"old", "params.npz": b"1"}, {"rows.csv": b"new", "run.json": b"2"}

    def anew(at: int) -> None:
        strike(folder, at, how)
        files.write(note, "new")
        files.write_folder(run, new)

    for struck in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        files.write_folder(run, old)
        files.write(note, "old")
        code, _ = Child(lambda n=struck: anew(n * every), folder.with_name("said.txt")).end()
        assert note.read_text() in ("old", "new")
        asides = [*folder.glob("*.aside-1")]
        kept = run if run.exists() else asides[0]
        assert kept is not run or not files.damage(run), files.damage(run)
        assert (kept / "rows.csv").read_bytes() in (b"old", b"new")
        if how == "error":
            now = (run / "rows.csv").read_bytes()
            assert kept is run and (not asides or now == b"new"), asides
            assert not [*folder.glob(".*")], "something is left half-written"
        files.remove_leftovers(folder, seconds=-1)
        assert not [*folder.glob(".*")]
        files.write_folder(run, new)
        assert files.damage(run) == [] and (run / "rows.csv").read_bytes() == b"new"
        if code == 0:
            return struck
    raise AssertionError


WORKS: dict[str, Callable[[Small, random.Random, int], str]] = {
    "writes": writes,
    **{how: partial(at_each_change, how) for how in HOWS},
    "flips": flips,
    "race": race,
}


def main(folder: Path, seed: str, *asked: str) -> None:
    """Do several kinds of work with one small sweep, and print what was found.

    Args:
      folder: A folder that is made; for `gather`, that of a study.
      seed: The seed.
      asked: The kinds, each with its amount, such as `kill=1`; or `gather=STOP`.
    """
    pairs = [one.split("=", 1) for one in asked]
    if pairs[0][0] == "gather":
        gather_often(folder, Path(pairs[0][1]), seed)
        return
    warnings.filterwarnings("ignore", "os.fork")  # no child computes with JAX
    composed(
        folder,
        lambda small: [
            print(WORKS[k](small, random.Random(seed), int(n)), flush=True) for k, n in pairs
        ],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
