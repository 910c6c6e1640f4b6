"""One line for a sweep while its jobs run, whoever runs them: read off the disk, beside the launcher."""

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from tqdm import tqdm

from bptt_study.runner import run_folder
from bptt_study.runner.run_folder import Place, State, Sweep

POLL_SECONDS = 0.5
SECONDS_BETWEEN_LINES = 10  # where there is no terminal


class Follower:
    """Counts what becomes of `todo`, runs of a sweep, of which the others are finished.

    states: of all runs at the start; what was there then is to be done again.
    """

    def __init__(self, sweep: Sweep, states: Mapping[str, State], todo: Sequence[str]) -> None:
        self.sweep, self.todo = sweep, todo
        self.diverged = sum(states[run].diverged > 0 for run in set(states) - set(todo))
        there = [run for run in todo if states[run].kind != "missing"]
        self.before = {run: _written(sweep.place(run)) for run in there}
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}  # run -> reason
        self.begun = time.monotonic()

    def look(self) -> None:
        """See what is new, and say what failed; what another process then did has not failed."""
        for run in self.todo:
            place = self.sweep.place(run)
            if run not in self.done and _written(place) not in (None, self.before.get(run)):
                self.done.add(run)
                self.failed.pop(run, None)
                self.diverged += bool(run_folder.about(place)["diverged"])
            if run not in self.done and place.failure.is_file():
                self.fail(run, run_folder.reason(place))

    def fail(self, run: str, reason: str) -> None:
        """Count and say it, once."""
        if run not in self.failed:
            self.failed[run] = reason
            where = self.sweep.place(run).failure  # on a full disk it is not there
            traceback = f"\n  traceback: {where}" * where.is_file()
            say(f"failed: {self.sweep.said(run)}: {reason}{traceback}")

    def line(self) -> str:
        """Done / running / failed / diverged / left, and the time left."""
        done = len(self.sweep.runs) - len(self.todo) + len(self.done)
        open_ = [r for r in self.todo if r not in self.done and r not in self.failed]
        running = sum(run_folder.claimed(self.sweep.place(run)) for run in open_)
        line = (
            f"{done} done, {running} running, {len(self.failed)} failed, {self.diverged} diverged, "
            f"{len(open_) - running} left"
        )
        if not (open_ and self.done):
            return line
        seconds = (time.monotonic() - self.begun) / len(self.done) * len(open_)
        return f"{line}; ready in {tqdm.format_interval(seconds)}"


def _written(place: Place) -> tuple[int, int] | None:
    """What tells one writing of a run's folder from another, whatever the clock says; None: not there."""
    try:
        found = (place.folder / run_folder.ABOUT).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


class Above(logging.Handler):
    """Hydra's log of a job, above the bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        _write(self.format(record))


def say(line: str) -> None:
    """A line on stdout, above the bar if there is one; Hydra has no logging outside of its jobs."""
    _write(f"{time.strftime('%H:%M:%S')} {line}")


def _write(line: str) -> None:
    """At once, also into a file or pipe; that it cannot be written is no failure of a run."""
    with suppress(OSError):
        tqdm.write(line)
        sys.stdout.flush()


@contextmanager
def follow(follower: Follower) -> Iterator[None]:
    """Show the line until the end of the block."""
    stop = threading.Event()
    total = len(follower.sweep.runs)
    bar = tqdm(
        total=total,
        initial=total - len(follower.todo),
        disable=not sys.stderr.isatty(),
        leave=False,
        bar_format="{desc} |{bar}|",
    )

    def watch() -> None:
        said, last = time.monotonic(), ""
        while not stop.wait(POLL_SECONDS):
            follower.look()
            line = follower.line()
            bar.n = total - len(follower.todo) + len(follower.done)
            bar.set_description_str(line)
            if bar.disable and line != last and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                say(line)
                said, last = time.monotonic(), line

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        bar.close()
        follower.look()
