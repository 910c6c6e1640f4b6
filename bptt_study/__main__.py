"""The commands for a shell: `bptt-study` (also `python -m bptt_study`), and -status, -figures and -report.

Ctrl-C stops a command with one line and status 130, even while it still imports. SIGTERM, SIGHUP and SIGUSR1
stop it with status 128 plus their number. If the reader of stdout goes away, as in `… | head`, the command
stops silently with status 141.
"""

import os
import select
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from bptt_study import __version__
from bptt_study.signals import raise_again, stop
from bptt_study.validation import printable


class ReaderGone(KeyboardInterrupt):
    """The reader of stdout or stderr is gone. This is handled like Ctrl-C, so a run writes its checkpoint."""


def main() -> None:
    """Start `bptt-study`."""
    _start()
    if sys.argv[1:] == ["--version"]:
        print(f"bptt-study {__version__}")
        return
    run("bptt_study.runner.cli")


def status() -> None:
    """Start `bptt-study-status`."""
    _start()
    run("bptt_study.runner.status")


def figures() -> None:
    """Start `bptt-study-figures`."""
    _start()
    run("bptt_study.runner.figures")


def report() -> None:
    """Start `bptt-study-report`."""
    _start()
    run("bptt_study.runner.page")


def run(module: str) -> None:
    """Call `main` of a module, and flush stdout before the program ends.

    Args:
      module: The full name of the module.
    """
    try:
        Path.cwd()
    except OSError as error:
        print(f"the working directory must be one that exists; {error}", file=sys.stderr)
        sys.exit(2)
    try:
        try:
            import_module(module).main()
        finally:
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # the pipes to workers are closed by now
            with suppress(OSError):  # Python itself reports other errors
                sys.stdout.flush()
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as at the start of Python
    except ReaderGone:
        sys.exit(128 + signal.SIGPIPE)
    except KeyboardInterrupt as stop:
        print(
            "stopped. No finished run is lost; the same command continues from there.",
            file=sys.stderr,
        )
        sys.exit(128 + getattr(stop, "number", signal.SIGINT))


def _start() -> None:
    _open_streams()
    _install_handlers()


def _open_streams() -> None:
    """Open what the shell has closed, and let nothing that is printed fail or steer the terminal.

    A file that the program opens would else get the number of stdout, into which other code prints.
    """
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(free)
    os.environ["NO_COLOR"] = "1"  # argparse has colours from Python 3.14 on
    os.environ["MPLBACKEND"] = "agg"  # a notebook passes its own on, which is not to be had here
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        write = stream.write
        stream.write = lambda text, write=write: write(printable(text))  # type: ignore[method-assign]


def _install_handlers() -> None:
    if sys.platform == "win32":
        sys.exit(
            "bptt-study runs on Linux and macOS: its signals and locks are POSIX. On Windows use WSL."
        )
    signal.signal(signal.SIGPIPE, _pipe_broke)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP, and that stays
            signal.signal(number, stop)
    sys.unraisablehook = raise_again


def _pipe_broke(*_: object) -> None:
    """Handle SIGPIPE. The pipe may lead to a worker instead, and then its launcher sees the error."""
    ours = select.poll()
    for stream in (1, 2):
        ours.register(stream, 0)  # 0: errors alone
    if ours.poll(0):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # once
        raise ReaderGone


if __name__ == "__main__":
    main()
