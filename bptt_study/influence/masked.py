"""M stored at the entries that a parameter reaches within n steps: SnAp-n on sparse recurrent weights."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from bptt_study.influence import whole
from bptt_study.influence.past import Block, Past
from bptt_study.influence.pytrees import parted, width
from bptt_study.influence.units import by_units, check_units, jacobian_pattern, shapes_of
from bptt_study.types import Cell, Params, State
from bptt_study.validation import SettingError


def masked(cell: Cell, name: str, n: int) -> Past:
    """Store the entries of M in ∪_{k<n} Aᵏ·pattern(I), where A is the pattern of J, as a vector per sequence.

    Each step rolls all of M, and drops the other entries.

    Raises:
      SettingError: If these are all entries, and for a cell whose parameters do not belong to units.
    """
    by_units(cell, name)
    mask = pattern(cell, n)
    if mask.all():
        way_out = f"{name}({n}) keeps all of M here and is RTRL; use rtrl."
        raise SettingError("n", n, "less for a cell as dense as this one", way_out)
    rows, entries = np.nonzero(mask)
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct((1, *p.shape), p.dtype), shapes_of(cell))

    def start(params: Params, batch_size: int) -> Array:
        return jnp.zeros((batch_size, len(rows)), jnp.result_type(*jax.tree.leaves(params)))

    def full(m: Float[Array, "B N"]) -> Params:
        matrix = jnp.zeros((len(m), *mask.shape), m.dtype).at[:, rows, entries].set(m)
        return parted(matrix, shapes)

    def roll(m: Float[Array, "B N"], block: Block, signs: Any) -> Float[Array, "B N"]:
        return whole.dense(whole.roll(cell, full(m), block))[:, rows, entries]

    def send(m: Float[Array, "B N"], adjoint: State) -> Params:
        return whole.send(full(m), adjoint)

    return Past(start, send, roll, check=partial(check_units, cell, name))


def pattern(cell: Cell, n: int) -> Bool[np.ndarray, "n P"]:
    """Find the entries of the state that each parameter reaches within n steps, by whole units."""
    links = jacobian_pattern(cell).astype(int)
    H = len(links)
    reached = np.eye(H, dtype=int)  # [from, to]
    for _ in range(min(n, H) - 1):  # no unit is further from another than H - 1 steps
        reached = np.minimum(reached + reached @ links, 1)
    columns = [
        np.tile(reached.T, (width(cell) // H, p.shape[-1] // H * (p.size // p.shape[-1])))
        for p in jax.tree.leaves(shapes_of(cell))
    ]
    return np.concatenate(columns, axis=1) > 0
