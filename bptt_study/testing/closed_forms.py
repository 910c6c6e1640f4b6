"""The book's own formulas for gradients through time: no recursion, no automatic differentiation.

Zhang, Lipton, Li & Smola 2023, Dive into Deep Learning, section 9.7, here for row vectors:
h_t = x_t W_xh + h_{t-1} W_hh without bias, o_t = h_t W_hq. All powers are there at once, for every pair
of steps: right to compare with, not to train with.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bptt_study.types import Params


def powers(W: Float[Array, "H H"], count: int) -> Float[Array, "N H H"]:
    """W^0 … W^{N-1}."""
    copies = jnp.broadcast_to(W, (count, *W.shape)).at[0].set(jnp.eye(len(W), dtype=W.dtype))
    return jax.lax.associative_scan(jnp.matmul, copies)


def linear_states(
    params: Params, inputs: Float[Array, "T B D"], state: Float[Array, "B H"]
) -> Float[Array, "T B H"]:
    """h_t = h_0 W_hh^t + Σ_{i=1}^{t} x_i W_xh W_hh^{t-i}, for t = 1 … T."""
    sources = jnp.concatenate([state[None], inputs @ params["cell"]["W_xh"]])
    return jnp.einsum("sbh,tshj->tbj", sources, _lags(params, len(sources)))[1:]


def linear_gradients(
    params: Params,
    inputs: Float[Array, "T B D"],
    state: Float[Array, "B H"],
    outputs: Float[Array, "T B Q"],
) -> dict[str, Float[Array, "..."]]:
    """∂L/∂W_xh [D, H], ∂L/∂W_hh [H, H], ∂L/∂W_hq [H, Q] from `outputs`, ∂L/∂o_t.

    ∂L/∂h_t = Σ_{i=t}^{T} ∂L/∂o_i W_hqᵀ (W_hhᵀ)^{i-t}
    ∂L/∂W_xh = Σ_t x_tᵀ ∂L/∂h_t,   ∂L/∂W_hh = Σ_t h_{t-1}ᵀ ∂L/∂h_t,   ∂L/∂W_hq = Σ_t h_tᵀ ∂L/∂o_t
    """
    h = linear_states(params, inputs, state)
    immediate = outputs @ params["readout"]["W_hq"].T
    adjoints = jnp.einsum("ibj,ithj->tbh", immediate, _lags(params, len(inputs)))
    return {
        "W_xh": jnp.einsum("tbd,tbh->dh", inputs, adjoints),
        "W_hh": jnp.einsum("tbg,tbh->gh", jnp.concatenate([state[None], h[:-1]]), adjoints),
        "W_hq": jnp.einsum("tbh,tbq->hq", h, outputs),
    }


def _lags(params: Params, steps: int) -> Float[Array, "T T H H"]:
    """W_hh^{t-s} at [t, s], 0 where t < s."""
    lag = jnp.arange(steps)[:, None] - jnp.arange(steps)
    past = powers(params["cell"]["W_hh"], steps)[jnp.maximum(lag, 0)]
    return jnp.where((lag >= 0)[..., None, None], past, 0)


def recursion(b: Float[Array, "T"], c: Float[Array, "T"]) -> Float[Array, "T"]:
    """a_t = b_t + c_t a_{t-1}, a_0 = 0: a_t = ∂h_t/∂w for b_t = ∂f/∂w and c_t = ∂f/∂h_{t-1}.

    Steps are maps a -> b + c a, composed two and two: the recursion itself, in log T rounds.
    """

    def compose(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
        return then[0] + then[1] * first[0], then[1] * first[1]

    return jax.lax.associative_scan(compose, (b, c))[0]


def solved_recursion(b: Float[Array, "T"], c: Float[Array, "T"]) -> Float[Array, "T"]:
    """a_t = b_t + Σ_{i=1}^{t-1} (Π_{j=i+1}^{t} c_j) b_i, the same solved."""
    t, i = jnp.arange(len(b))[:, None, None], jnp.arange(len(b))[:, None]
    j = jnp.arange(len(b))
    products = jnp.prod(jnp.where((j > i) & (j <= t), c, 1), axis=-1)  # [t, i]
    return jnp.tril(products) @ b
