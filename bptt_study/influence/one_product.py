"""M stored as one random Kronecker product for each group of parameters."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from bptt_study.influence.kronecker import Group, Link, columns, products
from bptt_study.influence.past import Past
from bptt_study.influence.pytrees import square_norm, width
from bptt_study.influence.rank_one import balance, mixed
from bptt_study.types import Cell


def kronecker_factored(cell: Cell, name: str) -> Past:
    """Store M as E[u ⊗ A] with u [F] and A [K, n], F + n·K numbers per sequence and group (Mujika et al. 2018).

    u ← p₀ u + σ p₁ φ,    A ← J A/p₀ + σ D/p₁,    σ = ±1; p₀, p₁ make both factors equally long.
    """

    def start(batch_size: int, F: int, K: int, dtype: Any) -> tuple[Array, Array]:
        return (
            jnp.zeros((batch_size, F), dtype),
            jnp.zeros((batch_size, K, width(cell)), dtype),
        )

    def roll(m: Any, jacobian: Any, link: Link, signs: Float[Array, "B 1"]) -> tuple[Array, Array]:
        u, A = m
        phi, D = signs * link.features, signs[..., None] * columns(link, A.shape[-1])
        A = jacobian(A)
        u_0, A_0 = balance(square_norm(A), square_norm(u))
        u_1, A_1 = balance(square_norm(link.slopes), square_norm(phi))
        return mixed((u_0, u_1), u, phi), mixed((A_0, A_1), A, D)

    def send(m: Any, u: Float[Array, "B n"]) -> Float[Array, "F K"]:
        features, A = m
        return jnp.einsum("bf,bkn,bn->fk", features, A, u)

    return products(cell, name, Group(start, roll, send, lambda K: 1))


def reverse_kronecker(cell: Cell, name: str) -> Past:
    """Store M as E[a ⊗ B] with a [K] and B [F, n], K + n·F numbers per sequence and group.

    a ← ρ₀ a + ρ₁ ν,    B ← J B/ρ₀ + φ ⊗ D ν/ρ₁,    ν = ±1 for each gate of each unit (Marschall et al. 2020).
    """

    def start(batch_size: int, F: int, K: int, dtype: Any) -> tuple[Array, Array]:
        return (
            jnp.zeros((batch_size, K), dtype),
            jnp.zeros((batch_size, F, width(cell)), dtype),
        )

    def roll(m: Any, jacobian: Any, link: Link, nu: Float[Array, "B K"]) -> tuple[Array, Array]:
        a, rows = m
        B, S, K = link.slopes.shape
        H = rows.shape[-1] // S
        to_state = (link.slopes * nu[:, None]).reshape(B, S, K // H, H).sum(axis=2).reshape(B, -1)
        own = link.features[..., None] * to_state[:, None]
        rows = jacobian(rows)
        a_0, rows_0 = balance(square_norm(rows), square_norm(a))
        a_1, rows_1 = balance(square_norm(own), square_norm(nu))
        return mixed((a_0, a_1), a, nu), mixed((rows_0, rows_1), rows, own)

    def send(m: Any, u: Float[Array, "B n"]) -> Float[Array, "F K"]:
        a, rows = m
        return jnp.einsum("bk,bfn,bn->fk", a, rows, u)

    return products(cell, name, Group(start, roll, send, lambda K: K))
