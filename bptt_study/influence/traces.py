"""M stored as two traces for each group of parameters, one of the features and one of the slopes: pp-prop."""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bptt_study.backprop.adjoint import update_vjp
from bptt_study.backprop.forward import Residuals
from bptt_study.backprop.pytrees import (
    add,
    as_types_of,
    floats,
    merge_time_and_batch,
    wide,
    zeros_like,
)
from bptt_study.influence import units
from bptt_study.influence.kronecker import by_products, features, gates_like, in_shape, sizes
from bptt_study.influence.past import Block, Past
from bptt_study.influence.pytrees import joined, like
from bptt_study.types import Affine, Cell, Params, State


class Traces(NamedTuple):
    """ε_x and ε_f, a list each, of the groups that have gates."""

    features: list[Float[Array, "B F"]]
    slopes: list[Float[Array, "B S K"]]  # S leaves of the state


def traces(cell: Cell, name: str, decay: float) -> Past:
    """Store M ≈ ε_x ⊗ ε_f, F + n/H·K numbers per sequence and group, biased (braintrace's pp-prop, ES-D-RTRL).

        ε_x ← α ε_x + φ,    ε_f ← α D_t ε_f + (1 - α) D,

    where D_t are each unit's own entries of J_t. With g_t = e_t ε_f,t the gradient of a group is

        Σ_t ε_x,t ⊗ g_t = Σ_t φ_t ⊗ G_t + α ε_x,0 ⊗ G_1,    G_t = g_t + α G_{t+1},

    so that all steps of a block share one product, and none stores a trace of features.

    Args:
      cell: A cell whose parameters are matrices of features × (gates × units).
      name: The name of the strategy, for its errors.
      decay: α.

    Returns:
      The past.

    Raises:
      SettingError: For another cell.
    """
    check, theta = by_products(cell, name), units.shapes_of(cell)
    affine, S = cast(Affine, cell.affine), len(jax.tree.leaves(like(cell)))

    def start(params: Params, batch_size: int) -> Traces:
        F, K, dtype = sizes(cell, params)
        zeros = partial(jnp.zeros, dtype=dtype)
        return Traces([zeros((batch_size, F)) for _ in K], [zeros((batch_size, S, k)) for k in K])

    def send(m: Traces, adjoint: State) -> Params:
        return _product(theta, m.features, [_sent(f, _stacked(adjoint)) for f in m.slopes])

    def roll(m: Traces, block: Block, signs: Any) -> Traces:
        return all_steps(m, block, zeros_like(floats(block.residuals.after)))[0]

    def all_steps(m: Traces, block: Block, immediate: State) -> tuple[Traces, Params]:
        # in short floats α = 0.999 would be 1, and 1 - α would not
        immediate = wide(immediate)
        D, own = _slopes(affine, block)
        slopes, each = _slope_traces(decay, m.slopes, D, own)
        G = _reverse_sums(decay, [_sent(f, _stacked(immediate)) for f in each])
        before = _product(theta, [decay * x for x in m.features], [g[0] for g in G])
        after = Traces(_feature_traces(decay, m.features, affine, block), slopes)
        return after, add(before, _gradient(affine, block, G))

    return Past(start, send, roll, through=units.diagonal, check=check, all_steps=all_steps)


def _stacked(state: State) -> Float[Array, "*lead S H"]:
    return jnp.stack(jax.tree.leaves(state), axis=-2)


def _sent(f: Float[Array, "*lead S K"], u: Float[Array, "*lead S H"]) -> Float[Array, "*lead K"]:
    return jnp.sum(f * units.over_gates(u, f), axis=-2)


def _product(theta: Params, features: list[Array], sent: list[Array]) -> Params:
    """Compute Σ ε_x ⊗ g over groups and sequences, a tree like the parameters."""
    each = [x.T @ g for x, g in zip(features, sent, strict=True)]
    return in_shape(cast(Array, sum(each)), theta)


def _slopes(affine: Affine, block: Block) -> tuple[list[Array], Array]:
    """Compute D of the groups, [T, B, S, K], and D_t, [T, B, to, from, H]."""

    def at_step(now: Residuals) -> tuple[list[Array], Array]:
        ones = units.each_ones(floats(now.after))
        D = jax.vmap(lambda u: update_vjp(affine, now, u)[:2], 0, 1)(ones)
        own = jax.vmap(lambda u: _stacked(block.vjp(u, now)), 0, 1)(ones)
        return [joined(d, 2) for d in D if jax.tree.leaves(d)], own

    return jax.vmap(at_step)(block.residuals)


def _slope_traces(
    decay: float, traces: list[Array], D: list[Array], own: Array
) -> tuple[list[Float[Array, "B S K"]], list[Float[Array, "T B S K"]]]:
    """Compute ε_f at the end of the block, and at each of its steps."""

    def step(
        traces: list[Array], now: tuple[list[Array], Array]
    ) -> tuple[list[Array], list[Array]]:
        slopes, own = now

        def rolled(f: Array, D: Array) -> Array:
            # a sum of a few products: a reduction over so short an axis is slow in a loop
            passed = (units.over_gates(own[:, :, k], D) * f[:, None, k] for k in range(f.shape[1]))
            return decay * sum(passed) + (1 - decay) * D

        traces = as_types_of(traces, jax.tree.map(rolled, traces, slopes))
        return traces, traces

    return lax.scan(step, traces, (D, own))


def _reverse_sums(decay: float, g: list[Float[Array, "T B K"]]) -> list[Float[Array, "T B K"]]:
    """Compute G_t = g_t + α G_{t+1}."""

    def step(later: list[Array], now: list[Array]) -> tuple[list[Array], list[Array]]:
        found = [g + decay * G for g, G in zip(now, later, strict=True)]
        return found, found

    return lax.scan(step, [zeros_like(a[0]) for a in g], g, reverse=True)[1]


def _feature_traces(
    decay: float, traces: list[Array], affine: Affine, block: Block
) -> list[Float[Array, "B F"]]:
    """Compute ε_x at the end of the block."""
    now, steps = block.residuals, len(block.residuals.inputs)
    weights = decay ** jnp.arange(steps)[::-1].astype(traces[0].dtype)
    total = weights.sum()

    def of_one(sequence: tuple[Array, State]) -> list[Array]:
        x, h = sequence
        # the features of `recur` are affine in h, so that those of the mean are their mean
        mean = jax.tree.map(lambda a: jnp.tensordot(weights / total, a, 1)[None], h)
        mean = as_types_of(h, mean)
        maps = (affine.project, x, weights), (affine.recur, mean, total[None])
        return [features(f, block.params, at, w) for f, at, w in maps[: len(traces)]]

    # one sequence at a time, because the derivative of each is as large as the parameters
    each = jax.tree.map(lambda a: a.swapaxes(0, 1), (now.inputs, now.before))
    new = lax.map(of_one, each)
    return [decay**steps * x + own for x, own in zip(traces, new, strict=True)]


def _gradient(affine: Affine, block: Block, G: list[Array]) -> Params:
    """Compute Σ_t φ_t ⊗ G_t over groups and sequences, a tree like the parameters."""
    x, h = merge_time_and_batch((block.residuals.inputs, block.residuals.before))
    run = lambda p: [affine.project(p, x), affine.recur(p, h)][: len(G)]  # noqa: E731
    out, vjp = jax.vjp(run, block.params)
    each = zip(out, merge_time_and_batch(G), strict=True)
    return vjp(as_types_of(out, [gates_like(a, sums) for a, sums in each]))[0]
