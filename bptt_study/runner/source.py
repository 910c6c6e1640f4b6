"""Is the code of a module that of its file? Functions, constants and imports in memory beside the source."""

import ast
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

MISSING = object()
BY_TEXT = {  # functions that import what a text names, of importlib, pkgutil, runpy, pydoc and Hydra
    *("import_module", "__import__", "resolve_name", "run_module", "locate"),
    *("instantiate", "get_class", "get_method", "get_object"),
}
PLAIN = (int, float, complex, str, bytes, type(None))  # what nobody can change, bool among them


class Source(NamedTuple):
    """The parts of a file's source that a module in memory can be compared with."""

    codes: frozenset[CodeType]  # of all functions and classes
    # names to which the module's level assigns one literal, and nothing else
    constants: dict[str, Any]
    names: frozenset[str]  # modules and packages that it imports, without what follows a dot
    texts: frozenset[str]  # those that it may import by a text: all its texts, if it imports any so
    # `from MODULE import NAME as ALIAS` at the module's level
    taken: tuple[tuple[str, str, str], ...]


@lru_cache(maxsize=1024)
def read(content: bytes) -> Source | None:
    """Read a file of Python; None if it cannot be compiled, so that nobody can import it."""
    try:
        with warnings.catch_warnings(action="ignore"):  # the import has shown them
            tree, compiled = ast.parse(content), compile(content, "", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    froms = [
        n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level and n.module
    ]
    names |= {str(n.module) for n in froms}
    taken = [
        (str(node.module), a.name, a.asname or a.name)
        for node in froms
        if node in tree.body
        for a in node.names
    ]
    codes = frozenset(_nested(compiled))
    return Source(codes, _constants(tree), _roots(names), _roots(_texts(tree)), tuple(taken))


def _roots(names: Iterable[str]) -> frozenset[str]:
    return frozenset(filter(str.isidentifier, (name.partition(".")[0] for name in names)))


def _texts(tree: ast.Module) -> list[str]:
    """List all texts of a source, if it uses a function that imports what a text names."""
    nodes = list(ast.walk(tree))
    used = {getattr(n, "id", getattr(n, "attr", getattr(n, "name", None))) for n in nodes}
    texts = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    return texts if used & BY_TEXT else []


def differs(content: bytes, file: Path, module: ModuleType) -> bool:
    """Return True if a module's functions, constants or imports are not those of this source."""
    found = read(content)
    if found is None:
        return True
    values = vars(module)
    functions = (f.__code__ for f in _functions(values, module.__name__))
    here = (code for code in functions if os.path.abspath(code.co_filename) == str(file))  # noqa: PTH100
    if any(code not in found.codes for code in here):
        return True
    constants = ((values.get(name, MISSING), literal) for name, literal in found.constants.items())
    return any(type(a) is not type(b) or a != b for a, b in constants)


def stale(content: bytes, module: ModuleType) -> str:
    """Name what a module imported from another and is not what the other has now; empty: nothing."""
    found, names = read(content), []
    for other, name, alias in found.taken if found else ():
        here = vars(module).get(alias, MISSING)
        there = getattr(sys.modules.get(other), name, MISSING)
        if MISSING not in (here, there) and here is not there:
            names.append(alias)
    return ", ".join(names)


def _nested(code: CodeType) -> Iterator[CodeType]:
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield const
            yield from _nested(const)


def _constants(tree: ast.Module) -> dict[str, Any]:
    stored = [
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    ]
    found = {}
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case _:
                continue
        with suppress(ValueError):  # it is no literal
            literal = ast.literal_eval(value)
            if stored.count(name) == 1 and isinstance(literal, (*PLAIN, tuple)):
                found[name] = literal
    return found


def _functions(values: dict[str, Any], module: str) -> Iterator[FunctionType]:
    """Yield the functions and methods that a module defines, also those in wrappers such as `jax.jit`."""
    for value in list(values.values()):
        inner = getattr(value, "__func__", getattr(value, "fget", value))
        while callable(wrapped := getattr(inner, "__wrapped__", None)):
            inner = wrapped
        if isinstance(inner, FunctionType):
            yield inner
        elif isinstance(inner, type) and inner.__module__ == module and values is not vars(inner):
            yield from _functions(dict(vars(inner)), module)
