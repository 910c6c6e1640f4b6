"""The progress of a running sweep in one line. It is read from the disk, and so works with any launcher."""

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from tqdm import tqdm

from bptt_study.report.progress import SECONDS, SECONDS_BETWEEN_LINES
from bptt_study.runner import run_folder
from bptt_study.runner.locks import locked
from bptt_study.runner.run_folder import RunPaths, RunState, Sweep
from bptt_study.validation import printable

POLL_SECONDS = 0.5


class SweepProgress:
    """The number of runs of a sweep that are done, running, failed, diverged and left.

    Args:
      sweep: The sweep.
      states: The states of all its runs at the start. Results that exist then belong to an earlier sweep.
      todo: The runs to do; the others are finished.
    """

    def __init__(self, sweep: Sweep, states: Mapping[str, RunState], todo: Sequence[str]) -> None:
        self.sweep, self.todo = sweep, todo
        self.diverged = sum(states[run].diverged > 0 for run in set(states) - set(todo))
        existing = [run for run in todo if states[run].kind != "missing"]
        self.before = {run: _written(sweep.paths(run)) for run in existing}
        self.done: set[str] = set()
        self.failed: dict[str, str] = {}  # run -> reason
        self.start = time.monotonic()

    def update(self) -> None:
        """Look for new results, and print new failures. A result replaces an earlier failure of its run."""
        for run in self.todo:
            paths = self.sweep.paths(run)
            if run not in self.done and _written(paths) not in (None, self.before.get(run)):
                self.done.add(run)
                self.failed.pop(run, None)
                self.diverged += bool(run_folder.about(paths)["diverged"])
            if run not in self.done and paths.failure.is_file():
                self.fail(run, run_folder.failure_reason(paths))

    def fail(self, run: str, reason: str) -> None:
        """Count a run as failed, and print the reason once."""
        if run not in self.failed:
            self.failed[run] = reason
            file = self.sweep.paths(run).failure  # a full disk may have prevented it
            traceback = f"\n  traceback: {file}" * file.is_file()
            say(f"failed: {self.sweep.label(run)}: {reason}{traceback}")

    def line(self) -> str:
        """Return the counts, and an estimate of the remaining time."""
        done = len(self.sweep.runs) - len(self.todo) + len(self.done)
        open_ = [r for r in self.todo if r not in self.done and r not in self.failed]
        running = sum(locked(self.sweep.paths(run).lock) for run in open_)
        line = (
            f"{done} done, {running} running, {len(self.failed)} failed, {self.diverged} diverged, "
            f"{len(open_) - running} left"
        )
        if not (open_ and self.done):
            return line
        seconds = (time.monotonic() - self.start) / len(self.done) * len(open_)
        return f"{line}; ready in {tqdm.format_interval(seconds)}"


def _written(paths: RunPaths) -> tuple[int, int] | None:
    """Return a stamp that changes whenever a run's folder is written; None if there is no folder."""
    try:
        found = (paths.folder / run_folder.ABOUT).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


class AboveBar(logging.Handler):
    """The handler of Hydra's log: it prints above the progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        _write(self.format(record))


def say(line: str) -> None:
    """Print a line with the time above the progress bar; outside of a run, Hydra logs nothing."""
    _write(f"{time.strftime('%H:%M:%S')} {line}")


@contextmanager
def said_if_slow(line: str) -> Iterator[None]:
    """Say this if the block takes more than a few seconds."""
    timer = threading.Timer(SECONDS, say, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _write(line: str) -> None:
    """Print and flush, also into a file or pipe. If this fails, no run fails because of it."""
    with suppress(OSError):
        tqdm.write(printable(line))
        sys.stdout.flush()


@contextmanager
def show_progress(progress: SweepProgress) -> Iterator[None]:
    """Show the line until the end of the block: as a bar on a terminal, else as a line every few seconds."""
    stop = threading.Event()
    total = len(progress.sweep.runs)
    bar = tqdm(
        total=total,
        initial=total - len(progress.todo),
        disable=not sys.stderr.isatty(),
        leave=False,
        bar_format="{desc} |{bar}|",
    )

    def watch() -> None:
        printed, last = time.monotonic(), ""
        while not stop.wait(POLL_SECONDS):
            progress.update()
            line = progress.line()
            bar.n = total - len(progress.todo) + len(progress.done)
            bar.set_description_str(line)
            due = time.monotonic() - printed > SECONDS_BETWEEN_LINES
            if bar.disable and line != last and due:
                say(line)
                printed, last = time.monotonic(), line

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        bar.close()
        progress.update()
