"""A cell that raises if it is transposed or differentiated, to check which passes a strategy takes."""

from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bptt_study.testing.errors import CheckError
from bptt_study.types import Cell, Params, State


def _guard(name: str) -> Primitive:
    """Make the identity as a primitive that has no derivative yet."""
    primitive = Primitive(name)
    primitive.def_impl(lambda a: a)
    primitive.def_abstract_eval(lambda a: a)
    mlir.register_lowering(primitive, lambda _, a: [a])
    batching.defvectorized(primitive)
    return primitive


def _refuse_transposition(cotangent: Any, operand: Any) -> Any:
    raise CheckError("claim.passes is 'forward', and the cell's step was transposed (reverse mode)")


def _refuse_derivative(primals: Any, tangents: Any) -> Any:
    raise CheckError("claim.passes is 'evaluations', and the cell's step was differentiated")


_forward, _evaluations = _guard("only_forward"), _guard("only_evaluations")
ad.deflinear2(_forward, _refuse_transposition)
ad.primitive_jvps[_evaluations] = _refuse_derivative
GUARDS = {"forward": _forward, "evaluations": _evaluations}


def guarded(cell: Cell, passes: str) -> Cell:
    """Make a cell that raises if a strategy takes other passes than it claims.

    Args:
      cell: The cell.
      passes: "evaluations", which allows no derivative, or "forward", which allows a jvp.

    Returns:
      The cell, by its `step` alone.
    """
    guard = GUARDS[passes]

    def step(params: Params, state: State, x: Any) -> State:
        return jax.tree.map(guard.bind, cell.step(params, state, x))

    return cell._replace(step=step, affine=None)
