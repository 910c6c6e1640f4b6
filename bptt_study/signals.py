"""The signals that end a program, or a run in a worker of a launcher, as a cluster sends them."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


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
    got: dict[int, Any] = {}

    def end(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_IGN)
        got[number] = frame
        raise Preempted(number, end)

    # submitit ends a job by SIGUSR2
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    known = {number: signal.getsignal(number) for number in numbers}
    if stop not in known.values() and threading.current_thread() is threading.main_thread():
        # the handler of `end_with_parent`, none, and those in C stay
        others = (signal.default_int_handler, signal.SIG_IGN, None)
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
        for number, frame in got.items():
            if callable(handler := former[number]):
                handler(number, frame)
