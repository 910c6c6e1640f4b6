"""Functions from outside are functions of their arguments alone: a trace keeps whatever else they read."""

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import numpy as np

from bptt_study.backprop.compare import as_floats, at_random_numbers, distance, equal
from bptt_study.known import is_known, is_shipped
from bptt_study.types import Cell, Layers

log = logging.getLogger(__name__)


def repeated(name: str, f: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function twice with the same arguments, and check that the results agree.

    Args:
      name: The setting that the error names.
      f: The function.
      arguments: Its arguments.

    Returns:
      The result.

    Raises:
      SettingError: If the second result is another.
    """
    once, again = f(*arguments), f(*arguments)
    must, what = "a function of its arguments alone", "one whose numbers differ from call to call"
    way_out = "Numbers from elsewhere, such as NumPy's global state, differ from run to run."
    equal(name, as_floats(again), as_floats(once), must, what, way_out, allowed=1e-4)
    return once


@at_random_numbers()  # as `check_promises` does: what it compiled serves again
def check_init(name: str, init: Callable[[Any], Any]) -> None:
    """Check a function that draws parameters, and say if all keys give the same ones, unless they are constant.

    Args:
      name: The setting that the error names.
      init: key -> parameters.

    Raises:
      SettingError: If the same key gives others.
    """
    first = repeated(name, init, jax.random.key(0))
    drawn = any(np.unique(leaf).size > 1 for leaf in jax.tree.leaves(as_floats(first)))
    if drawn and alike(first, init(jax.random.key(1))):
        say(f"{name} gives the same weights for every key, so all seeds start from them")


def check_draws_of(cell: Cell) -> None:
    """Check `init` and `zeros` of a cell and its layers, unless they are the package's own.

    Raises:
      SettingError: For a function that is none of its arguments alone.
    """
    for layer in cell.affine.cells if isinstance(cell.affine, Layers) else ():
        check_draws_of(layer)
    # a stack is made here, and its layers may come from outside
    vouched = is_known((cell.step, cell.affine, cell.read))
    if not (vouched and is_shipped(cell.init)):
        check_init("cell.init", cell.init)
    if not (vouched and is_shipped(cell.zeros)):
        repeated("cell.zeros", cell.zeros, 2)


def alike(a: Any, b: Any) -> bool:
    """Return whether two trees of arrays of the same shapes hold the same numbers."""
    return distance(as_floats(a), as_floats(b)) == 0


@cache
def say(line: str) -> None:
    """Say this once in a process."""
    log.warning("%s", line)
