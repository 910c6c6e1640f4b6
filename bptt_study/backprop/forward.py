"""The forward pass, h_t = f(h_{t-1}, x_t), and the values that it stores for the backward pass.

Every cell runs in one of three forms, according to the fields it offers: `affine`, `layers`, or `step` alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from bptt_study.backprop.compare import said
from bptt_study.backprop.pytrees import last, merge_time_and_batch, shifted
from bptt_study.types import Affine, Batch, Cell, Derivative, Layers, Params, Problem, State
from bptt_study.validation import SettingError


class Residuals(NamedTuple):
    """The values that the VJP of each step needs; every leaf has the leading axis T."""

    inputs: Array  # x_t
    before: State  # h_{t-1}
    after: State  # h_t
    # the residuals of the update, beside the states; empty for a cell with `step` alone
    update: Any


class Stored(NamedTuple):
    """The values that the forward pass stores for the backward pass: each state once."""

    start: State  # h_0, leaves [B, H]
    after: State  # h_1 … h_T, leaves [T, B, H]
    update: Any  # as in Residuals

    def residuals(self, inputs: Array) -> Residuals:
        """Make the residuals of the same steps from their inputs."""
        return Residuals(inputs, shifted(self.start, self.after), self.after, self.update)


def forward(cell: Cell, params: Params, state: State, inputs: Array) -> Stored:
    """Run T steps from h_0 = `state` and store all states.

    Args:
      cell: The cell.
      params: The cell's parameters.
      state: h_0, leaves [B, H].
      inputs: x_1 … x_T, [T, B] or [T, B, D].

    Returns:
      The values that the backward pass needs.
    """
    if isinstance(cell.affine, Layers):
        return _through_layers(cell.affine, params, state, inputs)
    after, update = _scan(cell, params, state, inputs, lambda after, kept: (after, kept))[1]
    return Stored(state, after, update)


def states(cell: Cell, params: Params, state: State, inputs: Array) -> State:
    """Compute the hidden states h_1 … h_T, leaves [T, B, H], from h_0 = `state`."""
    if isinstance(cell.affine, Layers):
        return _through_layers(cell.affine, params, state, inputs).after
    return _scan(cell, params, state, inputs, lambda after, _: after)[1]


def last_state(cell: Cell, params: Params, state: State, inputs: Array) -> State:
    """Compute h_T from h_0 = `state`, and store nothing else."""
    if isinstance(cell.affine, Layers):
        return last(_through_layers(cell.affine, params, state, inputs).after)
    return _scan(cell, params, state, inputs, lambda after, _: None)[0]


def _scan(
    cell: Cell,
    params: Params,
    state: State,
    inputs: Array,
    keep: Callable[[State, Any], Any],
) -> tuple[State, Any]:
    """Run all steps; return h_T, and keep(h_t, residuals of the update) of every step, stacked."""
    if isinstance(affine := cell.affine, Affine):
        xs, update = project(affine, params, inputs), derivative(affine).forward

        def step(state: State, projected: Any) -> tuple[State, Any]:
            after, kept = update(projected, affine.recur(params, state), state)
            return after, keep(after, kept)
    else:
        xs = inputs

        def step(state: State, projected: Any) -> tuple[State, Any]:
            after = cell.step(params, state, projected)  # the inputs themselves
            return after, keep(after, ())

    return lax.scan(step, state, xs, length=len(inputs))


def _through_layers(layers: Layers, params: Params, state: State, inputs: Array) -> Stored:
    """Run layer by layer, so that one product projects a layer's input for all time steps."""
    below, found = inputs, []
    for cell, theta, start in zip(layers.cells, params, state, strict=True):
        found.append(forward(cell, theta, start, below))
        below = read_out(cell, found[-1].after)
    _, after, update = zip(*found, strict=True)
    return Stored(state, tuple(after), tuple(update))


def read_out(cell: Cell, states: State) -> Float[Array, "T B H"]:
    """Return the part of h_1 … h_T that the readout sees."""
    return jax.vmap(cell.read)(states)


def project(affine: Affine, params: Params, inputs: Array) -> Any:
    """Compute the inputs' part of the pre-activations, [T, B, …], in one product over all tokens."""
    projected = affine.project(params, merge_time_and_batch(inputs))
    return jax.tree.map(lambda a: a.reshape(*inputs.shape[:2], *a.shape[1:]), projected)


def derivative(affine: Affine) -> Derivative:
    """Return the derivative of the update, written out or by `jax.vjp` from the update's arguments."""

    def run(projected: Any, recurred: Any, state: State) -> tuple[State, Any]:
        return affine.update(projected, recurred, state), (projected, recurred)

    def vjp(residuals: tuple[Any, State, State], adjoint: State) -> tuple[Any, Any, State]:
        (projected, recurred), before, _ = residuals
        return jax.vjp(affine.update, projected, recurred, before)[1](adjoint)

    return affine.derivative or Derivative(run, vjp)


def mean_loss(
    problem: Problem, readout: Params, states: State, batch: Batch, tokens: Float[Array, ""]
) -> Float[Array, ""]:
    """Compute the sum of the masked losses ÷ `tokens`, the number of tokens that count."""
    outputs = problem.readout.apply(readout, merge_time_and_batch(read_out(problem.cell, states)))
    outputs = outputs.reshape(*batch.mask.shape, *outputs.shape[1:])
    return masked_sum(problem, outputs, batch, tokens.dtype) / tokens


def masked_sum(
    problem: Problem, outputs: Float[Array, "T B Q"], batch: Batch, dtype: Any
) -> Float[Array, ""]:
    """Sum the losses times the mask.

    Neither the sum nor its derivative depends on a masked token, not even if its loss is nan.

    Args:
      problem: Cell, readout and loss.
      outputs: O [T, B, Q].
      batch: The batch.
      dtype: The type of the sum.

    Returns:
      The sum.

    Raises:
      SettingError: For a loss that does not return a real number for each token.
    """
    counts = batch.mask != 0
    outputs = jnp.where(per_token(counts, outputs), outputs, lax.stop_gradient(outputs))
    losses = problem.loss(outputs, batch.targets)
    real = isinstance(losses, jax.Array) and jnp.issubdtype(losses.dtype, jnp.floating)
    if not real or losses.shape != batch.mask.shape:
        allowed = "a function that returns one loss per token, real numbers [T, B]"
        raise SettingError("problem.loss", f"one that returns {said(losses)}", allowed)
    # a mask of booleans becomes numbers only here, where it is no longer than a segment
    weights = batch.mask.astype(dtype)
    weighted = losses.astype(dtype) * jnp.where(weights >= 0, weights, jnp.nan)
    return jnp.sum(jnp.where(counts, weighted, 0))


def count_tokens(mask: Float[Array, "T B"]) -> Float[Array, ""]:
    """Sum the mask; an empty mask gives 1, so that its mean loss and gradient are 0.

    The sum is a float of JAX's default type or a longer one: 65,536 tokens exceed the largest float16.
    """
    total = jnp.sum(mask.astype(jnp.promote_types(mask.dtype, jnp.result_type(float))))
    return jnp.where(total > 0, total, 1)


def token_count(params: Params, batch: Batch) -> Float[Array, ""]:
    """Count the tokens, as a float of the parameters' real type, or of float32 if that is longer."""
    kind = jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).dtype
    return count_tokens(batch.mask).astype(jnp.promote_types(kind, jnp.float32))


def per_token(condition: Bool[Array, "T B"], leaf: Array) -> Array:
    """Reshape a condition [T, B] so that it goes with a leaf [T, B, …]."""
    return condition.reshape(condition.shape + (1,) * (leaf.ndim - 2))


def evaluate(problem: Problem, params: Params, batch: Batch) -> dict[str, Float[Array, ""]]:
    """Compute the loss, and for classes the accuracy, of a batch from the zero state; forward only.

    Args:
      problem: Cell, readout and loss.
      params: The parameters.
      batch: The batch.

    Returns:
      The scores by name.
    """
    state = problem.cell.zeros(batch.mask.shape[1])
    after = states(problem.cell, params["cell"], state, batch.inputs)
    tokens = count_tokens(batch.mask)
    scores = {"validation_loss": mean_loss(problem, params["readout"], after, batch, tokens)}
    outputs = problem.readout.apply(params["readout"], read_out(problem.cell, after))
    classes = batch.targets.ndim == 2 and outputs.shape[-1] > 1
    if classes and jnp.issubdtype(batch.targets.dtype, jnp.integer):
        hits = jnp.argmax(outputs, axis=-1) == batch.targets
        scores["accuracy"] = jnp.sum(hits * batch.mask.astype(tokens.dtype)) / tokens
    return scores


def generate(
    problem: Problem, params: Params, prefix: Int[Array, "N"], length: int, key: Key[Array, ""]
) -> Int[Array, "length"]:
    """Let the model continue a prefix, one symbol after the other.

    Args:
      problem: Cell, readout and loss.
      params: The parameters.
      prefix: Symbols [N].
      length: The number of symbols to draw.
      key: The key of the draws.

    Returns:
      The symbols [length].
    """
    cell, theta = problem.cell, params["cell"]
    state = last(states(cell, theta, cell.zeros(1), prefix[:, None]))

    def step(state: State, key: Key[Array, ""]) -> tuple[State, Int[Array, ""]]:
        symbol = jax.random.categorical(
            key, problem.readout.apply(params["readout"], cell.read(state))
        )
        return cell.step(theta, state, symbol), symbol[0]

    return lax.scan(step, state, jax.random.split(key, length))[1]
