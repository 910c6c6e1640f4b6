"""The functions of a cell that must agree, such as step and form: both, and their VJPs, at random arguments."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jaxtyping import Array

from bptt_study.backprop.compare import drawn, equal, tried
from bptt_study.backprop.forward import derivative
from bptt_study.backprop.pytrees import as_types_of, floats
from bptt_study.backprop.special import check_turns
from bptt_study.backprop.twice import Both, agree, twice
from bptt_study.types import Affine, Cell, Layers, Params, State

IDS = 4  # of the random integers; the form and the step agree on one that does not exist, too
COUNTS = 10_000  # of those in a state, which may count steps: a cell may act otherwise after many


def check_agreement(cell: Cell, params: Params, state: State, x: Any) -> None:
    """Check that step and read see each sequence alone, and that the step is the form, with its derivative.

    Args:
      cell: The cell.
      params: The shapes of its parameters.
      state: Those of a state, leaves [B, …].
      x: That of x_t.

    Raises:
      SettingError: For two functions that differ.
    """
    rng = np.random.default_rng(0)
    evaluate = jax.jit(partial(_evaluate, cell))
    has_integers = len(jax.tree.leaves(floats(state))) < len(jax.tree.leaves(state))
    for counts in (IDS, COUNTS)[: 1 + has_integers]:
        _check_agreement(cell, params, state, x, rng, evaluate, counts)


def _check_agreement(
    cell: Cell, params: Params, state: State, x: Any, rng: Any, evaluate: Any, counts: int
) -> None:
    """Do `check_agreement` at random arguments, with integers below `counts` in the state."""

    def others(size: float) -> tuple[Any, ...]:
        now = drawn(rng, state, size=size, ids=counts)
        return now, *drawn(rng, (x, floats(state)), size=size, ids=IDS)

    draw = lambda _: drawn(rng, params, scaled=True)  # noqa: E731
    what, way_out = "one in which a sequence changes the others", "`bs.scan` takes such a function."
    for size, found, allowed in tried(evaluate, draw, others, cell.init):
        same = partial(agree, size=size, allowed=allowed)
        for name, both in (("cell.step", found.steps), ("cell.read", found.outputs)):
            same(name, both, "a function of each sequence alone", what, way_out)
        if found.by_form is not None:
            # a function that closes over parameters ignores the parameters that it is given
            same("cell.step", found.by_form, "equal to the parts of `cell.affine`")
        if found.derivative is not None:
            (stepped, sent), (after, expected) = found.derivative
            name, update = "cell.affine.derivative", "`cell.affine.update`"
            exact = partial(equal, allowed=allowed)
            exact(f"{name}.forward", stepped, after, f"equal to {update}")
            exact(f"{name}.vjp", sent, expected, f"the VJP of {update}", least=size)
    if cell.affine is not None:
        adjoint = drawn(rng, floats(state))
        check_turns(cell, lambda *given: evaluate(*given, adjoint).by_form, params, x, allowed)


class _Found(NamedTuple):
    """The values of a cell's functions at random arguments, and their VJPs."""

    steps: Both  # the step of a batch, and of each of its sequences alone
    outputs: Both  # what `read` makes of the batch's state, and of each sequence's
    by_form: Both | None  # the step, and the affine form
    derivative: Any  # (h_t, cotangents) as written out, and the same by JAX


def _evaluate(cell: Cell, params: Params, h: State, x: Array, adjoint: State) -> _Found:
    alone = lambda params, h, x: _alone(partial(cell.step, params), h, x)  # noqa: E731
    steps = twice(cell.step, alone, params, h, x)
    outputs = twice(cell.read, partial(_alone, cell.read), h)
    by_form = None
    if cell.affine is not None:
        by_form = twice(cell.step, partial(_by_form, cell.affine), params, h, x)
    both = None
    if isinstance(affine := cell.affine, Affine) and affine.derivative is not None:
        arguments = affine.project(params, x), affine.recur(params, h), h
        after, vjp = jax.vjp(affine.update, *arguments)
        stepped, kept = derivative(affine).forward(*arguments)
        sent = as_types_of(floats(after), adjoint)
        both = (stepped, derivative(affine).vjp((kept, h, after), sent)), (after, vjp(sent))
    return _Found(steps, outputs, by_form, both)


def _alone(f: Callable[..., Any], *arguments: Any) -> Any:
    """Run f on each sequence alone, and put the results side by side."""
    each = jax.tree.map(lambda a: a[:, None], arguments)
    return jax.tree.map(lambda a: a[:, 0], lax.map(lambda own: f(*own), each))


def _by_form(form: Affine | Layers, params: Params, state: State, x: Array) -> State:
    if isinstance(form, Affine):
        return form.step(params, state, x)
    found = []
    for layer, theta, own in zip(form.cells, params, state, strict=True):
        found.append(layer.step(theta, own, x))
        x = layer.read(found[-1])
    return tuple(found)
