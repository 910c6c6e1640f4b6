"""M stored as its entries at the owning unit and a rest of low rank."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bptt_study.backprop.one_by_one import eigenvectors
from bptt_study.backprop.pytrees import add
from bptt_study.influence import own_unit, whole
from bptt_study.influence.past import Block, Past
from bptt_study.influence.pytrees import like, parted, width
from bptt_study.influence.units import diagonal
from bptt_study.types import Cell, Params, State


def low_rank(cell: Cell, name: str, rank: int) -> Past:
    """Store M ≈ S + L R, where S is rolled as in `own_unit`, and L R is the best rest of the given rank.

        L R ← trunc_r(J (S + L R) + I - S'),    S' = diag(J) S + I.

    It is biased, and takes P n/H + r (n + P) numbers per sequence. Rank 0 is SnAp-1, rank n is RTRL.
    """
    own = own_unit.own_unit(cell, diagonal, name)

    def start(params: Params, batch_size: int) -> Any:
        L = jnp.zeros((batch_size, rank, width(cell)), jnp.result_type(*jax.tree.leaves(params)))
        rows = lambda p: jnp.zeros((batch_size, rank, *p.shape), p.dtype)  # noqa: E731
        return own.start(params, batch_size), L, jax.tree.map(rows, params)

    def roll(m: Any, block: Block, signs: Any) -> Any:
        S, L, R = m
        M = whole.roll(cell, _sum(cell, S, L, R), block)
        S = own.roll(S, block._replace(vjp=diagonal(cell, block.params)), signs)
        rest = whole.dense(jax.tree.map(jnp.subtract, M, _at_units(cell, S)))
        L, rows = truncated(rest, rank)
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct((1, *p.shape), p.dtype), block.params)
        return S, L, parted(rows, shapes)

    def send(m: Any, adjoint: State) -> Params:
        return whole.send(_sum(cell, *m), adjoint)

    return Past(start, send, roll, check=own.check)


def truncated(
    rest: Float[Array, "B n P"], rank: int
) -> tuple[Float[Array, "B r n"], Float[Array, "B r P"]]:
    """Compute the factors of the best approximation of each matrix by that rank."""
    E = jax.vmap(eigenvectors)(rest @ rest.swapaxes(1, 2))
    L = E[:, E.shape[1] - rank :]
    return L, L @ rest


def _sum(cell: Cell, S: Params, L: Float[Array, "B r n"], R: Params) -> Params:
    product = lambda a: jax.vmap(lambda left, a: jnp.tensordot(left.T, a, axes=1))(L, a)  # noqa: E731
    return add(_at_units(cell, S), jax.tree.map(product, R))


def _at_units(cell: Cell, S: Params) -> Params:
    """Write the entries at the owning unit as rows of all n: leaves [B, n/H, …] -> [B, n, …]."""
    H = jax.tree.leaves(like(cell))[0].shape[-1]

    def spread(a: Array) -> Array:
        own = jnp.tile(jnp.eye(H, dtype=a.dtype), a.shape[-1] // H)  # [H, gates × units]
        own = own.reshape(H, *[1] * (a.ndim - 3), a.shape[-1])
        return (a[:, :, None] * own).reshape(len(a), -1, *a.shape[2:])

    return jax.tree.map(spread, S)
