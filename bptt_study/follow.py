"""One line for a sweep while its jobs run, whoever runs them: read off the disk, beside the launcher."""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from bptt_study import runs
from bptt_study.runs import Sweep

POLL_SECONDS = 0.5
SECONDS_BETWEEN_LINES = 10  # where there is no terminal


class Follower:
    """Counts what becomes of `todo`, runs of a sweep, of which the others are finished."""

    def __init__(self, sweep: Sweep, todo: list[str], diverged: int) -> None:
        self.sweep, self.todo, self.diverged = sweep, todo, diverged
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}  # run -> reason
        self.begun = time.monotonic()

    def look(self) -> None:
        """See what is new, and say what failed."""
        for run in self.todo:
            place = self.sweep.place(run)
            if run not in self.done and (place.folder / runs.ABOUT).is_file():
                self.done.add(run)
                self.diverged += bool(runs.about(place)["diverged"])
            if run not in self.failed and place.failure.is_file():
                self.fail(run, runs.reason(place))

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
        left = len(self.todo) - len(self.done | set(self.failed))
        running = sum(
            runs.claimed(self.sweep.place(r))
            for r in self.todo
            if r not in self.done and r not in self.failed
        )
        seconds = (time.monotonic() - self.begun) / len(self.done) * left if self.done else None
        left_for = "" if seconds is None else f"; {seconds / 60:.0f} min left"
        return (
            f"{done} done, {running} running, {len(self.failed)} failed, {self.diverged} diverged, "
            f"{left - running} left{left_for}"
        )


def say(line: str) -> None:
    """A line on stdout, above the bar if there is one; Hydra has no logging outside of its jobs."""
    tqdm.write(f"{time.strftime('%H:%M:%S')} {line}")


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
        bar_format="{l_bar}{bar}| {desc}",
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
