"""Check a strategy's estimate: JAX broadcasts a gradient or a norm of another shape without a word."""

from contextlib import suppress
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.tree_util import keystr, tree_leaves_with_path
from jaxtyping import Array

from bptt_study.backprop.compare import distance, rounding, said
from bptt_study.backprop.forward import evaluate
from bptt_study.backprop.repeats import repeated
from bptt_study.instruments.draws import check_draws
from bptt_study.known import is_known, remember
from bptt_study.types import Batch, Estimate, Problem, Strategy
from bptt_study.validation import SettingError

PER_TOKEN = {"adjoint_norms": jnp.floating, "cuts": jnp.bool_}  # metrics [T, B], with their types


def check_estimate(problem: Problem, strategy: Strategy, batch: Batch) -> None:
    """Check the shapes and types of a strategy's first estimate, and that its loss is the mean over tokens.

    An estimate that fails is no matter of this check: training shows it with its place.

    Args:
      problem: Cell, readout and loss.
      strategy: The strategy.
      batch: The first batch of the run.

    Raises:
      SettingError: For the first result that is not what training takes.
    """
    known = (problem, strategy, *((a.shape, a.dtype) for a in batch))
    if is_known(known):
        return
    key = jax.random.key(0)
    params = jax.jit(problem.init)(key)
    state = repeated("strategy.init", strategy.init, params, batch.mask.shape[1])
    try:
        program, found = jax.make_jaxpr(strategy.estimate, return_shape=True)(
            params, state, batch, key
        )
    except SettingError:
        raise
    except Exception:  # the strategy's function may raise anything
        return
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], Estimate)):
        raise _wrong("another result", "an Estimate and a state")
    estimate, after = found
    _like("state", after, "the one before", state)
    if strategy.renew is not None:
        renewed = jax.eval_shape(strategy.renew, params, state)
        _like("renewed state", renewed, "the one before", state)
    _like("gradient", estimate.grads, "the parameters", params)
    _check_numbers(estimate, batch.mask.shape)
    _check_loss(problem, program, (params, state, batch, key))
    try:
        check_draws(strategy, params, state, batch)
    except SettingError as error:
        raise error.within("strategy") from None
    remember(known)


def _wrong(found: str, must: str, way_out: str = "") -> SettingError:
    return SettingError("strategy", f"one with {found}", f"one whose estimate has {must}", way_out)


def _like(what: str, tree: Any, name: str, other: Any) -> None:
    """Check that a tree has the structure, shapes and dtypes of another."""
    leaves, wanted = (dict(tree_leaves_with_path(t)) for t in (tree, other))
    for path in [*wanted, *leaves]:
        at = f"{what}{keystr(path)}"
        pair = [f"{at} {said(t[path])}" if path in t else f"no {at}" for t in (leaves, wanted)]
        if pair[0] != pair[1]:
            raise _wrong(pair[0], f"a {what} like {name}: {pair[1]}")
    found, asked = (str(jax.tree.structure(t)) for t in (tree, other))
    if found != asked:  # such as a list in place of a tuple
        raise _wrong(f"a {what} of {found}", f"a {what} like {name}, of {asked}")


def _check_numbers(estimate: Estimate, shape: tuple[int, ...]) -> None:
    """Check the loss and the metrics."""
    loss, metrics = estimate.loss, estimate.metrics
    if not _is_array(loss, (), jnp.floating):
        raise _wrong(f"the loss {said(loss)}", "a loss of one float, the mean over tokens")
    if not isinstance(metrics, dict):
        raise _wrong(f"metrics that are a {type(metrics).__name__}", "a dict of metrics")
    for name in PER_TOKEN.keys() & metrics.keys():
        if not _is_array(metrics[name], shape, kind := PER_TOKEN[name]):
            must = f"{name} [T, B] = {list(shape)}, {'flags' if kind is jnp.bool_ else 'floats'}"
            raise _wrong(f"{name} {said(metrics[name])}", must)


def _is_array(found: Any, shape: tuple[int, ...], kind: Any) -> bool:
    array = isinstance(found, jax.ShapeDtypeStruct)
    return array and found.shape == shape and jnp.issubdtype(found.dtype, kind)


def _check_loss(problem: Problem, program: ClosedJaxpr, arguments: tuple[Any, ...]) -> None:
    """Check that the loss is the mean over tokens: that of a plain forward pass from the fresh state."""
    params, _, batch, _ = arguments
    sizes = problem._replace(loss=lambda o, y: jnp.abs(problem.loss(o, y)))

    @jax.jit
    def scores(*arguments: Any) -> list[Array]:  # the compiler leaves the gradient out
        parts = [evaluate(p, params, batch)["validation_loss"] for p in (problem, sizes)]
        return [jaxpr_as_fun(program)(*jax.tree.leaves(arguments))[0], *parts]

    with suppress(
        jax.errors.JaxRuntimeError
    ):  # such as of a callback, which fails in training, too
        loss, mean, size = jax.device_get(scores(*arguments))
        if distance(loss, mean, size) > rounding(program.jaxpr):
            way_out = "Training and divergence go by it; `bs.testing.check_strategy` checks more."
            must = f"the mean loss of a token that counts, {mean:.6g} in the first batch"
            raise _wrong(f"the loss {loss:.6g}", must, way_out)
