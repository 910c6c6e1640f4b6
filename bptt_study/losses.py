"""Losses per token, `(outputs, targets) -> [T, B]`. `backprop` applies the mask and takes the mean."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bptt_study.validation import SettingError

Loss = TypeVar("Loss", bound=Callable[..., Any])


def in_nats(loss: Loss) -> Loss:
    """Mark a loss as measured in nats, such as a negative log-likelihood; tables and figures name the unit.

    Args:
      loss: The function.

    Returns:
      The same function.
    """
    vars(loss)["unit"] = "nats"
    return loss


def unit(loss: Callable[..., Any]) -> str:
    """Look up the unit of a loss.

    Args:
      loss: The function.

    Returns:
      The unit; empty for a loss that is not marked, such as the squared error.
    """
    return getattr(loss, "unit", "")


@in_nats
def cross_entropy(
    outputs: Float[Array, "T B Q"], targets: Int[Array, "T B"]
) -> Float[Array, "T B"]:
    """Compute -log softmax(O)[class] of each token.

    Args:
      outputs: O [T, B, Q].
      targets: Classes [T, B], 0 … Q - 1.

    Returns:
      The losses [T, B] in nats; nan for a class that does not exist.

    Raises:
      SettingError: For targets of other lengths, and for what are no classes, such as floats, flags and rows
        of zeros and a one.
    """
    targets = _as_long(targets, outputs)
    if not jnp.issubdtype(targets.dtype, jnp.integer) or targets.shape != outputs.shape[:-1]:
        _refuse(targets, "classes, one whole number for each token, [T, B]")
    targets = targets.astype(jnp.promote_types(targets.dtype, jnp.int32))  # 256 is no uint8
    exists = (targets >= 0) & (targets < outputs.shape[-1])
    chosen = jnp.take_along_axis(outputs, targets[..., None], axis=-1)[..., 0]
    # a factor of nan makes the gradient nan as well; otherwise it would belong to another loss
    return (jax.nn.logsumexp(outputs, axis=-1) - chosen) * jnp.where(exists, 1.0, jnp.nan)


def squared_error(
    outputs: Float[Array, "T B Q"], targets: Float[Array, "T B *Q"]
) -> Float[Array, "T B"]:
    """Compute ½ ‖O - Y‖² of each token, summed over the outputs.

    Args:
      outputs: O [T, B, Q].
      targets: Y [T, B, Q], or [T, B] for a single output.

    Returns:
      The losses [T, B].

    Raises:
      SettingError: For targets of other lengths, and for another number of targets than outputs.
    """
    targets = _as_long(targets, outputs)
    if targets.size != outputs.size:
        _refuse(targets, f"like the outputs, [T, B, {outputs.shape[-1]}]")
    difference = outputs - targets.reshape(outputs.shape)
    return 0.5 * jnp.sum(jnp.real(difference * jnp.conj(difference)), axis=-1)


def _as_long(targets: Array, outputs: Array) -> Array:
    """Return the targets as an array, if they have the outputs' T and B."""
    targets, lengths = jnp.asarray(targets), outputs.shape[:-1]
    if targets.shape[: len(lengths)] != lengths:
        allowed = f"of shape [{', '.join(map(str, lengths))}, …], as long as the outputs"
        raise SettingError("batch.targets", f"{targets.dtype}{[*targets.shape]}", allowed)
    return targets


def _refuse(targets: Array, allowed: str) -> None:
    axes = ", ".join(["T", "B", *map(str, targets.shape[2:])])  # T and B may be of a part
    raise SettingError("batch.targets", f"{targets.dtype}[{axes}]", allowed)
