"""Forward gradients: derivatives of the loss along random tangents, in forward mode."""

from functools import partial
from math import sqrt
from typing import Any

import jax
from jaxtyping import Array, Key

from bptt_study.backprop.one_by_one import qr
from bptt_study.backprop.perturbed import TANGENTS, Course, restart
from bptt_study.strategies.perturbed import (
    all_lags,
    cell_size,
    of_course,
    of_one_block,
    signs,
    with_lags,
    zeros_as_vector,
)
from bptt_study.strategies.validated import validated
from bptt_study.types import Params, Problem, Strategy
from bptt_study.validation import SettingError, flag, whole


@validated
def forward_gradient(problem: Problem, tangents: int = 1, orthogonal: bool = False) -> Strategy:
    """Make the mean of (∇L·v) v over random tangents v, which are drawn anew for each call.

    If the cell has P parameters, the variance is (P - 1)/tangents times the squared gradient.

    Args:
      problem: Cell, readout and loss.
      tangents: The number of tangents.
      orthogonal: Draw orthogonal tangents of length √P instead of signs. The variance is then
        P/tangents - 1 times the squared gradient, and P tangents give the gradient itself.

    Returns:
      The strategy.

    Raises:
      SettingError: For fewer than one tangent, and for more orthogonal tangents than there are parameters.

    References:
      Baydin et al. 2022.
    """
    count = cell_size(problem)
    if flag("orthogonal", orthogonal) and whole("tangents", tangents) > count:
        allowed = f"at most {count}, the number of the cell's parameters"
        raise SettingError("tangents", tangents, allowed)
    draw = _orthogonal if orthogonal else signs
    course, source = Course(TANGENTS, None, restart), "Baydin et al. 2022"
    strategy = of_course(problem, course, whole("tangents", tangents), source, draw=draw)
    if not orthogonal:
        return with_lags(strategy, all_lags(tangents, partial(of_one_block, count - 1)))
    claim = strategy.claim._replace(exact=tangents == count, noise=None)
    spread = partial(of_one_block, count / tangents - 1)
    return with_lags(strategy._replace(claim=claim, given=None), all_lags(1, spread))


def _orthogonal(pairs: int, like: Params, key: Key[Array, ""], block: Any) -> Params:
    """Draw orthogonal vectors of length √P in random directions."""
    vector, tree = zeros_as_vector(like)
    normal = jax.random.normal(jax.random.fold_in(key, block), (len(vector), pairs), vector.dtype)
    return jax.vmap(tree)(sqrt(len(vector)) * qr(normal)[0].T)
