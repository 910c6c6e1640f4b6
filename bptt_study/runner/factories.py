"""The check of `_target_`: which callables a configuration may name, and the checksum of their code.

A configuration may come from a results folder, so it is not trusted. Hydra refuses callables that run programs
or change the process. A callable of an installed package is called only if its annotation says what it makes.
"""

import ast
import hashlib
import inspect
import logging
import os
import stat
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from bptt_study.validation import SettingError

log = logging.getLogger(__name__)

KINDS = {
    "task": "Task",
    "cell": "Cell",
    "strategy": "Strategy",
    "optimizer": "Optimizer",
    "budget": "Budget",
    "probes": "Probe",
    "loggers": "Logger",
}
KNOWN = ("bptt_study", "hydra_plugins", "jax", "optax")  # a run records their versions


def resolve(group: str, target: str) -> Callable[..., Any]:
    """Find the factory of a configuration group by its name, without calling it.

    Args:
      group: The group, such as `task` or `probes.lag_mass`.
      target: The value of `_target_`.

    Returns:
      The factory.

    Raises:
      SettingError: For a name that cannot be imported, a callable that Hydra refuses, and a factory of another
        kind.
    """
    loaded = _loaded(target)
    find = _resolved.__wrapped__ if loaded is None else _resolved  # it is imported only now
    return find(group, target, id(loaded))


def _loaded(target: str) -> Any:
    """Return what a name means at present, as after a reload of its module; None if it is not imported."""
    owner, _, name = target.rpartition(".")
    found = sys.modules.get(target)
    return getattr(_loaded(owner), "__dict__", {}).get(name) if found is None and owner else found


@lru_cache(maxsize=256)
def _resolved(group: str, target: str, loaded: int) -> Callable[..., Any]:
    kind = KINDS[group.partition(".")[0]]
    name, allowed = f"{group}._target_", "the name of an importable factory"
    try:
        factory: Callable[..., Any] = instantiate({"_target_": target, "_partial_": True}).func
        inspect.signature(factory)
    except (InstantiationException, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise SettingError(name, target, allowed, f"Reason: {reason}.") from error
    made = factory if inspect.isclass(factory) else _annotations(factory).get("return")
    said = getattr(made, "__name__", str(made)).rpartition(".")[2]
    if said != kind and (made is not None or _installed(factory)):
        what = "which does not say what it makes" if made is None else f"which makes a {said}"
        way_out = f"Annotate it with `-> {kind}`." if made is None else ""
        raise SettingError(name, f"{target}, {what}", f"a factory of a {kind}", way_out)
    return factory


def check_made(group: str, target: str, made: Any) -> Any:
    """Check the kind of the object that a factory made.

    Args:
      group: The configuration group.
      target: The value of `_target_`.
      made: The object.

    Returns:
      The object.

    Raises:
      SettingError: If the object is not of the group's kind.
    """
    kind = KINDS[group.partition(".")[0]]
    if kind not in (base.__name__ for base in type(made).__mro__):
        what = f"{target}, which returns a {type(made).__name__}"
        raise SettingError(f"{group}._target_", what, f"a factory of a bptt_study.{kind}")
    return made


def code(config: Any) -> dict[str, str]:
    """Compute the checksums of the code from outside that a configuration names, and of what that imports.

    The checksum of a package covers all its Python files. Known libraries are left out, as a run records their
    versions, and so are the installed packages that code from outside imports.

    Args:
      config: The resolved configuration.

    Returns:
      The checksums by the names of the modules.
    """
    found: dict[str, str | None] = {}
    roots = {target.split(".")[0] for target in _targets(config)} - set(KNOWN)
    while roots:
        root = roots.pop()
        found[root] = fingerprint(root)
        files = _files(root) if _is_own(root) else []
        imported = {name for _, file in files for name in _imports(file.read_bytes())}
        roots |= {name for name in imported - set(KNOWN) - set(found) if _is_own(name)}
    return {root: said for root, said in sorted(found.items()) if said}


def made_from(config: Any) -> tuple[Any, ...]:
    """Find what decides the objects of a configuration beside its values: code, and files that it names.

    Args:
      config: The configuration, or a part of it.

    Returns:
      The checksums of the code from outside, and size and times of each file. While they are equal, an object
      that was made from this configuration may be used again.
    """
    return tuple(code(config).items()), tuple(map(_stamp, _texts(config)))


def _stamp(text: str) -> tuple[int, ...] | None:
    """Return the size and the times of the file of this name; None if there is none."""
    try:
        found = Path(text).expanduser().stat()
    except (OSError, ValueError, RuntimeError):  # no file, a null character, no such ~user
        return None
    regular = stat.S_ISREG(found.st_mode)
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns) if regular else None


def fingerprint(root: str) -> str | None:
    """Compute the checksum of the Python files of a module or package; None if it has no file.

    A file that this process has imported counts as it was then, since that code runs; see `_as_imported`.
    """
    specs = {spec.origin: spec for spec in _specs(root)}
    digest, files = hashlib.sha256(), _files(root)
    for name, file in files:
        digest.update(f"{name}\0".encode("utf-8", "surrogateescape"))
        digest.update(_as_imported(file, specs.get(str(file))))
    return digest.hexdigest()[:12] if files else None


def _files(root: str) -> list[tuple[str, Path]]:
    """List the Python files of a module or package, with their names in it; none if it has no file."""
    try:
        spec = find_spec(root)
    except (ValueError, ImportError):  # a module made by hand has no file
        return []
    if spec is None:
        return []
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not folders and spec.origin and Path(spec.origin).is_file():
        return [(Path(spec.origin).name, Path(spec.origin))]
    found = sorted((file, folder) for folder in folders for file in folder.rglob("*.py"))
    return [(file.relative_to(folder).as_posix(), file) for file, folder in found]


@lru_cache(maxsize=4096)
def _imports(source: bytes) -> frozenset[str]:
    """Find the names of the modules and packages that a file imports, without what follows a dot."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError):  # nobody can import it
        return frozenset()
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [n.module or "" for n in nodes if isinstance(n, ast.ImportFrom) and not n.level]
    return frozenset(name.partition(".")[0] for name in names) - {""}


def _is_own(root: str) -> bool:
    """Return True for a module or package that is neither Python's nor an installed one."""
    if root in sys.stdlib_module_names:
        return False
    return not any(_lies_in_packages(file) for _, file in _files(root)[:1])


def _specs(root: str) -> list[ModuleSpec]:
    """List the specs of a module or package and of its modules that are imported."""
    found = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == root]
    return [spec for module in found if (spec := getattr(module, "__spec__", None))]


_imported: dict[Path, tuple[ModuleSpec, bytes]] = {}


def _as_imported(file: Path, spec: ModuleSpec | None) -> bytes:
    """Return the checksum of a file as it was when it was first seen under this spec.

    Every import and reload of a module gives it a new spec. If the file has changed since then, this function
    says so. A file that had changed before it was first seen has a checksum that no other process gives it.
    """
    now = hashlib.sha256(file.read_bytes()).digest()
    if spec is None:
        return now
    seen, then = _imported.get(file, (None, now))
    if seen is not spec:
        compiled = _compiled_before(file, spec)
        then = hashlib.sha256(now + compiled).digest() if compiled else now
    _imported[file] = spec, then
    if then != now:
        _say_changed(file, spec.name, now)
    return then


def _compiled_before(file: Path, spec: ModuleSpec) -> bytes:
    """Return what Python compiled when it imported a file that has changed since then; otherwise nothing."""
    try:
        compiled = Path(spec.cached or "").read_bytes()
        flags, *of_source = struct.unpack("<3I", compiled[4:16])
        found = file.stat()
    except (OSError, struct.error):
        return b""
    now = [int(found.st_mtime) & 0xFFFFFFFF, found.st_size & 0xFFFFFFFF]
    # flags: by checksum, not by time. If Python may not write, what lies there is of an earlier import
    writes = not sys.dont_write_bytecode and os.access(Path(spec.cached or "").parent, os.W_OK)
    return compiled if writes and not flags and of_source != now else b""


@lru_cache(maxsize=256)
def _say_changed(file: Path, module: str, now: bytes) -> None:
    """Say once for each version of a file that it is not the one that runs."""
    line = (
        "%s has changed since %s was imported, and runs as it was: reload the module, or start anew"
    )
    log.warning(line, file, module)


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


def _annotations(factory: Callable[..., Any]) -> dict[str, Any]:
    return getattr(factory, "__annotations__", {})


def _installed(factory: Callable[..., Any]) -> bool:
    """Return True for a factory of Python or an installed package, False for the user's own code."""
    try:
        return _lies_in_packages(inspect.getfile(inspect.unwrap(factory)))
    except TypeError:  # the factory is built in
        return True


def _lies_in_packages(file: Path | str) -> bool:
    """Return True for a file in the folders of Python and of installed packages."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    real = Path(os.path.realpath(file))
    return any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)
