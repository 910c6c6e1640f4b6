"""Credit carried forward as others write it: braintrace, and RTRL in NumPy, one loss and gradient each.

A call goes on where the one before ended: hidden state and influence are carried. braintrace returns 0 for the
readout, whose gradient is local in time and not compared.
"""

from typing import Any

import numpy as np
from point import SYMBOLS, Contender, Point, data, setting


def numpy_rtrl(point: Point) -> Contender:
    """RTRL as a NumPy class has it: one sequence, and at each step the product J @ M of dense matrices.

    M_t = ∂h_t/∂vec(W) is [H, (D + H + 1) H], W all weights of the unit with its bias, [D + H + 1, H].
    """
    assert (point.cell, point.batch_size) == ("elman", 1), "one sequence of elman"
    params = setting(point)[1]
    cell, out = ({n: np.asarray(a) for n, a in params[part].items()} for part in params)
    W = np.concatenate([cell["W_xh"], cell["W_hh"], cell["b_h"][None]])
    H, eye = point.hidden, np.eye(SYMBOLS, dtype=W.dtype)
    inputs, targets = (a[:, 0] for a in data(point))
    state = {"h": np.zeros(H, W.dtype), "M": np.zeros((H, W.size), W.dtype)}

    def once() -> Any:
        h, M, loss = state["h"], state["M"], 0.0
        grads = {"W": np.zeros_like(W), **{name: np.zeros_like(a) for name, a in out.items()}}
        for x, y in zip(inputs, targets, strict=True):
            seen = np.concatenate([eye[x], h, np.ones(1, W.dtype)])
            h = np.tanh(seen @ W)
            slope = 1 - h**2
            J = slope[:, None] * cell["W_hh"].T
            M = J @ M + np.kron(seen, np.diag(slope))
            o = h @ out["W_hq"] + out["b_q"]
            p = np.exp(o - o.max())
            p /= p.sum()
            loss -= np.log(p[y]) / point.steps
            delta = (p - eye[y]) / point.steps
            grads["W_hq"] += np.outer(h, delta)
            grads["b_q"] += delta
            grads["W"] += (out["W_hq"] @ delta @ M).reshape(W.shape)
        state.update(h=h, M=M)
        return loss, grads

    return once, {}


def _braintrace(point: Point, rule: str, **settings: Any) -> Contender:
    """A learner that `braintrace.compile` makes, which `etrace_grad` drives over the sequence, compiled."""
    import brainstate
    import braintrace
    import jax
    import jax.numpy as jnp

    _, params, _, batch = setting(point)
    cell, out = params["cell"], params["readout"]

    class Model(brainstate.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = braintrace.nn.ValinaRNNCell(SYMBOLS, point.hidden, activation="tanh")
            self.out = brainstate.nn.Linear(point.hidden, SYMBOLS)
            both = jnp.concatenate([cell["W_xh"], cell["W_hh"]])
            self.rnn.W.weight.value = {"weight": both, "bias": cell["b_h"]}
            self.out.weight.value = {"weight": out["W_hq"], "bias": out["b_q"]}

        def update(self, x: Any) -> Any:
            return self.out(self.rnn(x))

    inputs = jax.nn.one_hot(batch.inputs, SYMBOLS)
    learner = braintrace.compile(
        Model(), getattr(braintrace, rule), inputs[0], batch_size=point.batch_size, **settings
    )

    def step_loss(x: Any, y: Any) -> Any:
        return -jnp.take_along_axis(jax.nn.log_softmax(learner(x)), y[:, None], axis=-1).mean()

    @brainstate.transform.jit
    def gradient() -> Any:
        grads, losses = learner.etrace_grad(
            inputs, batch.targets, step_fn=step_loss, return_value=True
        )
        own = grads["rnn", "W", "weight"]
        return losses.mean(), {"W": jnp.concatenate([own["weight"], own["bias"][None]])}

    return lambda: jax.block_until_ready(gradient()), {}


def braintrace_rtrl(point: Point) -> Contender:
    """braintrace's SnAp-2, which is RTRL where every unit links with every other."""
    return _braintrace(point, "SnAp", n=2)


def braintrace_snap(point: Point) -> Contender:
    """braintrace's SnAp-1."""
    return _braintrace(point, "SnAp", n=1)


def braintrace_d_rtrl(point: Point) -> Contender:
    """braintrace's D-RTRL, which takes no path through recurrent weights: e-prop."""
    return _braintrace(point, "D_RTRL")


def braintrace_pp_prop(point: Point) -> Contender:
    """braintrace's pp-prop, without a path through recurrent weights; its slopes' trace is made unbiased."""
    return _braintrace(point, "pp_prop", decay_or_rank=0.9)
