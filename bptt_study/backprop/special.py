"""Step and form where one of them may turn: at 0 and 1, at numbers that the program names, and at ids."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jaxtyping import Array

from bptt_study.backprop.closed import equations
from bptt_study.backprop.compare import drawn, made, shapes
from bptt_study.backprop.pytrees import floats
from bptt_study.backprop.twice import Both, agree
from bptt_study.types import Cell, Params, State

MOST = 32  # of the numbers that a program names, and of the entries of an array among them
IDS = 64  # the ids that are tried, beside the last one and those that a program names
LARGEST = 1e4  # beyond it, rounding and overflow would look like a fault


class Special(NamedTuple):
    """Arguments of a step, B rows each."""

    state: State
    inputs: Array
    size: float  # of their largest numbers
    said: str  # what is special about them
    ids: bool = False  # whether ids are
    # the rows where the state is random, and those where the inputs are
    random: tuple[Any, Any] = (slice(None), slice(None))


def named(program: ClosedJaxpr) -> list[float]:
    """List the finite numbers that a program names: its literals, and the entries of short constants."""
    literals = (
        v.val for equation in equations(program.jaxpr) for v in equation.invars if _is_literal(v)
    )
    found: dict[float, None] = {}
    for value in (*program.consts, *literals):
        number = jnp.issubdtype(jnp.result_type(value), jnp.number)
        if number and np.size(value) <= MOST:
            found |= dict.fromkeys(np.real(np.asarray(value)).astype(float).ravel().tolist())
    return [number for number in found if np.isfinite(number)][:MOST]


def check_turns(
    cell: Cell,
    evaluate: Callable[..., Both],
    params: Params,
    inputs: Any,
    allowed: float,
) -> None:
    """Check that the step and the form of a cell are equal where one of them may turn.

    A random number is never exactly 0, and a random id seldom the one that resets the state. At a kink, right
    functions may have any derivative between those of its sides: relu and max(x, 0) differ at 0. A kink at a
    number of some arguments leaves the derivative by all random ones alone, so that these are compared.

    Args:
      cell: The cell, with a form.
      evaluate: (parameters, state, x_t) -> the next state by the step, and by the form.
      params: The shapes of the parameters.
      inputs: The shape of x_t, [B] or [B, D], with B ≥ 4.
      allowed: The largest difference.

    Raises:
      SettingError: If the states differ.
    """
    rng = np.random.default_rng(1)
    random, start = drawn(rng, params, scaled=True), cell.zeros(inputs.shape[0])
    thetas = random, made(cell.init, random)
    program = jax.make_jaxpr(cell.step)(params, shapes(start), inputs)
    for given in _special(rng, program, params, start, inputs):
        for theta in thetas[: 1 if given.ids else 2]:
            _agree(evaluate(theta, given.state, given.inputs), given, theta is random, allowed)


def _special(
    rng: np.random.Generator, program: ClosedJaxpr, params: Params, start: State, inputs: Any
) -> Iterator[Special]:
    """Yield the fresh state; each number in the state, in the inputs and in parts of both; and ids."""
    draw = lambda: drawn(rng, (start, inputs))  # noqa: E731
    numbers = named(program)
    (state, x), small = draw(), 0.5
    state, fresh = jax.tree.map(_as, start, state), "the state of fresh sequences"
    yield Special(state, x, small, fresh, random=([], slice(None)))
    for number in {0.0: None, 1.0: None} | dict.fromkeys(numbers):
        if abs(number) <= LARGEST:
            state, x = draw()
            state = jax.tree.map(lambda a, v=number: _put(rng, a, v, whole=3, part=1), state)
            x = _put(rng, x, number, whole=0, part=2)
            size, random = max(small, abs(number)), ([0, 2], [1, 3])
            yield Special(state, x, size, f"the number {number:g}", random=random)
    if jnp.issubdtype(inputs.dtype, jnp.integer):
        ids, many = _ids(numbers, params, inputs.dtype), inputs.shape[0]
        for some in (ids[n : n + many] for n in range(0, len(ids), many)):
            state, x = draw()
            rows = np.resize(some, many).reshape(-1, *[1] * (len(inputs.shape) - 1))
            x = jnp.asarray(np.broadcast_to(rows, inputs.shape), x.dtype)
            yield Special(state, x, small, f"the ids {', '.join(map(str, some))}", True)


def _agree(both: Both, given: Special, generic: bool, allowed: float) -> None:
    """Raise SettingError unless a step and its form agree; derivatives count if the parameters are `generic`.

    An id that does not exist may be nan in one of them, and any number in the other.
    """
    stepped, by_form = (jax.tree.map(np.array, floats(h)) for h in both.results)
    if given.ids:
        for a, b in zip(jax.tree.leaves(stepped), jax.tree.leaves(by_form), strict=True):
            unknown = np.isnan(a) | np.isnan(b)
            a[unknown] = b[unknown] = 0
            generic &= not unknown.any()
    sent = [(theta, *map(_rows, hx, given.random)) for theta, *hx in filter(None, both.sent)]
    found = Both((stepped, by_form), (sent[0], sent[1]) if generic and sent else ((), ()))
    what, must = f"a function that, at {given.said}, differs", "equal to the parts of `cell.affine`"
    whose = f"a function whose derivative, at {given.said}, differs"
    agree("cell.step", found, must, what, whose=whose, size=given.size, allowed=allowed)


def _rows(tree: Any, rows: Any) -> Any:
    return jax.tree.map(lambda a: np.asarray(a)[rows], tree)


def _put(rng: np.random.Generator, leaf: Array, number: float, whole: int, part: int) -> Array:
    """Put a number into all entries of one row of floats, and into some entries of another."""
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    changed = np.array(leaf)
    changed[whole] = number
    changed[part] = np.where(rng.random(changed[part].shape) < 0.5, number, changed[part])
    return jnp.asarray(changed, leaf.dtype)


def _as(leaf: Array, like: Array) -> Array:
    return leaf.astype(like.dtype)


def _ids(numbers: list[float], params: Params, kind: Any) -> list[int]:
    """List ids of the longest table among the parameters, and those that a program names."""
    rows = max((a.shape[0] for a in jax.tree.leaves(params) if a.shape), default=1)
    own = (int(number) for number in numbers if number == int(number))
    ids = dict.fromkeys((*range(min(rows, IDS)), rows - 1, *own))
    bounds = jnp.iinfo(kind)
    return [i for i in ids if bounds.min <= i <= bounds.max]


def _is_literal(variable: Any) -> bool:
    return isinstance(variable, Literal)
