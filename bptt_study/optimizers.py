"""Optimizers by configuration: any optax factory, preceded by clipping and with a schedule for its rate."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from bptt_study.known import kept
from bptt_study.types import Params
from bptt_study.validation import SettingError, number, one_line

TRACED = (
    "all rates share one program, which traces `learning_rate`: compute with jax.numpy in place of float(…) "
    "and math, and take jnp.where in place of if"
)


class AtAnyRate(NamedTuple):
    """An optax transform whose state holds the learning rate, so that all rates share one program."""

    init: Callable[[Params], Any]  # at the rate 0
    update: Callable[..., Any]
    first: Callable[..., Any]  # (params, learning_rate), which may be traced -> the first state
    way_out: str = ""  # where `update` fails


class Optimizer(NamedTuple):
    """An optimizer: the optax transform, the global norm at which it clips (inf: never), and its numbers.

    `transform` does the clipping, as that of `clipped` does; `clip_norm` serves to count the clipped updates.
    `numbers` replace the entries of the same names in `transform.init(params)`. Optimizers that differ in them
    alone therefore have the same transform, and share one compiled program.
    """

    transform: optax.GradientTransformation
    clip_norm: float
    numbers: Mapping[str, float] = MappingProxyType({})

    def init(self, params: Params) -> Any:
        """Make the first state.

        Args:
          params: The parameters to be optimized.

        Returns:
          The state of `transform`, with `numbers` in it.
        """
        return first_state(self.transform, params, self.numbers)


def first_state(
    transform: optax.GradientTransformation, params: Params, numbers: Mapping[str, Any]
) -> Any:
    """Make the first state of a transform, with some of its numbers replaced.

    Args:
      transform: The optax transform.
      params: The parameters to be optimized.
      numbers: The new values by the names of the state's entries. They may be traced.

    Returns:
      `transform.init(params)` with these numbers.
    """
    typed = {
        name: jnp.asarray(value, optax.tree.dtype(params, "highest"))
        for name, value in numbers.items()
    }
    if isinstance(transform, AtAnyRate):
        return transform.first(params, **typed)
    return optax.tree.set(transform.init(params), **typed)


def check_state(state: Any) -> None:
    """Check that a first state gives scores of the optimizer's answer, and noise that each seed can draw anew.

    Args:
      state: The state, or its shapes.

    Raises:
      SettingError: For a state of optax whose answer is not the parameters after every update, and for random
        keys of two words, which look like any other numbers.
    """
    aside = (optax.contrib.SAMState, optax.contrib.ScheduleFreeState)
    for part in jax.tree.leaves(state, is_leaf=lambda one: isinstance(one, aside)):
        if isinstance(part, aside):
            allowed = "one whose answer is the parameters after every update"
            raise SettingError("optimizer", f"one with a {type(part).__name__}", allowed)
        if part.dtype == jnp.uint32 and part.shape[-1:] == (2,):
            way_out = "jax.random.key makes them, jax.random.PRNGKey does not."
            raise SettingError(
                "optimizer", "one with uint32[2]", "one with typed random keys alone", way_out
            )


def check_clip(optimizer: Optimizer, init: Callable[..., Params]) -> None:
    """Check that the transform clips at the optimizer's `clip_norm`.

    Then a larger gradient makes no other update. The second one counts, as adam's first never depends on it.

    Args:
      optimizer: The optimizer.
      init: The map from a key to the parameters, of which the shapes count.

    Raises:
      SettingError: If it does not.
    """
    transform, bound = optimizer.transform, optimizer.clip_norm
    if bound == jnp.inf or isinstance(transform, AtAnyRate):  # that of `clipped`
        return
    params = jax.eval_shape(init, jax.random.key(0))

    @jax.jit
    def second(multiple: float) -> Params:
        zeros, ones = (jax.tree.map(like, params) for like in (jnp.zeros_like, jnp.ones_like))
        grads = optax.tree.scale(bound / optax.tree.norm(ones), ones)
        _, state = transform.update(optax.tree.scale(2, grads), optimizer.init(zeros), zeros)
        return transform.update(optax.tree.scale(multiple, grads), state, zeros)[0]

    same = jax.tree.map(lambda a, b: jnp.allclose(a, b, 1e-3, 0), second(2.0), second(8.0))
    if not all(jax.tree.leaves(same)):
        allowed = "the norm at which its transform clips, or inf"
        way_out = "`bptt_study.optimizers.clipped` makes a transform that clips."
        raise SettingError("optimizer.clip_norm", bound, allowed, way_out)


def clipped(
    transform: Callable[..., optax.GradientTransformation],
    learning_rate: float,
    clip_norm: float | None = None,
    schedule: Callable[[Array], Array] | None = None,
) -> Optimizer:
    """Make an optimizer that clips by the global norm and then applies `transform(learning_rate=…)`.

    Clipping bounds the step, but it biases the estimate. The column clipped_fraction tells how often it acts.

    Args:
      transform: An optax factory such as `optax.adam`. With a schedule, it gets its learning_rate as a
        function of the number of updates.
      learning_rate: At least 0.
      clip_norm: The largest norm. None: no clipping.
      schedule: A map from the number of updates done to a factor of the learning rate. None: always 1.

    Returns:
      The optimizer.

    Raises:
      SettingError: For a negative learning rate, a clip_norm that is not positive, a schedule that gives no
        factor, or a transform that is no factory, has no such setting, or has a value of it already.

    References:
      Pascanu, Mikolov & Bengio 2013.
    """
    number("learning_rate", learning_rate, least=0)
    own = transform.keywords if isinstance(transform, partial) else {}
    if "learning_rate" in own:  # ours would replace it
        way_out = "`learning_rate` stands beside `transform`."
        raise SettingError("transform.learning_rate", own["learning_rate"], "left out", way_out)
    bound = jnp.inf if clip_norm is None else number("clip_norm", clip_norm, above=0)
    if schedule is not None:
        _check_schedule(schedule)
    try:
        whole = _at_any_rate(transform, clip_norm, schedule)
    except TypeError as error:
        reason = f"Reason: {error}. {_way_out(schedule)}".rstrip()
        raise SettingError("transform", transform, "a factory of optax", reason) from error
    return Optimizer(whole, float(bound), {"learning_rate": learning_rate})


def _way_out(schedule: Callable[[Array], Array] | None) -> str:
    """Say what a factory that fails may not know of."""
    said = "With a schedule, the factory gets its learning_rate as a function of the number of updates."
    return "" if schedule is None else said


@kept(64)
def _check_schedule(schedule: Any) -> None:
    """Check that a schedule maps the number of updates done to one number; training would call it first."""
    allowed = "a map from the number of updates done to one factor of the learning rate"
    try:
        factors = jax.tree.leaves(jax.eval_shape(schedule, jax.ShapeDtypeStruct((), jnp.int32)))
    except Exception as error:  # the schedule may raise anything
        raise SettingError("schedule", schedule, allowed, f"Reason: {one_line(error)}.") from error
    if len(factors) != 1 or factors[0].shape:
        found = ", ".join(f"{one.dtype}{list(one.shape)}" for one in factors) or "nothing"
        raise SettingError("schedule", schedule, allowed, f"It returns {found}.")


@kept(64)
def _at_any_rate(
    transform: Callable[..., optax.GradientTransformation],
    clip_norm: float | None,
    schedule: Callable[[Array], Array] | None,
) -> AtAnyRate:
    """Make the transform whose state holds the learning rate, on which all of its first state may depend."""

    def at(learning_rate: Any) -> optax.GradientTransformation:
        rate: Any = learning_rate if schedule is None else lambda n: learning_rate * schedule(n)
        return transform(learning_rate=rate)

    at(0.0)  # inject_hyperparams would call it only when training starts
    try:
        jax.make_jaxpr(lambda rate: [at(rate), rate][1])(0.0)
    except jax.errors.JAXTypeError as error:
        raise TypeError(TRACED) from error
    clip = optax.identity() if clip_norm is None else _clip(clip_norm)

    def whole(learning_rate: Any) -> optax.GradientTransformation:
        return optax.chain(clip, optax.inject_hyperparams(at)(learning_rate=learning_rate))

    def first(params: Params, learning_rate: Any) -> Any:
        return whole(learning_rate).init(params)

    return AtAnyRate(whole(0.0).init, whole(0.0).update, first, _way_out(schedule))


def _clip(largest: float) -> optax.GradientTransformation:
    """Clip by the global norm. In float16 the squares soon overflow, and an infinite norm would clip to 0."""
    clip = optax.clip_by_global_norm(largest)

    def clipped(grads: Params, params: Params | None) -> Params:
        wide = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), grads)
        found, _ = clip.update(wide, optax.EmptyState())
        return jax.tree.map(lambda g, c: c.astype(g.dtype), grads, found)

    return optax.stateless(clipped)


def warmup_cosine(updates: int, warmup: float) -> Callable[[Array], Array]:
    """Make a schedule that rises from 0 to 1 in the share `warmup` of the updates, then falls as a cosine.

    Args:
      updates: The number of updates of the run.
      warmup: The share of the updates in which the factor rises, at least 0 and less than 1; whole updates,
        rounded down, so a short run may have none.

    Returns:
      The map from the number of updates done to the factor.

    Raises:
      SettingError: For another share.
    """
    if not 0 <= number("warmup", warmup) < 1:
        raise SettingError("warmup", warmup, "a share of the updates, at least 0 and less than 1")
    rising = int(Fraction(str(warmup)) * updates)  # in decimals, as 0.29 · 100 falls short of 29
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, rising, updates)


def inverse_sqrt() -> Callable[[Array], Array]:
    """Make the schedule 1/√(1 + t).

    Returns:
      The map from t, the number of updates done, to the factor.
    """
    return lambda n: (1 + n) ** -0.5
