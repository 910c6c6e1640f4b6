"""Products of the gradients of the lag table, from which variances follow. `lag_table` has the notation.

"The module" in what follows is `lag_table`: the same holds for states, masks and parameters.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bptt_study.backprop.adjoint import per_sequence
from bptt_study.backprop.forward_pass import forward_pass
from bptt_study.backprop.lag_adjoints import flow_products, lag_adjoints
from bptt_study.backprop.pytrees import floats, numbers, wide, with_floats
from bptt_study.instruments.compiled import compiled
from bptt_study.instruments.lag_arguments import checked
from bptt_study.types import Batch, Params, Problem, State


def flows(
    problem: Problem, params: Params, batch: Batch, state: State | None = None
) -> Float[Array, "T T T"]:
    """Compute ⟨F[j,t], F[j,u]⟩ with F[j,t] = Σ_{s≥max(j,t)} G[s,s-t], the table that all variances follow from.

    F[j,t] is the gradient that all losses from step j on send to the parameters at step t. For t < j it is the
    part that passes over the link h_{j-1} -> h_j; for t ≥ j it is all of Σ_{s≥t} G[s,s-t].

    The table takes T²·B gradients of single tokens, T·B times the arithmetic of a gradient, and holds T²·B·H
    numbers. Products below the smallest float are lost, while compensation multiplies lag k by up to π^-k: in
    float32 with a mean length of 2, this matters from about 100 steps on, and `variance` may refuse the table.

    Args:
      problem: Cell, readout and loss.
      params: The parameters.
      batch: One batch of T steps.
      state: h_0, leaves [B, H]. None: zeros.

    Returns:
      The products [T, T, T] at [j, t, u], summed over sequences.

    Raises:
      SettingError: As the module says.
    """
    return _flows(problem, *_wide(problem, params, batch, state))


def shared_flows(
    problem: Problem, params: Params, batch: Batch, state: State | None = None
) -> Float[Array, "T T T"]:
    """Compute `flows` of F summed over the sequences, for strategies whose draws all sequences share.

    Args:
      problem: Cell, readout and loss.
      params: The parameters.
      batch: One batch of T steps.
      state: h_0, leaves [B, H]. None: zeros.

    Returns:
      The products [T, T, T] at [j, t, u].

    Raises:
      SettingError: As the module says.
    """
    return _flows(problem, *_wide(problem, params, batch, state), shared=True)


def products(
    problem: Problem, params: Params, batch: Batch, state: State | None = None
) -> Float[Array, "T T"]:
    """Compute ⟨G_k, G_l⟩ of the cell's parameters, for weights that depend on the lag alone.

    The table holds T·B gradients.

    Args:
      problem: Cell, readout and loss.
      params: The parameters.
      batch: One batch of T steps.
      state: h_0, leaves [B, H]. None: zeros.

    Returns:
      The products [T, T] at [k, l], summed over sequences.

    Raises:
      SettingError: As the module says.
    """
    return _products(problem, *_wide(problem, params, batch, state))


def _wide(
    problem: Problem, params: Params, batch: Batch, state: State | None
) -> tuple[Params, State, Batch]:
    """Check the arguments, and make floats of 16 bits longer: the products of theirs would soon be 0."""
    params, state, batch = checked(problem, params, batch, 1, state)
    return wide(params), with_floats(state, wide(floats(state))), batch


@compiled("shared")
def _flows(
    problem: Problem, params: Params, state: State, batch: Batch, shared: bool = False
) -> Float[Array, "T T T"]:
    return flow_products(forward_pass(problem, params, state, batch), shared)


@compiled()
def _products(problem: Problem, params: Params, state: State, batch: Batch) -> Float[Array, "T T"]:
    run = forward_pass(problem, params, state, batch)
    steps, size = batch.mask.shape

    def each(adjoints: State, k: Int[Array, ""]) -> Float[Array, "B P"]:
        def alone(one: Bool[Array, "B"]) -> Float[Array, "P"]:
            own = jax.tree.map(lambda a: jnp.where(per_sequence(one, a[0]), a, 0), adjoints)
            return numbers(run.parameter_gradient(own))

        return jax.vmap(alone)(jnp.eye(size, dtype=bool))

    rows = lag_adjoints(run, steps, each)
    return jnp.einsum("kbp,lbp->kl", rows, rows)
