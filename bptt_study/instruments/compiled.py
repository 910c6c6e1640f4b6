"""Compilation of an instrument: one program for each problem or strategy."""

from collections.abc import Callable
from functools import partial, wraps
from inspect import signature
from typing import Any, TypeVar, cast

import jax

from bptt_study.known import has_hash

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(*static: str, first: int = 1) -> Callable[[Function], Function]:
    """Compile a function whose first argument is a problem or a strategy.

    The program is kept for the next call with the same functions: what they read beside their arguments must
    not change. If one of the functions has no hash, the program is not kept.

    Args:
      *static: The names of arguments that are fixed at compilation, beside the first.
      first: The number of problems and strategies that come first.

    Returns:
      The decorator.
    """

    def decorate(f: Function) -> Function:
        named = [*signature(f).parameters][:first]
        kept = jax.jit(f, static_argnames=(*named, *static))

        @wraps(f)
        def run(*arguments: Any, **settings: Any) -> Any:
            fixed, others = arguments[:first], arguments[first:]
            if has_hash(fixed):
                return kept(*arguments, **settings)
            return jax.jit(partial(f, *fixed), static_argnames=static)(*others, **settings)

        return cast(Function, run)

    return decorate
