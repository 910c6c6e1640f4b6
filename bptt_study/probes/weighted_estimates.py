"""Gradient estimates for given link weights."""

from functools import partial

import jax
from jaxtyping import Array, Float

from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.backprop.pytrees import numbers
from bptt_study.types import Batch, Params, Problem


@partial(jax.jit, static_argnames=("problem",))
def weighted_estimates(
    problem: Problem, params: Params, batch: Batch, link_weights: Float[Array, "N n T B"]
) -> Float[Array, "N P"]:
    """Compute N estimates, each the mean of n draws.

    Link weights are arguments, so that all laws share one program.

    Args:
      problem: Cell, readout and loss.
      params: The parameters.
      batch: One batch of T steps.
      link_weights: ξ_t [N, n, T, B].

    Returns:
      The estimates [N, P], with all parameters in one vector.
    """
    state = problem.cell.zeros(batch.mask.shape[1])

    def one(link_weights: Float[Array, "n T B"]) -> Float[Array, "P"]:
        truncation = Truncation(link_weights=link_weights)
        estimate, _ = backpropagate(problem, params, state, batch, truncation)
        return numbers(estimate.grads)

    return jax.vmap(one)(link_weights)
