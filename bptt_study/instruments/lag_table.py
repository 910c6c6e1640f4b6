"""The lag table: the gradient that every loss sends k steps back in time.

With e_s = ∂L_s/∂h_s, J_t = ∂h_t/∂h_{t-1} and I_t = ∂f/∂θ at fixed h_{t-1}, for steps s = 0 … T-1 and lags
k = 0 … K-1,

    G[s,k] = e_sᵀ J_s J_{s-1} … J_{s-k+1} I_{s-k},    G_k = Σ_s G[s,k],    ∇L = Σ_k G_k.

K backward steps over all T·B adjoints at once compute every table (`lag_adjoints`). They hold the forward pass,
one lag's adjoints and the result: O(T·B·H), plus what a function says. Since h_0 is given, no gradient goes
to it, and K ≤ T. But h_0 acts on the table through the J_t, and through I at the first step. `state` is h_0,
zeros by default. An empty mask gives zeros. Every function raises SettingError for parameters that are not
finite (outside of jit), and for lags > T. The tables are compiled and kept: a loss or a cell that reads a
variable which changes later gives the old numbers.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bptt_study.backprop.forward import count_tokens
from bptt_study.backprop.forward_pass import forward_pass
from bptt_study.backprop.lag_adjoints import lag_adjoints, weighed_adjoints
from bptt_study.backprop.pytrees import as_types_of, norm
from bptt_study.instruments.compiled import compiled
from bptt_study.instruments.lag_arguments import checked, fitting
from bptt_study.types import Batch, Params, Problem, State


def gradients(
    problem: Problem, params: Params, batch: Batch, lags: int, state: State | None = None
) -> Params:
    """Compute G_k, the gradient of the mean loss at lag k.

    The cell's parameters receive it through I_{s-k}. The readout's own gradient is local in time and belongs to
    lag 0. The sum over all T lags is the gradient.

    Args:
      problem: Cell, readout and loss.
      params: The parameters.
      batch: One batch of T steps.
      lags: K.
      state: h_0, leaves [B, H]. None: zeros.

    Returns:
      A tree like params with a leading axis [K].

    Raises:
      SettingError: As the module says.
    """
    return _gradients(problem, *checked(problem, params, batch, lags, state), lags)


def adjoint_norms(
    problem: Problem, params: Params, batch: Batch, lags: int, state: State | None = None
) -> Float[Array, "T K B"]:
    """Compute ‖∂l_s/∂h_{s-k}‖ of each sequence, where l_s is the loss of token s times its mask.

    This is not the mean loss: l_s is not divided by the number of tokens. For the LSTM h is the pair (h, c).

    Args:
      problem: Cell, readout and loss.
      params: The parameters.
      batch: One batch of T steps.
      lags: K.
      state: h_0, leaves [B, H]. None: zeros.

    Returns:
      The norms [T, K, B] at [s, k, b]; 0 where s - k < 0, and where the mask is 0.

    Raises:
      SettingError: As the module says.
    """
    return _adjoint_norms(problem, *checked(problem, params, batch, lags, state), lags)


def norms(
    problem: Problem, params: Params, batch: Batch, lags: int, state: State | None = None
) -> Float[Array, "T K B"]:
    """Compute ‖G[s,k]‖ of each sequence, the Frobenius norm over the cell's parameters.

    The loss is the mean loss, as in `gradients`. The steps of a lag come one by one, so B gradients are held.

    Args:
      problem: Cell, readout and loss.
      params: The parameters.
      batch: One batch of T steps.
      lags: K.
      state: h_0, leaves [B, H]. None: zeros.

    Returns:
      The norms [T, K, B] at [s, k, b]; 0 where s - k < 0.

    Raises:
      SettingError: As the module says.
    """
    return _norms(problem, *checked(problem, params, batch, lags, state), lags)


def weighted_gradient(
    problem: Problem,
    params: Params,
    batch: Batch,
    weights: Float[Array, "T K *B"],
    state: State | None = None,
) -> Params:
    """Compute Σ_s Σ_k w[s,k] G[s,k], and the readout's own gradient.

    With `weights(strategy, T, T)` this is exactly the strategy's expected gradient on this batch.

    Args:
      problem: Cell, readout and loss.
      params: The parameters.
      batch: One batch of T steps.
      weights: w[s,k], [T, K] for all sequences, or [T, K, B] for each sequence.
      state: h_0, leaves [B, H]. None: zeros.

    Returns:
      A tree like params.

    Raises:
      SettingError: For weights of another length than T, and as the module says.
    """
    weights = fitting(weights, batch, "TK", "TKB")
    given = checked(problem, params, batch, weights.shape[1], state)
    return _weighted_gradient(problem, *given, weights)


def weighted_gradients(
    problem: Problem,
    params: Params,
    batch: Batch,
    weights: Float[Array, "N T K"],
    state: State | None = None,
) -> Params:
    """Compute `weighted_gradient` for N weights from one table, which holds (K + N)·T·B·H numbers.

    Args:
      problem: Cell, readout and loss.
      params: The parameters.
      batch: One batch of T steps.
      weights: N times w[s,k], [N, T, K].
      state: h_0, leaves [B, H]. None: zeros.

    Returns:
      A tree like params with a leading axis [N].

    Raises:
      SettingError: For weights of another shape, and as the module says.
    """
    weights = fitting(weights, batch, "NTK")
    given = checked(problem, params, batch, weights.shape[2], state)
    return _weighted_gradients(problem, *given, weights)


@compiled("lags")
def _gradients(problem: Problem, params: Params, state: State, batch: Batch, lags: int) -> Params:
    run = forward_pass(problem, params, state, batch)
    return {
        "cell": lag_adjoints(run, lags, lambda adjoints, k: run.parameter_gradient(adjoints)),
        "readout": jax.tree.map(
            lambda g: jnp.zeros((lags, *g.shape), g.dtype).at[0].set(g), run.readout_gradient
        ),
    }


@compiled("lags")
def _adjoint_norms(
    problem: Problem, params: Params, state: State, batch: Batch, lags: int
) -> Float[Array, "T K B"]:
    run = forward_pass(problem, params, state, batch)
    table = lag_adjoints(run, lags, lambda adjoints, k: norm(adjoints, keep=2))
    return count_tokens(batch.mask) * _by_loss(table)


@compiled("lags")
def _norms(
    problem: Problem, params: Params, state: State, batch: Batch, lags: int
) -> Float[Array, "T K B"]:
    run = forward_pass(problem, params, state, batch)
    return _by_loss(lag_adjoints(run, lags, lambda adjoints, k: run.token_norms(adjoints)))


@compiled()
def _weighted_gradient(
    problem: Problem, params: Params, state: State, batch: Batch, weights: Float[Array, "T K *B"]
) -> Params:
    run = forward_pass(problem, params, state, batch)

    def at_source(k: Int[Array, ""]) -> Float[Array, "T *B"]:
        w = jnp.roll(weights[:, k], -k, axis=0)  # a_k[t] comes from the loss t + k
        return w.reshape(len(w), -1)

    total = weighed_adjoints(run, at_source, weights.shape[1])
    return {"cell": run.parameter_gradient(total), "readout": run.readout_gradient}


@compiled()
def _weighted_gradients(
    problem: Problem, params: Params, state: State, batch: Batch, weights: Float[Array, "N T K"]
) -> Params:
    run = forward_pass(problem, params, state, batch)
    number, _, lags = weights.shape
    table = lag_adjoints(run, lags, lambda adjoints, k: adjoints)  # [K, T, B, H]
    # a_k[t] comes from the loss t + k, and is 0 if that lies beyond the end
    at_source = jax.vmap(lambda w, k: jnp.roll(w, -k, axis=1), (2, 0))(weights, jnp.arange(lags))
    weighed = jax.tree.map(lambda a: jnp.einsum("knt,ktb...->ntb...", at_source, a), table)
    readout = jax.tree.map(lambda g: jnp.broadcast_to(g, (number, *g.shape)), run.readout_gradient)
    return {
        "cell": jax.vmap(run.parameter_gradient)(as_types_of(table, weighed)),
        "readout": readout,
    }


def _by_loss(table: Float[Array, "K T B"]) -> Float[Array, "T K B"]:
    """Reorder a table by the loss s that an adjoint comes from, instead of the step t = s - k it reaches."""
    lags = jnp.arange(len(table))
    return jnp.swapaxes(jax.vmap(lambda row, k: jnp.roll(row, k, axis=0))(table, lags), 0, 1)
