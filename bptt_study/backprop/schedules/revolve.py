"""The order of recomputation: an exact backward pass stores some states, and computes the others again.

There are t units of time, and c places for states, the first of them for h_0. Binomial checkpointing needs

    C(t, c) = min_y { y + C(t - y, c - 1) + C(y, c) },    C(t, 1) = t (t + 1) / 2

forward steps.

References:
  Griewank 1992; Griewank & Walther 2000, "Algorithm 799: revolve"; Gruslys et al. 2016, eq. 1 (for recurrent
  networks).
"""

from functools import cache
from math import comb
from typing import NamedTuple

import numpy as np

from bptt_study.validation import whole


class Plan(NamedTuple):
    """The N operations, each of which runs one unit of time from a state that is at hand; arrays [N]."""

    # the place to take the state from; -1: the state that the operation before left
    load: np.ndarray
    unit: np.ndarray  # the unit that is run
    pull: np.ndarray  # True: store its steps and go back through them; False: run forward only
    store: np.ndarray  # the place for the state after it; -1: none


def forward_steps(units: int, places: int) -> int:
    """Compute C(t, c), the number of units run forward in the best order, each at least once."""
    return units + _again(units, places)


def plan(units: int, places: int) -> Plan:
    """Find the best order."""
    rows: list[tuple[int, int, bool, int]] = []
    # stretches still to do, each with the place of its first state; later places are free
    stretches = [(0, units, 0)]
    while stretches:
        begin, length, place = stretches.pop()
        free = places - place
        ahead = 0 if length == 1 else _split(length, free) if free > 1 else length - 1
        for step in range(ahead):
            keep = free > 1 and step == ahead - 1
            rows.append((-1 if step else place, begin + step, False, place + 1 if keep else -1))
        if free == 1 or length == 1:
            rows.append((-1 if ahead else place, begin + ahead, True, -1))
            stretches += [(begin, ahead, place)] if ahead else []
        else:
            stretches += [(begin, ahead, place), (begin + ahead, length - ahead, place + 1)]
    load, unit, pull, store = np.array(rows, np.int32).T
    return Plan(load, unit, pull > 0, store)


@cache
def layout(steps: int, states: int) -> tuple[int, int]:
    """Choose the length of a unit and the number of places that run the fewest steps forward.

    Units divide the steps evenly. While the pass goes back through a unit, the unit's own states are stored.
    Among equal choices the longest unit wins, for fewer and larger products.

    Args:
      steps: T.
      states: The largest sum of both numbers, at least 2.

    Returns:
      The length and the number of places.

    Raises:
      SettingError: For fewer states.
    """
    whole("states", states, least=2)
    lengths = [n for n in range(1, min(steps, states - 1) + 1) if steps % n == 0]

    def cost(length: int) -> int:
        return length * forward_steps(steps // length, states - length)

    length = min(lengths, key=lambda n: (cost(n), -n))
    return length, min(steps // length, states - length)


def _again(units: int, places: int) -> int:
    """Count the units run forward in addition to the one time when the pass goes back through each."""
    repeats = 0
    while comb(places + repeats, places) < units:
        repeats += 1
    return repeats * units - comb(places + repeats, places + 1)


@cache
def _split(units: int, places: int) -> int:
    """Find the y of the recursion; among equals the smallest."""
    costs = [y + _again(units - y, places - 1) + _again(y, places) for y in range(1, units)]
    return 1 + int(np.argmin(costs))
