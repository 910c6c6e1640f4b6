"""One backward pass for each loss: the code that the sliding window and the lag table replace."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from point import Contender, Point, compiled, setting


def _each_loss(point: Point, gradient: Callable[..., Any], losses: int) -> Contender:
    """Sum gradient(params, s, of_loss) over `losses` of the T losses, with one forward pass; scale to T.

    of_loss(readout, theta, s) is the loss of step s from the detached state `window` steps before it, and
    theta(i) are the cell's parameters at the i-th of these steps.
    """
    problem, params, state, batch = setting(point)
    cell, width = problem.cell, point.window
    assert width is not None
    begin_of = lambda s: jnp.maximum(s - width + 1, 0)  # noqa: E731

    def all_losses(params: Any, state: Any, batch: Any) -> Any:
        def remember(state: Any, x: Any) -> Any:
            return cell.step(params["cell"], state, x), state

        _, before = jax.lax.scan(remember, state, batch.inputs)

        def of_loss(readout: Any, theta: Callable[[Any], Any], each: Any, s: Any) -> Any:
            def step(state: Any, at: Any) -> Any:
                x, own = at
                state = cell.step(theta(own), state, x)
                return state, cell.read(state)

            begin = begin_of(s)
            first = jax.lax.stop_gradient(jax.tree.map(lambda h: h[begin], before))
            inputs = jax.lax.dynamic_slice_in_dim(batch.inputs, begin, width)
            _, h = jax.lax.scan(step, first, (inputs, each))
            outputs = problem.readout.apply(readout, h[s - begin])
            return problem.loss(outputs, batch.targets[s]).mean() / point.steps

        def further(total: Any, s: Any) -> Any:
            found = gradient(params, of_loss, s, s - begin_of(s))
            return jax.tree.map(jnp.add, total, found), None

        chosen = jnp.linspace(0, point.steps - 1, losses).astype(int)
        shape = jax.eval_shape(lambda s: gradient(params, of_loss, s, s), chosen[0])
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shape)
        return jax.lax.scan(further, nothing, chosen)[0]

    once, about = compiled(all_losses, params, state, batch)
    scale = point.steps / losses
    return once, about | {"scaled_by": scale, "operations": about["operations"] * scale}


def one_pass_a_loss(point: Point) -> Contender:
    """Compute the sliding window by its definition: for every loss one backward pass over its window."""

    def gradient(params: Any, of_loss: Any, s: Any, last: Any) -> Any:
        def loss(params: Any) -> Any:
            return of_loss(params["readout"], lambda _: params["cell"], None, s)

        return jax.value_and_grad(loss)(params)

    return _each_loss(point, gradient, point.steps)


def lags_one_pass_a_loss(point: Point) -> Contender:
    """Compute the lag table by autodiff: one backward pass over its window for every loss.

    Each step of the window has a copy of the parameters, whose gradient is that of the lag.
    """
    width = point.window
    assert width is not None

    def gradient(params: Any, of_loss: Any, s: Any, last: Any) -> Any:
        copies = jax.tree.map(lambda a: jnp.broadcast_to(a, (width, *a.shape)), params["cell"])
        by_step, readout = jax.grad(
            lambda copies, readout: of_loss(readout, lambda own: own, copies, s), (0, 1)
        )(copies, params["readout"])
        back = (last - jnp.arange(width)) % width  # steps after the loss, if any, have gradient 0
        return {"cell": jax.tree.map(lambda g: g[back], by_step), "readout": readout}

    return _each_loss(point, gradient, point.steps)


def lags_one_pass_a_loss_and_lag(point: Point) -> Contender:
    """Compute the lag table by `stop_gradient`: one backward pass for every loss and lag.

    The parameters are detached at all steps except the one at that lag. The time of 4 losses is scaled to T.
    """
    width = point.window
    assert width is not None
    i = jnp.arange(width)

    def gradient(params: Any, of_loss: Any, s: Any, last: Any) -> Any:
        def at_lag(k: Any) -> Any:
            def loss(params: Any) -> Any:
                detached = jax.lax.stop_gradient(params["cell"])

                def theta(counts: Any) -> Any:
                    return jax.tree.map(
                        lambda p, d: jnp.where(counts, p, d), params["cell"], detached
                    )

                return of_loss(params["readout"], theta, i == last - k, s)

            return jax.grad(loss)(params)

        found = jax.lax.map(at_lag, i)
        return found | {"readout": jax.tree.map(lambda g: g[0], found["readout"])}

    return _each_loss(point, gradient, min(4, point.steps))
