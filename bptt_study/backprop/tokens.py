"""Checks of tokens: an estimate calls readout and loss on parts of a batch, and adds up the mask's weights."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array

from bptt_study.backprop.closed import check_constants
from bptt_study.backprop.compare import at_random_numbers, drawn, said, shapes, tried
from bptt_study.backprop.forward import per_token
from bptt_study.backprop.special import named
from bptt_study.backprop.twice import Both, agree, twice
from bptt_study.known import is_known, is_shipped, remember
from bptt_study.types import Batch, Params, Problem
from bptt_study.validation import SettingError, one_line

IGNORED = (-100, -1, 0, 255)  # targets that mark, by custom, a token that does not count
STEPS, SIZE = 40, 3  # of the random tokens
NUMBERS = 2**24  # the most of a token beside its copies
MUST = "a function of each token alone"
WAY_OUT = "Weights over time or over sequences belong into the mask."


def check_tokens(problem: Problem, params: Params, batch: Batch) -> None:
    """Check readout and loss, each only once, with random numbers. Only shapes of the arguments matter.

    Args:
      problem: Cell, readout and loss.
      params: {"cell": …, "readout": …}.
      batch: The batch.

    Raises:
      SettingError: If the readout or the loss of a token depends on other tokens, or on their number, and if
        one of them closes over a traced value or a parameter: the gradient would leave that path out.
    """
    theta, read = shapes(params["readout"]), jax.eval_shape(lambda: _read(problem))
    outputs = jax.eval_shape(problem.readout.apply, theta, _tokens(read))
    readout, targets = problem.readout, _tokens(shapes(batch.targets))
    init = lambda key: (readout.init(key),)  # noqa: E731
    trained = jax.tree.leaves(params)
    _check("problem.readout.apply", readout.apply, (theta,), (_tokens(read),), trained, init)
    _check("problem.loss", problem.loss, (), (_tokens(outputs), targets), trained, ignores=True)
    for places in ((batch.mask.shape[0], 1), (1, batch.mask.shape[1])):
        if places[0] > STEPS or places[1] > SIZE:
            _check_places("problem.readout.apply", readout.apply, (theta,), (read,), places, init)
            _check_places("problem.loss", problem.loss, (), (outputs, targets), places)


def _read(problem: Problem) -> Any:
    return problem.cell.read(problem.cell.zeros(1))[None]


def _tokens(like: Any) -> jax.ShapeDtypeStruct:
    """Return the shape of STEPS × SIZE tokens."""
    return jax.ShapeDtypeStruct((STEPS, SIZE, *like.shape[2:]), like.dtype)


def _check(
    name: str,
    f: Callable[..., Any],
    whole: tuple[Any, ...],
    tokens: tuple[Any, ...],
    trained: list[Array],
    init: Callable[[Any], tuple[Any, ...]] = lambda key: (),
    ignores: bool = False,
) -> None:
    key = (f, *((a.shape, a.dtype) for a in jax.tree.leaves((whole, tokens))))
    if is_known(key):
        return
    try:
        jaxpr, result = jax.make_jaxpr(f, return_shape=True)(*whole, *tokens)
    except SettingError:
        raise
    except (TypeError, ValueError) as error:
        why = one_line(error).rstrip(".")
        found = f"one that fails for {' and '.join(map(said, tokens))} ({why})"
        raise SettingError(name, found, MUST, WAY_OUT) from error
    check_constants(name, jaxpr.consts, trained)
    shape = getattr(result, "shape", ())
    if (shape if ignores else shape[:2]) != (STEPS, SIZE):
        return  # what a loss must return is checked where it is called
    with at_random_numbers():
        rng, both = np.random.default_rng(0), jax.jit(partial(_together_and_alone, f))
        what = "one whose numbers change beside others"
        draw, others, allowed = _agree(name, both, rng, whole, tokens, init, what)
        for number in _ignored(jaxpr, tokens[-1].dtype) if ignores else ():
            *arrays, targets = others(0.5)
            hidden = jnp.asarray(rng.random((STEPS, SIZE)) < 0.5)
            ignored = jnp.where(per_token(hidden, targets), number, targets).astype(targets.dtype)
            # a token that is ignored may be anything, also 0/0; the others must not see how many are
            shown = lambda a, hidden=hidden: np.where(per_token(hidden, a), 0, a)  # noqa: E731
            found = jax.tree.map(shown, both(draw(0.5), *arrays, ignored))
            what = f"one whose numbers change beside targets of {number:g}"
            agree(name, found, MUST, what, WAY_OUT, size=0.5, allowed=allowed)
    remember(key)


def _agree(
    name: str,
    both: Callable[..., Both],
    rng: np.random.Generator,
    whole: tuple[Any, ...],
    tokens: tuple[Any, ...],
    init: Callable[[Any], tuple[Any, ...]],
    what: str,
) -> tuple[Callable[[float], Any], Callable[[float], Any], float]:
    """Check that both results agree at random numbers; return what draws these, and what rounding may make."""
    draw = lambda _: drawn(rng, whole, scaled=True)  # noqa: E731
    others = lambda size: drawn(rng, tokens, size=size, ids=_classes(tokens[0]))  # noqa: E731
    for size, found, allowed in tried(both, draw, others, init):
        agree(name, found, MUST, what, WAY_OUT, size=size, allowed=allowed)
    return draw, others, allowed


def _together_and_alone(f: Any, given: Any, *arrays: Array) -> Both:
    """Apply a function of tokens to all of them at once, and to each alone."""

    def together(given: Any, *arrays: Array) -> Array:
        return f(*given, *arrays)

    def alone(given: Any, *arrays: Array) -> Array:
        each = [a.reshape(STEPS * SIZE, 1, 1, *a.shape[2:]) for a in arrays]
        found = lax.map(lambda token: f(*given, *token), each)
        return found.reshape(STEPS, SIZE, *found.shape[3:])

    return twice(together, alone, given, *arrays)


def _check_places(
    name: str,
    f: Callable[..., Any],
    whole: tuple[Any, ...],
    tokens: tuple[Any, ...],
    places: tuple[int, int],
    init: Callable[[Any], tuple[Any, ...]] = lambda key: (),
) -> None:
    """Check that a token has the same numbers in each of these places, [T, 1] or [1, B], as a burn-in has not.

    `_check` has fewer places, and other tokens in each. Functions of the package are not checked, and of
    places no more than a vector of NUMBERS has.
    """
    one = tuple(jax.ShapeDtypeStruct((1, 1, *a.shape[2:]), a.dtype) for a in tokens)
    most = NUMBERS // max(1, *(a.size for a in one))
    places = min(places[0], most), min(places[1], most)
    key = (f, *((a.shape, a.dtype) for a in jax.tree.leaves((whole, one))), places)
    if is_shipped(f) or is_known(key):
        return
    if getattr(jax.eval_shape(f, *whole, *one), "shape", ())[:2] != (1, 1):
        return  # what a loss must return is checked where it is called

    def both(given: Any, *token: Array) -> Both:
        alone = f(*given, *token)
        wide = (jnp.broadcast_to(a, (*places, *a.shape[2:])) for a in token)
        each = jnp.broadcast_to(alone, (*places, *alone.shape[2:]))
        return Both((f(*given, *wide), each), ((), ()))

    what = f"one whose numbers change with the place in [{places[0]}, {places[1]}]"
    with at_random_numbers():
        _agree(name, jax.jit(both), np.random.default_rng(0), whole, one, init, what)
    remember(key)


def _classes(outputs: Any) -> list[int]:
    """List 2, 4, 8, … up to the number of classes: of targets below these, some are few and some are many."""
    return [2**n for n in range(1, max(1, outputs.shape[-1] - 1).bit_length() + 1)]


def _ignored(program: ClosedJaxpr, kind: Any) -> list[float]:
    """List targets that may mark a token that does not count: the usual ones, and those that a loss names."""
    numbers = dict.fromkeys((*IGNORED, *named(program)))
    if jnp.issubdtype(kind, jnp.inexact):
        return [jnp.nan, *numbers]
    if not jnp.issubdtype(kind, jnp.integer):
        return []
    bounds = jnp.iinfo(kind)
    return [n for n in numbers if n == int(n) and bounds.min <= n <= bounds.max]


def check_mask(mask: Array) -> None:
    """Check that each token has a finite weight of at least 0; one between 0 and 1 counts in part.

    Within jit, where values are unknown, nothing is checked, and the loss of a wrong weight is nan.

    Raises:
      SettingError: For a number that is negative, infinite or nan, and for a sum that float32 does not hold.
    """
    weights = np.zeros(1) if isinstance(mask, jax.core.Tracer) else np.asarray(mask)
    if (wrong := weights[~((weights >= 0) & (weights < np.inf))]).size:
        said = f"a weight of {wrong[0]}"
        raise SettingError("batch.mask", said, "finite and 0 or more everywhere")
    total, kind = weights.sum(dtype=np.float64), np.finfo(np.float32)
    if total and not kind.tiny <= total <= kind.max:
        allowed = f"one with the sum 0, or a sum from {kind.tiny:.1e} to {kind.max:.1e}"
        raise SettingError("batch.mask", f"the sum {total:.1e}", allowed)
