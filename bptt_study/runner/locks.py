"""A lock file for each run, so that two processes never do the same run at once; no jax, no pandas.

A lock belongs to the operating system (flock) and ends with its process: a dead process holds none. This holds
on local disks and on NFS with locking (version 4, or 3 with its lock daemon), across machines. On a file system
without flock, filelock falls back to files that exist while they are held.

The file names its holder, and its time is that of the holder's last sign of life. So a lock that stays behind
when its host dies, as on some network disks, is known by its silence, and taken over.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, SoftFileLock, Timeout

from bptt_study.validation import SettingError

FOLDER = ".locks"  # beside the runs
FORMER = ".claims"  # its name in version 0.1
TRY_SECONDS = 0.5  # longer than `locked` holds a lock to test it
BEAT_SECONDS = 20  # between two signs of life
SILENT_SECONDS = 300  # without one, after which the holder is called stopped


class Holder(NamedTuple):
    """The process that holds a lock, as far as the file tells."""

    process: int | None
    host: str
    beat: float  # seconds since the epoch, of its last sign of life

    def __str__(self) -> str:
        ago = max(0, round(time.time() - self.beat))
        who = f"process {self.process} on {self.host}" if self.host else "a process"
        return f"{who}, whose last sign of life was {ago} s ago"


@contextmanager
def lock(file: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock until the end of the block.

    Args:
      file: The lock file. Its folder is created.
      wait: Whether to wait while another process holds the lock.

    Yields:
      Whether this process holds the lock; always true with `wait`.

    Raises:
      SettingError: If the file system grants no locks.
    """
    with suppress(OSError):  # locks stay held when their folder is renamed
        file.parent.with_name(FORMER).rename(file.parent)
    file.parent.mkdir(parents=True, exist_ok=True)
    held, seen = FileLock(file), Silence()
    while not _acquired(held, file):
        if not wait:
            yield False
            return
        seen.take_over(file)
    try:
        with _signs_of_life(held, file):
            yield True
    finally:
        held.release()


def _acquired(held: FileLock, file: Path) -> bool:
    try:
        held.acquire(timeout=TRY_SECONDS)
    except Timeout:
        return False
    except OSError as error:  # ENOLCK, EIO, EOPNOTSUPP
        way_out = f"Reason: {error.strerror}. A local, writable disk has locks: results_dir=FOLDER."
        raise SettingError("results_dir", file, "on a disk that grants locks", way_out) from error
    return True


@contextmanager
def _signs_of_life(held: FileLock, file: Path) -> Iterator[None]:
    """Write who holds the lock, and touch the file now and then until the end of the block."""
    if type(held) is not SoftFileLock:  # which has written the same
        with suppress(OSError):
            file.write_text(f"{os.getpid()}\n{socket.gethostname()}\n", encoding="utf-8")
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(file)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def locked(file: Path) -> bool:
    """Test whether a living process holds the lock.

    Args:
      file: The lock file.

    Returns:
      True if it does.
    """
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # the file is read-only, or was deleted in the meantime
        return False


def holder(file: Path) -> Holder | None:
    """The process that holds a lock or held it last; None if the file is gone."""
    try:
        process, host, *_ = [*file.read_text(encoding="utf-8", errors="replace").split(), "", ""]
        return Holder(
            int(process) if re.fullmatch(r"\d{1,20}", process) else None, host, file.stat().st_mtime
        )
    except OSError:
        return None


def silent(file: Path) -> Holder | None:
    """The holder of a lock, if it has given no sign of life for long, by this machine's clock."""
    found = holder(file)
    return found if found and time.time() - found.beat > SILENT_SECONDS else None


class Silence:
    """How long locks have been silent, by the seconds that pass here: hosts may have different clocks."""

    def __init__(self) -> None:
        self.seen: dict[Path, tuple[Holder | None, float]] = {}

    def take_over(self, file: Path) -> bool:
        """Remove the lock of a process on another host that has been silent for long; return whether it was."""
        found = holder(file)
        before, since = self.seen.setdefault(file, (found, time.monotonic()))
        if before != found:
            self.seen[file] = found, time.monotonic()
            return False
        if time.monotonic() - since <= SILENT_SECONDS or found is None:
            return False
        if found.host in (
            "",
            socket.gethostname(),
        ):  # flock tells whether a process of this host lives
            return False
        file.unlink(missing_ok=True)
        return True


def wait_for_one(files: Iterable[Path], seconds: float = 0.5) -> None:
    """Return as soon as at least one of these locks is free; look every so many seconds."""
    files, silence = list(files), Silence()
    while all(locked(file) and not silence.take_over(file) for file in files):
        time.sleep(seconds)
