"""The phases of full BPTT, each a separate program that starts from the results of earlier phases.

Segments, devices and sums are as in the schedule `store_all`; arrays over time are [segments, steps, B, …].
The phases of one point share its arrays, so they run in one process.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from point import Contender, Point, compiled, setting

import bptt_study as bs
from bptt_study.backprop import BATCH_AXIS
from bptt_study.backprop.adjoint import joint_adjoints
from bptt_study.backprop.forward import Stored, derivative, project
from bptt_study.backprop.forward_pass import ForwardPass, differentiate
from bptt_study.backprop.pytrees import last, merge_time_and_batch
from bptt_study.backprop.schedules.call import even, segment_length

# the layout of an array on the devices
LIES: dict[str, tuple[str | None, ...]] = {
    "whole": (),
    "rows": (BATCH_AXIS,),
    "steps": (None, BATCH_AXIS),
    "segments": (None, None, BATCH_AXIS),
}
_once_each = lru_cache(maxsize=1)


class _Segmented(NamedTuple):
    """The arrays that the phases of a point share, on the devices."""

    problem: Any
    params: Any
    state: Any
    batch: Any
    parts: int

    def run(self, params: Any, stored: Stored, batch: Any) -> ForwardPass:
        """Run the forward pass of one segment; the compiler leaves out the parts that a phase does not use."""
        residuals = stored.residuals(batch.inputs)
        tokens = jnp.asarray(self.batch.mask.size, self.batch.mask.dtype)
        return differentiate(self.problem, params, residuals, batch, tokens)

    def alone(self, f: Callable[..., Any], out: Any, *arguments: Any) -> Contender:
        """Make f a program that each device runs on its part of the arguments; `out` is the results' layout."""
        with bs.devices.split_batch(self.parts):
            into = jax.tree.map(lambda a: a.sharding.spec, arguments)
            onto = jax.tree.map(lambda lies: P(*LIES[lies]), out)
            split = jax.shard_map(f, in_specs=into, out_specs=onto, check_vma=False)
            return compiled(split, *arguments)


@_once_each
def segmented(point: Point) -> _Segmented:
    """Make the arguments of all phases."""
    bs.devices.use("auto")
    problem, params, state, batch = setting(point)
    parts = math.gcd(point.batch_size, jax.device_count())
    size = point.batch_size // parts
    length = even(point.steps, segment_length(problem.cell.zeros(size), size))
    batch = jax.tree.map(lambda a: a.reshape(-1, length, point.batch_size), batch)
    with bs.devices.split_batch(parts):

        def placed(tree: Any, lies: str) -> Any:
            spec = jax.NamedSharding(jax.sharding.get_mesh(), P(*LIES[lies]))
            return jax.device_put(tree, spec)

        lying = placed(params, "whole"), placed(state, "rows"), placed(batch, "segments")
    return _Segmented(problem, *lying, parts)


def _summed(f: Callable[..., Any], *segments: Any) -> Any:
    """Return (Σ f(segment)[0] over segments and devices, f(segment)[1] of each)."""

    def further(total: Any, segment: Any) -> Any:
        found, beside = f(*segment)
        return jax.tree.map(jnp.add, total, found), beside

    like = jax.eval_shape(f, *jax.tree.map(lambda a: a[0], segments))[0]
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    total, beside = jax.lax.scan(further, nothing, segments)
    return jax.lax.psum(total, BATCH_AXIS), beside


# ---- the phases


@_once_each
def embedding(point: Point) -> Contender:
    """Compute the input's part of the pre-activations, for all time steps."""
    at = segmented(point)

    def of(params: Any, inputs: Any) -> Any:
        return jax.lax.map(partial(project, at.problem.cell.affine, params["cell"]), inputs)

    return at.alone(of, "segments", at.params, at.batch.inputs)


@_once_each
def forward(point: Point) -> Contender:
    """Run the recursion of the states, as `backprop.forward.forward` does after the projection."""
    at = segmented(point)
    affine = at.problem.cell.affine
    update = derivative(affine).forward

    def of(params: Any, state: Any, projected: Any) -> Any:
        def step(state: Any, projected: Any) -> Any:
            after, kept = update(projected, affine.recur(params["cell"], state), state)
            return after, (after, kept)

        def segment(state: Any, projected: Any) -> Any:
            stored = Stored(state, *jax.lax.scan(step, state, projected)[1])
            return last(stored.after), stored

        return jax.lax.scan(segment, state, projected)[1]

    lies = Stored("steps", "segments", "segments")
    return at.alone(of, lies, at.params, at.state, embedding(point)[0]())


@_once_each
def head(point: Point) -> Contender:
    """Run readout and loss: the loss, the readout's gradient, e_t."""
    at = segmented(point)

    def of(params: Any, stored: Any, batch: Any) -> Any:
        def segment(stored: Any, batch: Any) -> Any:
            run = at.run(params, stored, batch)
            return (run.loss, run.readout_gradient), run.immediate

        return _summed(segment, stored, batch)

    return at.alone(of, ("whole", "segments"), at.params, forward(point)[0](), at.batch)


@_once_each
def backward(point: Point) -> Contender:
    """Run the recursion of the adjoints."""
    at = segmented(point)
    cell = at.problem.cell

    def of(params: Any, stored: Any, batch: Any, immediate: Any) -> Any:
        def back(arriving: Any, segment: Any) -> Any:
            stored, batch, e = segment
            residuals = stored.residuals(batch.inputs)
            return joint_adjoints(cell, params["cell"], residuals, e, None, arriving)

        nothing = cell.zeros(batch.mask.shape[-1])
        return jax.lax.scan(back, nothing, (stored, batch, immediate), reverse=True)[1]

    _, immediate = head(point)[0]()
    return at.alone(of, "segments", at.params, forward(point)[0](), at.batch, immediate)


@_once_each
def contraction(point: Point) -> Contender:
    """Compute the cell's gradient from the adjoints."""
    at = segmented(point)

    def of(params: Any, stored: Any, batch: Any, adjoints: Any) -> Any:
        def segment(stored: Any, batch: Any, adjoints: Any) -> Any:
            return at.run(params, stored, batch).parameter_gradient(adjoints), ()

        return _summed(segment, stored, batch, adjoints)[0]

    adjoints = backward(point)[0]()
    return at.alone(of, "whole", at.params, forward(point)[0](), at.batch, adjoints)


PHASES = {f.__wrapped__.__name__: f for f in (embedding, forward, head, backward, contraction)}


def apart(point: Point) -> Contender:
    """Run the phases one after the other, and wait for each."""
    return lambda: [phase(point)[0]() for phase in PHASES.values()], {}


# ---- the matrix products of each phase, with the same shapes


@_once_each
def forward_products(point: Point) -> Contender:
    """Compute [B, H] × [H, GH] in each step."""
    at = segmented(point)

    def of(W: Any, h: Any) -> Any:
        return _summed(lambda h: (h @ W, ()), merge_time_and_batch(h))[0]

    return at.alone(of, "whole", at.params["cell"]["W_hh"], _arrays(point)[0])


@_once_each
def head_products(point: Point) -> Contender:
    """Compute the products of the readout, of e_t and of the readout's gradient in each segment."""
    at = segmented(point)

    def of(W: Any, h: Any) -> Any:
        def segment(h: Any) -> Any:
            h = merge_time_and_batch(h)
            outputs = h @ W
            return h.T @ outputs, outputs @ W.T

        return _summed(segment, h)

    out = ("whole", "steps")
    return at.alone(of, out, at.params["readout"]["W_hq"], _arrays(point)[0])


@_once_each
def backward_products(point: Point) -> Contender:
    """Compute [B, GH] × [GH, H] in each step."""
    at = segmented(point)

    def of(W: Any, delta: Any) -> Any:
        # transposed once, because XLA would transpose it in each step
        V = jax.lax.optimization_barrier(W.T)
        return _summed(lambda delta: (delta @ V, ()), merge_time_and_batch(delta))[0]

    return at.alone(of, "whole", at.params["cell"]["W_hh"], _arrays(point)[1])


@_once_each
def contraction_products(point: Point) -> Contender:
    """Compute [H, SB] × [SB, GH] in each segment."""
    at = segmented(point)

    def of(h: Any, delta: Any) -> Any:
        def segment(h: Any, delta: Any) -> Any:
            return merge_time_and_batch(h).T @ merge_time_and_batch(delta), ()

        return _summed(segment, h, delta)[0]

    return at.alone(of, "whole", *_arrays(point))


def _arrays(point: Point) -> tuple[Any, Any]:
    """Compute h_t, and numbers with the shape of all gates' pre-activations."""
    projected = jax.tree.leaves(embedding(point)[0]())
    states = forward(point)[0]().after
    return segmented(point).problem.cell.read(states), jnp.concatenate(projected, axis=-1)
