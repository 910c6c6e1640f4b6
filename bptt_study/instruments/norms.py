"""The norms of a strategy's gradient over time and lag."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from bptt_study.types import Batch, Params, Strategy


def gradient_norms(
    strategy: Strategy, params: Params, batch: Batch, key: Key[Array, ""], draws: int = 16
) -> dict[str, Float[Array, "T"]]:
    """Gradient norms over time steps and over the lag, as the strategy sees them; state from zero.

    time: ‖∂L/∂h_t‖ for t = 1 … T, L the mean loss of the batch, Frobenius norm over B and H.
    lag: ‖∂l_T/∂h_{T-k}‖ for k = 0 … T - 1, l_T the last step's loss, mean over the sequences.
    For the LSTM, h is the pair (h, c). Both are means over `draws` keys of a random strategy.
    """
    size = batch.mask.shape[1]
    state = strategy.init(params, size)
    last = batch._replace(mask=jnp.zeros_like(batch.mask).at[-1].set(1))

    def norms(key: Key[Array, ""]) -> dict[str, Array]:
        over_time = strategy.estimate(params, state, batch, key)[0].metrics["adjoint_norms"]
        over_lag = strategy.estimate(params, state, last, key)[0].metrics["adjoint_norms"]
        # the loss of one token is the mean over the batch times its size
        return {
            "time": jnp.linalg.norm(over_time, axis=1),
            "lag": over_lag[::-1].mean(axis=1) * size,
        }

    return jax.tree.map(lambda n: n.mean(axis=0), lax.map(norms, jax.random.split(key, draws)))
