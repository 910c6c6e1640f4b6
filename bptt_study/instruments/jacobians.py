"""The Jacobians J_t = ∂h_t/∂h_{t-1}, which show how far one step, or many steps, stretch an adjoint."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from bptt_study.backprop.forward_pass import forward_pass
from bptt_study.backprop.one_by_one import qr
from bptt_study.backprop.pytrees import like, rows
from bptt_study.instruments.compiled import compiled
from bptt_study.instruments.lag_arguments import checked
from bptt_study.types import Batch, Params, Problem, State
from bptt_study.validation import SettingError, whole


class Spectrum(NamedTuple):
    """The spectrum of each J_t; n is the number of floats in the state: H, or 2H for the LSTM's (h, c).

    A complex number counts as two.
    """

    # largest singular value: the bound on how far a step stretches
    singular: Float[np.ndarray, "T B"]
    radius: Float[np.ndarray, "T B"]  # spectral radius


def jacobians(
    problem: Problem, params: Params, batch: Batch, state: State | None = None
) -> Float[Array, "T B n n"]:
    """Compute J_t = ∂h_t/∂h_{t-1} of every step and sequence.

    Args:
      problem: Cell, readout and loss.
      params: The parameters.
      batch: One batch of T steps.
      state: h_0, leaves [B, H]. None: zeros.

    Returns:
      J_t [T, B, n, n], with rows for h_t and columns for h_{t-1}. The real parts of a complex leaf come before
      its imaginary ones.

    Raises:
      SettingError: For parameters that are not finite.
    """
    return _jacobians(problem, *checked(problem, params, batch, 1, state))


@compiled()
def _jacobians(
    problem: Problem, params: Params, state: State, batch: Batch
) -> Float[Array, "T B n n"]:
    run = forward_pass(problem, params, state, batch)
    _, size, n = (flat := jax.vmap(rows)(run.immediate)).shape
    # JAX's cotangent of a complex number is the conjugate of its gradient
    conjugate = partial(jax.tree.map, jnp.conj)

    def row(unit: Float[Array, "n"]) -> Float[Array, "T B n"]:
        units = jnp.broadcast_to(unit, (size, n))
        adjoints = jax.vmap(lambda e: conjugate(like(units, e)))(run.immediate)
        return jax.vmap(rows)(conjugate(jax.vmap(run.step_vjp)(adjoints, run.residuals)))

    return jnp.moveaxis(jax.vmap(row)(jnp.eye(n, dtype=flat.dtype)), 0, -2)


def spectrum(jacobians: Float[Array, "T B n n"]) -> Spectrum:
    """Compute the largest singular value and the spectral radius of every J_t, by LAPACK on the host.

    Args:
      jacobians: J_t [T, B, n, n].

    Returns:
      Both numbers, each [T, B].
    """
    J = np.asarray(jacobians)
    return Spectrum(np.linalg.norm(J, ord=2, axis=(-2, -1)), np.abs(np.linalg.eigvals(J)).max(-1))


def lyapunov_exponents(
    jacobians: Float[Array, "T B n n"], count: int, skip: int = 0
) -> Float[Array, "B count"]:
    """Compute the leading Lyapunov exponents of each sequence, per step: the mean over t of log |diag R_t|.

    This is the QR method, Q_t R_t = J_t Q_{t-1}, from a fixed random orthonormal Q_0. A finite T leaves an
    error of order 1/(T - skip), and may leave the columns of Q out of order, so the means are sorted. If a
    direction dies, as in an mlp, its exponent is -inf.

    Args:
      jacobians: J_t [T, B, n, n].
      count: The number of exponents.
      skip: The number of first steps, in which Q still turns, that are left out of the mean.

    Returns:
      The exponents [B, count], the largest first.

    Raises:
      SettingError: For more exponents than the state has numbers, and a skip of all steps.

    References:
      Benettin et al. 1980; Geist, Parlitz & Lauterborn 1990; Engelken, Wolf & Abbott 2023 (recurrent networks).
    """
    steps, _, n, _ = jacobians.shape
    if whole("count", count) > n:
        raise SettingError("count", count, f"between 1 and the size of the state ({n})")
    if whole("skip", skip, least=0) >= steps:
        raise SettingError("skip", skip, f"between 0 and T - 1 ({steps - 1})")
    start = np.linalg.qr(np.random.default_rng(0).standard_normal((n, count)))[0]
    growth = _log_growth(jacobians, jnp.asarray(start, jacobians.dtype))
    return jnp.sort(growth[skip:].mean(axis=0), descending=True)


def _log_growth(
    jacobians: Float[Array, "T B n n"], start: Float[Array, "n m"]
) -> Float[Array, "T B m"]:
    """Compute log |diag R_t| of Q_t R_t = J_t Q_{t-1}, Q_0 = `start`: the growth of m directions per step."""

    def step(Q: Array, J: Array) -> tuple[Array, Array]:
        Q, R = jax.vmap(qr)(J @ Q)
        return Q, jnp.log(jnp.abs(jnp.diagonal(R, axis1=-2, axis2=-1)))

    Q = jnp.broadcast_to(start, (jacobians.shape[1], *start.shape))
    return lax.scan(step, Q, jacobians)[1]
