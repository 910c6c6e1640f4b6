"""What the benchmark times: functions from a point of its grid to one loss and gradient, ours and others'.

A contender returns `(once, about)`: `once()` computes the loss and the gradient of all parameters and waits for
them; `about` is what is known without running it. All start from the weights of `Problem.init`, and
tests/test_bench.py compares their losses and gradients, so that the times compare the same thing. No Hydra.
"""

import math
import resource
import sys
import time
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from bptt_study.backprop import BATCH_AXIS

SYMBOLS = 28
GATES = {"elman": 1, "gru": 3, "lstm": 4}


class Point(NamedTuple):
    """One place of the grid."""

    cell: str
    hidden: int
    batch_size: int
    steps: int
    window: int | None = None  # None: full BPTT

    def __str__(self) -> str:
        window = "" if self.window is None else f", w {self.window:g}"
        return f"{self.cell}, H {self.hidden}, B {self.batch_size}, T {self.steps}{window}"


Contender = tuple[Callable[[], Any], dict[str, Any]]


def data(point: Point) -> tuple[np.ndarray, np.ndarray]:
    """Symbols and the ones after them, [T, B]."""
    rng = np.random.default_rng(0)
    text = rng.integers(SYMBOLS, size=(point.steps + 1, point.batch_size))
    return text[:-1], text[1:]


def setting(point: Point) -> tuple[Any, Any, Any, Any]:
    """Problem, parameters, state and batch, as ours and the weights of all others."""
    import jax
    import jax.numpy as jnp

    import bptt_study as bs

    cell = getattr(bs.cells, point.cell)(SYMBOLS, point.hidden)
    readout = bs.readouts.linear(point.hidden, SYMBOLS)
    problem = bs.Problem(cell, readout, bs.losses.cross_entropy)
    inputs, targets = (jnp.asarray(a, jnp.int32) for a in data(point))
    batch = bs.Batch(inputs, targets, jnp.ones(inputs.shape))
    return problem, problem.init(jax.random.key(0)), cell.zeros(point.batch_size), batch


def _compiled(f: Callable[..., Any], *arguments: Any, operations: int | None = None) -> Contender:
    """f as a thunk, with what the compiler tells: of all devices that it runs on."""
    import jax

    import bptt_study as bs

    begun = time.perf_counter()
    program = jax.jit(f).lower(*arguments).compile()
    seconds = time.perf_counter() - begun
    devices = len(jax.tree.leaves(arguments)[0].sharding.device_set)
    about = {
        "compile_seconds": seconds,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes * devices,
        "operations": operations or bs.measure.arithmetic(f, *arguments) * devices,
    }
    return lambda: jax.block_until_ready(program(*arguments)), about


# ---- ours


def _estimate(make: Callable[..., Any], point: Point, *settings: Any) -> Contender:
    """A strategy's estimate, its batch split over devices of one core each, where a training loop has it."""
    import jax
    from jax.sharding import PartitionSpec as P

    import bptt_study as bs

    bs.devices.use("auto")
    problem, params, state, batch = setting(point)
    strategy = make(problem, *settings)

    def estimate(*arguments: Any) -> Any:
        estimate, state = strategy.estimate(*arguments)
        return estimate.loss, estimate.grads, state

    # of the whole batch: how often a loop of one part turns cannot be told from outside
    key = jax.random.key(1)
    operations = bs.measure.arithmetic(estimate, params, state, batch, key)
    parts = math.gcd(point.batch_size, jax.device_count())
    with bs.devices.split_batch(parts):

        def placed(tree: Any, *axes: Any) -> Any:
            return jax.device_put(tree, jax.NamedSharding(jax.sharding.get_mesh(), P(*axes)))

        arguments = placed(params), placed(state, BATCH_AXIS), placed(batch, None, BATCH_AXIS)
        once, about = _compiled(estimate, *arguments, key, operations=operations)
    return once, about | _predicted(strategy.claim.memory, problem, params, point, parts)


def _predicted(memory: str, problem: Any, params: Any, point: Point, parts: int) -> dict[str, Any]:
    """What the strategy's claim promises to hold.

    bytes = states held × (h_t and the factors of its link) + segment × (e_t, λ_t, what λ_t is pulled back
    to: twice the pre-activations, and the logits with their derivative).

    States held, by the claim: T; for window the steps whose states a cache holds, or the window, if that is
    longer; for segment the same, or the reach of the law, and T below `unroll.ROUNDS` such; for
    √T the places and one unit between two.
    """
    import jax
    import jax.numpy as jnp

    from bptt_study.backprop import unroll
    from bptt_study.backprop.schedules import revolve
    from bptt_study.strategies.randomized import reach

    size, T = point.batch_size // parts, point.steps
    start, x = jax.eval_shape(lambda: (problem.cell.zeros(size), jnp.zeros((1, size), jnp.int32)))
    left = jax.eval_shape(
        lambda state, x: unroll.trace(problem.cell, params["cell"], state, x)[1:], start, x
    )
    state, step = (sum(a.size for a in jax.tree.leaves(tree)) for tree in (start, left))
    fits = unroll.fitting(start, size)
    segment = min(T, max(point.window or 1, fits))
    longest = max(fits, reach(_law(point), point.batch_size * T))
    held = {
        "T": T,
        "window": segment,
        "segment": longest if unroll.ROUNDS * longest <= T else T,
        "√T": sum(revolve.layout(T, 2 * max(1, math.isqrt(T)))),
    }[memory]
    working = 2 * state + 2 * size * (GATES[point.cell] * point.hidden + SYMBOLS)
    one = params["readout"]["b_q"].dtype.itemsize
    numbers = held * step + min(segment, held) * working
    return {"states": held, "predicted_bytes": one * parts * numbers}


def full(point: Point) -> Contender:
    """bptt_study: full BPTT."""
    from bptt_study import strategies

    return _estimate(strategies.full, point)


def chunks(point: Point) -> Contender:
    """bptt_study: fixed truncation, chunks."""
    from bptt_study import strategies

    return _estimate(strategies.fixed, point, point.window)


def checkpointed(point: Point) -> Contender:
    """bptt_study: the gradient of full BPTT at √T memory."""
    from bptt_study import strategies

    return _estimate(strategies.checkpointed, point)


def random_cuts(point: Point) -> Contender:
    """bptt_study: randomized truncation, segments of a quarter of the window on average."""
    from bptt_study import strategies

    return _estimate(strategies.randomized, point, _law(point))


def _law(point: Point) -> Any:
    from bptt_study import strategies

    return strategies.constant(max(2, (point.window or point.steps) / 4))


def sliding(point: Point) -> Contender:
    """bptt_study: the sliding window."""
    from bptt_study import strategies

    return _estimate(strategies.fixed, point, point.window, 1)


def ours(point: Point) -> Contender:
    """bptt_study: full, or chunks where the point has a window."""
    return (full if point.window is None else chunks)(point)


def lag_table(point: Point) -> Contender:
    """bptt_study: `lags.gradients`, G_k of all losses for all lags k < window."""
    import bptt_study as bs

    problem, params, state, batch = setting(point)

    def table(params: Any, state: Any, batch: Any) -> Any:
        return bs.lags.gradients(problem, params, batch, point.window, state)

    return _compiled(table, params, state, batch)


# ---- textbook JAX: the chapter's equations, plain jax.numpy; our names and layout of the weights alone

TEXTBOOK: dict[str, Callable[..., Any]] = {}


def _equations(step: Callable[..., Any]) -> Callable[..., Any]:
    TEXTBOOK[step.__name__] = step
    return step


@_equations
def elman(x: Any, h: Any, W_hh: Any) -> Any:
    """H_t = tanh(X_t W_xh + H_{t-1} W_hh + b_h); x is X_t W_xh + b_h."""
    import jax.numpy as jnp

    return jnp.tanh(x + h @ W_hh)


@_equations
def gru(x: Any, h: Any, W_hh: Any, b_hh: Any) -> Any:
    """R, Z = σ(…), H̃ = tanh(X W_xh + R ⊙ (H W_hh)), H_t = Z ⊙ H_{t-1} + (1 - Z) ⊙ H̃."""
    import jax
    import jax.numpy as jnp

    (x_r, x_z, x_n), (h_r, h_z, h_n) = (jnp.split(a, 3, axis=-1) for a in (x, h @ W_hh + b_hh))
    r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
    return z * h + (1 - z) * jnp.tanh(x_n + r * h_n)


@_equations
def lstm(x: Any, state: Any, W_hh: Any) -> Any:
    """I, F, O = σ(…), G = tanh(…), C_t = F ⊙ C_{t-1} + I ⊙ G, H_t = O ⊙ tanh(C_t)."""
    import jax
    import jax.numpy as jnp

    h, c = state
    i, f, g, o = jnp.split(x + h @ W_hh, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _textbook(point: Point, represent: Callable[[Any], Any], product: Callable[..., Any]) -> Any:
    """`jax.value_and_grad` through a `lax.scan` of whole steps, `stop_gradient` at the cuts."""
    import jax
    import jax.numpy as jnp

    _, params, state, batch = setting(point)
    cuts = jnp.arange(point.steps) % (point.window or point.steps) == 0

    def loss(params: Any, state: Any, inputs: Any, targets: Any) -> Any:
        recurrent = dict(params["cell"])
        W_xh, b_h = recurrent.pop("W_xh"), recurrent.pop("b_h")

        def step(state: Any, now: Any) -> Any:
            x, cut = now
            if point.window is not None:
                state = jax.tree.map(lambda h: jnp.where(cut, jax.lax.stop_gradient(h), h), state)
            state = TEXTBOOK[point.cell](product(x, W_xh) + b_h, state, **recurrent)
            return state, jax.tree.leaves(state)[0]

        state, H = jax.lax.scan(step, state, (represent(inputs), cuts))
        outputs = H @ params["readout"]["W_hq"] + params["readout"]["b_q"]
        log_p = jax.nn.log_softmax(outputs)
        return -jnp.take_along_axis(log_p, targets[..., None], axis=-1).mean(), state

    gradient = jax.value_and_grad(loss, has_aux=True)
    return _compiled(gradient, params, state, batch.inputs, batch.targets)


def textbook(point: Point) -> Contender:
    """Textbook JAX as the chapter writes it: one-hot inputs."""
    import jax

    return _textbook(point, lambda x: jax.nn.one_hot(x, SYMBOLS), lambda x, W: x @ W)


def textbook_indexed(point: Point) -> Contender:
    """The same with rows of W_xh instead of one-hot products, as an expert writes it."""
    return _textbook(point, lambda x: x, lambda x, W: W[x])


# ---- other libraries


def flax_weights(point: Point, params: Any) -> Any:
    """Our parameters (or gradients) as flax names them."""
    import jax.numpy as jnp

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


def flax(point: Point) -> Contender:
    """`flax.linen.RNN` over the sequence, or over one chunk after the other with the carry detached."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    cells = {"elman": nn.SimpleCell, "gru": nn.GRUCell, "lstm": nn.OptimizedLSTMCell}

    class Model(nn.Module):
        @nn.compact
        def __call__(self, carry: Any, x: Any) -> Any:
            cell = cells[point.cell](point.hidden, name="cell")
            rnn = nn.RNN(cell, time_major=True, return_carry=True)
            carry, h = rnn(jax.nn.one_hot(x, SYMBOLS), initial_carry=carry)
            return carry, nn.Dense(SYMBOLS, name="head")(h)

    _, params, state, batch = setting(point)
    carry = state[::-1] if isinstance(state, tuple) else state  # flax carries (c, h)
    width = point.window or point.steps

    def loss(params: Any, carry: Any, x: Any, y: Any) -> Any:
        carry, outputs = Model().apply(params, carry, x)
        log_p = jax.nn.log_softmax(outputs)
        return -jnp.take_along_axis(log_p, y[..., None], axis=-1).sum() / batch.mask.size, carry

    def gradient(params: Any, carry: Any, inputs: Any, targets: Any) -> Any:
        def chunk(sofar: Any, xy: Any) -> Any:
            carry, total = sofar
            (value, carry), grads = jax.value_and_grad(loss, has_aux=True)(params, carry, *xy)
            return (carry, jax.tree.map(jnp.add, total, (value, grads))), None

        nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        xy = (a.reshape(-1, width, point.batch_size) for a in (inputs, targets))
        (carry, found), _ = jax.lax.scan(chunk, (carry, nothing), tuple(xy))
        return *found, carry

    return _compiled(gradient, flax_weights(point, params), carry, batch.inputs, batch.targets)


def torch_weights(point: Point, params: Any) -> dict[str, Any]:
    """Our parameters (or gradients) as PyTorch names them: without the second bias that only the GRU needs."""
    cell = params["cell"]
    names = {
        "weight_ih_l0": "W_xh",
        "weight_hh_l0": "W_hh",
        "bias_ih_l0": "b_h",
        "bias_hh_l0": "b_hh",
    }
    rnn = {
        f"rnn.{theirs}": np.array(cell[name]).T for theirs, name in names.items() if name in cell
    }
    head = {"weight": params["readout"]["W_hq"], "bias": params["readout"]["b_q"]}
    return rnn | {f"head.{name}": np.array(a).T for name, a in head.items()}


def torch(point: Point) -> Contender:
    """`torch.nn.RNN`, `GRU`, `LSTM`: one call and one backward pass a chunk, the state detached between."""
    import torch
    from torch import nn

    H, width = point.hidden, point.window or point.steps
    rnn = {"elman": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[point.cell](SYMBOLS, H)
    model = nn.ModuleDict({"rnn": rnn, "head": nn.Linear(H, SYMBOLS)})
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    weights = torch_weights(point, setting(point)[1])
    model.load_state_dict({n: torch.from_numpy(a) for n, a in weights.items()}, strict=False)
    x, y = (torch.from_numpy(a) for a in data(point))

    def detached(state: Any) -> Any:
        return tuple(map(detached, state)) if isinstance(state, tuple) else state.detach()

    def once() -> Any:
        model.zero_grad()
        state, total = None, 0.0
        for begin in range(0, point.steps, width):
            one_hot = nn.functional.one_hot(x[begin : begin + width], SYMBOLS)
            h, state = model["rnn"](one_hot.to(h_type), state)
            outputs = model["head"](h).flatten(0, 1)
            chosen = y[begin : begin + width].flatten()
            loss = nn.functional.cross_entropy(outputs, chosen, reduction="sum") / y.numel()
            loss.backward()
            total, state = total + loss.item(), detached(state)
        return total, {name: weight.grad for name, weight in model.named_parameters()}

    h_type = next(model.parameters()).dtype
    return once, {}


# ---- one backward pass per loss


def _each_loss(point: Point, gradient: Callable[..., Any], losses: int) -> Contender:
    """Σ_s gradient(params, s, of_loss) over `losses` of the T losses, forward pass shared; time scaled to T.

    of_loss(readout, theta, s): the loss of step s from the state `window` steps before it, detached;
    theta(i) are the cell's parameters at the i-th of these steps.
    """
    import jax
    import jax.numpy as jnp

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

    once, about = _compiled(all_losses, params, state, batch)
    scale = point.steps / losses
    return once, about | {"scaled_by": scale, "operations": about["operations"] * scale}


def one_pass_a_loss(point: Point) -> Contender:
    """The sliding window as its definition says: for every loss one backward pass over its window."""
    import jax

    def gradient(params: Any, of_loss: Any, s: Any, last: Any) -> Any:
        def loss(params: Any) -> Any:
            return of_loss(params["readout"], lambda _: params["cell"], None, s)

        return jax.value_and_grad(loss)(params)

    return _each_loss(point, gradient, point.steps)


def lags_one_pass_a_loss(point: Point) -> Contender:
    """The lag table by autodiff: for every loss one backward pass over its window, in which each step has
    a copy of the parameters, whose gradients are those of the lags.
    """
    import jax
    import jax.numpy as jnp

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
    """The lag table by `stop_gradient`: for every loss and lag one backward pass, in which the parameters are
    detached at all steps but the one so far back. Measured on 4 losses and scaled to all T.
    """
    import jax
    import jax.numpy as jnp

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


# ---- the limit


def products(point: Point) -> Contender:
    """The limit: the recurrent weights' three products for all tokens, 3·T·B·G·H² multiply-adds."""
    import jax.numpy as jnp

    tokens, H, G = point.steps * point.batch_size, point.hidden, GATES[point.cell]
    h, W, delta = jnp.ones((tokens, H)), jnp.ones((H, G * H)), jnp.ones((tokens, G * H))
    return _compiled(lambda h, W, d: (h @ W, d @ W.T, h.T @ d), h, W, delta)


# ---- the phases of full BPTT, `unroll._through`: each a program of its own, on what those before it left
# Segments, devices and sums are those of the estimate; arrays over time are [segments, steps, B, …].

# how an array lies on the devices
LIES: dict[str, tuple[str | None, ...]] = {
    "whole": (),
    "rows": (BATCH_AXIS,),
    "steps": (None, BATCH_AXIS),
    "segments": (None, None, BATCH_AXIS),
}
_once_each = lru_cache(maxsize=1)  # the phases of one point share its arrays


class _Segmented(NamedTuple):
    """What the phases of a point share, lying on the devices."""

    problem: Any
    params: Any
    state: Any
    batch: Any
    parts: int

    def linear(self, params: Any, kept: Any, batch: Any) -> Any:
        """What of it a phase does not use, the compiler leaves out."""
        from bptt_study.backprop import unroll

        return unroll._linearise(self.problem, params, kept, batch, self.batch.mask.size)

    def alone(self, f: Callable[..., Any], out: Any, *arguments: Any) -> Contender:
        """f as a program that each device runs on its part of the arguments; `out`: how results lie."""
        import jax
        from jax.sharding import PartitionSpec as P

        import bptt_study as bs

        with bs.devices.split_batch(self.parts):
            into = jax.tree.map(lambda a: a.sharding.spec, arguments)
            onto = jax.tree.map(lambda lies: P(*LIES[lies]), out)
            split = jax.shard_map(f, in_specs=into, out_specs=onto, check_vma=False)
            return _compiled(split, *arguments)


@_once_each
def _segmented(point: Point) -> _Segmented:
    import jax
    from jax.sharding import PartitionSpec as P

    import bptt_study as bs
    from bptt_study.backprop import unroll

    bs.devices.use("auto")
    problem, params, state, batch = setting(point)
    parts = math.gcd(point.batch_size, jax.device_count())
    size = point.batch_size // parts
    length = unroll._even(point.steps, unroll.fitting(problem.cell.zeros(size), size))
    batch = jax.tree.map(lambda a: a.reshape(-1, length, point.batch_size), batch)
    with bs.devices.split_batch(parts):

        def placed(tree: Any, lies: str) -> Any:
            spec = jax.NamedSharding(jax.sharding.get_mesh(), P(*LIES[lies]))
            return jax.device_put(tree, spec)

        lying = placed(params, "whole"), placed(state, "rows"), placed(batch, "segments")
    return _Segmented(problem, *lying, parts)


def _summed(f: Callable[..., Any], *segments: Any) -> Any:
    """(Σ f(segment)[0] over segments and devices, f(segment)[1] of each)."""
    import jax
    import jax.numpy as jnp

    def further(total: Any, segment: Any) -> Any:
        found, beside = f(*segment)
        return jax.tree.map(jnp.add, total, found), beside

    like = jax.eval_shape(f, *jax.tree.map(lambda a: a[0], segments))[0]
    nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    total, beside = jax.lax.scan(further, nothing, segments)
    return jax.lax.psum(total, BATCH_AXIS), beside


@_once_each
def embedding(point: Point) -> Contender:
    """Input's part of the pre-activations, for all time steps."""
    import jax

    from bptt_study.backprop import unroll

    at = _segmented(point)

    def of(params: Any, inputs: Any) -> Any:
        return jax.lax.map(partial(unroll._project, at.problem.cell, params["cell"]), inputs)

    return at.alone(of, "segments", at.params, at.batch.inputs)


@_once_each
def forward(point: Point) -> Contender:
    """The recursion of the states."""
    import jax

    from bptt_study.backprop import unroll

    at = _segmented(point)

    def of(params: Any, state: Any, projected: Any) -> Any:
        def forth(state: Any, projected: Any) -> Any:
            kept = unroll._traced(at.problem.cell, params["cell"], state, projected)
            return jax.tree.map(lambda h: h[-1], kept.states), kept

        return jax.lax.scan(forth, state, projected)[1]

    traced = unroll.Trace("steps", "segments", "segments")
    return at.alone(of, traced, at.params, at.state, embedding(point)[0]())


@_once_each
def head(point: Point) -> Contender:
    """Readout and loss: the loss, the readout's gradient, e_t."""
    at = _segmented(point)

    def of(params: Any, kept: Any, batch: Any) -> Any:
        def segment(kept: Any, batch: Any) -> Any:
            linear = at.linear(params, kept, batch)
            return (linear.loss, linear.readout_grads), linear.immediate

        return _summed(segment, kept, batch)

    return at.alone(of, ("whole", "segments"), at.params, forward(point)[0](), at.batch)


@_once_each
def backward(point: Point) -> Contender:
    """The recursion of the adjoints."""
    import jax

    from bptt_study.backprop import unroll

    at = _segmented(point)

    def of(params: Any, kept: Any, batch: Any, immediate: Any) -> Any:
        def back(arriving: Any, segment: Any) -> Any:
            *of_it, e = segment
            linear = at.linear(params, *of_it)
            return unroll._recursion(linear.back, e, linear.at, arriving)

        nothing = at.problem.cell.zeros(batch.mask.shape[-1])
        return jax.lax.scan(back, nothing, (kept, batch, immediate), reverse=True)[1]

    _, immediate = head(point)[0]()
    return at.alone(of, "segments", at.params, forward(point)[0](), at.batch, immediate)


@_once_each
def contraction(point: Point) -> Contender:
    """The cell's gradient from the adjoints."""
    at = _segmented(point)

    def of(params: Any, kept: Any, batch: Any, adjoints: Any) -> Any:
        def segment(kept: Any, batch: Any, adjoints: Any) -> Any:
            return at.linear(params, kept, batch).contract(adjoints), ()

        return _summed(segment, kept, batch, adjoints)[0]

    adjoints = backward(point)[0]()
    return at.alone(of, "whole", at.params, forward(point)[0](), at.batch, adjoints)


PHASES = ("embedding", "forward", "head", "backward", "contraction")


def apart(point: Point) -> Contender:
    """The phases one after the other, each waited for."""
    return lambda: [_prepared(name, point)[0]() for name in PHASES], {}


@_once_each
def forward_products(point: Point) -> Contender:
    """In each step [B, H] × [H, GH]."""
    from bptt_study.backprop import unroll

    at = _segmented(point)

    def of(W: Any, h: Any) -> Any:
        return _summed(lambda h: (h @ W, ()), unroll._flat(h))[0]

    return at.alone(of, "whole", at.params["cell"]["W_hh"], _arrays(point)[0])


@_once_each
def head_products(point: Point) -> Contender:
    """In each segment those of the readout, of e_t and of the readout's gradient."""
    from bptt_study.backprop import unroll

    at = _segmented(point)

    def of(W: Any, h: Any) -> Any:
        def segment(h: Any) -> Any:
            h = unroll._flat(h)
            outputs = h @ W
            return h.T @ outputs, outputs @ W.T

        return _summed(segment, h)

    out = ("whole", "steps")
    return at.alone(of, out, at.params["readout"]["W_hq"], _arrays(point)[0])


@_once_each
def backward_products(point: Point) -> Contender:
    """In each step [B, GH] × [GH, H]."""
    import jax

    from bptt_study.backprop import unroll

    at = _segmented(point)

    def of(W: Any, delta: Any) -> Any:
        # laid out once: XLA would turn it around in each step
        V = jax.lax.optimization_barrier(W.T)
        return _summed(lambda delta: (delta @ V, ()), unroll._flat(delta))[0]

    return at.alone(of, "whole", at.params["cell"]["W_hh"], _arrays(point)[1])


@_once_each
def contraction_products(point: Point) -> Contender:
    """In each segment [H, SB] × [SB, GH]."""
    from bptt_study.backprop import unroll

    at = _segmented(point)

    def of(h: Any, delta: Any) -> Any:
        def segment(h: Any, delta: Any) -> Any:
            return unroll._flat(h).T @ unroll._flat(delta), ()

        return _summed(segment, h, delta)[0]

    return at.alone(of, "whole", *_arrays(point))


def _arrays(point: Point) -> tuple[Any, Any]:
    """h_t, and numbers of the shape of all gates."""
    import jax
    import jax.numpy as jnp

    gates = jax.tree.leaves(embedding(point)[0]())
    states = forward(point)[0]().states
    return _segmented(point).problem.cell.read(states), jnp.concatenate(gates, axis=-1)


PRODUCTS = tuple(f"{phase}_products" for phase in PHASES if phase != "embedding")
TOGETHER = ("apart", *PHASES, *PRODUCTS)  # in one process: they share arrays


# ---- in the contender's own process


@cache
def _prepared(name: str, point: Point) -> Contender:
    return globals()[name](point)


def prepare(name: str, point: Point) -> dict[str, Any]:
    """Compile and warm up; what is known of the contender, and how long one run takes."""
    _prepared.cache_clear()
    once, about = _prepared(name, point)
    once()
    return {"scaled_by": 1.0} | about | {"warm": run(name, point)[0]}


def run(name: str, point: Point, least: float = 0.05) -> tuple[float, float]:
    """Seconds and minor page faults of one run, means of as many in a row as take `least` seconds.

    In a row as in training: for a single one of some milliseconds after another process had the cores, the
    system may leave two threads on one core.
    """
    once, _ = _prepared(name, point)
    faults, begun, runs, seconds = _usage().ru_minflt, time.perf_counter(), 0, 0.0
    while seconds < least:
        once()
        runs, seconds = runs + 1, time.perf_counter() - begun
    return seconds / runs, (_usage().ru_minflt - faults) / runs


def _usage() -> resource.struct_rusage:
    return resource.getrusage(resource.RUSAGE_SELF)


def peak_bytes() -> int:
    """The most memory that this process has had."""
    return _usage().ru_maxrss * (1 if sys.platform == "darwin" else 1024)
