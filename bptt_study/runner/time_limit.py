"""The end of what takes too long, and of a worker whose parent is gone."""

import math
import multiprocessing
import os
import signal
import threading
import time
from functools import cache

GRACE_SECONDS = 5  # for a checkpoint, before a worker without a parent is ended
POLL_SECONDS = 1.0


class OvertimeError(Exception):
    """A run trained longer than `run_timeout`."""


class TimeLimit:
    """A limit to the time that a run trains. It counts from the first `check` on, so not while a run compiles.

    Args:
      seconds: The limit; None: none.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.begun = seconds, math.inf

    def check(self) -> None:
        """Raise OvertimeError if the time is up; no part of the run may be under way."""
        now = time.monotonic()
        self.begun = min(self.begun, now)
        if self.seconds is not None and now - self.begun > self.seconds:
            raise OvertimeError(f"it trained longer than run_timeout={self.seconds:g} s")


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
