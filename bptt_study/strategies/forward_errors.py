"""Errors forward in time: the adjoint recursion, solved for the next adjoint instead of the one before."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from bptt_study.backprop.compare import drawn, has_nan, tried
from bptt_study.backprop.forward import forward, token_count
from bptt_study.backprop.forward_pass import ForwardPass, differentiate
from bptt_study.backprop.one_by_one import solve
from bptt_study.backprop.parts import WHOLE, in_parts, sequences
from bptt_study.backprop.pytrees import add, as_arrays, floats, last, like, norm, rows, zeros_like
from bptt_study.backprop.shapes import check_call
from bptt_study.strategies.validated import validated
from bptt_study.types import Batch, Claim, Estimate, Params, Problem, State, Strategy
from bptt_study.validation import SettingError, number


@validated
def forward_errors(problem: Problem, tolerance: float = 1e-3) -> Strategy:
    """Make the strategy that computes the gradient of `full` by two passes forward in time.

        λ_1 = Σ_t (J_t … J_2)ᵀ e_t,    λ_{t+1} = J_{t+1}⁻ᵀ (λ_t - e_t).

    The first pass computes λ_1, and the second continues from it. The memory does not grow with T. Every step
    of the second pass solves, for each sequence, a linear system with as many unknowns as the state has
    numbers. Because it inverts J, rounding errors grow if J contracts: if J contracts by ρ at each step, the
    error after T steps is about ε ρ⁻ᵀ. A sequence ends at its last step t with e_t ≠ 0, such as the last that
    the mask counts; later adjoints are 0. There, the recursion should have λ_t = e_t. The metric
    `closing_error` is the distance from e_t, relative to e_t, over all sequences. It does not see an error that
    has shrunk again, as where J contracts first and expands later. So a random error of size ε |λ_t - e_t|
    joins each step and is carried along. The metric `rounding_error` is what all of them change of the
    gradient of the cell's parameters, relative to it. If one of both errors is beyond the tolerance, the
    gradient is nan.

    Args:
      problem: Cell, readout and loss.
      tolerance: The largest closing error, and the largest rounding error, of a gradient that is returned.

    Returns:
      The strategy.

    Raises:
      SettingError: For a tolerance of 0 or less. In `estimate`, for floats of 16 bits, and for a cell whose J
        is singular at random parameters and a random state.

    References:
      Zucchet 2026.
    """
    number("tolerance", tolerance, above=0)

    def estimate(params: Params, state: State, batch: Batch, key: Any) -> tuple[Estimate, State]:
        params, state, batch = as_arrays((params, state, batch))
        check_call(problem, params, state, batch)
        kind = jnp.finfo(jnp.result_type(*jax.tree.leaves(floats(state)))).dtype
        if kind.itemsize < 4:
            raise SettingError(
                "state", kind, "float32 or float64", "LAPACK solves no shorter ones."
            )
        with jax.ensure_compile_time_eval():
            _check_invertible(problem, params, state, batch)
        layout = (WHOLE, sequences(0), sequences(1), WHOLE)
        each = (sequences(1), *[sequences(0)] * 3)
        run = in_parts(partial(_two_sweeps, problem), batch.mask.shape[1], layout, each)
        tokens = token_count(params, batch)
        (loss, grads, rounding), (norms, missed, e, end) = run(
            params, lax.stop_gradient(state), batch, tokens
        )
        errors = _relative(missed, e), _relative(rounding, grads["cell"])
        good = jnp.maximum(*errors) <= tolerance
        grads = jax.tree.map(lambda g: jnp.where(good, g, jnp.nan), grads)
        metrics = {
            "adjoint_norms": norms,
            "closing_error": errors[0],
            "rounding_error": errors[1],
        }
        return Estimate(loss, grads, metrics), lax.stop_gradient(end)

    return Strategy(
        init=lambda params, batch_size: problem.cell.zeros(batch_size),
        estimate=estimate,
        claim=Claim(exact=True, unbiased=True, memory="1", steps="2 T", source="Zucchet 2026"),
    )


def _relative(error: Any, to: Any) -> Float[Array, ""]:
    """Return the norm of an error relative to another; without a token both are 0."""
    return norm(error) / jnp.where(norm(to) == 0, 1, norm(to))


def _two_sweeps(
    problem: Problem, params: Params, state: State, batch: Batch, tokens: Float[Array, ""]
) -> Any:
    step = partial(_step, problem, params, tokens)
    begin, ends = _first_adjoints(step, state, batch)
    directions = np.random.default_rng(0).normal(size=begin.shape) / np.sqrt(begin.shape[1])

    def beside(adjoint: Array, wrong: Array) -> Float[Array, "B n 2"]:
        """Put an adjoint beside its error, which the error of this step joins."""
        size = jnp.finfo(adjoint.dtype).eps * norm(adjoint, keep=1)[:, None]
        return jnp.stack([adjoint, wrong + size * jnp.asarray(directions, adjoint.dtype)], axis=2)

    def one(carry: Any, now: tuple[Batch, Int[Array, ""]]) -> tuple[Any, Array]:
        before, left, (loss, grads, rounding), closing = carry
        state, run, e, J = step(before, now[0])
        solved = jax.vmap(solve)(jnp.swapaxes(J, 1, 2), left)
        both = jnp.where(now[1] == 0, left, solved)
        both = jnp.where((now[1] > ends)[:, None, None], 0, both)
        adjoint, wrong = both[..., 0], both[..., 1]
        here = (now[1] == ends)[:, None]
        closing = tuple(
            jnp.where(here, new, old) for new, old in zip((adjoint - e, e), closing, strict=True)
        )
        of_cell, of_wrong = (
            run.parameter_gradient(jax.tree.map(lambda a: a[None], like(sent, floats(state))))
            for sent in (adjoint, wrong)
        )
        own = {"cell": of_cell, "readout": run.readout_gradient}
        sums = loss + run.loss, add(grads, own), add(rounding, of_wrong)
        return (state, beside(adjoint - e, wrong), sums, closing), norm(adjoint, keep=1)

    none = zeros_like(begin)
    sums = (jnp.zeros((), tokens.dtype), zeros_like(params), zeros_like(params["cell"]))
    start = state, beside(begin, none), sums, (none, none)
    (end, _, sums, closing), norms = lax.scan(one, start, (batch, jnp.arange(len(batch.mask))))
    return sums, (norms, *closing, end)


def _first_adjoints(step: Any, state: State, batch: Batch) -> tuple[Array, Int[Array, "B"]]:
    """Run the first pass: λ_1 [B, n], and the last step with e_t ≠ 0 of each sequence, or -1."""

    def one(carry: Any, now: tuple[Batch, Int[Array, ""]]) -> tuple[Any, None]:
        state, phi, total, ends = carry
        state, _, e, J = step(state, now[0])
        phi = jnp.where(now[1] == 0, phi, J @ phi)  # J_t … J_2
        ends = jnp.where(jnp.any(e != 0, axis=1), now[1], ends)
        return (state, phi, total + jnp.einsum("bij,bi->bj", phi, e), ends), None

    none = zeros_like(rows(floats(state)))
    identity = jnp.broadcast_to(
        jnp.eye(none.shape[1], dtype=none.dtype), (*none.shape, none.shape[1])
    )
    start = state, identity, none, jnp.full(len(none), -1)
    (_, _, begin, ends), _ = lax.scan(one, start, (batch, jnp.arange(len(batch.mask))))
    return begin, ends


def _step(
    problem: Problem, params: Params, tokens: Float[Array, ""], state: State, now: Batch
) -> tuple[State, ForwardPass, Array, Array]:
    """Run one step: the next state, its derivatives, e_t [B, n] and J_t [B, n, n]."""
    now = jax.tree.map(lambda a: a[None], now)
    stored = forward(problem.cell, params["cell"], state, now.inputs)
    run = differentiate(problem, params, stored.residuals(now.inputs), now, tokens)
    e = rows(jax.tree.map(lambda a: a[0], run.immediate))
    return last(stored.after), run, e, _jacobian(run, floats(state))


def _jacobian(run: ForwardPass, state: State) -> Float[Array, "B n n"]:
    """Compute J_t of one step, row by row: the step VJP of each unit vector."""
    residuals = jax.tree.map(lambda a: a[0], run.residuals)
    none = jnp.zeros_like(rows(state))

    def row(unit: Float[Array, "n"]) -> Float[Array, "B n"]:
        return rows(run.step_vjp(like(none + unit, state), residuals))

    return jnp.swapaxes(jax.vmap(row)(jnp.eye(none.shape[1], dtype=none.dtype)), 0, 1)


def _check_invertible(problem: Problem, params: Params, state: State, batch: Batch) -> None:
    """Check J once, at random numbers: only the shapes and dtypes of the arguments matter."""
    rng = np.random.default_rng(0)

    def jacobian(theta: Params, h: State, now: Batch) -> Float[Array, "B n n"]:
        stored = forward(problem.cell, theta["cell"], h, now.inputs)
        run = differentiate(problem, theta, stored.residuals(now.inputs), now, jnp.ones(()))
        return _jacobian(run, floats(h))

    draw = lambda _: drawn(rng, params, scaled=True)  # noqa: E731
    others = lambda _: drawn(rng, (state, Batch(*(a[:1] for a in batch))))  # noqa: E731
    for _, J, _ in tried(jacobian, draw, others, problem.init, sizes=(0.5,)):
        if has_nan(J):
            continue
        sizes = np.linalg.svd(np.asarray(J, float), compute_uv=False)
        if not (sizes[:, -1] > 1e-6 * sizes[:, 0]).all():
            way_out = "Use `full` or `checkpointed`."
            raise SettingError(
                "cell", "one that forgets", "one whose ∂h_t/∂h_{t-1} can be inverted", way_out
            )
