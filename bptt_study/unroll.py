"""The forward scan and the backward recursion over time: the only place that loops over time.

Notation (shared by all strategies): h_t = f(h_{t-1}, x_t), J_t = ∂h_t/∂h_{t-1}, I_t = ∂f/∂θ at step t
with h_{t-1} held fixed, e_t = ∂l_t/∂h_t (immediate), λ_t = ∂L/∂h_t (adjoint).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from bptt_study.checks import SettingError
from bptt_study.types import Batch, Cell, Estimate, Params, Problem, State


def forward(cell: Cell, params: Params, state: State, inputs: Array) -> State:
    """Hidden states h_1 … h_T, each leaf [T, B, H], from h_0 = `state`."""

    def step(state: State, projected: Any) -> tuple[State, State]:
        state = cell.update(projected, cell.recur(params, state), state)
        return state, state

    return lax.scan(step, state, cell.project(params, inputs))[1]


def evaluate(problem: Problem, params: Params, batch: Batch) -> dict[str, Float[Array, ""]]:
    """Loss (and accuracy for classes) of a batch whose state starts from zero: forward only."""
    state = problem.cell.zeros(batch.mask.shape[1])
    states = forward(problem.cell, params["cell"], state, batch.inputs)
    scores = {"validation_loss": _mean_loss(problem, params["readout"], states, batch)}
    if jnp.issubdtype(batch.targets.dtype, jnp.integer):
        outputs = problem.readout.apply(params["readout"], problem.cell.read(states))
        hits = jnp.argmax(outputs, axis=-1) == batch.targets
        scores["accuracy"] = jnp.sum(hits * batch.mask) / jnp.sum(batch.mask)
    return scores


def generate(
    problem: Problem, params: Params, prefix: Int[Array, "N"], length: int, key: Key[Array, ""]
) -> Int[Array, "length"]:
    """`length` symbols drawn one after the other from the model, continuing the prefix."""
    cell, theta = problem.cell, params["cell"]
    states = forward(cell, theta, cell.zeros(1), prefix[:, None])
    state = jax.tree.map(lambda h: h[-1], states)

    def step(state: State, key: Key[Array, ""]) -> tuple[State, Int[Array, ""]]:
        symbol = jax.random.categorical(
            key, problem.readout.apply(params["readout"], cell.read(state))
        )
        return cell.step(theta, state, symbol), symbol[0]

    return lax.scan(step, state, jax.random.split(key, length))[1]


def backpropagate(
    problem: Problem,
    params: Params,
    state: State,
    batch: Batch,
    window: int | None = None,
    stride: int | None = None,
    gates: Float[Array, "*N T B"] | None = None,
) -> tuple[Estimate, State]:
    """Loss and gradient of one batch, as the truncation lets them through time.

    Losses come in blocks of `stride` steps from step 0 on; each block is back-propagated to
    `window - stride` steps before its start, where the state is detached (Williams & Peng 1990,
    BPTT(h; h')). Without a stride the blocks are as long as the window, without a window one block
    holds all T losses. Every link h_{t-1} -> h_t multiplies what passes back by ξ_t = gates[t]:

        λ_t = e_t + ξ_{t+1} J_{t+1}ᵀ λ_{t+1},    ĝ = Σ_t λ_tᵀ I_t + the readout's own gradient.

    N draws of gates, [N, T, B], give the average of their N gradients.

    The blocks share one forward pass and run side by side: `window` sequential steps, and T·window/stride
    step adjoints of arithmetic. All T states are stored. Adjoints come first; the gradient is
    then one contraction with all of them.
    """
    steps = batch.mask.shape[0]
    stride = stride or window or steps
    if window is not None and window < stride:
        raise SettingError("window", window, f"at least the stride ({stride})")
    stride = min(stride, steps)
    last_block = (steps - 1) // stride * stride
    window = min(window or steps, last_block + stride)
    if window == last_block + stride:  # even the last block reaches step 0: one block does it all
        stride = window = steps

    linear = linearise(problem, params, state, batch)
    gate = jnp.ones((steps, 1)) if gates is None else gates

    def back(adjoint: State, at: Any) -> State:
        """ξ_t J_tᵀ λ_t, what the adjoint of h_t sends to h_{t-1}."""
        at, gate = at
        return jax.tree.map(lambda a: gate[..., None] * a, linear.back(adjoint, at))

    def adjoints_of(gate: Float[Array, "T B"]) -> State:
        return _adjoints(back, linear.immediate, (linear.at, gate), window, stride)

    if gate.ndim > 2:  # the gradient is linear in λ: average the adjoints, then contract them once
        adjoints = jax.tree.map(lambda a: a.mean(axis=0), jax.vmap(adjoints_of)(gate))
    else:
        adjoints = adjoints_of(gate)
    shut = jnp.all(gate.reshape(-1, *gate.shape[-2:]) == 0, axis=0)
    boundary = (jnp.arange(steps)[:, None] % stride == 0) & (window == stride)
    metrics = {
        # for looking at: the square root has no derivative at zero
        "adjoint_norms": norm_of(lax.stop_gradient(adjoints), axis=-1),
        "cuts": jnp.broadcast_to(boundary | shut, batch.mask.shape).at[0].set(False),
    }
    grads = {"cell": linear.contract(adjoints), "readout": linear.readout_grads}
    last = jax.tree.map(lambda h: lax.stop_gradient(h[-1]), linear.states)
    return Estimate(linear.loss, grads, metrics), last


class Linearised(NamedTuple):
    """One forward pass and its derivatives: what every backward pass over it is made of."""

    loss: Float[Array, ""]  # mean over unmasked tokens
    readout_grads: Params  # the readout's own gradient
    states: State  # h_1 … h_T, leaves [T, B, H]
    immediate: State  # e_t of the mean loss, leaves [T, B, H]
    at: Any  # what `back` needs of each step, leading axis T
    back: Callable[[State, Any], State]  # (λ_t, at[t]) -> J_tᵀ λ_t, leaves [B, H]
    contract: Callable[[State], Params]  # λ_1 … λ_T -> Σ_t λ_tᵀ I_t, the cell's gradient
    token_grads: Callable[
        [State, Int[Array, ""]], Params
    ]  # (λ, b) -> λ_tᵀ I_t of sequence b, [T, …]
    token_norms: Callable[[State], Float[Array, "T B"]]  # λ_1 … λ_T -> ‖λ_tᵀ I_t‖, each sequence


def linearise(problem: Problem, params: Params, state: State, batch: Batch) -> Linearised:
    """The forward pass from h_0 = `state`, which is detached; all T states are stored."""
    cell, theta = problem.cell, params["cell"]
    start = lax.stop_gradient(state)
    projected, pull_projection = jax.vjp(lambda p: cell.project(p, batch.inputs), theta)
    states, links = _linearised_forward(cell, theta, start, projected)
    previous = jax.tree.map(lambda h0, h: jnp.concatenate([h0[None], h[:-1]]), start, states)

    loss, (readout_grads, immediate) = jax.value_and_grad(_mean_loss, argnums=(1, 2))(
        problem, params["readout"], states, batch
    )

    def back(adjoint: State, at: Any) -> State:
        link, before = at
        _, through_recur, direct = link(adjoint)
        (recurred,) = jax.vjp(lambda h: cell.recur(theta, h), before)[1](through_recur)
        return jax.tree.map(jnp.add, recurred, direct)

    def contract(adjoints: State) -> Params:
        through_project, through_recur, _ = jax.vmap(lambda link, a: link(a))(links, adjoints)
        (grads,) = pull_projection(through_project)
        (recur_grads,) = jax.vjp(lambda p: cell.recur(p, previous), theta)[1](through_recur)
        return jax.tree.map(jnp.add, grads, recur_grads)

    def tokens(adjoints: State) -> Any:
        through = jax.vmap(lambda link, a: link(a))(links, adjoints)[:2]
        return through, batch.inputs, previous

    def grads_of(token: Any) -> Params:
        through, x, before = token
        _, pull = jax.vjp(lambda p: (cell.project(p, x), cell.recur(p, before)), theta)
        return pull(through)[0]

    def token_grads(adjoints: State, sequence: Int[Array, ""]) -> Params:
        return jax.vmap(grads_of)(jax.tree.map(lambda a: a[:, sequence], tokens(adjoints)))

    def token_norms(adjoints: State) -> Float[Array, "T B"]:
        # one step at a time: the gradients of all tokens are T·B times the parameters
        return lax.map(jax.vmap(lambda token: norm_of(grads_of(token))), tokens(adjoints))

    return Linearised(
        loss=loss,
        readout_grads=readout_grads,
        states=states,
        immediate=immediate,
        at=(links, previous),
        back=back,
        contract=contract,
        token_grads=token_grads,
        token_norms=token_norms,
    )


def lag_adjoints(
    linear: Linearised,
    lags: int,
    reduce: Callable[[State, Int[Array, ""]], Any],
    start: State | None = None,
) -> Any:
    """What every loss sends k steps back, reduced lag by lag: reduce(a_k, k) stacked over k < K.

    a_k[t] = ∂L_{t+k}/∂h_t, leaves [T, B, H], L_s the part of the mean loss that falls on step s; 0
    where t + k > T. From a_0 = e, or `start`, on, a_{k+1}[t-1] = J_tᵀ a_k[t]: one step for all T·B
    adjoints at once, K steps in all, and one a_k held at a time.
    """

    def further(adjoints: State, k: Int[Array, ""]) -> tuple[State, Any]:
        sent = jax.vmap(linear.back)(adjoints, linear.at)
        earlier = jax.tree.map(lambda a: jnp.roll(a, -1, axis=0).at[-1].set(0), sent)
        return earlier, reduce(adjoints, k)

    first = linear.immediate if start is None else start
    return lax.scan(further, first, jnp.arange(lags))[1]


def flow_products(linear: Linearised) -> Float[Array, "T T T"]:
    """Σ_b ⟨F_b[j,t], F_b[j,u]⟩ as [j, t, u]: F_b[j,t] = λ_jᵀ J_j … J_{t+1} I_t of sequence b, 0 for t ≥ j.

    F[j,t] is what all losses from step j on send over the link h_{j-1} -> h_j to the parameters at
    step t. Holds T²·B·H numbers and T gradients.
    """
    steps, size = jax.tree.leaves(linear.states)[0].shape[:2]
    total = _adjoints(linear.back, linear.immediate, linear.at, steps, steps)
    sent = lag_adjoints(linear, steps, lambda adjoints, k: adjoints, total)
    t = jnp.arange(steps)

    def over_link(j: Int[Array, ""]) -> Float[Array, "T T"]:
        def masked(a: Array) -> Array:
            return jnp.where((t < j)[:, None, None], a[jnp.maximum(j - t, 0), t], 0)

        here = jax.tree.map(masked, sent)

        def products(b: Int[Array, ""], gram: Array) -> Array:
            rows = [g.reshape(steps, -1) for g in jax.tree.leaves(linear.token_grads(here, b))]
            return gram + sum(row @ row.T for row in rows)

        return lax.fori_loop(0, size, products, jnp.zeros((steps, steps), linear.loss.dtype))

    return lax.map(over_link, t)


def jacobians(linear: Linearised) -> Float[Array, "T B n n"]:
    """J_t = ∂h_t/∂h_{t-1} of every step and sequence, rows ∂h_t[i]; n = H, for the LSTM's (h, c) 2H."""
    leaves, tree = jax.tree.flatten(linear.states)
    sizes = [leaf.shape[-1] for leaf in leaves]
    unit = jnp.split(jnp.eye(sum(sizes), dtype=leaves[0].dtype), np.cumsum(sizes)[:-1], axis=1)

    def row(unit: list[Array]) -> Float[Array, "T B n"]:
        adjoints = [jnp.broadcast_to(u, leaf.shape) for u, leaf in zip(unit, leaves, strict=True)]
        sent = jax.vmap(linear.back)(jax.tree.unflatten(tree, adjoints), linear.at)
        return jnp.concatenate(jax.tree.leaves(sent), axis=-1)

    return jnp.moveaxis(jax.vmap(row)(unit), 0, -2)


def log_growth(
    jacobians: Float[Array, "T B n n"], start: Float[Array, "n m"]
) -> Float[Array, "T B m"]:
    """log |diag R_t| of Q_t R_t = J_t Q_{t-1}, Q_0 = `start`: the growth of m directions at each step."""

    def step(Q: Array, J: Array) -> tuple[Array, Array]:
        Q, R = jnp.linalg.qr(J @ Q)
        return Q, jnp.log(jnp.abs(jnp.diagonal(R, axis1=-2, axis2=-1)))

    Q = jnp.broadcast_to(start, (jacobians.shape[1], *start.shape))
    return lax.scan(step, Q, jacobians)[1]


def norm_of(tree: Any, axis: int | None = None) -> Array:
    """Frobenius norm of all leaves together; axis: of that axis alone."""
    return jnp.sqrt(sum(jnp.sum(a * a, axis=axis) for a in jax.tree.leaves(tree)))


def _linearised_forward(
    cell: Cell, theta: Params, state: State, projected: Any
) -> tuple[State, Any]:
    """States h_1 … h_T, and for each step the pullback of its update, λ_t -> (project, recur, h_{t-1}).

    The update knows no parameters, so a pullback holds pointwise factors only, and stacks over time.
    """

    def step(state: State, projected: Any) -> tuple[State, Any]:
        state, link = jax.vjp(cell.update, projected, cell.recur(theta, state), state)
        return state, (state, link)

    return lax.scan(step, state, projected)[1]


def _mean_loss(problem: Problem, readout: Params, states: State, batch: Batch) -> Float[Array, ""]:
    outputs = problem.readout.apply(readout, problem.cell.read(states))
    tokens = problem.loss(outputs, batch.targets)
    return jnp.sum(tokens * batch.mask) / jnp.sum(batch.mask)


def _adjoints(back: Any, immediate: State, at: Any, window: int, stride: int) -> State:
    """λ_t [T, B, H] of all losses together, each seen `window` back in blocks of `stride`.

    Time is laid out as [stride, blocks]: row r of lane n is step n·stride + r. All lanes go back one
    row at a time; below row 0 an adjoint goes on in the lane before its own.
    """
    steps = jax.tree.leaves(immediate)[0].shape[0]
    blocks = -(-steps // stride)

    def lanes(a: Array) -> Array:
        a = jnp.pad(a, [(0, blocks * stride - steps)] + [(0, 0)] * (a.ndim - 1))
        return jnp.swapaxes(a.reshape(blocks, stride, *a.shape[1:]), 0, 1)

    def own_row(arriving: State, row: Any) -> tuple[State, State]:
        e, at = row
        adjoint = jax.tree.map(jnp.add, e, arriving)
        return jax.vmap(back)(adjoint, at), adjoint

    def earlier_row(carry: tuple[State, State], row: Array) -> tuple[tuple[State, State], None]:
        arriving, total = carry
        here = row == stride - 1
        adjoint = jax.tree.map(
            lambda a: jnp.where(here, jnp.roll(a, -1, axis=0).at[-1].set(0), a), arriving
        )
        total = jax.tree.map(lambda t, a: t.at[row].add(a), total, adjoint)
        return (jax.vmap(back)(adjoint, jax.tree.map(lambda a: a[row], at)), total), None

    immediate, at = jax.tree.map(lanes, (immediate, at))
    nothing = jax.tree.map(lambda e: jnp.zeros_like(e[0]), immediate)
    arriving, total = lax.scan(own_row, nothing, (immediate, at), reverse=True)
    if window > stride:
        rows = stride - 1 - jnp.arange(window - stride) % stride
        (_, total), _ = lax.scan(earlier_row, (arriving, total), rows)
    return jax.tree.map(
        lambda a: jnp.swapaxes(a, 0, 1).reshape(blocks * stride, *a.shape[2:])[:steps], total
    )
