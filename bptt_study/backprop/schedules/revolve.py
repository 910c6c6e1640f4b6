"""Which states an exact backward pass keeps, and in which order it computes the others again.

t units of time, c places for states, the first for h_0. Binomial checkpointing: Griewank 1992; Griewank &
Walther 2000, "Algorithm 799: revolve"; for recurrent networks Gruslys et al. 2016, eq. 1:

    C(t, c) = min_y { y + C(t - y, c - 1) + C(y, c) },    C(t, 1) = t (t + 1) / 2.
"""

from functools import cache
from math import comb
from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
    """One unit of time after the other, each from a state that is at hand; arrays [N]."""

    load: (
        np.ndarray
    )  # the place to take the state from; -1: it is the one that the operation before left
    unit: np.ndarray  # which unit is run
    pull: np.ndarray  # whether it is stored step by step and gone back through, or run forward only
    store: np.ndarray  # the place for the state after it; -1: none


def forward_steps(units: int, places: int) -> int:
    """C(t, c): units run forward in all, each at least once, in the best order."""
    return units + _again(units, places)


def plan(units: int, places: int) -> Plan:
    """The best order."""
    rows: list[tuple[int, int, bool, int]] = []
    # stretches still to do, each with the place of its first state; places from there on are free
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
    """Length of a unit and places, together at most `states`, that run the fewest steps forward.

    Units divide the steps evenly, and a unit's own states are stored while it is gone back through. Of
    equals the longest, for fewer and larger products. states ≥ 2.
    """
    lengths = [n for n in range(1, min(steps, states - 1) + 1) if steps % n == 0]

    def cost(length: int) -> int:
        return length * forward_steps(steps // length, states - length)

    length = min(lengths, key=lambda n: (cost(n), -n))
    return length, min(steps // length, states - length)


def _again(units: int, places: int) -> int:
    """Units run forward besides the one time in which each is gone back through."""
    repeats = 0
    while comb(places + repeats, places) < units:
        repeats += 1
    return repeats * units - comb(places + repeats, places + 1)


@cache
def _split(units: int, places: int) -> int:
    """The y of the recursion; of equals the smallest."""
    costs = [y + _again(units - y, places - 1) + _again(y, places) for y in range(1, units)]
    return 1 + int(np.argmin(costs))
