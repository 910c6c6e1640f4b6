"""Compilation of an instrument: one program for each problem."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar, cast

import jax

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(*static: str) -> Callable[[Function], Function]:
    """Compile a function whose first argument is a problem.

    The program is kept for the next call with the same functions: what they read beside their arguments must
    not change. If a function of the problem has no hash, the program is not kept.

    Args:
      *static: The names of arguments that are fixed at compilation, beside the problem.

    Returns:
      The decorator.
    """

    def decorate(f: Function) -> Function:
        kept = jax.jit(f, static_argnames=("problem", *static))

        @wraps(f)
        def run(problem: Any, *arguments: Any, **settings: Any) -> Any:
            try:
                hash(problem)
            except TypeError:
                once = jax.jit(partial(f, problem), static_argnames=static)
                return once(*arguments, **settings)
            return kept(problem, *arguments, **settings)

        return cast(Function, run)

    return decorate
