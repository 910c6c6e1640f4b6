"""Checksums of code from outside and of files that a run reads: they decide its numbers beside its settings.

A checksum stands for the code that runs. A file counts as it was when Python imported it. If a file has changed
since then, a line says so.
"""

import hashlib
import logging
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from bptt_study.runner import source
from bptt_study.runner.factories import KNOWN, lies_in_packages
from bptt_study.runner.progress import said_if_slow

log = logging.getLogger(__name__)


def code(config: Any) -> dict[str, str]:
    """Compute the checksums of the code from outside that a configuration names, and of files that it names.

    Code is that of modules and packages in the names of factories, and of your other modules and packages that
    these import. The checksum of a package covers all its files. Known libraries are left out, as a run
    records their versions, and so are the installed packages that code from outside imports.

    Args:
      config: The resolved configuration.

    Returns:
      The checksums by the names of the modules; those of files by "file NAME".
    """
    files = {f"file {text}": _file_sha256(text, stamp) for text, stamp in _files(config)}
    return dict(sorted((_modules_named(config) | files).items()))


def _modules_named(config: Any) -> dict[str, str]:
    """Compute the checksums of the modules and packages of `code`."""
    found: dict[str, str | None] = {}
    named = {text.split(".")[0] for text in _texts(config) if _is_dotted(text)}
    roots = {target.split(".")[0] for target in _targets(config)} | set(filter(_is_own, named))
    while roots := roots - set(KNOWN) - set(found):
        root = roots.pop()
        found[root] = fingerprint(root)
        for _, file in files_of(root) if _is_own(root) else []:
            if read := source.read(file.read_bytes()):
                texts = {
                    name for name in read.texts if _places(name)[0]
                }  # a folder is no package here
                roots |= set(filter(_is_own, read.names | texts))
    return {name: said for name, said in found.items() if said}


def made_from(config: Any) -> tuple[Any, ...]:
    """Find what decides the objects of a configuration beside its values: code, and files that it names.

    Sizes and times stand for the files here, so a factory can refuse a large one before all of it is read.

    Args:
      config: The configuration, or a part of it.

    Returns:
      Hashable facts. While they are equal, an object that was made from this configuration may be used again.
    """
    return (*_modules_named(config).items(), *_files(config))


def fingerprint(root: str) -> str | None:
    """Compute the checksum of the files of a module or package; None if it has no file.

    A file that this process has imported counts as it was then, since that code runs; see `_as_imported`. Of
    bptt_study itself and of installed packages, only Python files count.
    """
    modules = {getattr(m, "__file__", None): m for m in _modules(root)}
    digest, files, own = hashlib.sha256(), files_of(root), _is_own(root)
    for name, file in files:
        digest.update(f"{name}\0".encode("utf-8", "surrogateescape"))
        digest.update(_as_imported(file, modules.get(str(file)), own))
    for folder in _places(root)[1] if own else []:
        for data in sorted(_below(folder)):  # such as a table that the package reads
            if data.suffix != ".py":
                line = f"{data.relative_to(folder).as_posix()}\0{_sha256_of(data)}"
                digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:12] if files else None


def files_of(root: str) -> list[tuple[str, Path]]:
    """List the Python files of a module or package, with their names in it; none if it has no file."""
    file, folders = _places(root)
    below = ((found, folder) for folder in folders for found in _below(folder))
    named = [(f.relative_to(d).as_posix(), f) for f, d in sorted(below) if f.suffix == ".py"]
    return named or ([(file.name, file)] if file else [])


def _places(root: str) -> tuple[Path | None, list[Path]]:
    """Find the file of a module, script or package, and the folders of a package."""
    try:
        spec = find_spec(root)
    except (ValueError, ImportError):  # a script, or a module that was made by hand
        name, folders = getattr(sys.modules.get(root), "__file__", None), []
    else:
        name = spec.origin if spec else None
        folders = list((spec and spec.submodule_search_locations) or [])
    file = Path(name) if name and Path(name).is_file() else None
    # a namespace package that is twice on the path has its folder twice
    unlike = {folder.resolve(): folder for folder in map(Path, folders) if folder.is_dir()}
    return file, list(unlike.values())


def _below(folder: Path) -> Iterator[Path]:
    """Yield the files of a package's folder, without what is hidden, compiled, or a virtual environment."""
    for found in sorted(folder.iterdir()):
        if found.name.startswith(".") or found.name == "__pycache__":
            continue
        if found.is_file():
            yield found
        elif found.is_dir() and not (found / "pyvenv.cfg").exists():
            yield from _below(found)


def _is_own(root: str) -> bool:
    """Return True for a module or package with files that is neither known, nor Python's, nor installed."""
    if root in sys.stdlib_module_names or root in KNOWN:
        return False
    file, folders = _places(root)
    places = [file] if file else folders
    return bool(places) and not any(map(lies_in_packages, places))


def _modules(root: str) -> list[ModuleType]:
    """List a module or package and its modules that are imported."""
    return [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == root]


_imported: dict[Path, tuple[ModuleSpec | None, bytes]] = {}


def _as_imported(file: Path, module: ModuleType | None, own: bool) -> bytes:
    """Return the checksum of a file as it was when it was first seen under its module's spec.

    Every import and reload of a module gives it a new spec. If another code runs than the file's, the checksum
    is one that no other process gives it.
    """
    content = file.read_bytes()
    now = hashlib.sha256(content).digest()
    if module is None:
        return now
    spec = getattr(module, "__spec__", None)
    seen, then = _imported.get(file, (None, b""))
    if not then or seen is not spec:
        other = own and source.differs(content, file, module)
        then = _of_this_process(now) if other else now
    if own and then == now and (names := source.stale(content, module)):
        then = _of_this_process(now)
        _say(
            f"{file} uses {names} of a module that was reloaded since: reload {module.__name__}, too"
        )
    elif then != now:
        _say(
            f"{file} has changed since {module.__name__} was imported, and runs as it was: reload the module, "
            "or start anew",
            now,
        )
    _imported[file] = spec, then
    return then


def _of_this_process(now: bytes) -> bytes:
    """Make a checksum that no other process has."""
    return hashlib.sha256(now + os.urandom(8)).digest()


@lru_cache(maxsize=256)
def _say(line: str, version: bytes = b"") -> None:
    """Say this once for each version of a file."""
    log.warning(line)


def _files(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the regular files that texts with a suffix or a slash name, with their sizes and times."""
    for text in sorted(set(_texts(config))):
        try:
            found = Path(text).expanduser().stat() if "." in text or "/" in text else None
        except (OSError, ValueError, RuntimeError):  # no file, a null character, no such ~user
            continue
        if found and stat.S_ISREG(found.st_mode):
            yield text, (found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _sha256_of(file: Path) -> str:
    found = file.stat()
    return _file_sha256(str(file), (found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@lru_cache(maxsize=4096)
def _file_sha256(text: str, stamp: tuple[int, ...]) -> str:
    """Compute the checksum of a file, whose size and times tell its versions apart."""
    with (
        said_if_slow(f"computes the checksum of {text}"),
        Path(text).expanduser().open("rb") as file,
    ):
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _is_dotted(text: str) -> bool:
    """Return True for a text like the name of a function in a module."""
    parts = text.split(".")
    return len(parts) > 1 and all(part.isidentifier() for part in parts)


def _targets(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping) and isinstance(node.get("_target_"), str):
        yield node["_target_"]
    for value in _children(node):
        yield from _targets(value)


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    for value in _children(node):
        yield from _texts(value)


def _children(node: Any) -> list[Any]:
    if isinstance(node, Mapping):
        return list(node.values())
    return node if isinstance(node, list) else []
