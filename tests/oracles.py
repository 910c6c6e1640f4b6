"""The gradient estimators once more, from their definitions: NumPy loops, derivatives by hand.

Nothing of bptt_study and nothing of JAX is used here. Every loss is sent back on its own, which is
slow and leaves no doubt: `table` holds what loss s contributes to the parameters at step t, for
each sequence, and an estimator is a set of weights w[s, t, b] on it.

The state of the LSTM is [h, c] side by side in the last axis, [B, 2H]. Names as in the package: T steps,
B sequences, D inputs, H hidden units, Q outputs, P parameters of the cell.
"""

from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


def sigmoid(a: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-a))


def one_hot(classes: np.ndarray, size: int) -> np.ndarray:
    return np.eye(size)[classes]


def flat(tree: dict[str, Any]) -> np.ndarray:
    """All numbers of a dict of dicts of arrays in one vector, keys in alphabetical order."""
    parts = [tree[name] for name in sorted(tree)]
    return np.concatenate([flat(p) if isinstance(p, dict) else np.ravel(p) for p in parts])


# One step and its pullback. `tape` is what the pullback needs; adjoints carry a leading axis of losses.


def step(kind: str, p: Arrays, state: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, Any]:
    if kind == "mlp":
        h = np.tanh(x @ p["W_xh"] + p["b_h"])
        return h, (x, h)
    if kind in ("linear", "elman_tanh", "elman_relu"):
        # the product of the concatenation [X_t, H_{t-1}] with the stacked weights
        together = np.concatenate([x, state], axis=-1)
        a = together @ np.concatenate([p["W_xh"], p["W_hh"]], axis=0) + p["b_h"]
        phi = {"linear": lambda a: a, "elman_tanh": np.tanh, "elman_relu": lambda a: a * (a > 0)}
        h = phi[kind](a)
        return h, (x, state, h)
    n_hidden = p["W_hh"].shape[0]
    gate = [slice(k * n_hidden, (k + 1) * n_hidden) for k in range(4)]
    if kind == "gru":
        gi, gh = x @ p["W_xh"] + p["b_h"], state @ p["W_hh"] + p["b_hh"]
        r = sigmoid(gi[:, gate[0]] + gh[:, gate[0]])
        z = sigmoid(gi[:, gate[1]] + gh[:, gate[1]])
        n = np.tanh(gi[:, gate[2]] + r * gh[:, gate[2]])
        return (1 - z) * n + z * state, (x, state, r, z, n, gh[:, gate[2]])
    if kind == "lstm":
        h, c = state[:, :n_hidden], state[:, n_hidden:]
        a = x @ p["W_xh"] + h @ p["W_hh"] + p["b_h"]
        i, f, o = (sigmoid(a[:, gate[k]]) for k in (0, 1, 3))
        g = np.tanh(a[:, gate[2]])
        new = f * c + i * g
        return np.concatenate([o * np.tanh(new), new], -1), (x, h, c, i, f, g, o, np.tanh(new))
    raise ValueError(kind)


def pull(kind: str, p: Arrays, tape: Any, adjoint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From the adjoint of h_t, [S, B, n]: its part of the gradient [S, B, P], the adjoint of h_{t-1}."""
    if kind == "mlp":
        x, h = tape
        d = adjoint * (1 - h * h)
        return _grads(W_xh=_outer(x, d), b_h=d), np.zeros_like(adjoint)
    if kind in ("linear", "elman_tanh", "elman_relu"):
        x, before, h = tape
        slope = {"linear": 1.0, "elman_tanh": 1 - h * h, "elman_relu": 1.0 * (h > 0)}[kind]
        d = adjoint * slope
        return _grads(W_xh=_outer(x, d), W_hh=_outer(before, d), b_h=d), d @ p["W_hh"].T
    if kind == "gru":
        x, before, r, z, n, gh_n = tape
        d_z = adjoint * (before - n) * z * (1 - z)
        d_n = adjoint * (1 - z) * (1 - n * n)
        d_r = d_n * gh_n * r * (1 - r)
        d_in, d_rec = np.concatenate([d_r, d_z, d_n], -1), np.concatenate([d_r, d_z, d_n * r], -1)
        grads = _grads(W_xh=_outer(x, d_in), W_hh=_outer(before, d_rec), b_h=d_in, b_hh=d_rec)
        return grads, adjoint * z + d_rec @ p["W_hh"].T
    if kind == "lstm":
        x, h, c, i, f, g, o, tanh_new = tape
        d_h, d_c = np.split(adjoint, 2, axis=-1)
        d_c = d_c + d_h * o * (1 - tanh_new**2)
        d = np.concatenate(
            [
                d_c * g * i * (1 - i),
                d_c * c * f * (1 - f),
                d_c * i * (1 - g * g),
                d_h * tanh_new * o * (1 - o),
            ],
            axis=-1,
        )
        grads = _grads(W_xh=_outer(x, d), W_hh=_outer(h, d), b_h=d)
        return grads, np.concatenate([d @ p["W_hh"].T, d_c * f], axis=-1)
    raise ValueError(kind)


def _outer(x: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.einsum("bi,sbj->sbij", x, d)


def _grads(**grads: np.ndarray) -> np.ndarray:
    return np.concatenate([g.reshape(*g.shape[:2], -1) for _, g in sorted(grads.items())], axis=-1)


class Table(NamedTuple):
    loss: float
    readout: np.ndarray  # gradient of the readout, flat
    states: np.ndarray  # [T, B, n]
    grads: np.ndarray  # [S, T, B, P] what loss s contributes at step t, all links open
    adjoints: np.ndarray  # [S, T, B, n] ∂l_s/∂h_t
    tapes: list[Any]


def table(
    kind: str,
    params: dict[str, Arrays],
    state: np.ndarray,
    inputs: np.ndarray,  # [T, B, D] floats
    targets: np.ndarray,
    mask: np.ndarray,
    loss: str,  # cross_entropy | squared_error
) -> Table:
    cell, readout = params["cell"], params["readout"]
    n_steps, n_hidden = len(inputs), readout["W_hq"].shape[0]
    states, tapes = [], []
    for t in range(n_steps):
        state, tape = step(kind, cell, state, inputs[t])
        states.append(state)
        tapes.append(tape)

    grads, adjoints = None, np.zeros((n_steps, n_steps, *state.shape))
    total, d_W, d_b = 0.0, np.zeros_like(readout["W_hq"]), np.zeros_like(readout["b_q"])
    immediate = np.zeros((n_steps, *state.shape))
    for t in range(n_steps):
        h = states[t][:, :n_hidden]
        out = h @ readout["W_hq"] + readout["b_q"]
        if loss == "cross_entropy":
            probabilities = np.exp(out) / np.exp(out).sum(axis=-1, keepdims=True)
            hot = one_hot(targets[t], out.shape[-1])
            tokens, d_out = -np.log((probabilities * hot).sum(axis=-1)), probabilities - hot
        else:
            d_out = out - targets[t].reshape(out.shape)
            tokens = 0.5 * (d_out**2).sum(axis=-1)
        total += (mask[t] * tokens).sum() / mask.sum()
        d_out = d_out * (mask[t] / mask.sum())[:, None]
        d_W, d_b = d_W + h.T @ d_out, d_b + d_out.sum(axis=0)
        immediate[t, :, :n_hidden] = d_out @ readout["W_hq"].T

    passing = np.zeros((n_steps, *state.shape))  # row s: adjoint of loss s alone
    for t in reversed(range(n_steps)):
        passing[t] = immediate[t]
        adjoints[:, t] = passing
        part, passing = pull(kind, cell, tapes[t], passing)
        grads = np.zeros((n_steps, n_steps, *part.shape[1:])) if grads is None else grads
        grads[:, t] = part
    return Table(total, flat({"W_hq": d_W, "b_q": d_b}), np.stack(states), grads, adjoints, tapes)


def weighted(table: Table, weights: np.ndarray) -> np.ndarray:
    """Σ w[s, t, b] G[s, t, b], the gradient of the cell's parameters, flat; weights [T, T] or [T, T, B]."""
    weights = weights[..., None] if weights.ndim == 2 else weights
    return (weights[..., None] * table.grads).sum(axis=(0, 1, 2))


def weighted_adjoints(table: Table, weights: np.ndarray) -> np.ndarray:
    """λ_t = Σ_s w[s, t, b] ∂l_s/∂h_t, [T, B, n]."""
    weights = weights[..., None] if weights.ndim == 2 else weights
    return (weights[..., None] * table.adjoints).sum(axis=0)


def full(n_steps: int) -> np.ndarray:
    return np.tril(np.ones((n_steps, n_steps)))


def tbptt(n_steps: int, stride: int, window: int) -> np.ndarray:
    """Losses in blocks of `stride`; the block from step `start` reaches max(0, start - (window - stride))."""
    weights = np.zeros((n_steps, n_steps))
    for s in range(n_steps):
        start = s // stride * stride
        for t in range(max(0, start - (window - stride)), s + 1):
            weights[s, t] = 1
    return weights


def sliding(n_steps: int, window: int) -> np.ndarray:
    """Every loss alone, lags 0 … window - 1."""
    lag = np.arange(n_steps)[:, None] - np.arange(n_steps)
    return 1.0 * ((lag >= 0) & (lag < window))


def gated(xi: np.ndarray) -> np.ndarray:
    """w[s, t, b] = ξ_{t+1} … ξ_s for link gates ξ [T, B]."""
    n_steps, n_batch = xi.shape
    weights = np.zeros((n_steps, n_steps, n_batch))
    for s in range(n_steps):
        for t in range(s + 1):
            weights[s, t] = np.prod(xi[t + 1 : s + 1], axis=0)
    return weights


def forward_form(kind: str, cell: Arrays, table: Table, xi: np.ndarray) -> np.ndarray:
    """ĝ = Σ_t e_tᵀ z_t with z_t = I_t + ξ_t J_t z_{t-1}, explicit Jacobians, flat."""
    n_steps, n_batch, n = table.states.shape
    unit = np.broadcast_to(np.eye(n)[:, None], (n, n_batch, n))
    total, z = 0.0, None
    for t in range(n_steps):
        immediate, jacobian = pull(kind, cell, table.tapes[t], unit)  # row i: derivative of h_t[i]
        passed = 0 if z is None else xi[t][:, None] * np.einsum("ibj,jbp->ibp", jacobian, z)
        z = immediate + passed
        total = total + np.einsum("bi,ibp->p", table.adjoints[t, t], z)
    return total
