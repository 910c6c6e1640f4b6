"""The unit convention: each parameter of an affine cell belongs to one unit, in its last axis, gates × units.

Then I_t = ∂f/∂θ has non-zero rows at the owning unit only. For each leaf of the state, its non-zero entries
form an array like the parameter: the gradient that λ = 1 sends to it.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bptt_study.backprop.adjoint import StepVJP, update_vjp
from bptt_study.backprop.compare import at_random_numbers, distance, drawn, shapes, tried
from bptt_study.backprop.forward import Residuals
from bptt_study.backprop.pytrees import as_types_of, floats
from bptt_study.influence.pytrees import like
from bptt_study.known import is_known, remember
from bptt_study.types import Affine, Cell, Params, State
from bptt_study.validation import SettingError

NEEDED = "one with an affine form whose parameters end in gates × units"


def by_units(cell: Cell, name: str, instead: str = "rtrl") -> Affine:
    """Return the cell's affine form, if its parameters end in gates × units.

    Args:
      cell: The cell.
      name: The name of the strategy, for its errors.
      instead: The strategy that the error recommends.

    Returns:
      The form.

    Raises:
      SettingError: For another cell.
    """
    allowed, way_out = f"{NEEDED}, for {name}", f"Use {instead} with this cell."
    if not isinstance(cell.affine, Affine):
        raise SettingError("cell", "one without that form", allowed, way_out)
    leaves = jax.tree.leaves(like(cell))
    sizes = {leaf.shape[1:] for leaf in leaves}
    if len(sizes) != 1 or len(leaves[0].shape) != 2:
        said = ", ".join(str(list(leaf.shape[1:])) for leaf in leaves)
        raise SettingError("cell", f"one with states of the shapes {said}", allowed, way_out)
    H = leaves[0].shape[1]
    for path, p in jax.tree_util.tree_leaves_with_path(shapes_of(cell)):
        if not p.shape or p.shape[-1] % H:
            where = jax.tree_util.keystr(path, simple=True, separator=".")
            said = f"one of {H} units whose parameter {where} has the shape {list(p.shape)}"
            raise SettingError("cell", said, allowed, way_out)
    for gates in jax.tree.leaves(jax.eval_shape(cell.affine.recur, shapes_of(cell), like(cell))):
        if gates.shape[-1] % H:
            said = f"one of {H} units whose `recur` returns the shape {list(gates.shape[1:])}"
            raise SettingError("cell", said, allowed, way_out)
    return cell.affine


def check_units(cell: Cell, name: str, params: Params, inputs: Any, instead: str = "rtrl") -> None:
    """Check, from shapes alone, that no unit's state depends directly on another unit's parameters.

    Then, for all adjoints u, the gradient of a parameter is u of its own unit times the gradient for u = 1.

    Raises:
      SettingError: For a cell whose units share parameters.
    """
    affine = by_units(cell, name, instead)
    now = jax.ShapeDtypeStruct((1, *inputs.shape[2:]), inputs.dtype)
    theta = shapes(params)
    types = str(jax.tree.map(lambda a: (a.shape, a.dtype), (theta, now)))
    if is_known(key := (check_units, affine, types)):
        return
    allowed = f"{NEEDED}, each unit's its own, for {name}"
    rng = np.random.default_rng(0)

    def run(p: Params, x: Array, h: State, u: State) -> dict[str, Any]:
        parts = affine.project(p, x), affine.recur(p, h), h
        found = {
            "one whose update mixes units": jax.vjp(affine.update, *parts),
            "one whose units share parameters": jax.vjp(lambda p: affine.step(p, h, x), p),
        }
        sent = lambda after, vjp: _sent(vjp, as_types_of(floats(after), u))  # noqa: E731
        return {said: sent(*each) for said, each in found.items()}

    with at_random_numbers():
        draw = lambda size: drawn(rng, theta, size=size)  # noqa: E731
        others = lambda size: drawn(rng, (now, cell.zeros(1), like(cell)), size=size)  # noqa: E731
        for _, found, most in tried(run, draw, others, cell.init):
            for said, pairs in found.items():
                if any(distance(*pair) > most for pair in pairs):
                    raise SettingError("cell", said, allowed, f"Use {instead} with this cell.")
    remember(key)


def _sent(vjp: Callable[[State], Any], adjoint: State) -> list[tuple[Array, Array, Array]]:
    """Compute what a unit's adjoint sends back, its adjoint times what 1 sends back, and its size."""
    pairs = []
    leaves, structure = jax.tree.flatten(adjoint)
    for n, leaf in enumerate(leaves):
        at = [leaf if m == n else jnp.zeros_like(a) for m, a in enumerate(leaves)]
        ones = [jnp.ones_like(leaf) if m == n else a for m, a in enumerate(at)]
        sent, of_ones = (jax.tree.leaves(vjp(jax.tree.unflatten(structure, a))) for a in (at, ones))
        pairs += [
            (a, b * over_gates(leaf[0], b), jnp.abs(leaf).max())
            for a, b in zip(sent, of_ones, strict=True)
        ]
    return pairs


def over_gates(units: Float[Array, "*B H"], like: Array) -> Array:
    """Repeat a number for each unit over the gates, along the last axis of `like`, gates × units."""
    return jnp.tile(units, (*[1] * (units.ndim - 1), like.shape[-1] // units.shape[-1]))


def each_ones(state: State) -> State:
    """Make states with ones at one leaf and zeros at the others, for each leaf: leaves [n/H, B, H]."""
    leaves, structure = jax.tree.flatten(state)
    ones = [
        jnp.stack([jnp.full_like(a, n == k) for n in range(len(leaves))])
        for k, a in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, ones)


def recur_jacobian(affine: Affine, params: Params, state: State) -> list[Any]:
    """Compute ∂recur/∂h for each leaf of the state, leaves [H, gates, H] with row j from unit j."""
    leaves, structure = jax.tree.flatten(state)
    H = leaves[0].shape[-1]

    def of(n: int) -> Any:
        zeros = [jnp.zeros((H, H), leaf.dtype) for leaf in leaves]
        eye = [
            jnp.eye(H, dtype=leaf.dtype) if m == n else z
            for m, (leaf, z) in enumerate(zip(leaves, zeros, strict=True))
        ]
        at, base = (affine.recur(params, jax.tree.unflatten(structure, h)) for h in (eye, zeros))
        return jax.tree.map(lambda a, b: (a - b).reshape(H, -1, H), at, base)

    return [of(n) for n in range(len(leaves))]


def diagonal(cell: Cell, params: Params) -> StepVJP:
    """Make the map λ -> Jᵀλ with each unit's own entries of J alone: (n/H) × (n/H) numbers per unit."""
    affine = cast(Affine, cell.affine)
    own = [
        jax.tree.map(lambda J: jnp.diagonal(J, axis1=0, axis2=2), J)  # [gates, H]
        for J in recur_jacobian(affine, params, like(cell))
    ]

    def through(J: Float[Array, "gates H"], sent: Array) -> Float[Array, "B H"]:
        return jnp.sum(J * sent.reshape(-1, *J.shape), axis=1)

    def vjp(adjoint: State, now: Residuals) -> State:
        _, to_recur, direct = update_vjp(affine, now, adjoint)
        leaves, structure = jax.tree.flatten(direct)
        sent = [
            sum(jax.tree.leaves(jax.tree.map(through, J, to_recur)), d).astype(d.dtype)
            for J, d in zip(own, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, sent)

    return vjp


def direct(cell: Cell, params: Params) -> StepVJP:
    """Make the map λ -> Jᵀλ without the path through recur: the update's own use of h_{t-1} remains."""
    affine = cast(Affine, cell.affine)
    return lambda adjoint, now: update_vjp(affine, now, adjoint)[2]


def jacobian_pattern(cell: Cell) -> np.ndarray:
    """Find which units reach which others at the next step through recur, [H, H], by any leaf and gate.

    Parameters of several sizes are drawn at random, so that an entry is 0 only if it is 0 for all parameters.
    Large ones may overflow, and infinity times 0 is nan; an entry that is always nan counts as a link.
    """
    affine, rng = cast(Affine, cell.affine), np.random.default_rng(0)
    run = lambda theta: recur_jacobian(affine, theta, like(cell))  # noqa: E731
    draw = lambda size: drawn(rng, shapes_of(cell), size=size)  # noqa: E731
    with at_random_numbers():
        each = [found for _, found, _ in tried(run, draw, lambda size: (), cell.init)]
        H = jax.tree.leaves(like(cell))[0].shape[-1]
        links = np.zeros((H, H), bool)
        for J in jax.tree.leaves(jax.tree.map(lambda *a: np.stack(a), *each)):
            links |= ((np.nan_to_num(J) != 0).any(axis=0) | np.isnan(J).all(axis=0)).any(axis=1)
        return links


def is_exact(cell: Cell, through: Callable[[Cell, Params], StepVJP]) -> bool:
    """Return True if no credit passes from unit to unit, so that `through` keeps all of J."""
    pattern = jacobian_pattern(cell)
    kept = np.eye(len(pattern), dtype=bool) if through is diagonal else np.zeros_like(pattern)
    return not (pattern & ~kept).any()


def shapes_of(cell: Cell) -> Params:
    """Return the shapes and dtypes of the cell's parameters."""
    return jax.eval_shape(cell.init, jax.random.key(0))
