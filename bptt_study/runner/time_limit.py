"""The end of a run by a signal, of what takes too long, and of a worker whose parent is gone."""

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

GRACE_SECONDS = 5  # for a checkpoint, before a worker without a parent is ended
POLL_SECONDS = 1.0


class Stopped(KeyboardInterrupt):
    """The effect of a signal that ends a program, as a cluster sends it. It is handled like Ctrl-C.

    Args:
      number: The signal.
      handler: The handler that raised it.
    """

    def __init__(self, number: int, handler: Callable[[int, object], None]) -> None:
        super().__init__(
            f"{signal.Signals(number).name} ended it; the same command goes on with it"
        )
        self.number, self.handler = number, handler


class Preempted(Stopped):
    """The effect of such a signal on a worker: its run fails, with a checkpoint, and the sweep goes on."""


def stop(number: int, _: object) -> None:
    """Handle a signal that ends the program."""
    signal.signal(number, signal.SIG_IGN)  # once: what follows writes the checkpoint
    raise Stopped(number, stop)


def raise_again(dropped: "sys.UnraisableHookArgs") -> None:
    """Repeat a Ctrl-C that Python has dropped, as in callbacks of the garbage collector; JAX has one."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        number = getattr(dropped.exc_value, "number", signal.SIGINT)
        if isinstance(dropped.exc_value, Stopped):
            signal.signal(number, dropped.exc_value.handler)
        threading.Timer(0.01, os.kill, [os.getpid(), number]).start()
    else:
        sys.__unraisablehook__(dropped)


@contextmanager
def end_at_signals() -> Iterator[None]:
    """Let the signals that stop the program end the run in this block alone, if this process is a worker's.

    A handler of the launcher, such as submitit's, gets the signal when the run has written its checkpoint.
    """
    former: dict[int, Any] = {}
    got: list[tuple[int, Any]] = []

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)
        got.append((number, frame))
        raise Preempted(number, end)

    # the handlers of the command, of `end_with_parent`, none, and those in C stay
    others = (stop, signal.default_int_handler, signal.SIG_IGN, None)
    if threading.current_thread() is threading.main_thread():
        # submitit ends a job by SIGUSR2
        numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        known = {number: signal.getsignal(number) for number in numbers}
        former = {number: handler for number, handler in known.items() if handler not in others}
    hook = sys.unraisablehook
    for number in former:
        signal.signal(number, end)
        sys.unraisablehook = raise_again
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in former.items():
            signal.signal(number, handler)
        for number, frame in got:
            if callable(handler := former[number]):
                handler(number, frame)


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
