"""The check of `_target_`: which callables a configuration may name.

A configuration may come from a results folder, so it is not trusted. Hydra refuses callables that run programs
or change the process. A callable of an installed package is called only if its annotation says what it makes.
"""

import inspect
import os
import sys
import sysconfig
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from bptt_study.validation import SettingError

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
    root = sys.modules.get(target.partition(".")[0])
    if getattr(root, "__file__", None) is None and not hasattr(root, "__path__"):
        way_out = "A run records the code that it was made of."
        what = f"{target}, whose module has no file"
        raise SettingError(name, what, "a factory in a module that has a file", way_out)
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


def _annotations(factory: Callable[..., Any]) -> dict[str, Any]:
    return getattr(factory, "__annotations__", {})


def _installed(factory: Callable[..., Any]) -> bool:
    """Return True for a factory of Python or an installed package, False for the user's own code."""
    try:
        return lies_in_packages(inspect.getfile(inspect.unwrap(factory)))
    except TypeError:  # the factory is built in
        return True


def lies_in_packages(file: Path | str) -> bool:
    """Return True for a file in the folders of Python and of installed packages, of whatever environment."""
    folders = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    real = Path(os.path.realpath(file))
    of_python = any(real.is_relative_to(os.path.realpath(folder)) for folder in folders)
    return of_python or bool({"site-packages", "dist-packages"} & {*real.parts})
