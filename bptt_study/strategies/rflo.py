"""Random-feedback local online learning: e-prop on leaky units, and feedback that need not be the readout's."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32

from bptt_study.backprop.forward import Residuals, read_out
from bptt_study.backprop.pytrees import floats, with_floats
from bptt_study.influence.carried import strategy
from bptt_study.influence.own_unit import own_unit
from bptt_study.influence.units import direct, is_exact
from bptt_study.types import Batch, Claim, Estimate, Params, Problem, State, Strategy
from bptt_study.validation import flag, one_of, whole


class Fed(NamedTuple):
    """The state of a strategy with feedback of its own."""

    carried: Any
    feedback: UInt32[
        Array, "k"
    ]  # the key from which its weights are drawn; zeros: none was there yet


def rflo(
    problem: Problem,
    feedback: str = "exact",
    block: int | None = None,
    carried: bool = True,
) -> Strategy:
    """RFLO (Murray 2019): S_t = (1 - α) S_{t-1} + I_t on the cell `leaky`, whose α is that of the trace.

    The rule is `eprop`. With random feedback e_t = Bᵀ ∂l_t/∂o_t, B_{qh} ~ N(0, 1/H) drawn once, in the first
    call, and kept when sequences start afresh; the readout's own gradient stays exact.

    Args:
      problem: Its cell has an affine form whose parameters end in gates × units.
      feedback: "exact", the readout's weights, or "random".
      block: Time steps between two rolls of S, which change no number; None: as many as cost least.
      carried: Whether S goes on from call to call.

    Raises:
      SettingError: For another feedback, a block below 1, and another cell.
    """
    one_of("feedback", feedback, ("exact", "random"))
    if block is not None:
        whole("block", block)
    past = own_unit(problem.cell, direct, "rflo")
    exact = feedback == "exact" and is_exact(problem.cell, direct)
    claim = Claim(
        exact=exact,
        unbiased=exact,
        memory="1",
        steps="block",
        source="Murray 2019",
        reach="stream" if flag("carried", carried) else "call",
        online=carried,
    )
    if feedback == "exact":
        return strategy(problem, past, claim, block, carried=carried)

    def through(held: Array) -> Strategy:
        sent = partial(fed_back, problem, held)
        return strategy(problem, past, claim, block, carried=carried, feedback=sent)

    none = jnp.zeros_like(jax.random.key_data(jax.random.key(0)))
    plain = through(none)

    def estimate(
        params: Params, state: Fed, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Estimate, Fed]:
        drawn = jax.random.key_data(jax.random.fold_in(key, 1))
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


def fed_back(
    problem: Problem,
    held: UInt32[Array, "k"],
    params: Params,
    residuals: Residuals,
    batch: Batch,
    tokens: Float[Array, ""],
) -> State:
    """e_t = Bᵀ ∂L/∂o_t, leaves [S, B, H], with B drawn from the key that is held."""
    cell = problem.cell
    h, vjp = jax.vjp(
        lambda after: read_out(cell, with_floats(residuals.after, after)), floats(residuals.after)
    )
    outputs = problem.readout.apply(params["readout"], h)
    delta = jax.grad(lambda o: jnp.sum(problem.loss(o, batch.targets) * batch.mask) / tokens)(
        outputs
    )
    shape = outputs.shape[-1], h.shape[-1]
    weights = jax.random.normal(jax.random.wrap_key_data(held), shape, h.dtype)
    return vjp(delta @ weights * h.shape[-1] ** -0.5)[0]
