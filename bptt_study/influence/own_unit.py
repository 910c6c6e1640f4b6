"""M stored for the owning unit alone: SnAp-1, e-prop, RFLO."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bptt_study.backprop.adjoint import StepVJP
from bptt_study.backprop.pytrees import floats
from bptt_study.influence.past import Block, Past
from bptt_study.influence.pytrees import like
from bptt_study.influence.units import by_units, check_units, each_ones, over_gates
from bptt_study.types import Cell, Params, State


def own_unit(cell: Cell, through: Callable[[Cell, Params], StepVJP], name: str) -> Past:
    """Store the entries of M at the unit that owns the parameter, P numbers for each leaf of the state.

        S_t = D_t S_{t-1} + I_t,

    where D_t is the part of J_t that `through` keeps, which links no two units. S is exact if J_t links no two
    units either. One roll takes a retreat from ones for each leaf of the state. M has leaves [B, n/H, …].

    Args:
      cell: The cell.
      through: (cell, θ) -> the map (λ_t, residuals) -> D_tᵀ λ_t.
      name: The name of the strategy, for its errors.

    Returns:
      The past.

    Raises:
      SettingError: For a cell whose parameters do not belong to units.
    """
    by_units(cell, name)
    count = len(jax.tree.leaves(like(cell)))

    def start(params: Params, batch_size: int) -> Params:
        return jax.tree.map(lambda p: jnp.zeros((batch_size, count, *p.shape), p.dtype), params)

    check = partial(check_units, cell, name)
    return Past(start, send, roll, through=through, check=check)


def send(m: Params, adjoint: State) -> Params:
    """Compute Σ_b λ_bᵀ S_b."""
    u = jnp.stack(jax.tree.leaves(adjoint), axis=1)  # [B, n/H, H]
    return jax.tree.map(lambda a: jnp.sum(_spread(u, a) * a, axis=(0, 1)), m)


def roll(m: Params, block: Block, signs: Any) -> Params:
    """Compute S of the last step, by one retreat for each leaf of the state."""
    ones = each_ones(floats(jax.tree.map(lambda a: a[0], block.residuals.after)))
    leaving, own = jax.vmap(block.retreat, out_axes=1)(ones)
    passed = jnp.stack(jax.tree.leaves(leaving), axis=2)  # [B, to, from, H]

    def rolled(new: Array, old: Array) -> Array:
        return new + jnp.sum(_spread(passed, new) * old[:, None], axis=2)

    return jax.tree.map(rolled, own, m)


def _spread(u: Array, entries: Array) -> Array:
    """Expand a number per unit, [*lead, H], to a factor per gate and unit for each row of the parameter."""
    wide = over_gates(u, entries)
    rows = (1,) * (entries.ndim - 3)  # entries are [B, n/H, *rows, gates × units]
    return wide.reshape(*wide.shape[:-1], *rows, wide.shape[-1])
