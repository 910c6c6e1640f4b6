"""The folder in which JAX keeps compiled programs: where it is, and what is mended in it.

JAX writes an entry in place. One that is cut short, by a kill or a full disk, is compiled again at every start,
with a warning, and JAX never replaces it.
"""

import zlib
from pathlib import Path

CHECKED = ".checked"  # its time is that of the last check


def default_folder() -> Path | None:
    """The folder in the user's cache; None for a user without a home."""
    import pooch  # not needed to import this module: some machines lack it

    try:
        return Path(pooch.os_cache("bptt_study")) / "xla"
    except RuntimeError:
        return None


def remove_truncated(folder: Path) -> list[Path]:
    """Remove the entries written since the last call that cannot be decompressed, and return them."""
    try:
        stamp = folder / CHECKED
        last = stamp.stat().st_mtime if stamp.exists() else 0.0
        stamp.touch()
        new = [file for file in folder.glob("*-cache") if file.stat().st_mtime >= last]
        broken = [file for file in new if not _whole(file.read_bytes())]
        for file in broken:
            file.unlink(missing_ok=True)
    except OSError:  # there is no such folder, it is read-only, or another process empties it
        return []
    return broken


def _whole(entry: bytes) -> bool:
    if entry[:1] not in (b"", b"\x78"):  # zstd, where it is installed
        return True
    try:
        return bool(zlib.decompress(entry))
    except zlib.error:
        return False
