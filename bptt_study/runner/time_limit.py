"""The end of what takes too long, and of a worker whose parent is gone."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

AGAIN_SECONDS = 10  # until the error is raised again, as Python drops it in some callbacks
GRACE_SECONDS = 5  # for a checkpoint, before a worker without a parent is ended
POLL_SECONDS = 1.0


class OvertimeError(Exception):
    """A run took longer than `run_timeout`."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise OvertimeError in the block after so many seconds; None sets no limit.

    It is raised between two instructions of Python, so after a call into XLA has returned.
    """
    if seconds is None:
        yield
        return

    def stop(*_: object) -> None:
        raise OvertimeError(f"it took longer than run_timeout={seconds:g} s; its checkpoint stays")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@cache
def end_with_parent() -> None:
    """Let a worker of joblib end within seconds of its parent: first as at Ctrl-C, then by force.

    Other launchers see to it themselves, or their jobs are meant to go on.
    """
    if not multiprocessing.current_process().name.startswith("Loky"):
        return
    parent = os.getppid()
    signal.signal(signal.SIGUSR1, signal.default_int_handler)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(GRACE_SECONDS)
        os._exit(128 + signal.SIGUSR1)

    threading.Thread(target=watch, daemon=True).start()
