"""The folder in which JAX keeps compiled programs: where it is, and what is mended in it.

JAX writes an entry in place. One that is cut short, by a kill or a full disk, is compiled again at every start,
with a warning, and JAX never replaces it.
"""

import zlib
from pathlib import Path

CHECKED = ".checked"  # its time is that of the last check
ZSTD = bytes.fromhex("28b52ffd")


def default_folder() -> Path | None:
    """The folder in the user's cache; None for a user without a home."""
    import pooch  # not needed to import this module: some machines lack it

    try:
        return Path(pooch.os_cache("bptt_study")) / "xla"
    except RuntimeError:
        return None


def remove_truncated(folder: Path) -> list[Path]:
    """Remove the entries written since the last call that are cut short, and return them."""
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
    """Test whether an entry is one of JAX's to its end; one of a kind that is not known counts as such."""
    try:
        if ZSTD.startswith(
            entry[: len(ZSTD)]
        ):  # from Python 3.14 on, or where zstandard is installed
            return _is_zstd(entry)
        return entry[0] != 0x78 or bool(zlib.decompress(entry))
    except (zlib.error, IndexError):
        return False


def _is_zstd(entry: bytes) -> bool:
    """Test whether the blocks of a zstd frame (RFC 8878) end where the entry ends; no content is read."""
    descriptor = entry[4]
    one_segment = descriptor >> 5 & 1
    at = 5 + (1 - one_segment)  # the size of the window
    at += (0, 1, 2, 4)[descriptor & 3]  # the number of the dictionary
    at += (one_segment, 2, 4, 8)[descriptor >> 6]  # the size of the content
    last = 0
    while not last:
        header = int.from_bytes([entry[at], entry[at + 1], entry[at + 2]], "little")
        last, repeats, size = header & 1, header >> 1 & 3 == 1, header >> 3
        at += 3 + (1 if repeats else size)
    return at + 4 * (descriptor >> 2 & 1) == len(entry)  # a checksum
