"""Optimizers by configuration: any optax factory, with clipping before it and a schedule on its rate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array

from bptt_study.checks import SettingError, number


class Optimizer(NamedTuple):
    """An optax transform, and the norm above which it clips (inf: never)."""

    transform: optax.GradientTransformation
    clip_norm: float


def clipped(
    transform: Callable[..., optax.GradientTransformation],
    learning_rate: float,
    clip_norm: float | None = None,
    schedule: Callable[[Array], Array] | None = None,
) -> Optimizer:
    """`transform(learning_rate=…)` behind clipping by global norm (Pascanu et al. 2013).

    transform: an optax factory such as `optax.adam`; schedule: update -> factor on the learning rate.
    Clipping bounds the step and biases the estimate again: the rows tell how often it did.

    Raises SettingError for a negative learning rate, a clip_norm that is not positive, or a transform
    that is no factory or knows no such setting.
    """
    number("learning_rate", learning_rate, least=0)
    bound = jnp.inf if clip_norm is None else number("clip_norm", clip_norm, above=0)

    def at(learning_rate: Any) -> optax.GradientTransformation:
        rate: Any = learning_rate if schedule is None else lambda n: learning_rate * schedule(n)
        return transform(learning_rate=rate)

    try:
        at(learning_rate)  # inject_hyperparams would call it only when training starts
        # the rate is part of the state, so that a grid of rates is one compiled program
        step = optax.inject_hyperparams(at)(learning_rate=learning_rate)
    except TypeError as error:
        raise SettingError("transform", transform, f"an optax factory: {error}") from error
    clip = optax.identity() if clip_norm is None else optax.clip_by_global_norm(bound)
    return Optimizer(optax.chain(clip, step), float(bound))


def warmup_cosine(updates: int, warmup: float) -> Callable[[Array], Array]:
    """A factor that rises from 0 to 1 in the share `warmup` of the updates, then falls as a cosine."""
    if not 0 <= number("warmup", warmup) < 1:
        raise SettingError("warmup", warmup, "shares of the updates, 0 ≤ warmup < 1")
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, int(warmup * updates), updates)


def inverse_sqrt() -> Callable[[Array], Array]:
    """The factor 1/√(1 + t) after t updates."""
    return lambda n: (1 + n) ** -0.5
