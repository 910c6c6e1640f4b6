"""M stored as one outer product of random vectors: unbiased online recurrent optimization."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bptt_study.backprop.pytrees import floats
from bptt_study.influence.past import Block, Past
from bptt_study.influence.pytrees import joined, like, parted, square_norm, width
from bptt_study.types import Cell, Params, State

RankOne = tuple[State, Params]  # s̃ leaves [B, …], θ̃ leaves [B, …]


def rank_one(cell: Cell) -> Past:
    """Store M as E[s̃ θ̃ᵀ], n + P numbers per sequence.

        s̃ ← ρ₀ Φ s̃ + ρ₁ ν,    θ̃ ← θ̃/ρ₀ + (Σ_t Φ_{S,t} I_t)ᵀ ν/ρ₁,    ν = ±1,

    where ρ₀ and ρ₁ make the two factors of each product equally long, because the noise is then least.
    """

    def start(params: Params, batch_size: int) -> RankOne:
        theta = jax.tree.map(lambda p: jnp.zeros((batch_size, *p.shape), p.dtype), params)
        return floats(cell.zeros(batch_size)), theta

    def roll(m: RankOne, block: Block, signs: Float[Array, "B n"]) -> RankOne:
        s, theta = m
        nu = parted(signs, like(cell))
        moved, (_, own) = block.advance(s), block.retreat(nu)
        s_0, theta_0 = balance(square_norm(theta), square_norm(moved))
        s_1, theta_1 = balance(square_norm(own), square_norm(nu))
        return mixed((s_0, s_1), moved, nu), mixed((theta_0, theta_1), theta, own)

    def send(m: RankOne, adjoint: State) -> Params:
        s, theta = m
        along = jnp.sum(joined(s, 1) * joined(adjoint, 1), axis=1)
        return jax.tree.map(lambda a: jnp.tensordot(along, a, axes=1), theta)

    return Past(start, send, roll, signs=lambda params: width(cell))


def shared_rank_one(cell: Cell) -> Past:
    """Store one outer product for all B sequences as one system: B·n + P numbers, and more noise."""

    def start(params: Params, batch_size: int) -> RankOne:
        return floats(cell.zeros(batch_size)), jax.tree.map(jnp.zeros_like, params)

    def roll(m: RankOne, block: Block, signs: Float[Array, "B n"]) -> RankOne:
        s, theta = m
        nu = parted(signs, like(cell))
        moved, (_, each) = block.advance(s), block.retreat(nu)
        own = jax.tree.map(lambda a: a.sum(axis=0), each)
        s_0, theta_0 = balance(_total(theta), _total(moved))
        s_1, theta_1 = balance(_total(own), _total(nu))
        return mixed((s_0, s_1), moved, nu), mixed((theta_0, theta_1), theta, own)

    def send(m: RankOne, adjoint: State) -> Params:
        s, theta = m
        along = jnp.sum(joined(s, 1) * joined(adjoint, 1))
        return jax.tree.map(lambda a: along * a, theta)

    return Past(start, send, roll, signs=lambda params: width(cell))


def balance(of: Array, by: Array) -> tuple[Array, Array]:
    """Compute ρ = √(‖a‖/‖b‖) and 1/ρ from ‖a‖² and ‖b‖².

    If either norm is 0, the product is 0. Then both results are 0, since the other factor would only be noise.
    """
    fine = (of > 0) & (by > 0)
    rho = (jnp.where(fine, of, 1) / jnp.where(fine, by, 1)) ** 0.25
    return jnp.where(fine, rho, 0), jnp.where(fine, 1 / rho, 0)


def mixed(weights: tuple[Array, Array], a: Any, b: Any) -> Any:
    """Compute the weighted sum of two trees with leaves [B, …]; weights are [B], or one for all."""

    def mix(a: Array, b: Array) -> Array:
        of_a, of_b = (w.reshape(*w.shape, *[1] * (a.ndim - w.ndim)) for w in weights)
        return of_a * a + of_b * b

    return jax.tree.map(mix, a, b)


def _total(tree: Any) -> Array:
    return sum((jnp.sum(a * a) for a in jax.tree.leaves(tree)), jnp.zeros(()))


def averaged(past: Past, draws: int) -> Past:
    """Store `draws` independent copies, leaves [draws, B, …], and send their average: variance / draws."""

    def start(params: Params, batch_size: int) -> Any:
        one = past.start(params, batch_size)
        return jax.tree.map(lambda a: jnp.repeat(a[None], draws, axis=0), one)

    def send(m: Any, adjoint: State) -> Params:
        each = jax.vmap(past.send, in_axes=(0, None))(m, adjoint)
        return jax.tree.map(lambda a: a.mean(axis=0), each)

    def roll(m: Any, block: Block, signs: Float[Array, "B k"]) -> Any:
        own = signs.reshape(len(signs), draws, -1)
        return jax.vmap(lambda m, s: past.roll(m, block, s), in_axes=(0, 1))(m, own)

    return past._replace(
        start=start, send=send, roll=roll, signs=lambda params: draws * past.signs(params)
    )
