"""The code that people write today: one loss and gradient in textbook JAX, flax and PyTorch.

The textbook has the chapter's equations in plain `jax.numpy`; the names and the layout of the weights are ours.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from point import GATES, SYMBOLS, Contender, Point, compiled, data, setting

# ---- textbook JAX


def elman(x: Any, h: Any, W_hh: Any) -> Any:
    """Compute H_t = tanh(X_t W_xh + H_{t-1} W_hh + b_h), where x is X_t W_xh + b_h."""
    return jnp.tanh(x + h @ W_hh)


def gru(x: Any, h: Any, W_hh: Any, b_hh: Any) -> Any:
    """Compute R, Z = σ(…), H̃ = tanh(X W_xh + R ⊙ (H W_hh)), H_t = Z ⊙ H_{t-1} + (1 - Z) ⊙ H̃."""
    (x_r, x_z, x_n), (h_r, h_z, h_n) = (jnp.split(a, 3, axis=-1) for a in (x, h @ W_hh + b_hh))
    r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
    return z * h + (1 - z) * jnp.tanh(x_n + r * h_n)


def lstm(x: Any, state: Any, W_hh: Any) -> Any:
    """Compute I, F, O = σ(…), G = tanh(…), C_t = F ⊙ C_{t-1} + I ⊙ G, H_t = O ⊙ tanh(C_t)."""
    h, c = state
    i, f, g, o = jnp.split(x + h @ W_hh, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


TEXTBOOK = {"elman": elman, "gru": gru, "lstm": lstm}
Product = Callable[[Any, Any], Any]


def _layer(name: str, product: Product, params: Any, state: Any, x: Any) -> tuple[Any, Any]:
    """Compute one step of one layer: its state, and the h that the layer above sees."""
    recurrent = dict(params)
    W_xh, b_h = recurrent.pop("W_xh"), recurrent.pop("b_h")
    state = TEXTBOOK[name](product(x, W_xh) + b_h, state, **recurrent)
    return state, jax.tree.leaves(state)[0]


def _step(point: Point, product: Product, params: Any, state: Any, x: Any) -> tuple[Any, Any]:
    """Compute one step of the network; product(x, W_xh) is the input's product of the lowest layer."""
    if point.cell != "stacked":
        return _layer(point.cell, product, params, state, x)
    below, h = _layer("lstm", product, params[0], state[0], x)
    above, h = _layer("lstm", jnp.matmul, params[1], state[1], h)
    return (below, above), h


def _mean_loss(readout: Any, H: Any, targets: Any) -> Any:
    log_p = jax.nn.log_softmax(H @ readout["W_hq"] + readout["b_q"])
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1).mean()


def _textbook(point: Point, represent: Callable[[Any], Any], product: Product) -> Contender:
    """Use `jax.value_and_grad` through a `lax.scan` of whole steps, with `stop_gradient` at the cuts."""
    _, params, state, batch = setting(point)
    cuts = jnp.arange(point.steps) % (point.window or point.steps) == 0

    def loss(params: Any, state: Any, inputs: Any, targets: Any) -> Any:
        def step(state: Any, now: Any) -> Any:
            x, cut = now
            if point.window is not None:
                state = jax.tree.map(lambda h: jnp.where(cut, lax.stop_gradient(h), h), state)
            return _step(point, product, params["cell"], state, x)

        state, H = lax.scan(step, state, (represent(inputs), cuts))
        return _mean_loss(params["readout"], H, targets), state

    gradient = jax.value_and_grad(loss, has_aux=True)
    return compiled(gradient, params, state, batch.inputs, batch.targets)


def _rows(x: Any, W: Any) -> Any:
    return W[x]


def textbook(point: Point) -> Contender:
    """Make textbook JAX as the chapter writes it, with one-hot inputs."""
    return _textbook(point, partial(jax.nn.one_hot, num_classes=SYMBOLS), jnp.matmul)


def textbook_indexed(point: Point) -> Contender:
    """Make textbook JAX as an expert writes it, with rows of W_xh instead of one-hot products."""
    return _textbook(point, lambda x: x, _rows)


def by_scan(point: Point, scan: Callable[..., Any]) -> Contender:
    """Use `jax.value_and_grad` of the textbook's loss, whose loop over time is `scan(f, init, xs)`."""
    _, params, state, batch = setting(point)

    def loss(params: Any, state: Any, inputs: Any, targets: Any) -> Any:
        step = partial(_step, point, _rows, params["cell"])
        state, H = scan(step, state, inputs)
        return _mean_loss(params["readout"], H, targets), state

    gradient = jax.value_and_grad(loss, has_aux=True)
    return compiled(gradient, params, state, batch.inputs, batch.targets)


def lax_scan(point: Point) -> Contender:
    """Use `jax.value_and_grad` through `lax.scan`: full BPTT for any window."""
    return by_scan(point, lax.scan)


# ---- other libraries


def flax_weights(point: Point, params: Any) -> Any:
    """Rename our parameters (or gradients) as flax names them."""
    cell, readout = params["cell"], params["readout"]
    head = {"kernel": readout["W_hq"], "bias": readout["b_q"]}
    gates = GATES[point.cell]
    W_xh, W_hh, b_h = (jnp.split(cell[name], gates, axis=-1) for name in ("W_xh", "W_hh", "b_h"))
    i, h = [{"kernel": W} for W in W_xh], [{"kernel": W} for W in W_hh]
    for dense, b in zip(h if point.cell == "lstm" else i, b_h, strict=True):
        dense["bias"] = b
    if point.cell == "gru":
        h[2]["bias"] = jnp.split(cell["b_hh"], gates)[2]
    letters = {"elman": [""], "gru": "rzn", "lstm": "ifgo"}[point.cell]
    named = {
        f"{kind}{x}": dense
        for kind, all_ in (("i", i), ("h", h))
        for x, dense in zip(letters, all_, strict=True)
    }
    return {"params": {"cell": named, "head": head}}


def _flax_model(point: Point) -> Any:
    import flax.linen as nn

    cells = {"elman": nn.SimpleCell, "gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}

    class Model(nn.Module):
        @nn.compact
        def __call__(self, carry: Any, x: Any) -> Any:
            cell = cells[point.cell](point.hidden, name="cell")
            rnn = nn.RNN(cell, time_major=True, return_carry=True)
            carry, h = rnn(jax.nn.one_hot(x, SYMBOLS), initial_carry=carry)
            return carry, nn.Dense(SYMBOLS, name="head")(h)

    return Model()


def flax(point: Point) -> Contender:
    """Use `flax.linen.RNN` over the sequence, or over one chunk after the other with the carry detached."""
    model = _flax_model(point)
    _, params, state, batch = setting(point)
    carry = state[::-1] if isinstance(state, tuple) else state  # flax carries (c, h)
    width = point.window or point.steps

    def loss(params: Any, carry: Any, x: Any, y: Any) -> Any:
        carry, outputs = model.apply(params, carry, x)
        log_p = jax.nn.log_softmax(outputs)
        return -jnp.take_along_axis(log_p, y[..., None], axis=-1).sum() / batch.mask.size, carry

    def gradient(params: Any, carry: Any, inputs: Any, targets: Any) -> Any:
        def chunk(sofar: Any, xy: Any) -> Any:
            carry, total = sofar
            (value, carry), grads = jax.value_and_grad(loss, has_aux=True)(params, carry, *xy)
            return (carry, jax.tree.map(jnp.add, total, (value, grads))), None

        nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        xy = (a.reshape(-1, width, point.batch_size) for a in (inputs, targets))
        (carry, found), _ = lax.scan(chunk, (carry, nothing), tuple(xy))
        return *found, carry

    return compiled(gradient, flax_weights(point, params), carry, batch.inputs, batch.targets)


def torch_weights(point: Point, params: Any) -> dict[str, Any]:
    """Rename our parameters (or gradients) as PyTorch does, without the second bias that only the GRU needs."""
    layers = params["cell"] if point.cell == "stacked" else [params["cell"]]
    names = {"weight_ih": "W_xh", "weight_hh": "W_hh", "bias_ih": "b_h", "bias_hh": "b_hh"}
    rnn = {
        f"rnn.{theirs}_l{n}": np.array(cell[name]).T
        for n, cell in enumerate(layers)
        for theirs, name in names.items()
        if name in cell
    }
    head = {"weight": params["readout"]["W_hq"], "bias": params["readout"]["b_q"]}
    return rnn | {f"head.{name}": np.array(a).T for name, a in head.items()}


def torch_model(point: Point) -> Any:
    """Make PyTorch's network with our weights."""
    import torch
    from torch import nn

    make = {"elman": nn.RNN, "gru": nn.GRU}.get(point.cell, nn.LSTM)
    rnn = make(SYMBOLS, point.hidden, num_layers=2 if point.cell == "stacked" else 1)
    model = nn.ModuleDict({"rnn": rnn, "head": nn.Linear(point.hidden, SYMBOLS)})
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    weights = torch_weights(point, setting(point)[1])
    model.load_state_dict({n: torch.from_numpy(a) for n, a in weights.items()}, strict=False)
    return model


def torch(point: Point, device: str = "cpu") -> Contender:
    """Use `torch.nn.RNN`, `GRU` or `LSTM`: one call and one backward pass per chunk, with detached states."""
    import torch
    from torch.nn import functional

    width = point.window or point.steps
    model = torch_model(point).to(device)
    x, y = (torch.from_numpy(a).to(device) for a in data(point))

    def detached(state: Any) -> Any:
        return tuple(map(detached, state)) if isinstance(state, tuple) else state.detach()

    def once() -> Any:
        model.zero_grad()
        state, total = None, 0.0
        for begin in range(0, point.steps, width):
            one_hot = functional.one_hot(x[begin : begin + width], SYMBOLS)
            h, state = model["rnn"](one_hot.to(h_type), state)
            outputs = model["head"](h).flatten(0, 1)
            chosen = y[begin : begin + width].flatten()
            loss = functional.cross_entropy(outputs, chosen, reduction="sum") / y.numel()
            loss.backward()
            total, state = total + loss.item(), detached(state)
        if device != "cpu":
            torch.cuda.synchronize()
        return total, {name: weight.grad for name, weight in model.named_parameters()}

    h_type = next(model.parameters()).dtype
    return once, {}


# ---- the limit


def products(point: Point) -> Contender:
    """Compute the limit: the recurrent weights' three products for all tokens, 3·T·B·G·H² multiply-adds."""
    tokens, H, G = point.steps * point.batch_size, point.hidden, GATES[point.cell]
    h, W, delta = jnp.ones((tokens, H)), jnp.ones((H, G * H)), jnp.ones((tokens, G * H))
    return compiled(lambda h, W, d: (h @ W, d @ W.T, h.T @ d), h, W, delta)
