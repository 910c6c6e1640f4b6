"""Losses per token: `(outputs, targets) -> [T, B]`. `backprop` applies the mask and takes the mean."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def cross_entropy(
    outputs: Float[Array, "T B Q"], targets: Int[Array, "T B"]
) -> Float[Array, "T B"]:
    """-log softmax(O)[class], in nats."""
    chosen = jnp.take_along_axis(outputs, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(outputs, axis=-1) - chosen


def squared_error(
    outputs: Float[Array, "T B Q"], targets: Float[Array, "T B *Q"]
) -> Float[Array, "T B"]:
    """½ ‖O - Y‖², summed over the outputs. Targets may be [T, B] for a single output."""
    return 0.5 * jnp.sum((outputs - targets.reshape(outputs.shape)) ** 2, axis=-1)
