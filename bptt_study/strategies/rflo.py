"""Random-feedback local online learning: e-prop on leaky units, with feedback weights that may be random."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from bptt_study.backprop.adjoint import StepVJP
from bptt_study.backprop.forward import Residuals, masked_sum, read_out
from bptt_study.backprop.pytrees import floats, with_floats
from bptt_study.influence.carried import strategy
from bptt_study.influence.own_unit import own_unit
from bptt_study.influence.units import direct, is_exact
from bptt_study.strategies.validated import validated
from bptt_study.types import Batch, Cell, Claim, Estimate, Params, Problem, State, Strategy
from bptt_study.validation import SettingError, number, one_of, whole

# of the feedback weights, whichever generator the caller's keys have
GENERATOR = "threefry2x32"


class Fed(NamedTuple):
    """The state of a strategy with its own feedback weights."""

    carried: Any
    # the key from which the feedback weights are drawn; zeros before the first call
    feedback: UInt32[Array, "k"]


@validated
def rflo(
    problem: Problem,
    feedback: str = "exact",
    block: int | None = None,
    carried: bool = True,
    leak: float | None = None,
) -> Strategy:
    """Make RFLO: S_t = (1 - α) S_{t-1} + I_t on the cell `leaky`, whose α is also the trace's.

    The rule is `eprop`. With random feedback, e_t = Bᵀ ∂l_t/∂o_t. The weights B_{qh} ~ N(0, 1/H) are drawn in
    the first call, and stay the same when sequences start afresh. The readout's own gradient stays exact.

    Args:
      problem: Cell, readout and loss. The cell has an affine form whose parameters end in gates × units.
      feedback: "exact", the readout's weights, or "random".
      block: Time steps between two updates of S; it does not change the numbers. None: the cheapest.
      carried: Whether S goes on from call to call.
      leak: α of the trace. None: what the cell's own update forgets, which in `elman` is all.

    Returns:
      The strategy.

    Raises:
      SettingError: For another feedback, a block below 1, a leak outside [0, 1], and another cell.

    References:
      Murray 2019.
    """
    one_of("feedback", feedback, ("exact", "random"))
    if leak is not None and number("leak", leak, least=0) > 1:
        raise SettingError("leak", leak, "between 0 and 1, or null for the cell's own")
    if block is not None:
        whole("block", block)
    past = own_unit(problem.cell, direct if leak is None else keeping(1 - leak), "rflo")
    exact = feedback == "exact" and leak is None and is_exact(problem.cell, direct)
    claim = Claim(exact=exact, unbiased=exact, source="Murray 2019")
    if feedback == "exact":
        return strategy(problem, past, claim, block, carried=carried)

    def through(held: Array) -> Strategy:
        sent = partial(fed_back, problem, held)
        return strategy(problem, past, claim, block, carried=carried, feedback=sent)

    none = jnp.zeros_like(jax.random.key_data(jax.random.key(0, impl=GENERATOR)))
    plain = through(none)

    def estimate(
        params: Params, state: Fed, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Estimate, Fed]:
        own = jax.random.bits(jax.random.fold_in(key, 1), none.shape, none.dtype)
        drawn = jnp.maximum(own, 1)  # none is zero
        held = jnp.where(jnp.any(state.feedback != 0), state.feedback, drawn)
        found, after = through(held).estimate(params, state.carried, batch, key)
        return found, Fed(after, held)

    def renew(params: Params, state: Fed) -> Fed:
        size = len(jax.tree.leaves(state.carried)[0])
        return state._replace(carried=plain.init(params, size))

    return plain._replace(
        init=lambda params, size: Fed(plain.init(params, size), none),
        estimate=estimate,
        renew=renew,
    )


def keeping(share: float) -> Callable[[Cell, Params], StepVJP]:
    """A trace that keeps this share of itself at every step, whatever the cell does."""
    return lambda cell, params: lambda adjoint, now: jax.tree.map(lambda a: share * a, adjoint)


def fed_back(
    problem: Problem,
    held: UInt32[Array, "k"],
    params: Params,
    residuals: Residuals,
    batch: Batch,
    tokens: Float[Array, ""],
) -> State:
    """Compute e_t = Bᵀ ∂L/∂o_t, with B drawn from the key in the state.

    Args:
      problem: Cell, readout and loss.
      held: The raw key.
      params: The parameters.
      residuals: The residuals of S steps.
      batch: The batch of these steps.
      tokens: The number of tokens by which the loss is divided.

    Returns:
      e_t, leaves [S, B, H].
    """
    cell = problem.cell
    h, vjp = jax.vjp(
        lambda after: read_out(cell, with_floats(residuals.after, after)), floats(residuals.after)
    )
    outputs = problem.readout.apply(params["readout"], h)
    delta = jax.grad(lambda o: masked_sum(problem, o, batch, tokens.dtype) / tokens)(outputs)
    shape = outputs.shape[-1], h.shape[-1]
    weights = jax.random.normal(jax.random.wrap_key_data(held, impl=GENERATOR), shape, h.dtype)
    return vjp((delta @ weights * h.shape[-1] ** -0.5).astype(h.dtype))[0]
