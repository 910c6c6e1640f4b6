"""Perturbed passes: random directions move the parameters, and the loss's response gives the gradient.

    θ_t = θ + σ v_e(t),   ξ_t = the sum of the directions drawn until step t,   ĝ = Σ_t (dl_t/dσ) ξ_t

v_e is drawn anew for every block e of time. dl_t/dσ at σ = 0 is a jvp. For σ > 0 it is the antithetic
difference (l_t⁺ - l_t⁻)/2σ of two particles, which needs no derivative. No adjoint goes back through time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bptt_study.backprop.forward import mean_loss, states, token_count
from bptt_study.backprop.parts import WHOLE, in_parts, sequences
from bptt_study.backprop.pytrees import add, as_arrays, as_types_of, floats, last, wide, with_floats
from bptt_study.backprop.schedules.call import no_sums, segment_length
from bptt_study.backprop.shapes import check_call
from bptt_study.types import Batch, Estimate, Params, Problem, State


class Particles(NamedTuple):
    """The states that N perturbations carry through time."""

    state: State  # h without perturbation, leaves [B, …]
    apart: State  # tangents of h, leaves [N, B, …], or the states of θ + σv, then of θ - σv, [2N, B, …]
    drawn: Params  # ξ, leaves [N, …]; 0 before the first draw; a long sum, wide within a call


class Answers(NamedTuple):
    """The response of one stretch of time to N perturbations."""

    loss: Float[Array, ""]  # without perturbation
    # the part of the gradient that needs no perturbation: the readout's, or nothing
    local: dict[str, Params]
    slopes: Float[Array, "N"]  # Σ dl_t/dσ
    particles: Particles  # at the end of the stretch


class Derivative(NamedTuple):
    """A way to compute the loss's response."""

    moved: Callable[[Params], dict[str, Params]]  # the part of the parameters that is perturbed
    # (h, N) -> `Particles.apart` of particles that come from h
    start: Callable[[State, int], State]
    # (problem, params, particles, v, batch, tokens) -> one stretch of time
    answers: Callable[[Problem, Params, Particles, Params, Batch, Array], Answers]
    sigma: float | None = None  # None: a derivative


class Course(NamedTuple):
    """The course of the perturbations in time."""

    derivative: Derivative
    hold: int | None  # steps of a block, counted from the start of the call; None: all of them
    # (particles, fresh v, `apart` of particles that come from h) -> (particles at the block's start, its v)
    enter: Callable[[Particles, Params, State], tuple[Particles, Params]]


def restart(particles: Particles, v: Params, fresh: State) -> tuple[Particles, Params]:
    """Start every block from h, so that it responds only to its own v."""
    return Particles(particles.state, fresh, wide(v)), v


def accumulate(particles: Particles, v: Params, fresh: State) -> tuple[Particles, Params]:
    """Let the particles go on with another v; they respond to all v drawn so far (Vicol et al. 2021)."""
    return particles._replace(drawn=add(particles.drawn, v)), v


def keep(particles: Particles, v: Params, fresh: State) -> tuple[Particles, Params]:
    """Let the first v stay until the particles start anew (Li et al. 2023)."""
    undrawn = jnp.stack([jnp.all(d == 0) for d in jax.tree.leaves(particles.drawn)]).all()
    v = as_types_of(v, jax.tree.map(partial(jnp.where, undrawn), v, particles.drawn))
    return particles._replace(drawn=wide(v)), v


def perturbed(
    problem: Problem,
    params: Params,
    particles: Particles,
    batch: Batch,
    draw: Callable[[Any, Int[Array, ""]], Params],
    noise: Any,
    course: Course,
) -> tuple[Estimate, Particles]:
    """Estimate the gradient of one batch from the response of its loss to perturbations.

    Args:
      problem: Cell, readout and loss.
      params: {"cell": …, "readout": …}.
      particles: The particles at the start of the call.
      batch: Inputs [T, B] or [T, B, D], targets [T, B, …], mask [T, B].
      draw: (noise, number of a block) -> v, leaves [N, …], the same for all sequences.
      noise: A key, or all draws.
      course: The course of the perturbations in time.

    Returns:
      The estimate, without metrics, and the particles after the last step.

    Raises:
      SettingError: For a batch that cannot be split over the devices, and a cell that breaks a promise.
    """
    params, particles, batch = as_arrays((params, particles, batch))
    steps, size = batch.mask.shape
    check_call(problem, params, particles.state, batch)
    hold = min(course.hold or steps, steps)

    def run(params: Params, particles: Particles, batch: Batch, noise: Any, tokens: Array) -> Any:
        walk = _Walk(problem, params, batch, tokens, course)

        def block(carry: Any, start: Any, steps: int) -> Any:
            particles, sums = carry
            return walk.block(particles, sums, draw(noise, start // hold), start, steps)

        carry = particles._replace(drawn=wide(particles.drawn)), no_sums(params, tokens)
        after, sums = _stretches(block, carry, steps, hold)
        return sums, after._replace(drawn=as_types_of(particles.drawn, after.drawn))

    layout = Particles(sequences(0), sequences(1), WHOLE)
    arguments = (WHOLE, layout, sequences(1), WHOLE, WHOLE)
    run = in_parts(run, size, arguments, layout)
    particles = lax.stop_gradient(particles)
    (loss, grads), end = run(params, particles, batch, noise, token_count(params, batch))
    return Estimate(loss, as_types_of(params, grads), {}), lax.stop_gradient(end)


class _Walk(NamedTuple):
    """The arguments of one estimate that stay the same on the way through time."""

    problem: Problem
    params: Params
    batch: Batch
    tokens: Float[Array, ""]  # number of tokens of the whole batch, which may be split over devices
    course: Course

    def block(
        self, particles: Particles, sums: tuple[Array, Params], v: Params, start: Any, steps: int
    ) -> tuple[Particles, tuple[Array, Params]]:
        """Run the steps for which v holds, in stretches; memory holds one stretch at a time."""
        derivative, (loss, grads) = self.course.derivative, sums
        pairs = len(jax.tree.leaves(v)[0])
        particles, v = self.course.enter(particles, v, derivative.start(particles.state, pairs))

        def stretch(carry: Any, begin: Any, steps: int) -> Any:
            particles, slopes, loss, grads = carry
            own = jax.tree.map(
                lambda a: lax.dynamic_slice_in_dim(a, start + begin, steps), self.batch
            )
            found = derivative.answers(self.problem, self.params, particles, v, own, self.tokens)
            grads = grads | {name: add(grads[name], own) for name, own in found.local.items()}
            slopes += found.slopes.astype(slopes.dtype)
            return found.particles, slopes, loss + found.loss.astype(loss.dtype), grads

        length = segment_length((particles.state, particles.apart), self.batch.mask.shape[1])
        carry = (particles, jnp.zeros(pairs, self.tokens.dtype), loss, grads)
        particles, slopes, loss, grads = _stretches(stretch, carry, steps, length)
        credit = jax.tree.map(
            lambda xi: (jnp.tensordot(slopes, xi, 1) / pairs).astype(xi.dtype), particles.drawn
        )
        grads = grads | {name: add(grads[name], own) for name, own in credit.items()}
        return particles, (loss, grads)


def _stretches(run: Callable[[Any, Any, int], Any], carry: Any, steps: int, length: int) -> Any:
    """Call run(carry, start, length) for one stretch of time after the other; the last may be shorter."""
    length = min(length, steps)
    whole, rest = divmod(steps, length)
    carry = lax.fori_loop(0, whole, lambda n, carry: run(carry, n * length, length), carry)
    return run(carry, whole * length, rest) if rest else carry


# Two ways to compute the loss's response


def _tangents_of(state: State, pairs: int) -> State:
    return jax.tree.map(lambda h: jnp.zeros((pairs, *h.shape), h.dtype), floats(state))


def _along(
    problem: Problem,
    params: Params,
    particles: Particles,
    v: Params,
    batch: Batch,
    tokens: Float[Array, ""],
) -> Answers:
    """Compute Σ_t e_t · ∂h_t/∂σ, and the readout's own gradient, which is local in time."""
    cell, h = problem.cell, particles.state

    def run(theta: Params, start: State) -> tuple[State, State]:
        after = states(cell, theta, with_floats(h, start), batch.inputs)
        return floats(after), after

    def push(v: Params, tangent: State) -> tuple[State, State, State]:
        return jax.jvp(run, (params["cell"], floats(h)), (v, tangent), has_aux=True)

    _, tangents, after = jax.vmap(push, out_axes=(None, 0, None))(v["cell"], particles.apart)

    def loss_of(readout: Params, own: State) -> Float[Array, ""]:
        return mean_loss(problem, readout, with_floats(after, own), batch, tokens)

    loss, (readout, immediate) = jax.value_and_grad(loss_of, argnums=(0, 1))(
        params["readout"], floats(after)
    )
    each = jax.tree.map(lambda e, d: jnp.tensordot(d, e, e.ndim).real, immediate, tangents)
    apart = jax.tree.map(lambda d: d[:, -1], tangents)
    slopes = sum(jax.tree.leaves(each), start=jnp.zeros((), tokens.dtype))
    return Answers(
        loss, {"readout": readout}, slopes, particles._replace(state=last(after), apart=apart)
    )


TANGENTS = Derivative(lambda params: {"cell": params["cell"]}, _tangents_of, _along)


def differences(sigma: float) -> Derivative:
    """Make the derivative (l⁺ - l⁻)/2σ of pairs of particles at θ ± σv, with all parameters perturbed."""

    def start(state: State, pairs: int) -> State:
        return jax.tree.map(lambda h: jnp.broadcast_to(h, (2 * pairs, *h.shape)), state)

    def answers(
        problem: Problem,
        params: Params,
        particles: Particles,
        v: Params,
        batch: Batch,
        tokens: Float[Array, ""],
    ) -> Answers:
        def run(params: Params, state: State) -> tuple[Array, State]:
            after = states(problem.cell, params["cell"], state, batch.inputs)
            return mean_loss(problem, params["readout"], after, batch, tokens), last(after)

        both = jax.tree.map(
            lambda p, d: p + sigma * jnp.stack([d, -d]).reshape(-1, *p.shape), params, v
        )
        losses, apart = jax.vmap(run)(both, particles.apart)
        loss, state = run(params, particles.state)
        plus, minus = jnp.split(losses, 2)
        slopes = (plus - minus) / (2 * sigma)
        return Answers(loss, {}, slopes, particles._replace(state=state, apart=apart))

    return Derivative(lambda params: params, start, answers, sigma)
