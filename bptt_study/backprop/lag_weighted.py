"""A gradient whose lags have weights: ĝ = Σ_k w_k G_k + the readout's own gradient."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bptt_study.backprop.forward import forward, token_count
from bptt_study.backprop.forward_pass import differentiate
from bptt_study.backprop.lag_adjoints import weighed_adjoints
from bptt_study.backprop.parts import WHOLE, in_parts, sequences
from bptt_study.backprop.pytrees import adjoint_norms, as_arrays, last
from bptt_study.backprop.shapes import check_call
from bptt_study.types import Batch, Estimate, Params, Problem, State


def lag_weighted(
    problem: Problem, params: Params, state: State, batch: Batch, weights: Float[Array, "K B"]
) -> tuple[Estimate, State]:
    """Compute the loss of one batch, and its gradient with the weight w_k on lag k.

    All T states are stored. The backward recursion runs once for each lag up to the last weight that is not 0,
    for all losses at once: a step of it takes as much arithmetic as the whole recursion of full BPTT.

    Args:
      problem: Cell, readout and loss.
      params: {"cell": …, "readout": …}.
      state: h_0, leaves [B, H]; no gradient flows into it.
      batch: Inputs [T, B] or [T, B, D], targets [T, B, …], mask [T, B].
      weights: w_k of each sequence [K, B], K ≤ T.

    Returns:
      The estimate, with the metric `adjoint_norms` [T, B], ‖Σ_k w_k ∂L_{t+k}/∂h_t‖; and the state h_T.

    Raises:
      SettingError: For a batch that cannot be split over the devices, and a cell that breaks a promise.
    """
    params, state, batch = as_arrays((params, state, batch))
    check_call(problem, params, state, batch)

    def run(params: Params, state: State, batch: Batch, weights: Any, tokens: Array) -> Any:
        stored = forward(problem.cell, params["cell"], state, batch.inputs)
        found = differentiate(problem, params, stored.residuals(batch.inputs), batch, tokens)
        lags = jnp.max(jnp.where(weights != 0, 1 + jnp.arange(len(weights))[:, None], 0))
        adjoints = weighed_adjoints(found, lambda k: weights[k], lags)
        grads = {"cell": found.parameter_gradient(adjoints), "readout": found.readout_gradient}
        return (found.loss, grads), (adjoint_norms(adjoints), last(stored.after))

    arguments = (WHOLE, sequences(0), sequences(1), sequences(1), WHOLE)
    run = in_parts(run, batch.mask.shape[1], arguments, (sequences(1), sequences(0)))
    tokens, state = token_count(params, batch), lax.stop_gradient(state)
    (loss, grads), (norms, end) = run(params, state, batch, weights, tokens)
    return Estimate(loss, grads, {"adjoint_norms": norms}), lax.stop_gradient(end)
