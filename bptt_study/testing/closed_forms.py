"""The book's closed formulas for gradients through time, without a recursion or automatic differentiation.

Zhang, Lipton, Li & Smola 2023, Dive into Deep Learning, section 9.7, here for row vectors:
h_t = x_t W_xh + h_{t-1} W_hh without bias, o_t = h_t W_hq. All powers of W_hh are held at once, for every
pair of steps: the formulas serve for comparison, not for training.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bptt_study.types import Params


def powers(W: Float[Array, "H H"], count: int) -> Float[Array, "N H H"]:
    """Compute W^0 … W^{N-1}.

    Args:
      W: A matrix [H, H].
      count: N.

    Returns:
      The powers [N, H, H].
    """
    copies = jnp.broadcast_to(W, (count, *W.shape)).at[0].set(jnp.eye(len(W), dtype=W.dtype))
    return jax.lax.associative_scan(jnp.matmul, copies)


def linear_states(
    params: Params, inputs: Float[Array, "T B D"], state: Float[Array, "B H"]
) -> Float[Array, "T B H"]:
    """Compute h_t = h_0 W_hh^t + Σ_{i=1}^{t} x_i W_xh W_hh^{t-i}.

    Args:
      params: `W_xh` [D, H] and `W_hh` [H, H].
      inputs: x_t [T, B, D].
      state: h_0 [B, H].

    Returns:
      h_1 … h_T, [T, B, H].
    """
    sources = jnp.concatenate([state[None], inputs @ params["cell"]["W_xh"]])
    return jnp.einsum("sbh,tshj->tbj", sources, _lags(params, len(sources)))[1:]


def linear_gradients(
    params: Params,
    inputs: Float[Array, "T B D"],
    state: Float[Array, "B H"],
    outputs: Float[Array, "T B Q"],
) -> dict[str, Float[Array, "..."]]:
    """Compute the gradients of the three matrices.

    ∂L/∂h_t = Σ_{i=t}^{T} ∂L/∂o_i W_hqᵀ (W_hhᵀ)^{i-t}
    ∂L/∂W_xh = Σ_t x_tᵀ ∂L/∂h_t,   ∂L/∂W_hh = Σ_t h_{t-1}ᵀ ∂L/∂h_t,   ∂L/∂W_hq = Σ_t h_tᵀ ∂L/∂o_t

    Args:
      params: `W_xh` [D, H], `W_hh` [H, H] and `W_hq` [H, Q].
      inputs: x_t [T, B, D].
      state: h_0 [B, H].
      outputs: ∂L/∂o_t [T, B, Q].

    Returns:
      ∂L/∂W_xh [D, H], ∂L/∂W_hh [H, H] and ∂L/∂W_hq [H, Q], by the names of the matrices.
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
    """Compute W_hh^{t-s} at [t, s], 0 where t < s."""
    lag = jnp.arange(steps)[:, None] - jnp.arange(steps)
    past = powers(params["cell"]["W_hh"], steps)[jnp.maximum(lag, 0)]
    return jnp.where((lag >= 0)[..., None, None], past, 0)


def recursion(b: Float[Array, "T"], c: Float[Array, "T"]) -> Float[Array, "T"]:
    """Compute a_t = b_t + c_t a_{t-1}, a_0 = 0, by composing the maps a -> b + c a in pairs, in log T rounds.

    For b_t = ∂f/∂w and c_t = ∂f/∂h_{t-1}, a_t is ∂h_t/∂w.

    Args:
      b: b_t [T].
      c: c_t [T].

    Returns:
      a_t [T].
    """

    def compose(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
        return then[0] + then[1] * first[0], then[1] * first[1]

    return jax.lax.associative_scan(compose, (b, c))[0]


def solved_recursion(b: Float[Array, "T"], c: Float[Array, "T"]) -> Float[Array, "T"]:
    """Compute the solution of `recursion`, a_t = b_t + Σ_{i=1}^{t-1} (Π_{j=i+1}^{t} c_j) b_i.

    Args:
      b: b_t [T].
      c: c_t [T].

    Returns:
      a_t [T].
    """
    t, i = jnp.arange(len(b))[:, None, None], jnp.arange(len(b))[:, None]
    j = jnp.arange(len(b))
    products = jnp.prod(jnp.where((j > i) & (j <= t), c, 1), axis=-1)  # [t, i]
    return jnp.tril(products) @ b
