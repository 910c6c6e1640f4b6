"""`bptt-study`, which is `python -m bptt_study`, and `bptt-study-status`, as a shell starts and stops them.

Ctrl-C (status 130) and a reader of stdout that goes away, as in `… | head` (status 141), stop them with a line
or without a word, and already while they import the rest.
"""

import os
import select
import signal
import sys
from contextlib import suppress
from importlib import import_module
from threading import Timer


class ReaderGone(KeyboardInterrupt):
    """Nobody reads any more: as Ctrl-C, so that what was begun leaves its checkpoint."""


def main() -> None:
    """Entry point of `bptt-study`."""
    _listen()
    run("bptt_study.runner.cli")


def status() -> None:
    """Entry point of `bptt-study-status`."""
    _listen()
    run("bptt_study.runner.status")


def run(module: str) -> None:
    """The `main` of this module, to the last word on stdout."""
    try:
        try:
            import_module(module).main()
        finally:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no worker's any more
            with suppress(OSError):  # others Python itself will tell of
                sys.stdout.flush()
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python starts
    except ReaderGone:
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt:
        print(
            "stopped: nothing finished is lost; the same command again goes on from there",
            file=sys.stderr,
        )
        sys.exit(128 + signal.SIGINT)


def _listen() -> None:
    signal.signal(signal.SIGPIPE, _pipe_broke)
    sys.unraisablehook = _dropped


def _pipe_broke(*_: object) -> None:
    """The pipe may also be one to a worker, of which its launcher hears."""
    ours = select.poll()
    for stream in (1, 2):
        ours.register(stream, 0)  # for errors only
    if ours.poll(0):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # once
        raise ReaderGone


def _dropped(what: "sys.UnraisableHookArgs") -> None:
    """Ctrl-C comes again where Python drops it: in a callback of the garbage collector, and JAX has one."""
    if issubclass(what.exc_type, KeyboardInterrupt):
        Timer(0.01, os.kill, [os.getpid(), signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(what)


if __name__ == "__main__":
    main()
