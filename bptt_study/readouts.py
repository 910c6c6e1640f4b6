"""Readouts, which map hidden states to outputs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from bptt_study.types import Params, Readout
from bptt_study.validation import whole


def linear(hidden: int, outputs: int) -> Readout:
    """Make the linear readout, O = H W_hq + b_q, which starts with W_hq ~ N(0, 1/H) and b_q = 0.

    Args:
      hidden: H, the size of the last axis of what the cell's `read` returns.
      outputs: Q, the number of outputs.

    Returns:
      The readout, with parameters `W_hq` [H, Q] and `b_q` [Q].

    Raises:
      SettingError: For a size below 1.
    """
    whole("hidden", hidden), whole("outputs", outputs)
    return Readout(
        init=lambda key: {
            "W_hq": hidden**-0.5 * jax.random.normal(key, (hidden, outputs)),
            "b_q": jnp.zeros(outputs),
        },
        apply=_affine,
    )


def _affine(params: Params, h: Array) -> Array:
    return h @ params["W_hq"] + params["b_q"]
