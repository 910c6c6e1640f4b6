"""The executor of all estimators that carry credit forward: within a block it is exact.

    ĝ_block = Σ_t λ_tᵀ I_t + λ_0ᵀ M_0,    M_S = Φ M_0 + Σ_t Φ_{S,t} I_t,    Φ = J_S … J_1,   λ_0 = J_1ᵀ λ_1

for the S steps of a block, with λ_t = e_t + J_{t+1}ᵀ λ_{t+1} inside it. M_t = ∂h_t/∂θ is the influence of the
parameters on the state, and a `Past` is a way to store it. To roll M is to advance it in time. In the papers'
form, by steps, each step rolls M first:

    M_t = J_t M_{t-1} + I_t,    ĝ = Σ_t e_tᵀ M_t.

Both forms give the same numbers if M is stored exactly.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from bptt_study.backprop.adjoint import parameter_gradient
from bptt_study.backprop.forward import Residuals, forward, token_count
from bptt_study.backprop.forward_pass import differentiate
from bptt_study.backprop.pytrees import (
    add,
    as_arrays,
    as_types_of,
    last,
    merge_time_and_batch,
    wide,
    zeros_like,
)
from bptt_study.backprop.schedules.call import no_sums
from bptt_study.backprop.shapes import check_call, check_real
from bptt_study.influence.past import Block, Past
from bptt_study.types import Batch, Claim, Estimate, Params, Problem, State, Strategy
from bptt_study.validation import SettingError, flag

# The number of steps between two rolls of M, if the estimate does not depend on it. It is large enough to make
# the fixed cost of a roll small, and small enough for a core's cache to hold the steps' arrays.
SEGMENT = 64


class Carried(NamedTuple):
    """The state of a strategy that carries credit forward."""

    hidden: State  # h, leaves [B, H]
    past: Any  # M


Signs = Callable[[Array], Array]  # number of the roll -> ±1 [B, k]
# (θ of cell and readout, residuals, batch, tokens) -> e_t, leaves [S, B, H]
Feedback = Callable[[Params, Residuals, Batch, Float[Array, ""]], State]


def carry(
    problem: Problem,
    params: Params,
    state: Carried,
    batch: Batch,
    signs: Signs,
    past: Past,
    length: int,
    by_steps: bool = False,
    feedback: Feedback | None = None,
) -> tuple[Estimate, Carried]:
    """Compute the loss and the gradient of one batch, with credit for the steps before it.

    Args:
      problem: Cell, readout and loss.
      params: {"cell": …, "readout": …}.
      state: h_0 and M_0.
      batch: Inputs [T, B] or [T, B, D], targets [T, B, …], mask [T, B].
      signs: The ±1 of each roll of M: T rolls by steps, ⌈T/length⌉ rolls by blocks.
      past: The way to store M.
      length: Time steps of a block; by steps, the number of steps that memory holds at once.
      by_steps: Whether each step rolls M before M is sent, the papers' form.
      feedback: The function that gives e_t for the cell's gradient. None: the loss's derivative.

    Returns:
      The estimate, without metrics, and (h_T, M_T).
    """
    params, state, batch = as_arrays((params, state, batch))
    check_call(problem, params, state.hidden, batch)
    past.check(params["cell"], batch.inputs)
    state, tokens = lax.stop_gradient(state), token_count(params, batch)
    cell, theta = problem.cell, params["cell"]
    vjp = past.through(cell, theta)
    # M is a long sum, so it is wide until the call ends; and it keeps its type
    typed = past._replace(
        roll=lambda m, *now: as_types_of(m, past.roll(m, *now)),
        send=lambda *sent: as_types_of(wide(theta), past.send(*sent)),
    )
    run = partial(_by_steps if by_steps else _by_block, typed)

    def go(total: Any, batch: Batch) -> tuple[Any, None]:
        (hidden, m), sums, rolled = total
        stored = forward(cell, theta, hidden, batch.inputs)
        residuals = stored.residuals(batch.inputs)
        found = differentiate(problem, params, residuals, batch, tokens)
        e = found.immediate
        e = e if feedback is None else feedback(params, residuals, batch, tokens)
        m, gradient = run(m, Block(cell, theta, residuals, vjp), e, lambda n: signs(rolled + n))
        own = found.loss, {"cell": gradient, "readout": found.readout_gradient}
        state = Carried(last(stored.after), m)
        return (state, add(sums, own), rolled + (len(batch.mask) if by_steps else 1)), None

    total = state._replace(past=wide(state.past)), no_sums(params, tokens), jnp.array(0)
    steps = len(batch.mask)
    whole, rest = divmod(steps, length := min(length, steps))
    total, _ = lax.scan(go, total, jax.tree.map(partial(_cut, whole, steps - rest), batch))
    if rest:
        total, _ = go(total, jax.tree.map(lambda a: a[steps - rest :], batch))
    after, (loss, grads), _ = total
    after = after._replace(past=as_types_of(state.past, after.past))
    return Estimate(loss, as_types_of(params, grads), {}), lax.stop_gradient(after)


def _cut(parts: int, length: int, a: Array) -> Array:
    """Reshape the first `length` rows to [parts, length / parts, …]."""
    return a[:length].reshape(parts, length // parts, *a.shape[1:])


def _by_block(
    past: Past, m: Any, block: Block, immediate: State, signs: Signs
) -> tuple[Any, Params]:
    nothing = zeros_like(jax.tree.map(lambda e: e[0], immediate))
    leaving, adjoints = block.back(immediate, nothing)
    own = parameter_gradient(block.cell, block.params, block.residuals, adjoints)
    return past.roll(m, block, signs(jnp.array(0))), add(own, past.send(m, leaving))


def _by_steps(
    past: Past, m: Any, block: Block, immediate: State, signs: Signs
) -> tuple[Any, Params]:
    if past.all_steps is not None:
        return as_types_of((m, wide(block.params)), past.all_steps(m, block, immediate))

    def rolled(m: Any, residuals: Residuals, n: Array) -> Any:
        one = block._replace(residuals=jax.tree.map(lambda a: a[None], residuals))
        return past.roll(m, one, signs(n))

    def alone(carry: tuple[Any, Params], now: Any) -> tuple[tuple[Any, Params], None]:
        e, *step = now
        m = rolled(carry[0], *step)
        return (m, add(carry[1], past.send(m, e))), None

    def kept(m: Any, step: Any) -> tuple[Any, Any]:
        m = rolled(m, *step)
        return m, m

    steps = block.residuals, jnp.arange(len(block.residuals.inputs))
    nothing = wide(zeros_like(block.params))
    if 2 * _size(m) > _size(nothing):
        return lax.scan(alone, (m, nothing), (immediate, *steps))[0]
    # `send` sums over sequences: those of all steps together are one product, and each step keeps a small M
    m, each = lax.scan(kept, m, steps)
    return m, past.send(*merge_time_and_batch((each, immediate)))


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def strategy(
    problem: Problem,
    past: Past,
    claim: Claim,
    length: int | None = None,
    by_steps: bool = False,
    carried: bool = True,
    feedback: Feedback | None = None,
) -> Strategy:
    """Make the strategy that stores the past in this way.

    Args:
      problem: Cell, readout and loss.
      past: The way to store M.
      claim: Whether the estimate is exact or unbiased, and its source; this function adds the other promises.
      length: Time steps of a block. None: `SEGMENT`, if the estimate does not depend on it.
      by_steps: Whether each step rolls M before M is sent.
      carried: Whether M goes on from call to call. If not, each call starts at M = 0.
      feedback: The function that gives e_t for the cell's gradient. None: the loss's derivative.

    Returns:
      The strategy.

    Raises:
      SettingError: If `carried` is neither true nor false.
    """
    flag("carried", carried)
    check_real(problem.cell, "estimators that carry credit forward")
    size = length or SEGMENT
    run_all = partial(carry, problem, past=past, length=size, by_steps=by_steps, feedback=feedback)

    def init(params: Params, batch_size: int) -> Carried:
        zero = past.start(params["cell"], batch_size) if carried else ()
        return Carried(problem.cell.zeros(batch_size), zero)

    def shape(steps: int, batch_size: int, params: Params) -> tuple[int, int, int]:
        rolls = steps if by_steps else -(-steps // size)
        return rolls, batch_size, past.signs(params["cell"])

    def run(params: Params, state: Carried, batch: Batch, signs: Signs) -> tuple[Estimate, Carried]:
        if carried:
            return run_all(params, state, batch, signs)
        zero = past.start(params["cell"], batch.mask.shape[1])
        estimate, after = run_all(params, state._replace(past=zero), batch, signs)
        return estimate, after._replace(past=())

    def estimate(
        params: Params, state: Carried, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Estimate, Carried]:
        dtype = jnp.result_type(*jax.tree.leaves(params))
        one = shape(len(batch.mask), batch.mask.shape[1], params)[1:]
        # each roll draws its own signs, because memory for all of them would grow with T
        draw = partial(jax.random.rademacher, shape=one, dtype=dtype)
        return run(params, state, batch, lambda n: draw(jax.random.fold_in(key, n)))

    def given(
        params: Params, state: Carried, batch: Batch, noise: Float[Array, "N B k"]
    ) -> tuple[Estimate, Carried]:
        if noise.shape != (own := shape(len(batch.mask), batch.mask.shape[1], params)):
            raise SettingError("noise", f"shape {list(noise.shape)}", f"of shape {list(own)}")
        return run(params, state, batch, lambda n: noise[n])

    claim = claim._replace(noise=shape, held=1 if by_steps else size)
    claim = _complete(claim, problem, past, by_steps, carried)
    return Strategy(init, estimate, claim, given if claim.noise else None)


def _complete(claim: Claim, problem: Problem, past: Past, by_steps: bool, carried: bool) -> Claim:
    """Add the promises that follow from how M is stored and rolled; without signs there is no noise."""
    theta = jax.eval_shape(problem.cell.init, jax.random.key(0))
    noisy = past.signs(theta) > 0
    kept = jax.eval_shape(lambda: past.start(zeros_like(theta), 1)) if carried else ()
    return claim._replace(
        memory="1",
        steps="1" if by_steps else "block",
        reach="stream" if carried else "call",
        # signs that a block draws once differ for a call of other blocks
        online=carried and (by_steps or not noisy),
        numbers=sum(leaf.size for leaf in jax.tree.leaves(kept)),
        noise=claim.noise if noisy else None,
    )
