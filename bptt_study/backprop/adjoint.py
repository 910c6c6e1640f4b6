"""The backward recursion λ_t = e_t + ξ_{t+1} J_{t+1}ᵀ λ_{t+1}, and the parameter gradient Σ_t λ_tᵀ I_t.

λ_t = ∂L/∂h_t is the adjoint, e_t = ∂l_t/∂h_t the part of it that step t's own loss sends, J_t = ∂h_t/∂h_{t-1},
and I_t = ∂f/∂θ at step t with h_{t-1} held fixed. Adjoints are trees like the state's floats.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bptt_study.backprop.forward import (
    Residuals,
    derivative,
    read_out,
)
from bptt_study.backprop.pytrees import (
    add,
    as_types_of,
    floats,
    merge_time_and_batch,
    with_floats,
    zeros_like,
)
from bptt_study.types import Affine, Cell, Layers, Params, State

# (λ_t, residuals of step t) -> J_tᵀ λ_t, leaves [B, H]
StepVJP = Callable[[State, Residuals], State]


def step_vjp(cell: Cell, params: Params) -> StepVJP:
    """Make the map (λ_t, residuals of step t) -> J_tᵀ λ_t.

    Args:
      cell: The cell.
      params: The cell's parameters.

    Returns:
      The map, for leaves [B, H].
    """
    if isinstance(cell.affine, Affine):
        return _affine_step_vjp(cell.affine, params)

    def vjp(adjoint: State, now: Residuals) -> State:
        def step(state: State) -> State:
            return floats(cell.step(params, with_floats(now.before, state), now.inputs))

        return jax.vjp(step, floats(now.before))[1](adjoint)[0]

    return vjp


def _affine_step_vjp(affine: Affine, params: Params) -> StepVJP:
    # XLA's product with a transposed W_hh transposes the matrix in each step. Transposing it here once, and
    # back in the loop, makes XLA cancel the two transpositions.
    turned = jax.tree.map(lambda W: lax.optimization_barrier(W.T), params)

    def recur_vjp(state: State, cotangent: Any) -> State:
        """Use that `recur` is affine in h: its derivative is the same everywhere."""
        own = jax.tree.map(jnp.transpose, turned)
        return jax.vjp(lambda h: affine.recur(own, h), zeros_like(state))[1](cotangent)[0]

    def vjp(adjoint: State, now: Residuals) -> State:
        _, to_recur, direct = update_vjp(affine, now, adjoint)
        return add(recur_vjp(now.before, to_recur), direct)

    return vjp


def update_vjp(affine: Affine, now: Residuals, adjoint: State) -> tuple[Any, Any, State]:
    """Pull λ_t back through the update to cotangents of (project, recur, h_{t-1})."""
    return derivative(affine).vjp((now.update, now.before, now.after), adjoint)


def weighted(vjp: StepVJP) -> Callable[[State, tuple[Residuals, Any]], State]:
    """Make the map (λ_t, (residuals of step t, ξ_t)) -> ξ_t J_tᵀ λ_t; ξ_t = None stands for 1."""

    def scaled(adjoint: State, now: tuple[Residuals, Any]) -> State:
        residuals, xi = now
        passed = vjp(adjoint, residuals)
        if xi is None:
            return passed
        return jax.tree.map(lambda a: (per_sequence(xi, a) * a).astype(a.dtype), passed)

    return scaled


def per_sequence(xi: Array, leaf: Array) -> Array:
    """Reshape numbers [B], or [T, B], so that they multiply a leaf [B, …], or [T, B, …]."""
    return xi.reshape(xi.shape + (1,) * (leaf.ndim - xi.ndim))


def recursion(vjp: Any, immediate: State, residuals: Any, arriving: State) -> tuple[State, State]:
    """Run the recursion λ_t = e_t + vjp(λ_{t+1}, residuals of step t + 1) over T steps.

    Returns:
      The adjoint that the first step sends to the state before it, and all λ_t, leaves [T, …].
    """

    def step(arriving: State, now: Any) -> tuple[State, State]:
        e, residuals = now
        adjoint = add(e, arriving)
        return as_types_of(arriving, vjp(adjoint, residuals)), adjoint

    return lax.scan(step, arriving, (immediate, residuals), reverse=True)


def adjoints(
    cell: Cell,
    params: Params,
    residuals: Residuals,
    immediate: State,
    link_weights: Float[Array, "T B"] | None,
    arriving: State,
) -> tuple[State, State]:
    """Run the backward recursion over T steps; only link weights cut it.

    Args:
      cell: The cell.
      params: Its parameters.
      residuals: The residuals of these steps.
      immediate: e_t, leaves [T, B, H].
      link_weights: ξ_t [T, B]. None: 1.
      arriving: The adjoint that arrives at the last state from later steps, leaves [B, H].

    Returns:
      The adjoint that the first step sends to the state before it, leaves [B, H], and all λ_t, [T, B, H].
    """
    run = _layers_adjoints if isinstance(cell.affine, Layers) else joint_adjoints
    return run(cell, params, residuals, immediate, link_weights, arriving)


def joint_adjoints(
    cell: Cell,
    params: Params,
    residuals: Residuals,
    immediate: State,
    link_weights: Float[Array, "T B"] | None,
    arriving: State,
) -> tuple[State, State]:
    """Compute `adjoints` for all layers together: one step of the recursion sends a whole state back."""
    vjp = weighted(step_vjp(cell, params))
    return recursion(vjp, immediate, (residuals, link_weights), arriving)


def _layers_adjoints(
    cell: Cell,
    params: Params,
    residuals: Residuals,
    immediate: State,
    link_weights: Float[Array, "T B"] | None,
    arriving: State,
) -> tuple[State, State]:
    """Compute `adjoints` layer by layer from the top: every path crosses each link of time once, in any layer.

    Within a step, the adjoint of a layer's state also goes to the layer below. The returned λ_t leave this part
    out, because the states of all layers together are one h_t.
    """
    each = _each_layer(cast(Layers, cell.affine), params, residuals)
    leaving, shown = [], []
    from_above: State | None = None
    for n, (layer, theta, own) in reversed(list(enumerate(each))):
        e = immediate[n] if from_above is None else add(immediate[n], from_above)
        left, total = adjoints(layer, theta, own, e, link_weights, arriving[n])
        leaving.append(left)
        shown.append(total if from_above is None else _subtract(total, from_above))
        from_above = _to_layer_below(each, n, total) if n else None
    return tuple(reversed(leaving)), tuple(reversed(shown))


def _each_layer(
    layers: Layers, params: Params, residuals: Residuals
) -> list[tuple[Cell, Params, Residuals]]:
    below, found = residuals.inputs, []
    for n, (cell, theta) in enumerate(zip(layers.cells, params, strict=True)):
        own = Residuals(below, *(part[n] for part in residuals[1:]))
        found.append((cell, theta, own))
        below = read_out(cell, own.after)
    return found


def _to_layer_below(each: list[tuple[Cell, Params, Residuals]], n: int, total: State) -> State:
    """Compute the adjoints that layer n sends, within the same step, to the state of the layer below."""
    to_inputs = input_gradient(*each[n], total)
    below, _, own = each[n - 1]
    read = lambda h: read_out(below, with_floats(own.after, h))  # noqa: E731
    return jax.vjp(read, floats(own.after))[1](to_inputs)[0]


def _subtract(a: State, b: State) -> State:
    return jax.tree.map(jnp.subtract, a, b)


def parameter_gradient(cell: Cell, params: Params, residuals: Residuals, adjoints: State) -> Params:
    """Compute the parameter gradient Σ_t λ_tᵀ I_t over the steps of `residuals`, a tree like `params`."""
    if isinstance(cell.affine, Layers):
        each, found = _each_layer(cell.affine, params, residuals), []
        from_above: State | None = None
        for n, (own, theta, kept) in reversed(list(enumerate(each))):
            total = adjoints[n] if from_above is None else add(adjoints[n], from_above)
            found.append(parameter_gradient(own, theta, kept, total))
            from_above = _to_layer_below(each, n, total) if n else None
        return type(params)(reversed(found))
    if isinstance(cell.affine, Affine):
        return _affine_parameter_gradient(cell.affine, params, residuals, adjoints)
    return jax.vjp(lambda p: _steps(cell, p, residuals), params)[1](adjoints)[0]


def _steps(cell: Cell, params: Params, residuals: Residuals) -> State:
    """Compute the floats of h_1 … h_T, each step from its own h_{t-1}, all steps side by side."""
    return floats(jax.vmap(partial(cell.step, params))(residuals.before, residuals.inputs))


def _affine_parameter_gradient(
    affine: Affine, params: Params, residuals: Residuals, adjoints: State
) -> Params:
    # one axis of T·B tokens, because XLA's products over two axes are slower
    to_project, to_recur = merge_time_and_batch(through_update(affine, residuals, adjoints))
    inputs, before = merge_time_and_batch((residuals.inputs, residuals.before))
    (grads,) = jax.vjp(lambda p: affine.project(p, inputs), params)[1](to_project)
    (recur_grads,) = jax.vjp(lambda p: affine.recur(p, before), params)[1](to_recur)
    return add(grads, recur_grads)


def through_update(affine: Affine, residuals: Residuals, adjoints: State) -> tuple[Any, Any]:
    """Pull all λ_t back to cotangents of (project, recur), leaves [T, B, …]."""
    return jax.vmap(lambda now, adjoint: update_vjp(affine, now, adjoint))(residuals, adjoints)[:2]


def input_gradient(cell: Cell, params: Params, residuals: Residuals, adjoints: State) -> Array:
    """Compute λ_tᵀ ∂f/∂x_t, summed over the units, [T, B, D], for float inputs."""
    if isinstance(cell.affine, Affine):
        affine = cell.affine
        to_project, _ = merge_time_and_batch(through_update(affine, residuals, adjoints))
        inputs = merge_time_and_batch(residuals.inputs)
        (found,) = jax.vjp(lambda x: affine.project(params, x), inputs)[1](to_project)
        return found.reshape(residuals.inputs.shape)
    run = lambda x: _steps(cell, params, residuals._replace(inputs=x))  # noqa: E731
    return jax.vjp(run, residuals.inputs)[1](adjoints)[0]
