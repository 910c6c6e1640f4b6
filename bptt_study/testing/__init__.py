"""Checks of strategies and cells, shipped for strategies and cells from outside the package, too.

The two functions load on first use, so that the closed forms can be imported without them.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bptt_study.testing.check_cell import check_cell
    from bptt_study.testing.check_strategy import check_strategy

__all__ = ["check_cell", "check_strategy"]


class _Package(ModuleType):
    """A package whose exported functions stay visible although files have the same names.

    Importing `testing.check_strategy` binds that name here to the file.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{name}"), name)


sys.modules[__name__].__class__ = _Package
