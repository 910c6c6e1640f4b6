"""Files and folders that are written completely or not at all, and whose later damage is detected.

A sealed folder holds `SHA256SUMS`, which `sha256sum -c` can read. The last line, a comment for that program, is
the checksum of the lines above together with the folder's name, so the file protects itself.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

SEAL = "SHA256SUMS"
# of file systems, such as some network disks, that flush no folders: a rename is on the disk by itself, or late
NO_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
HOST = re.sub(r"\W", "_", socket.gethostname())[:32]


def write(file: Path, content: bytes | str) -> None:
    """Write a file completely, or leave it as it was.

    The data go to a temporary file, which is flushed to the disk and then renamed.

    Args:
      file: The path.
      content: Bytes, or a text that is encoded as UTF-8.

    Raises:
      OSError: If the disk is full, or the folder is missing or read-only. No temporary file remains.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    beside = _beside(file)
    try:
        with beside.open("xb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        beside.replace(file)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _flush(file.parent)


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write a sealed folder completely, or leave it as it was.

    Args:
      folder: The path. An older folder of this name is replaced.
      contents: The bytes of each file by its name.

    Raises:
      OSError: If the disk is full or read-only. No temporary folder remains.
    """
    beside = _beside(folder)
    beside.mkdir(parents=True)
    old = None
    try:
        for name, data in contents.items():
            write(beside / name, data)
        write(beside / SEAL, _seal(folder.name, {n: _digest(d) for n, d in contents.items()}))
        old = set_aside(folder) if folder.exists() else None
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        if old and not folder.exists():
            old.rename(folder)
        raise
    _flush(folder.parent)
    if old:
        shutil.rmtree(old)


def sealed_at(folder: Path) -> tuple[int, int] | None:
    """Return what tells the folder's seal from that of another folder in its place; None without a seal."""
    try:
        found = (folder / SEAL).stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def read_json(file: Path) -> Any:
    """Read a JSON file.

    Args:
      file: The path.

    Returns:
      The content, which may have any shape; see `has_shape`.

    Raises:
      OSError: If the file cannot be read.
      ValueError: If it is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def has_shape(found: Any, shape: Any) -> bool:
    """Return whether the content of a JSON file is what the program writes there.

    Args:
      found: The content, or a part of it.
      shape: None; a class; a pattern, which a text must match; a tuple of shapes, of which one must do; [shape]
        for a list of such; {"name": shape, …} for a mapping that has these names, but for "name?", which may be
        missing; {shape: shape} for a mapping whose names and values are such.
    """
    match shape:
        case tuple():
            return any(has_shape(found, one) for one in shape)
        case [one]:
            return isinstance(found, list) and all(has_shape(each, one) for each in found)
        case dict():
            if not isinstance(found, dict):
                return False
            if all(isinstance(name, str) for name in shape):
                needed = {name for name in shape if not name.endswith("?")}
                known = {name.rstrip("?"): one for name, one in shape.items()}
                fits = (has_shape(found[name], one) for name, one in known.items() if name in found)
                return needed <= {*found} and all(fits)
            ((names, one),) = shape.items()
            return all(has_shape(n, names) and has_shape(v, one) for n, v in found.items())
        case re.Pattern():
            return isinstance(found, str) and bool(shape.fullmatch(found))
        case None:
            return found is None
    return isinstance(found, shape) and (shape is bool or not isinstance(found, bool))


def digests(folder: Path) -> dict[str, str]:
    """Read the checksums of a sealed folder's files from its seal, by their names; none without a seal."""
    try:
        lines = (folder / SEAL).read_bytes().decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines[:-1])}


def damage(folder: Path) -> list[str]:
    """List the faults of a sealed folder.

    Args:
      folder: The path.

    Returns:
      One phrase for each fault; an empty list for an intact folder.
    """
    seal = folder / SEAL
    if not seal.is_file():
        return [f"{SEAL} is missing"]
    sealed = digests(folder)
    if seal.read_bytes() != _seal(folder.name, sealed):
        return [f"{SEAL} is truncated, edited or from another folder"]
    # a file manager leaves hidden files behind, which nothing reads
    found = {file.name for file in folder.iterdir() if file.name[0] != "."} - {SEAL}
    return [
        *(f"{name} is missing" for name in sealed if name not in found),
        *(f"{name} does not belong there" for name in sorted(found - set(sealed))),
        *(
            f"{name} is truncated or edited"
            for name, digest in sealed.items()
            if name in found and _digest((folder / name).read_bytes()) != digest
        ),
    ]


def set_aside(path: Path) -> Path:
    """Rename an unusable file or folder to NAME.aside-1, -2, …, so that nothing is lost.

    Args:
      path: The file or folder.

    Returns:
      The new path.
    """
    number = 1
    while (aside := path.with_name(f"{path.name}.aside-{number}")).exists():
        number += 1
    return path.rename(aside)


def remove_temporary(path: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote this file or folder."""
    for left in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def remove_leftovers(folder: Path, seconds: float = 60) -> list[Path]:
    """Remove the temporary files of dead processes of this host, older than so many seconds, and return them.

    Processes of one name of a host may be in several containers, where a living one looks dead: hence the age.
    """
    found = []
    for left in folder.glob(".*"):
        named = re.fullmatch(r"\..+\.(\w+)-(\d+)\.[0-9a-f]{12}", left.name)
        if named and named[1] == HOST and not _lives(int(named[2])):
            with suppress(OSError):  # another process removes it, too
                if time.time() - left.stat().st_mtime > seconds:
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
                    found.append(left)
    return found


def _beside(path: Path) -> Path:
    """A new temporary name in the same folder, which says whose it is."""
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}.{uuid.uuid4().hex[:12]}")


def _lives(process: int) -> bool:
    """Test whether a process with this number exists."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _digest(data: bytes) -> str:
    """Return the SHA-256 of the data, in hex digits."""
    return hashlib.sha256(data).hexdigest()


def _seal(name: str, digests: Mapping[str, str]) -> bytes:
    """Return the content of SHA256SUMS for a folder of this name."""
    lines = "".join(f"{digest}  {file}\n" for file, digest in digests.items()).encode()
    return lines + f"# {_digest(lines)}  the lines above, of {name}\n".encode()


def _flush(folder: Path) -> None:
    """Flush the folder itself to the disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise
    finally:
        os.close(descriptor)
