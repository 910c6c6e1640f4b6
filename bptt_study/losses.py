"""Losses per token: `(outputs, targets) -> [T, B]`. `backprop` applies the mask and takes the mean."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Loss = TypeVar("Loss", bound=Callable[..., Any])


def in_nats(loss: Loss) -> Loss:
    """Mark a loss as one in nats, such as a negative log-likelihood; tables and figures name the unit."""
    vars(loss)["unit"] = "nats"
    return loss


def unit(loss: Callable[..., Any]) -> str:
    """The unit of a loss; empty for a loss that is not marked, such as the squared error."""
    return getattr(loss, "unit", "")


@in_nats
def cross_entropy(
    outputs: Float[Array, "T B Q"], targets: Int[Array, "T B"]
) -> Float[Array, "T B"]:
    """-log softmax(O)[class], in nats; nan for a class that does not exist."""
    exists = (targets >= 0) & (targets < outputs.shape[-1])
    chosen = jnp.take_along_axis(outputs, targets[..., None], axis=-1)[..., 0]
    # as a factor, so that the gradient is nan as well: else it would be that of another loss
    return (jax.nn.logsumexp(outputs, axis=-1) - chosen) * jnp.where(exists, 1.0, jnp.nan)


def squared_error(
    outputs: Float[Array, "T B Q"], targets: Float[Array, "T B *Q"]
) -> Float[Array, "T B"]:
    """½ ‖O - Y‖², summed over the outputs. Targets may be [T, B] for a single output."""
    return 0.5 * jnp.sum((outputs - targets.reshape(outputs.shape)) ** 2, axis=-1)
