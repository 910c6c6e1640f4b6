"""A lock file for each run, so that two processes never do the same run at once; no jax, no pandas.

A lock belongs to the operating system (flock) and ends with its process: a dead process holds none. This is
true on local disks and on NFS with locking (version 4, or 3 with its lock daemon), across machines. On a file
system without flock, filelock uses files that name host and process; only a process on the same host can take
over such a file from a dead process.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

FOLDER = ".locks"  # beside the runs
FORMER = ".claims"  # its name in version 0.1
TRY_SECONDS = 0.5  # longer than `locked` holds a lock to test it


@contextmanager
def lock(file: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock until the end of the block.

    Args:
      file: The lock file. Its folder is created.
      wait: Whether to wait while another process holds the lock.

    Yields:
      Whether this process holds the lock; always true with `wait`.
    """
    with suppress(OSError):  # locks stay held when their folder is renamed
        file.parent.with_name(FORMER).rename(file.parent)
    file.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(file)
    try:
        held.acquire(timeout=-1 if wait else TRY_SECONDS)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        held.release()


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


def wait_for_one(files: Iterable[Path], seconds: float = 0.5) -> None:
    """Return as soon as at least one of these locks is free.

    Args:
      files: The lock files.
      seconds: The time between two looks.
    """
    files = list(files)
    while all(locked(file) for file in files):
        time.sleep(seconds)
