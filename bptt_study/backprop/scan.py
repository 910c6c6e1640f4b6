"""The definition: `lax.scan` whose reverse-mode derivative is truncated.

    λ_t = ∂l_t/∂h_t + ξ_{t+1} J_{t+1}ᵀ λ_{t+1},    ĝ = Σ_t λ_tᵀ I_t,

where the truncation decides which later losses count. `scan` defines every truncation strategy, for any
network, and the tests compare each faster schedule of `backpropagate` with it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters.ad import JVPTracer
from jaxtyping import Array, Bool, Float

from bptt_study.backprop.closed import closed
from bptt_study.backprop.link import checked, weighted
from bptt_study.backprop.pytrees import add, as_types_of, floats, wide, with_floats, zeros_like
from bptt_study.validation import SettingError, whole

GROUP = 64  # steps of the blocks that run side by side: the residuals of more exceed a core's cache


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Any,
    xs: Any = None,
    window: int | None = None,
    stride: int | None = None,
    link_weights: Float[Array, "T *B"] | None = None,
    length: int | None = None,
) -> tuple[Any, Any]:
    """Scan `f` over the leading axis of `xs` as `lax.scan` does, with a truncated derivative.

    The values are those of `lax.scan`, and without settings the gradient is, too. With a window, the gradient
    is TBPTT(k1, k2) with k1 = `stride` and k2 = `window`. The outputs ys come in blocks of `stride` steps
    from step 0 on. The cotangents of the block that starts at step s travel back to step max(0, s - (window -
    stride)), where the carry is detached. The cotangent of the last carry belongs to the last block. A block
    that reaches step 0 continues into `init`, which is an input like `xs`.

    Args:
      f: (carry, x) -> (carry, y), with any trees of arrays. It may close over parameters; their gradient
        is truncated as well.
      init: The carry before the first step.
      xs: A tree of arrays with the leading axis T. A tree without leaves, such as None, needs `length`.
      window: k2, time steps. None: one block holds all steps, whatever the stride.
      stride: k1, time steps. None: the window, so that blocks are chunks; 1: the sliding window.
      link_weights: ξ_t [T], which multiplies all cotangents that pass back over the link h_{t-1} -> h_t;
        0 cuts the link. With [T, B] each sequence has its own, and every leaf of the carry has the leading
        axis B. The gradient depends on ξ and has a derivative by it, which is 0 where ξ_t = 0.
      length: T, which `xs` tells if it has leaves.

    Returns:
      The last carry, and the outputs ys with the leading axis T.

    Raises:
      SettingError: For a window or stride below 1, a stride above the window, and lengths that differ.
      TypeError: Under forward-mode differentiation with a window. `scan` without a window allows it.

    References:
      Williams & Peng 1990.
    """
    init, xs = jax.tree.map(jnp.asarray, (init, xs))
    steps = _length(xs, length)
    if not jax.tree.leaves(xs):
        f, xs = partial(_without_inputs, f, xs), jnp.arange(steps)
    if link_weights is not None:
        f, xs = weighted(f), (xs, checked(jnp.asarray(link_weights), steps, init))
    exact = window is None or not steps
    stride, window = blocks(steps, window, stride)
    if stride >= steps and (exact or not _narrow(f, init, xs)):
        return lax.scan(f, init, xs)
    # as `lax.scan` does, a carry of plain numbers takes the types that the steps give it
    like, _ = jax.eval_shape(partial(lax.scan, f), init, xs)
    init = jax.tree.map(lambda a, b: a if a.dtype == b.dtype else a.astype(b.dtype), init, like)
    step, parameters = closed(f, init, _at(xs, 0))
    if stride >= steps:
        return _block(step, parameters, wide(floats(parameters)), init, xs, None)
    if any(isinstance(leaf, JVPTracer) for leaf in jax.tree.leaves((parameters, init, xs))):
        raise TypeError(
            "bs.scan with a window has a reverse-mode derivative only: take jax.grad or jax.vjp, jax.jacrev in "
            "place of jax.jacfwd, or leave window and stride out for the exact derivative of lax.scan."
        )
    return _truncated(step, stride, window - stride, parameters, init, xs)


def _narrow(f: Any, init: Any, xs: Any) -> bool:
    """Return True if `f` closes over floats of 16 bits: `lax.scan` adds up their cotangents in 16 bits."""
    held = jax.tree.leaves(floats(list(jax.make_jaxpr(f)(init, _at(xs, 0)).consts)))
    return any(a.dtype != b.dtype for a, b in zip(held, wide(held), strict=True))


def blocks(steps: int, window: int | None, stride: int | None) -> tuple[int, int]:
    """Compute the stride and window that TBPTT(k1, k2) has on a sequence of T steps.

    If even the last block reaches step 0, one block holds all steps.

    Args:
      steps: T.
      window: k2, as in `scan`.
      stride: k1, as in `scan`.

    Returns:
      The stride and the window, time steps, both at most T.

    Raises:
      SettingError: For a window or stride below 1, and a stride above the window.
    """
    if window is not None:
        whole("window", window)
    if stride is not None:
        whole("stride", stride)
    stride = stride or window or max(steps, 1)
    if window is not None and window < stride:
        raise SettingError("window", window, f"at least the stride ({stride})")
    stride = min(stride, max(steps, 1))
    last_start = (steps - 1) // stride * stride
    if window is None or window >= last_start + stride:
        return steps, steps
    return stride, window


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _truncated(
    f: Any, stride: int, further: int, parameters: Any, init: Any, xs: Any
) -> tuple[Any, Any]:
    return lax.scan(lambda carry, x: f(carry, x, *parameters), init, xs)


def _forward(
    f: Any, stride: int, further: int, parameters: Any, init: Any, xs: Any
) -> tuple[tuple[Any, Any], tuple[Any, Any, Any]]:
    """Run all steps, and store the carry from which each block starts."""

    def step(carry: Any, x: Any) -> tuple[Any, Any]:
        (after, y), _ = jax.vjp(
            f, carry, x, *parameters
        )  # of these values no derivative is truncated
        return after, (carry, y)

    last, (carries, ys) = lax.scan(step, init, xs)
    starts = jnp.maximum(jnp.arange(0, _length(xs), stride) - further, 0)
    return (last, ys), (parameters, jax.tree.map(lambda a: a[starts], carries), xs)


def _backward(
    f: Any, stride: int, further: int, residuals: Any, cotangents: Any
) -> tuple[Any, Any, Any]:
    """Run each block again from its detached start, side by side in groups, and let JAX differentiate it."""
    held, starts, xs = residuals
    to_last, to_ys = cotangents
    steps, length = _length(xs), stride + further
    group = max(1, min(count := -(-steps // stride), GROUP // length))
    even = not further and steps % stride == 0  # then no block is shorter than others

    def of_group(total: Any, number: Array) -> tuple[Any, None]:
        lane = number * group + jnp.arange(group)
        n = jnp.minimum(lane, count - 1)  # lanes beyond the last block repeat it and pass nothing
        own_first, end = n * stride, jnp.minimum((n + 1) * stride, steps)
        first = jnp.maximum(own_first - further, 0)[:, None]
        t = end[:, None] - length + jnp.arange(length)[None]  # [blocks, steps]
        made_up, t = t < first, jnp.maximum(t, first)  # these fill up a block that is shorter
        counts = (lane < count)[:, None] & ~made_up
        own = counts & (t >= own_first[:, None])

        def run(parameters: Any, starts: Any, xs: Any) -> Any:
            start, x = with_floats(starts_of, starts), with_floats(xs_of, xs)
            block = partial(_block, f, held, parameters)
            return floats(jax.vmap(block)(start, x, None if even else made_up))

        starts_of, xs_of = _at(starts, n), _at(xs, t)
        vjp = jax.vjp(run, wide(floats(held)), floats(starts_of), floats(xs_of))[1]
        to_carry = jax.tree.map(lambda a: _where(lane == count - 1, a[None]), floats(to_last))
        to_y = jax.tree.map(lambda a: _where(own, a[t]), floats(to_ys))
        to_parameters, to_start, to_x = vjp((to_carry, to_y))
        reaches_init = (lane < count) & (n * stride <= further)
        to_init = jax.tree.map(lambda a: _where(reaches_init, a).sum(axis=0), to_start)
        before = jax.tree.map(lambda a, b: a.at[t].add(_where(counts, b)), total[2], to_x)
        return (*add(total[:2], (to_parameters, to_init)), before), None

    like = floats((held, _at(starts, 0), xs))
    total = lax.scan(of_group, wide(zeros_like(like)), jnp.arange(-(-count // group)))[0]
    return as_types_of(like, total)


_truncated.defvjp(_forward, _backward)


def _block(
    f: Any, held: Any, parameters: Any, start: Any, xs: Any, made_up: Bool[Array, "S"] | None
) -> Any:
    """Scan one block with `held`, whose floats `parameters` are wide: then JAX adds up their cotangents wide.

    A made-up step repeats the block's first step, and its result is not used. So each derivative is that of a
    real step, and no made-up number can cause a division by zero.
    """

    def step(carry: Any, now: Any) -> tuple[Any, Any]:
        x, made_up = now
        own = with_floats(held, as_types_of(floats(held), parameters))
        after, y = f(carry, x, *own)
        kept = after if made_up is None else jax.tree.map(partial(jnp.where, made_up), carry, after)
        return kept, y

    return lax.scan(step, start, (xs, made_up))


def _at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda a: a[index], tree)


def _where(condition: Bool[Array, "*n"], a: Array) -> Array:
    """Select `a` where the condition on its leading axes holds, else 0."""
    return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, 0)


def _without_inputs(f: Any, nothing: Any, carry: Any, step: Array) -> Any:
    return f(carry, nothing)


def _length(xs: Any, length: int | None = None) -> int:
    """Read T from the leaves of `xs`, and from `length` if there are none."""
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(xs)}
    if length is not None:
        lengths |= {(whole("length", length, least=0),)}
    if len(lengths) != 1 or () in lengths:
        said = f"leading axes {sorted(map(list, lengths))}"
        raise SettingError("xs", said, "a tree whose leaves have one length T, or `length`")
    return int(lengths.pop()[0])
