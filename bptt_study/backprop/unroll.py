"""The forward scan and the backward recursion over time: the only place that loops over time.

Notation (shared by all strategies): h_t = f(h_{t-1}, x_t), J_t = ∂h_t/∂h_{t-1}, I_t = ∂f/∂θ at step t
with h_{t-1} held fixed, e_t = ∂l_t/∂h_t (immediate), λ_t = ∂L/∂h_t (adjoint).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Key

from bptt_study import validation
from bptt_study.backprop import BATCH_AXIS
from bptt_study.backprop.schedules import revolve
from bptt_study.types import Batch, ByHand, Cell, Estimate, Params, Problem, State
from bptt_study.validation import SettingError


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
    scores = {
        "validation_loss": _mean_loss(
            problem, params["readout"], states, batch, jnp.sum(batch.mask)
        )
    }
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
    reach: int | None = None,
    segment: int | None = None,
    states: int | None = None,
) -> tuple[Estimate, State]:
    """Loss and gradient of one batch, as the truncation lets them through time.

    Losses come in blocks of `stride` steps from step 0 on; each block is back-propagated to
    `window - stride` steps before its start, where the state is detached (Williams & Peng 1990,
    BPTT(h; h')). Without a stride the blocks are as long as the window, without a window one block
    holds all T losses. Every link h_{t-1} -> h_t multiplies what passes back by ξ_t = gates[t]:

        λ_t = e_t + ξ_{t+1} J_{t+1}ᵀ λ_{t+1},    ĝ = Σ_t λ_tᵀ I_t + the readout's own gradient.

    N draws of gates, [N, T, B], give the average of their N gradients. `reach` promises that hardly ever more
    than so many steps of a sequence lie between two cuts, ξ = 0.

    Time is taken in segments of about `segment` steps (None: what fills a cache). Without a window all states
    are stored, or just `states` of them and the others computed again in the best order (checkpointing),
    and the segments are gone through backwards. With one, a segment is done with when its blocks
    are: they run side by side, `window` sequential steps, and the states of one segment are stored at a
    time, beside those of window - stride steps before it. One draw of gates with a reach, in a sequence of
    eight such segments or more, lets each sequence go on from its own last cut in every segment; where the
    promise is broken all is done again by checkpointing (measured: up to twice the time). No reverse-mode
    derivative goes through that. Within a segment adjoints come first; the gradient is then one contraction
    with all of them.
    """
    steps, size = batch.mask.shape
    # a mask of booleans counts as one of numbers
    batch = batch._replace(mask=batch.mask.astype(jnp.result_type(*jax.tree.leaves(params))))
    stride = stride or window or steps
    if window is not None and window < stride:
        raise SettingError("window", window, f"at least the stride ({stride})")
    stride = min(stride, steps)
    last_block = (steps - 1) // stride * stride
    window = min(window or steps, last_block + stride)
    if window == last_block + stride:  # even the last block reaches step 0: one block does it all
        stride = window = steps

    if reach is not None:
        validation.whole("reach", reach)
    if size % (parts := _parts()):
        raise SettingError("batch_size", size, f"multiples of {parts}, over which it is split")

    def passes(
        params: Params, state: State, batch: Batch, gates: Array | None, tokens: Array
    ) -> tuple[Array, Params, Array, State]:
        gates = None if gates is None else jnp.moveaxis(gates, -2, 0)  # time first, as in all else
        walk = _Walk(problem, params, batch, gates, tokens, window, stride)
        length = segment or fitting(state, batch.mask.shape[1])
        if stride < steps:
            return _along(walk, state, length)
        if reach is not None and gates is not None and gates.ndim == 2:
            longest = max(length, reach)
            if steps >= ROUNDS * longest:
                return _from_cut_to_cut(walk, state, longest)
        if states is None or states >= steps:
            return _through(walk, state, _even(steps, length))
        return _again(walk, state, *revolve.layout(steps, states))

    if parts > 1:
        passes = _split(passes, gates)
    state = lax.stop_gradient(state)
    loss, grads, norms, last = passes(params, state, batch, gates, jnp.sum(batch.mask))
    boundary = (jnp.arange(steps)[:, None] % stride == 0) & (window == stride)
    if gates is not None:
        boundary |= jnp.all(gates.reshape(-1, steps, size) == 0, axis=0)
    cuts = jnp.broadcast_to(boundary, batch.mask.shape).at[0].set(False)
    return Estimate(loss, grads, {"adjoint_norms": norms, "cuts": cuts}), lax.stop_gradient(last)


def _parts() -> int:
    """Devices over which the mesh that is set, see `training.devices.split_batch`, splits the batch."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(BATCH_AXIS, 1)


def _split(passes: Any, gates: Array | None) -> Any:
    """The same, a part of the sequences on each device: sequences meet only in the sums over the batch."""
    P = jax.sharding.PartitionSpec
    whole, over_time = P(), P(None, BATCH_AXIS)
    draws = () if gates is None else gates.shape[:-2]

    def part(*arguments: Any) -> Any:
        loss, grads, norms, last = passes(*arguments)
        return *lax.psum((loss, grads), BATCH_AXIS), norms, last

    return jax.shard_map(
        part,
        in_specs=(whole, P(BATCH_AXIS), over_time, P(*[None] * len(draws), *over_time), whole),
        out_specs=(whole, whole, over_time, P(BATCH_AXIS)),
        axis_names={BATCH_AXIS},
        check_vma=False,  # scans start from constants, which carry no device axis to check
    )


# of a segment, measured on a CPU: H 32 … 512, 4 … 16 sequences a device
HELD = 2**14  # numbers in each of its arrays, all of which a core's cache then holds
TOKENS = 256  # at least: what is done once for each segment, its contraction too, pays with so many
LONGEST = 512  # steps
# from cut to cut at least: in fewer the last one, which is never full, weighs more than an eighth
ROUNDS = 8


def fitting(state: State, size: int) -> int:
    """Steps of a segment of `size` sequences."""
    width = sum(leaf.size for leaf in jax.tree.leaves(state)) or size
    return max(1, min(max(HELD // width, TOKENS // size), LONGEST))


def _even(steps: int, length: int) -> int:
    """At most `length`, and a divisor of the steps if there is one near: a remainder is compiled apart."""
    least = -(-steps // length)
    parts = (n for n in range(least, 2 * least + 1) if steps % n == 0)
    return -(-steps // next(parts, least))


class _Walk(NamedTuple):
    """What the segments of one estimate share."""

    problem: Problem
    params: Params
    batch: Batch
    gates: Float[Array, "T *N B"] | None
    tokens: Float[Array, ""]  # of the whole batch
    window: int
    stride: int

    def part(self, start: Any, length: int) -> tuple[Batch, Array | None]:
        """Batch and gates of `length` steps from step `start` on."""

        def cut(a: Array) -> Array:
            return lax.dynamic_slice_in_dim(a, start, length)

        return jax.tree.map(cut, (self.batch, self.gates))

    def pull(
        self, trace: "Trace", batch: Batch, gates: Array | None, arriving: State
    ) -> tuple[State, State, tuple[Array, Params]]:
        """Of one segment: what leaves it for the steps before it, λ_t, and (loss, gradient).

        `arriving` at its last state from the steps after it, [B, H] or for N draws [N, B, H].
        """
        linear = _linearise(self.problem, self.params, trace, batch, self.tokens)

        def adjoints_of(gate: Array | None, arriving: State) -> tuple[State, State]:
            return _recursion(_gated(linear.back), linear.immediate, (linear.at, gate), arriving)

        leaving, adjoints = _each_draw(adjoints_of, gates, arriving)
        grads = {"cell": linear.contract(adjoints), "readout": linear.readout_grads}
        return leaving, adjoints, (linear.loss, grads)

    def nothing(self, state: State) -> tuple[State, tuple[Array, Params]]:
        """Where a backward pass begins: no adjoint arrives (for N draws [N, B, H]), no loss, no gradient."""
        draws = () if self.gates is None else self.gates.shape[1:-1]
        arriving = jax.tree.map(lambda h: jnp.zeros((*draws, *h.shape), h.dtype), state)
        return arriving, (jnp.zeros((), self.tokens.dtype), _zeros(self.params))

    def back(self, carry: Any, kept: "Trace", start: Any) -> tuple[Any, Array]:
        """Back through the segment of `kept`, whose first step is `start`; its ‖λ_t‖ beside."""
        arriving, total = carry
        length = len(jax.tree.leaves(kept.states)[0])
        leaving, adjoints, found = self.pull(kept, *self.part(start, length), arriving)
        return (leaving, _add(total, found)), _norms(adjoints)


def _gated(back: Any) -> Callable[[State, Any], State]:
    """ξ_t J_tᵀ λ_t, what the adjoint of h_t sends to h_{t-1}."""

    def sent(adjoint: State, now: Any) -> State:
        at, gate = now
        sent = back(adjoint, at)
        return sent if gate is None else jax.tree.map(lambda a: gate[..., None] * a, sent)

    return sent


def _each_draw(adjoints_of: Any, gates: Array | None, *arriving: State) -> tuple[Any, State]:
    """The gradient is linear in λ: average the adjoints of all draws, to contract them once."""
    if gates is None or gates.ndim == 2:
        return adjoints_of(gates, *arriving)
    leaving, each = jax.vmap(adjoints_of, in_axes=(1, *[0] * len(arriving)))(gates, *arriving)
    return leaving, jax.tree.map(lambda a: a.mean(axis=0), each)


def _norms(adjoints: State) -> Float[Array, "T B"]:
    """For looking at: the square root has no derivative at zero."""
    return norm_of(lax.stop_gradient(adjoints), axis=-1)


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _zeros(tree: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, tree)


def _joined(parts: Any) -> Array:
    """[n, S, …], [S', …], … one after the other: [n·S + S' + …, …]."""
    return jnp.concatenate([a.reshape(-1, a.shape[-1]) for a in parts])


def _through(walk: _Walk, state: State, length: int) -> tuple[Array, Params, Array, State]:
    """Loss, gradient, ‖λ_t‖, last state of a backward pass through all steps: all states are stored."""
    steps = len(walk.batch.mask)
    whole, rest = steps // length, steps % length
    cell, theta = walk.problem.cell, walk.params["cell"]

    def forth(state: State, start: Any, length: int = length) -> tuple[State, Trace]:
        kept = trace(cell, theta, state, walk.part(start, length)[0].inputs)
        return jax.tree.map(lambda h: h[-1], kept.states), kept

    def back(carry: Any, at: Any) -> tuple[Any, Array]:
        kept, start = at
        return walk.back(carry, kept, start)

    starts = jnp.arange(whole) * length
    last, kept = lax.scan(forth, state, starts)
    carry, norms = walk.nothing(state), []
    if rest:
        last, tail = forth(last, whole * length, rest)
        carry, found = walk.back(carry, tail, whole * length)
        norms = [found]
    (_, (loss, grads)), found = lax.scan(back, carry, (kept, starts), reverse=True)
    return loss, grads, _joined([found, *norms]), last


def _again(
    walk: _Walk, state: State, length: int, places: int
) -> tuple[Array, Params, Array, State]:
    """As `_through`, storing `places` states, and `length` more of the segment that is gone back through."""
    units = len(walk.batch.mask) // length
    cell, theta = walk.problem.cell, walk.params["cell"]

    def operate(carry: Any, operation: revolve.Plan) -> tuple[Any, None]:
        state, stored, last, found, norms = carry
        load, unit, pull, store = operation
        state = jax.tree.map(lambda h, s: jnp.where(load < 0, h, s[load]), state, stored)
        start = unit * length
        inputs = walk.part(start, length)[0].inputs

        def forth() -> Any:
            return _last(cell, theta, state, inputs), last, found, norms

        def back() -> Any:
            kept = trace(cell, theta, state, inputs)
            after, own = walk.back(found, kept, start)
            end = jax.tree.map(
                lambda h, e: jnp.where(unit == units - 1, h[-1], e), kept.states, last
            )
            return state, end, after, lax.dynamic_update_slice_in_dim(norms, own, start, 0)

        state, last, found, norms = lax.cond(pull, back, forth)
        stored = jax.tree.map(
            lambda s, h: s.at[jnp.where(store < 0, places, store)].set(h, mode="drop"),
            stored,
            state,
        )
        return (state, stored, last, found, norms), None

    stored = jax.tree.map(lambda h: jnp.zeros((places, *h.shape), h.dtype).at[0].set(h), state)
    norms = jnp.zeros(walk.batch.mask.shape, walk.tokens.dtype)
    carry = (state, stored, state, walk.nothing(state), norms)
    plan = revolve.plan(units, places)
    (_, _, last, (_, (loss, grads)), norms), _ = lax.scan(operate, carry, plan)
    return loss, grads, norms, last


def _from_cut_to_cut(walk: _Walk, state: State, length: int) -> tuple[Array, Params, Array, State]:
    """As `_through`, storing `length` states: each sequence goes in its own time, from cut to cut.

    A round runs each sequence `length` steps on from its own last cut, and back-propagates those up to the
    last cut among them; the rest is run again in the next round. A sequence without a cut among its steps
    cannot go on; then checkpointing does it all, with 2√T states.
    """
    steps, size = walk.batch.mask.shape
    cell, theta = walk.problem.cell, walk.params["cell"]
    row, lane = jnp.arange(length)[:, None], jnp.arange(size)
    gates = cast(Array, walk.gates)  # of one draw
    ends = jnp.concatenate([gates[1:] == 0, jnp.ones((1, size), bool)])  # a segment's last step

    def unfinished(carry: Any) -> Array:
        done, stuck, _ = carry
        return jnp.any(done < steps) & ~stuck

    def go(carry: Any) -> Any:
        done, _, (loss, grads, norms, state) = carry
        t = done + row
        batch, gate, end = jax.tree.map(
            lambda a: a.at[t, lane].get(mode="fill", fill_value=0), (walk.batch, gates, ends)
        )
        ready = jnp.max(jnp.where(end, row + 1, 0), axis=0)  # steps of whole segments
        own = row < ready
        kept = trace(cell, theta, state, batch.inputs)
        batch = batch._replace(mask=batch.mask * own)
        _, adjoints, found = walk.pull(kept, batch, gate, walk.nothing(state)[0])
        # those of steps that are not ready come again in the next round
        norms = norms.at[t, lane].set(_norms(adjoints), mode="drop")
        state = jax.tree.map(
            lambda h0, h: jnp.where((ready > 0)[:, None], h[ready - 1, lane], h0),
            state,
            kept.states,
        )
        stuck = jnp.any((ready == 0) & (done < steps))
        return done + ready, stuck, (*_add((loss, grads), found), norms, state)

    nothing = (*walk.nothing(state)[1], jnp.zeros_like(walk.batch.mask), state)
    begin = (jnp.zeros(size, int), jnp.zeros((), bool), nothing)
    _, stuck, found = lax.while_loop(unfinished, go, begin)

    def again(_: Any) -> Any:
        return False, _again(walk, state, *revolve.layout(steps, 2 * math.isqrt(steps)))

    # a loop of one turn or none: under vmap a condition would always do both
    return lax.while_loop(lambda carry: carry[0], again, (stuck, found))[1]


class _Held(NamedTuple):
    """Steps to which adjoints of later losses may still come; all leaves [S, …]."""

    at: list[Array]  # only leaves: a pullback traced anew is another tree, which no scan carries on
    inputs: Array
    gates: Float[Array, "S *N B"] | None
    adjoints: State  # λ_t of the losses until now


def _along(walk: _Walk, state: State, length: int) -> tuple[Array, Params, Array, State]:
    """Loss, gradient, ‖λ_t‖, last state of truncated passes: the states of one segment are stored at a time.

    Beside them those of the steps before it to which its losses are back-propagated, in whole blocks:
    what these get is contracted when no more can come.
    """
    steps, stride, further = len(walk.batch.mask), walk.stride, walk.window - walk.stride
    before = -(-further // stride) * stride
    length = min(max(length // stride * stride, stride, before), steps)
    cell, theta = walk.problem.cell, walk.params["cell"]

    def forth(state: State, start: Any, length: int) -> tuple[State, Linearised, _Held]:
        batch, gates = walk.part(start, length)
        kept = trace(cell, theta, state, batch.inputs)
        linear = _linearise(walk.problem, walk.params, kept, batch, walk.tokens)
        last = jax.tree.map(lambda h: h[-1], kept.states)
        adjoints, at = _zeros(kept.states), jax.tree.leaves(linear.at)
        return last, linear, _Held(at, batch.inputs, gates, adjoints)

    def contract(held: _Held) -> tuple[Params, Array]:
        at = jax.tree.unflatten(links, held.at)
        return _contract(cell, theta, at, held.inputs, held.adjoints), _norms(held.adjoints)

    def go(carry: Any, start: Any, length: int = length) -> tuple[Any, Array]:
        state, held, (loss, grads) = carry
        state, linear, own = forth(state, start, length)
        held = jax.tree.map(lambda *a: jnp.concatenate(a), held, own)
        at = jax.tree.unflatten(links, held.at)

        def adjoints_of(gates: Array | None) -> tuple[None, State]:
            back = _gated(linear.back)
            return None, _blocks(back, linear.immediate, (at, gates), stride, further)

        _, adjoints = _each_draw(adjoints_of, held.gates)
        # the made-up steps before the first get no adjoint
        adjoints = jax.tree.map(
            lambda a: a.at[:before].set(jnp.where(start > 0, a[:before], 0)), adjoints
        )
        held = held._replace(adjoints=_add(held.adjoints, adjoints))
        found, norms = contract(jax.tree.map(lambda a: a[:length], held))
        grads = _add(grads, {"cell": found, "readout": linear.readout_grads})
        held = jax.tree.map(lambda a: a[length:], held)
        return (state, held, (loss + linear.loss, grads)), norms

    _, linear, own = forth(state, 0, 1)
    links = jax.tree.structure(linear.at)
    # links of a real step: zeros in their place may be divided by
    nothing = jax.tree.map(lambda a: jnp.repeat(a, before, axis=0), own)
    whole, rest = divmod(steps, length)
    carry = (state, nothing, walk.nothing(state)[1])
    carry, found = lax.scan(go, carry, jnp.arange(whole) * length)
    norms = [found]
    if rest:
        carry, found = go(carry, whole * length, rest)
        norms.append(found)
    last, held, (loss, grads) = carry
    if before:
        found, tail = contract(held)
        grads = grads | {"cell": _add(grads["cell"], found)}
        norms.append(tail)
    return loss, grads, _joined(norms)[before:], last


class Trace(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    start: State  # h_0, leaves [B, H]
    states: State  # h_1 … h_T, leaves [T, B, H]
    kept: Any  # what else the derivative of each step's update needs


def trace(cell: Cell, theta: Params, state: State, inputs: Array) -> Trace:
    """The forward pass from h_0 = `state`, which stores all T states."""
    return _traced(cell, theta, state, _project(cell, theta, inputs))


def _traced(cell: Cell, theta: Params, state: State, projected: Any) -> Trace:
    """The update knows no parameters: its derivative keeps pointwise factors only, which stack over time."""
    update = _derivative(cell).forth

    def step(state: State, projected: Any) -> tuple[State, Any]:
        after, kept = update(projected, cell.recur(theta, state), state)
        return after, (after, kept)

    return Trace(state, *lax.scan(step, state, projected)[1])


def _derivative(cell: Cell) -> ByHand:
    """Of the update; `jax.vjp` keeps the pullback."""
    return cell.derivative or ByHand(
        forth=lambda *arguments: jax.vjp(cell.update, *arguments),
        back=lambda at, adjoint: at[0](adjoint),
    )


def _last(cell: Cell, theta: Params, state: State, inputs: Array) -> State:
    """h_T from h_0 = `state`: nothing else is stored."""

    def step(state: State, projected: Any) -> tuple[State, None]:
        return cell.update(projected, cell.recur(theta, state), state), None

    return lax.scan(step, state, _project(cell, theta, inputs))[0]


class Linearised(NamedTuple):
    """One forward pass and its derivatives: what every backward pass over it is made of."""

    loss: Float[Array, ""]  # mean over unmasked tokens
    readout_grads: Params  # the readout's own gradient
    states: State  # h_1 … h_T, leaves [T, B, H]
    immediate: State  # e_t of the mean loss, leaves [T, B, H]
    at: Any  # what `back` needs of each step: (kept, h_{t-1}, h_t), leading axis T
    back: Callable[[State, Any], State]  # (λ_t, at[t]) -> J_tᵀ λ_t, leaves [B, H]
    contract: Callable[[State], Params]  # λ_1 … λ_T -> Σ_t λ_tᵀ I_t, the cell's gradient
    token_grads: Callable[
        [State, Int[Array, ""]], Params
    ]  # (λ, b) -> λ_tᵀ I_t of sequence b, [T, …]
    token_norms: Callable[[State], Float[Array, "T B"]]  # λ_1 … λ_T -> ‖λ_tᵀ I_t‖, each sequence


def linearise(problem: Problem, params: Params, state: State, batch: Batch) -> Linearised:
    """The forward pass from h_0 = `state`, which is detached; all T states are stored."""
    kept = trace(problem.cell, params["cell"], lax.stop_gradient(state), batch.inputs)
    return _linearise(problem, params, kept, batch, jnp.sum(batch.mask))


def _linearise(
    problem: Problem, params: Params, kept: Trace, batch: Batch, tokens: Float[Array, ""]
) -> Linearised:
    """The loss is Σ over the batch's tokens ÷ `tokens`."""
    cell, theta = problem.cell, params["cell"]
    # XLA's product with a transposed W_hh turns it around again in each step. Turned here once, and back in
    # the loop, the product's own transposition meets that and both go (measured: full BPTT takes 0.76 of
    # the time for the LSTM at H 512, 0.9 at H 256, 0.95 at H 128)
    turned = jax.tree.map(lambda W: lax.optimization_barrier(W.T), theta)

    def recur_back(sent: Any) -> State:
        """Affine in h: its derivative is the same everywhere."""
        again = jax.tree.map(jnp.transpose, turned)
        return jax.vjp(lambda h: cell.recur(again, h), _zeros(kept.start))[1](sent)[0]

    loss, (readout_grads, immediate) = jax.value_and_grad(_mean_loss, argnums=(1, 2))(
        problem, params["readout"], kept.states, batch, tokens
    )

    update_back = _derivative(cell).back
    previous = jax.tree.map(lambda h0, h: jnp.concatenate([h0[None], h[:-1]]), *kept[:2])
    at = (kept.kept, previous, kept.states)

    def back(adjoint: State, at: Any) -> State:
        _, through_recur, direct = update_back(at, adjoint)
        return _add(recur_back(through_recur), direct)

    def tokens_of(adjoints: State) -> Any:
        return _through_update(cell, at, adjoints), batch.inputs, previous

    def grads_of(token: Any) -> Params:
        sent, x, before = token
        _, pull = jax.vjp(lambda p: (cell.project(p, x), cell.recur(p, before)), theta)
        return pull(sent)[0]

    def token_grads(adjoints: State, sequence: Int[Array, ""]) -> Params:
        return jax.vmap(grads_of)(jax.tree.map(lambda a: a[:, sequence], tokens_of(adjoints)))

    def token_norms(adjoints: State) -> Float[Array, "T B"]:
        # one step at a time: the gradients of all tokens are T·B times the parameters
        return lax.map(jax.vmap(lambda token: norm_of(grads_of(token))), tokens_of(adjoints))

    return Linearised(
        loss=loss,
        readout_grads=readout_grads,
        states=kept.states,
        immediate=immediate,
        at=at,
        back=back,
        contract=partial(_contract, cell, theta, at, batch.inputs),
        token_grads=token_grads,
        token_norms=token_norms,
    )


def _through_update(cell: Cell, at: Any, adjoints: State) -> tuple[Any, Any]:
    """λ_t pulled back to (project, recur), leaves [T, B, …]."""
    return jax.vmap(_derivative(cell).back)(at, adjoints)[:2]


def _contract(cell: Cell, theta: Params, at: Any, inputs: Array, adjoints: State) -> Params:
    """Σ_t λ_tᵀ I_t of the steps whose links are `at`."""
    # over T·B tokens as one axis: XLA's products over two are slower (measured 1.1 to 1.3 times)
    through_project, through_recur = _flat(_through_update(cell, at, adjoints))
    inputs, before = _flat((inputs, at[1]))
    (grads,) = jax.vjp(lambda p: cell.project(p, inputs), theta)[1](through_project)
    (recur_grads,) = jax.vjp(lambda p: cell.recur(p, before), theta)[1](through_recur)
    return _add(grads, recur_grads)


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
    nothing = _zeros(jax.tree.map(lambda h: h[0], linear.states))
    _, total = _recursion(linear.back, linear.immediate, linear.at, nothing)
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


def _flat(tree: Any) -> Any:
    """[T, B, …] -> [T·B, …]."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), tree)


def _project(cell: Cell, theta: Params, inputs: Array) -> Any:
    projected = cell.project(theta, _flat(inputs))
    return jax.tree.map(lambda a: a.reshape(*inputs.shape[:2], *a.shape[1:]), projected)


def _mean_loss(
    problem: Problem, readout: Params, states: State, batch: Batch, tokens: Float[Array, ""]
) -> Float[Array, ""]:
    outputs = problem.readout.apply(readout, _flat(problem.cell.read(states)))
    outputs = outputs.reshape(*batch.mask.shape, *outputs.shape[1:])
    return jnp.sum(problem.loss(outputs, batch.targets) * batch.mask) / tokens


def _recursion(back: Any, immediate: State, at: Any, arriving: State) -> tuple[State, State]:
    """What leaves the first step for the one before it, and λ_t = e_t + what arrives, all [T, …]."""

    def step(arriving: State, now: Any) -> tuple[State, State]:
        e, at = now
        adjoint = _add(e, arriving)
        return back(adjoint, at), adjoint

    return lax.scan(step, arriving, (immediate, at), reverse=True)


def _blocks(back: Any, immediate: State, at: Any, stride: int, further: int) -> State:
    """λ_t [P + S, B, H] of S losses, in blocks of `stride` that are back-propagated `further` than their start.

    The last S of the P + S steps have the losses. Time is laid out as [stride, blocks]: row r of lane n
    is step n·stride + r. All lanes with losses go back one row at a time; below row 0 an adjoint goes on in
    the lane before its own.
    """
    each = jax.vmap(back)

    def lanes(a: Array, beyond: str) -> Array:
        a = jnp.pad(a, [(0, -len(a) % stride)] + [(0, 0)] * (a.ndim - 1), beyond)
        return jnp.swapaxes(a.reshape(-1, stride, *a.shape[1:]), 0, 1)

    steps = len(jax.tree.leaves(at)[0])
    immediate = jax.tree.map(lambda a: lanes(a, "constant"), immediate)
    at = jax.tree.map(lambda a: lanes(a, "edge"), at)  # zeros there may be divided by
    blocks, own = (jax.tree.leaves(a)[0].shape[1] for a in (at, immediate))
    before = blocks - own

    def hop(n: Any, carry: tuple[State, State]) -> tuple[State, State]:
        arriving, total = carry
        row, lane = stride - 1 - n % stride, before - 1 - n // stride

        def corner(a: Array) -> tuple[Any, ...]:
            return row, lane, *[0] * (a.ndim - 2)

        def here(a: Array) -> Array:
            return lax.dynamic_slice(a, corner(a), (1, own, *a.shape[2:]))[0]

        def added(t: Array, a: Array) -> Array:
            return lax.dynamic_update_slice(t, (here(t) + a)[None], corner(t))

        total = jax.tree.map(added, total, arriving)
        return each(arriving, jax.tree.map(here, at)), total

    nothing = jax.tree.map(lambda e: jnp.zeros_like(e[0]), immediate)
    arriving, total = _recursion(
        each, immediate, jax.tree.map(lambda a: a[:, before:], at), nothing
    )
    if before:
        total = jax.tree.map(
            lambda t: jnp.pad(t, [(0, 0), (before, 0)] + [(0, 0)] * (t.ndim - 2)), total
        )
        _, total = lax.fori_loop(0, further, hop, (arriving, total))
    return jax.tree.map(
        lambda a: jnp.swapaxes(a, 0, 1).reshape(blocks * stride, *a.shape[2:])[:steps], total
    )
