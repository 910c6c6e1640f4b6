"""Checks that need not run again, as they have passed for the same functions and types."""

from contextlib import suppress
from typing import Any

# functions that have passed a check, with the types for which they were checked
_known: dict[Any, None] = {}
MOST = 1024  # the largest number of them


def remember(key: Any) -> None:
    """Register that a check need not run again; functions without a hash, which may change, are not kept."""
    _known.pop(next(iter(_known)), None) if len(_known) >= MOST else None
    with suppress(TypeError):
        _known[key] = None


def is_known(key: Any) -> bool:
    """Return whether a check need not run again."""
    with suppress(TypeError):
        return key in _known
    return False
