"""Checks and results that need not be computed again. What has no hash may change, and is not kept."""

from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, wraps
from typing import Any

# functions that have passed a check, with the types for which they were checked
_known: dict[Any, None] = {}
MOST = 1024  # the largest number of them


def remember(key: Any) -> None:
    """Register that a check need not run again."""
    _known.pop(next(iter(_known)), None) if len(_known) >= MOST else None
    with suppress(TypeError):
        _known[key] = None


def is_known(key: Any) -> bool:
    """Return whether a check need not run again."""
    return has_hash(key) and key in _known


def has_hash(key: Any) -> bool:
    """Return whether a tree of functions and settings can be the key of what is kept."""
    with suppress(TypeError):
        hash(key)
        return True
    return False


def is_shipped(f: Callable[..., Any]) -> bool:
    """Return whether a function is the package's own. One that wraps it has its `__module__` too."""
    return str(getattr(f, "__globals__", {}).get("__name__")).startswith("bptt_study.")


def kept(most: int) -> Callable[[Callable[..., Any]], Any]:
    """Make the decorator of a function that keeps its last results, if its arguments have a hash.

    Args:
      most: The number of results, as of `functools.lru_cache`.

    Returns:
      The decorator.
    """

    def decorate(f: Callable[..., Any]) -> Any:
        cached = lru_cache(maxsize=most)(f)

        @wraps(f)
        def run(*arguments: Any) -> Any:
            return (cached if has_hash(arguments) else f)(*arguments)

        vars(run)["cache_clear"] = cached.cache_clear
        return run

    return decorate
