"""Files and folders that appear whole or not at all, and that tell afterwards whether they still are.

A sealed folder holds `SHA256SUMS`, which `sha256sum -c` reads too; its last line, a comment to that program,
is the checksum of the lines above and the folder's name, so that it protects itself.
"""

import hashlib
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

SEAL = "SHA256SUMS"


def write(file: Path, content: bytes | str) -> None:
    """The file with this content, or as it was: written beside, flushed to the disk, renamed.

    Raises OSError, and leaves nothing beside, if the disk is full or the folder gone or read-only.
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
    _settle(file.parent)


def write_folder(folder: Path, contents: Mapping[str, bytes]) -> None:
    """A sealed folder with these files, in place of an older one if there is one; whole or not at all."""
    beside = _beside(folder)
    beside.mkdir(parents=True)
    try:
        for name, data in contents.items():
            write(beside / name, data)
        write(beside / SEAL, _seal(folder.name, {n: _digest(d) for n, d in contents.items()}))
        old = set_aside(folder) if folder.exists() else None
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _settle(folder.parent)
    if old:
        shutil.rmtree(old)


def damage(folder: Path) -> list[str]:
    """What is wrong with a sealed folder, a phrase per file; empty: it is whole."""
    seal = folder / SEAL
    if not seal.is_file():
        return [f"{SEAL} is missing"]
    lines = seal.read_bytes().decode("utf-8", "replace").splitlines()
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines[:-1])}
    if seal.read_bytes() != _seal(folder.name, digests):
        return [f"{SEAL} is truncated, edited or another folder's"]
    found = {file.name for file in folder.iterdir()} - {SEAL}
    return [
        *(f"{name} is missing" for name in digests if name not in found),
        *(f"{name} is foreign" for name in sorted(found - set(digests))),
        *(
            f"{name} is truncated or edited"
            for name, digest in digests.items()
            if name in found and _digest((folder / name).read_bytes()) != digest
        ),
    ]


def set_aside(path: Path) -> Path:
    """Rename what cannot be used, so that nothing is lost: to NAME.aside-1, -2, … Returns that path."""
    number = 1
    while (aside := path.with_name(f"{path.name}.aside-{number}")).exists():
        number += 1
    return path.rename(aside)


def sweep_up(path: Path) -> None:
    """Remove what processes that were killed while writing this file or folder have left beside it."""
    for left in path.parent.glob(f".{path.name}.*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _seal(name: str, digests: Mapping[str, str]) -> bytes:
    lines = "".join(f"{digest}  {file}\n" for file, digest in digests.items()).encode()
    return lines + f"# {_digest(lines)}  the lines above, of {name}\n".encode()


def _settle(folder: Path) -> None:
    """Flush the folder itself, so that a rename outlives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
