"""M stored as r Kronecker products, which each step reduces without bias and with the least variance."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bptt_study.backprop.one_by_one import eigenvectors
from bptt_study.influence.kronecker import Group, Link, columns, products
from bptt_study.influence.past import Past
from bptt_study.influence.pytrees import width
from bptt_study.types import Cell

Products = tuple[Float[Array, "B r F"], Float[Array, "B r C"]]  # C = K·n


def optimal_kronecker(cell: Cell, name: str, rank: int) -> Past:
    """Store M as E[Σ_i u_i ⊗ A_i] with r products, r (F + n·K) numbers per sequence and group.

    Each step moves A_i by J, appends (φ, D), and reduces the r + 1 products to r (Benzing et al. 2019).
    """

    def start(batch_size: int, F: int, K: int, dtype: Any) -> Products:
        return (
            jnp.zeros((batch_size, rank, F), dtype),
            jnp.zeros((batch_size, rank, K * width(cell)), dtype),
        )

    def roll(m: Products, jacobian: Any, link: Link, signs: Float[Array, "B r"]) -> Products:
        u, A = m
        B, n = len(u), width(cell)
        A = jacobian(A.reshape(B, -1, n)).reshape(A.shape)
        u = jnp.concatenate([u, link.features[:, None]], axis=1)
        A = jnp.concatenate([A, columns(link, n).reshape(B, 1, -1)], axis=1)
        # only products of two signs count, so one sign can be fixed
        return jax.vmap(reduce)(u, A, jnp.concatenate([jnp.ones((B, 1), u.dtype), signs], axis=1))

    def send(m: Products, adjoint: Float[Array, "B n"]) -> Float[Array, "F K"]:
        u, A = m
        A = A.reshape(*A.shape[:2], -1, adjoint.shape[-1])
        return jnp.einsum("brf,brkn,bn->fk", u, A, adjoint)

    return products(cell, name, Group(start, roll, send, lambda K: rank))


def reduce(
    u: Float[Array, "R F"], A: Float[Array, "R C"], signs: Float[Array, "R"]
) -> tuple[Float[Array, "r F"], Float[Array, "r C"]]:
    """Replace R = r + 1 products by r products with the same mean, Σ_i u_i ⊗ A_i.

    Singular values come from Gram matrices. Their rounding errors change the factors, and so the variance, a
    little. The mean stays exact, because every operation preserves the sum.
    """
    # each pass over A costs as much as J, so only its Gram matrix, one rotation and the factor use it
    c, u, rotation = orthogonal(u, u @ u.T)
    scaled = c[:, None] * rotation
    turn = eigenvectors(scaled @ (A @ A.T) @ scaled.T)
    A = (turn @ scaled) @ A
    d, inverse = lengths(A)
    order = jnp.argsort(-d)
    mixing = factor(d[order], signs).astype(rotation.dtype)
    W = jnp.zeros_like(rotation).at[order, :-1].set(mixing)[:, :-1]
    return W.T @ (turn @ u), (W.T * inverse) @ A


def orthogonal(
    rows: Float[Array, "R C"], gram: Float[Array, "R R"]
) -> tuple[Float[Array, "R"], Float[Array, "R C"], Float[Array, "R R"]]:
    """Find lengths c, unit rows Q and a rotation E with E rows = diag(c) Q."""
    E = eigenvectors(gram)
    rows = E @ rows
    c, inverse = lengths(rows)
    return c, inverse[:, None] * rows, E


def lengths(rows: Float[Array, "R C"]) -> tuple[Float[Array, "R"], Float[Array, "R"]]:
    """Compute the rows' norms and their inverses, and set both to 0 for a row that is only rounding noise."""
    c = jnp.sqrt(jnp.sum(rows * rows, axis=1))
    some = c > 10 * len(c) * jnp.finfo(c.dtype).eps * jnp.max(c)
    return jnp.where(some, c, 0), jnp.where(some, 1 / jnp.where(some, c, 1), 0)


def factor(d: Float[Array, "R"], signs: Float[Array, "R"]) -> Float[Array, "R r"]:
    """Make W with E[W Wᵀ] = diag(d), d falling, and the least variance (Benzing et al. 2019, section 3).

    The m largest d_j are kept, where m is the least number with (r - m) d_{m+1} ≤ s = Σ_{j>m} d_j. The others
    share the remaining q = r - m columns. These are an orthonormal basis of the space orthogonal to z, where
    z_j² = 1 - q d_j/s, with a random sign for each row, times √(s/q). The added variance is
    s²/q - Σ_{j>m} d_j².
    """
    R = len(d)
    r, n = R - 1, jnp.arange(R)
    rest = jnp.cumsum(d[::-1])[::-1]  # Σ_{j ≥ n} d_j
    m = jnp.argmax((r - n) * d <= rest)  # the condition always holds at n = r - 1
    s, q = rest[m], r - m
    share = jnp.where(s > 0, q * d / jnp.where(s > 0, s, 1), n != r)
    z = jnp.where(n >= m, jnp.sqrt(jnp.maximum(1 - share, 0)), 0)
    v = z.at[r].add(
        1
    )  # reflects the last unit vector to -z, and the others into the space orthogonal to z
    basis = (jnp.eye(R, dtype=d.dtype) - 2 * jnp.outer(v, v) / jnp.sum(v * v))[:, :r]
    scale = jnp.where(n < m, jnp.sqrt(d), jnp.sqrt(s / q))[:r]
    return signs[:, None] * basis * scale
