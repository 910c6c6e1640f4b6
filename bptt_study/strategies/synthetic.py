"""Synthetic gradients: at each cut, a learned prediction replaces the adjoint that later steps send back."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from bptt_study.backprop.adjoint import recursion, weighted
from bptt_study.backprop.forward import token_count
from bptt_study.backprop.parts import WHOLE, in_parts, sequences
from bptt_study.backprop.pytrees import (
    add,
    as_arrays,
    as_types_of,
    floats,
    like,
    rows,
    wide,
    zeros_like,
)
from bptt_study.backprop.schedules.call import Call
from bptt_study.backprop.schedules.tails import Block, tailed
from bptt_study.backprop.shapes import check_call
from bptt_study.strategies.validated import validated
from bptt_study.types import Batch, Claim, Estimate, Params, Problem, State, Strategy
from bptt_study.validation import SettingError, flag, number, whole


class Synthesiser(NamedTuple):
    """The prediction ŝ(h) = (h W + b) / tokens, where h is the state's numbers in one row.

    h W + b is the gradient of the summed loss of later steps; `tokens` is the number that counts in the call.
    """

    W: Float[Array, "n n"]
    b: Float[Array, "n"]


class Synthetic(NamedTuple):
    """The state of the strategy: the hidden state, and a synthesiser that fresh sequences keep."""

    state: State
    synthesiser: Synthesiser


class Lessons(NamedTuple):
    """States of one block, leaves [N, B, …], and the adjoints that should have been predicted there."""

    states: State
    targets: State


@validated
def dni(problem: Problem, block: int, rate: float = 0.01, future: bool = True) -> Strategy:
    """Make decoupled neural interfaces: each block ends in a synthetic gradient.

    The synthesiser starts at 0, where the estimate is that of chunks. It learns to predict the adjoint that the
    block after a cut sends back, by one step of gradient descent on half the squared error at every call.

    Predictions are gradients of the summed loss, divided by the tokens that count in the call. So if they are
    true, the gradient of a stream's mean loss is the mean of its calls' gradients, weighted by their tokens.
    A call with few tokens that count has a large gradient: weight calls of unequal counts by their tokens.
    Without a token that counts, the gradient is 0, and the synthesiser learns nothing.

    Args:
      problem: Cell, readout and loss.
      block: Steps of a block, counted from the start of the call; the last may be shorter.
      rate: The rate of the synthesiser's gradient descent, on the mean over cuts and sequences. The targets are
        gradients of the summed loss, so the rate does not depend on the number of tokens.
      future: Whether to predict, at the end of the call, the adjoint that later calls would send back. False
        takes it as 0, and the estimate aims at the gradient of the call.

    Returns:
      The strategy.

    Raises:
      SettingError: For a block below 1, and a rate of 0 or less; in `estimate`, without `future`, for a block
        that leaves no cut.

    References:
      Jaderberg et al. 2017.
    """

    def lessons(predict: Any, block: Block) -> Lessons:
        first = jax.tree.map(lambda h: h[:1], block.run.residuals.before)
        return Lessons(first, jax.tree.map(lambda a: a[None], block.leaving))

    return _strategy(_Setting(problem, block, rate, future, lessons), "Jaderberg et al. 2017")


@validated
def bp_lambda(
    problem: Problem, block: int, lam: float = 1.0, rate: float = 0.01, future: bool = True
) -> Strategy:
    """Make synthetic gradients that learn at every step, from λ-returns.

        y_{t-1} = J_tᵀ (e_t + (1 - λ) ŝ_t + λ y_t),

    with y = ŝ at the end of the block, is the target of ŝ at h_{t-1}. For λ = 1, y is the adjoint from the rest
    of the block and from the prediction at its end. For λ = 0, it is one step and the prediction after it.

    Args:
      problem: Cell, readout and loss.
      block: Steps of a block, counted from the start of the call; the last may be shorter.
      lam: λ, from 0 to 1.
      rate: As in `dni`, on the mean over steps and sequences.
      future: As in `dni`.

    Returns:
      The strategy.

    Raises:
      SettingError: As `dni`, and for a lam outside 0 to 1.

    References:
      Pemberton & Costa 2024.
    """
    if number("lam", lam, least=0) > 1:
        raise SettingError("lam", lam, "a number from 0 to 1")
    setting = _Setting(problem, block, rate, future, partial(_weighted_returns, lam))
    return _strategy(setting, "Pemberton & Costa 2024")


def _weighted_returns(lam: float, predict: Any, block: Block) -> Lessons:
    """Compute y of every step of a block, by a backward recursion whose links pass λ."""
    run = block.run
    predicted = jax.vmap(predict)(run.residuals.after)

    def sent(e: Array, s: Array, arriving: Array) -> Array:
        return (e + (1 - lam) * s).at[-1].set(e[-1] + arriving)

    immediate = jax.tree.map(sent, run.immediate, predicted, block.arriving)
    links = jnp.full(run.residuals.inputs.shape[:2], lam, run.loss.dtype)
    nothing = zeros_like(block.arriving)
    _, found = recursion(weighted(run.step_vjp), immediate, (run.residuals, links), nothing)
    return Lessons(run.residuals.before, jax.vmap(run.step_vjp)(found, run.residuals))


class _Sums(NamedTuple):
    """The gradient of half the squared errors, summed over lessons and sequences, and their number."""

    gradient: Synthesiser
    number: Float[Array, ""]


class _Setting(NamedTuple):
    """The arguments of a strategy."""

    problem: Problem
    block: int
    rate: float
    future: bool
    # (ŝ, block) -> the lessons that the block gives
    lessons: Callable[[Callable[[State], State], Block], Lessons]


def _strategy(setting: _Setting, source: str) -> Strategy:
    whole("block", setting.block)
    number("rate", setting.rate, above=0)
    flag("future", setting.future)
    zeros = setting.problem.cell.zeros
    n = jax.eval_shape(lambda: rows(floats(zeros(1)))).shape[1]

    def init(params: Params, batch_size: int) -> Synthetic:
        dtype = jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).dtype  # real, as `rows` are
        nothing = Synthesiser(jnp.zeros((n, n), dtype), jnp.zeros(n, dtype))
        return Synthetic(zeros(batch_size), nothing)

    def renew(params: Params, carried: Synthetic) -> Synthetic:
        size = jax.tree.leaves(carried.state)[0].shape[0]
        return carried._replace(state=zeros(size))

    claim = Claim(memory="window", held=setting.block, source=source, numbers=n * n + n)
    return Strategy(init, partial(_estimate, setting), claim, renew=renew)


def _estimate(
    setting: _Setting, params: Params, carried: Synthetic, batch: Batch, key: Any
) -> tuple[Estimate, Synthetic]:
    params, carried, batch = as_arrays((params, carried, batch))
    check_call(setting.problem, params, carried.state, batch)
    steps, size = batch.mask.shape
    if setting.block >= steps and not setting.future:
        way_out = "Without a cut there is nothing to learn; `future` true predicts at the end."
        allowed = f"less than the {steps} steps of a call"
        raise SettingError("block", setting.block, allowed, way_out)
    arguments = (WHOLE, sequences(0), sequences(1), WHOLE, WHOLE, WHOLE)
    run = in_parts(partial(_run, setting), size, arguments, (sequences(1), sequences(0)))
    state, before = lax.stop_gradient(carried)
    (loss, grads, sums), (norms, end) = run(
        params, state, batch, before, token_count(params, batch), jnp.any(batch.mask != 0)
    )
    step = setting.rate / jnp.maximum(sums.number, 1)
    synthesiser = jax.tree.map(lambda p, g: (p - step * g).astype(p.dtype), before, sums.gradient)
    cuts = jnp.broadcast_to(jnp.arange(steps)[:, None] % setting.block == 0, batch.mask.shape)
    metrics = {"adjoint_norms": norms, "cuts": cuts.at[0].set(False)}
    grads = as_types_of(params, grads)
    return Estimate(loss, grads, metrics), lax.stop_gradient(Synthetic(end, synthesiser))


def _run(
    setting: _Setting,
    params: Params,
    state: State,
    batch: Batch,
    synthesiser: Synthesiser,
    tokens: Float[Array, ""],
    counted: Bool[Array, ""],  # whether any token of the whole batch counts
) -> Any:
    steps = len(batch.mask)
    block = min(setting.block, steps)
    call = Call(setting.problem, params, batch, None, tokens, block, block)

    def predict(h: State) -> State:
        return like(_predicted(synthesiser, h) / tokens, floats(h))

    def tail(h: State, t: Int[Array, ""]) -> State:
        there = counted & (setting.future | (t < steps))
        return jax.tree.map(lambda a: jnp.where(there, a, 0), predict(h))

    def learn(sums: _Sums, of_block: Block) -> _Sums:
        states, targets = setting.lessons(predict, of_block)
        number = jnp.arange(len(jax.tree.leaves(states)[0])) + of_block.begin
        # there is no cut before the call's first step, unless calls follow each other
        counts = counted & ((number > 0) | setting.future)
        own = _gradient(synthesiser, states, targets, tokens, counts)
        return add(sums, as_types_of(sums, own))

    zero = _Sums(wide(zeros_like(synthesiser)), jnp.zeros((), tokens.dtype))
    sums, learned = tailed(call, state, tail, learn, zero)
    return (sums.loss, sums.grads, learned), (sums.adjoint_norms, sums.last)


def _predicted(synthesiser: Synthesiser, h: State) -> Float[Array, "B n"]:
    return rows(floats(h)) @ synthesiser.W + synthesiser.b


def _gradient(
    synthesiser: Synthesiser, states: State, targets: State, tokens: Array, counts: Array
) -> _Sums:
    """Sum ∂/∂(W, b) of ½ ‖h W + b - tokens · target‖² over the lessons that count."""
    before = jax.vmap(lambda h: rows(floats(h)))(states)  # [N, B, n]
    off = jax.vmap(partial(_predicted, synthesiser))(states) - tokens * jax.vmap(rows)(targets)
    off = jnp.where(counts[:, None, None], off, 0)
    gradient = Synthesiser(jnp.einsum("tbi,tbj->ij", before, off), off.sum(axis=(0, 1)))
    return _Sums(gradient, before.shape[1] * jnp.sum(counts, dtype=tokens.dtype))
