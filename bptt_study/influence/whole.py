"""M stored completely: real-time recurrent learning."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bptt_study.backprop.pytrees import add, floats
from bptt_study.influence.past import Block, Past
from bptt_study.influence.pytrees import joined, units_of, width
from bptt_study.types import Cell, Params, State


def whole(cell: Cell) -> Past:
    """Store all of M, n·P numbers per sequence, leaves [B, n, …]: exact.

    One roll takes n retreats, from the unit vectors of the state: row i of M_S is e_iᵀ Φ M_0 plus the
    contribution of the block's own steps.
    """

    def start(params: Params, batch_size: int) -> Params:
        n = width(cell)
        return jax.tree.map(lambda p: jnp.zeros((batch_size, n, *p.shape), p.dtype), params)

    return Past(start, send, lambda m, block, signs: roll(cell, m, block))


def send(m: Params, adjoint: State) -> Params:
    """Compute Σ_b λ_bᵀ M_b."""
    u = joined(adjoint, 1)
    return jax.tree.map(lambda a: jnp.tensordot(u, a, axes=((0, 1), (0, 1))), m)


def roll(cell: Cell, m: Params, block: Block) -> Params:
    """Compute M_S = Φ M_0 + Σ_t Φ_{S,t} I_t."""
    h = jax.tree.leaves(floats(block.residuals.after))[0]  # [S, B, …]
    units = units_of(cell, h.shape[1], h.dtype)
    leaving, own = jax.vmap(block.retreat, out_axes=(1, 1))(units)
    rows = joined(leaving, 2)  # [B, n, n]: e_iᵀ Φ

    def passed(a: Array) -> Array:
        return jax.vmap(lambda r, b: jnp.tensordot(r, b, axes=1))(rows, a)

    return add(own, jax.tree.map(passed, m))


def dense(m: Any) -> Array:
    """Write M as matrices [B, n, P]."""
    return jnp.concatenate([a.reshape(*a.shape[:2], -1) for a in jax.tree.leaves(m)], axis=-1)
