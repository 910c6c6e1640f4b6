"""The check of `_target_`: which callables a configuration may name.

A configuration may come from a results folder, so it is not trusted. Hydra refuses callables that run programs
or change the process. A callable that is not your own code is called as a factory only if its annotation says
what it makes, and below a factory only if it is one of PARTS.
"""

import importlib
import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from bptt_study.validation import SettingError

KINDS = {
    "task": "bptt_study.types.Task",
    "cell": "bptt_study.types.Cell",
    "strategy": "bptt_study.types.Strategy",
    "optimizer": "bptt_study.optimizers.Optimizer",
    "budget": "bptt_study.training.budget.Budget",
    "probes": "bptt_study.probes.Probe",
    "loggers": "bptt_study.runner.loggers.Logger",
}
KNOWN = ("bptt_study", "hydra_plugins", "jax", "optax")  # a run records their versions
# modules whose functions compute and make parts; jax.numpy is none of them, as its `load` may run a file
ROOMS = ("cells", "losses", "optimizers", "probes", "readouts", "strategies", "tasks")
PARTS = ("optax", "jax.lax", "jax.nn", *(f"bptt_study.{room}" for room in ROOMS))


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
    name, kind = f"{group}._target_", _kind(group)
    factory = _imported(name, target)
    made = factory if inspect.isclass(factory) else _annotations(factory).get("return")
    said = getattr(made, "__name__", str(made)).rpartition(".")[2]
    fits = issubclass(made, kind) if inspect.isclass(made) else said == kind.__name__
    if not fits and (made is not None or not _is_own(factory)):
        what = "which does not say what it makes" if made is None else f"which makes a {said}"
        way_out = f"Annotate it with `-> {kind.__name__}`." if made is None else ""
        raise SettingError(name, f"{target}, {what}", f"a factory of a {kind.__name__}", way_out)
    root = sys.modules.get(target.partition(".")[0])
    if getattr(root, "__file__", None) is None and not hasattr(root, "__path__"):
        way_out = "A run records the code that it was made of."
        what = f"{target}, whose module has no file"
        raise SettingError(name, what, "a factory in a module that has a file", way_out)
    return factory


def _kind(group: str) -> type:
    module, _, name = KINDS[group.partition(".")[0]].rpartition(".")
    found: type = getattr(importlib.import_module(module), name)
    return found


def _imported(name: str, target: str) -> Callable[..., Any]:
    """Import a callable by its name, without calling it; `name` is the setting, for messages."""
    allowed = "the name of an importable factory"
    if not all(part.isidentifier() for part in target.split(".")):  # Hydra would fill in ${…}
        raise SettingError(name, target, allowed)
    try:
        found: Callable[..., Any] = instantiate({"_target_": target, "_partial_": True}).func
        inspect.signature(found)
    except (InstantiationException, AttributeError, TypeError, ValueError) as error:
        reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")
        raise SettingError(name, target, allowed, f"Reason: {reason}.") from error
    return found


def check_parts(name: str, node: Any) -> None:
    """Check what Hydra would call below a factory, such as an optax transform, without calling it.

    Args:
      name: The setting.
      node: Its value, with nodes that have a `_target_` at any depth.

    Raises:
      SettingError: For a callable that is neither your own nor one of PARTS.
    """
    if isinstance(node, str) and "${" in node:  # Hydra would fill it in, perhaps with such a node
        raise SettingError(name, node, "a text without ${")
    if isinstance(node, Mapping | list):
        for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
            check_parts(f"{name}.{key}", value)
    if isinstance(node, Mapping) and "_target_" in node:
        name, target = f"{name}._target_", str(node["_target_"])
        found = _imported(name, target)
        if not (_is_own(found) or f"{_home(found)}.".startswith(tuple(f"{m}." for m in PARTS))):
            allowed = "a function of your own, of optax, jax.nn or jax.lax, or a part of bptt_study"
            raise SettingError(name, target, allowed, "A function of your own may call it.")


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
    kind = _kind(group)
    if not isinstance(made, kind):
        what = f"{target}, which returns a {type(made).__name__}"
        raise SettingError(f"{group}._target_", what, f"a factory of a bptt_study.{kind.__name__}")
    return made


def _annotations(factory: Callable[..., Any]) -> dict[str, Any]:
    return getattr(factory, "__annotations__", {})


def _home(factory: Callable[..., Any]) -> str:
    """Return the name of the module that defines a callable, as it is imported."""
    return str(getattr(inspect.unwrap(factory), "__module__", None)).replace("._src", "")


def _is_own(factory: Callable[..., Any]) -> bool:
    """Return True for the user's own code, False for that of this package, Python or an installed one."""
    try:
        file = inspect.getfile(inspect.unwrap(factory))
    except TypeError:  # the factory is built in
        return False
    return _home(factory).partition(".")[0] not in KNOWN and not lies_in_packages(file)


def lies_in_packages(file: Path | str) -> bool:
    """Return True for a file in the folders of Python and of installed packages, of whatever environment."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    real = Path(os.path.realpath(file))
    of_python = any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)
    return of_python or bool({"site-packages", "dist-packages"} & {*real.parts})
