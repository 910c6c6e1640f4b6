"""M stored as Kronecker products: the common part of these ways.

The parameters of cells like the GRU are matrices. Stacked, their rows form one matrix [F, K], K = gates ×
units. The effect of a step's parameters on its state is I_t = φ_p ⊗ D_p + φ_r ⊗ D_r. The features φ are x_t
and 1 for `project`, and h_{t-1} and 1 for `recur`. The slopes D are the derivatives of each unit's state by
its own gates. The two groups stay separate, because they differ if a gate stands between them. F counts all
rows.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bptt_study.backprop.adjoint import update_vjp
from bptt_study.backprop.compare import at_random_numbers, distance, drawn, shapes, tried
from bptt_study.influence import units
from bptt_study.influence.past import Block, Past
from bptt_study.influence.pytrees import joined, like, parted
from bptt_study.types import Affine, Cell, Params, State
from bptt_study.validation import SettingError

NEEDED = "one whose parameters are matrices of features × (gates × units)"
WAY_OUT = "Use uoro with this cell."


class Link(NamedTuple):
    """I_t = φ ⊗ D of one group, project or recur."""

    features: Float[Array, "B F"]
    slopes: Float[Array, "B S K"]  # S leaves of the state, each unit in its own gates


class Group(NamedTuple):
    """A way to store M for one group."""

    start: Callable[[int, int, int, Any], Any]  # (B, F, K, dtype) -> the product(s), 0
    # (product, J on arrays [B, C, n], link, signs [B, k]) -> the product after one step
    roll: Callable[[Any, Callable[[Array], Array], Link, Array], Any]
    send: Callable[[Any, Float[Array, "B n"]], Float[Array, "F K"]]
    signs: Callable[[int], int] = lambda K: 0  # the number of ±1 per sequence and step


def by_products(cell: Cell, name: str) -> Callable[[Params, Array], None]:
    """Make the check that M is a sum of Kronecker products; what the shapes show is checked at once.

    Raises:
      SettingError: For a cell whose parameters are not matrices of features × (gates × units).
    """
    units.by_units(cell, name, "uoro")
    if len(wide := {p.shape[-1] for p in jax.tree.leaves(units.shapes_of(cell))}) > 1:
        said = f"one whose parameters have {' and '.join(map(str, sorted(wide)))} columns"
        raise SettingError("cell", said, f"{NEEDED}, for {name}", WAY_OUT)

    def check(params: Params, inputs: Array) -> None:
        units.check_units(cell, name, params, inputs, "uoro")
        check_products(cell, name, params, inputs)

    return check


def products(cell: Cell, name: str, group: Group) -> Past:
    """Make the `Past` whose groups store M in a given way; it advances one step at a time.

    Args:
      cell: A cell whose parameters are matrices of features × (gates × units).
      name: The name of the strategy, for its errors.
      group: The way to store one group's part.

    Returns:
      The past.

    Raises:
      SettingError: For another cell.
    """
    check = by_products(cell, name)
    state, theta = like(cell), units.shapes_of(cell)

    def start(params: Params, batch_size: int) -> Any:
        F, K, dtype = sizes(cell, params)
        return tuple(group.start(batch_size, F, k, dtype) for k in K)

    def roll(m: Any, block: Block, signs: Float[Array, "B k"]) -> Any:
        def jacobian(columns: Float[Array, "B C n"]) -> Float[Array, "B C n"]:
            # as if each column were a sequence of its own: one product, and no axis moves
            B, C, n = columns.shape
            of_each = jax.tree.map(partial(_repeated, C), block.residuals)
            moved = block._replace(residuals=of_each).advance(parted(columns.reshape(-1, n), state))
            return joined(moved, 1).reshape(B, C, n)

        found = links(block)
        K = [link.slopes.shape[-1] for link in found]
        own = jnp.split(signs, np.cumsum([group.signs(k) for k in K])[:-1], axis=1)
        each = zip(m, found, own, strict=True)
        return tuple(group.roll(part, jacobian, link, s) for part, link, s in each)

    def send(m: Any, adjoint: State) -> Params:
        u = joined(adjoint, 1)
        total = sum(group.send(part, u) for part in m)
        return in_shape(cast(Array, total), theta)

    def count(params: Params) -> int:
        return sum(group.signs(k) for k in sizes(cell, params)[1])

    return Past(start, send, roll, signs=count, check=check)


def _repeated(times: int, a: Array) -> Array:
    """Repeat each sequence: [S, B, …] -> [S, B·times, …]."""
    S, B, *rest = a.shape
    return jnp.broadcast_to(a[:, :, None], (S, B, times, *rest)).reshape(S, B * times, *rest)


def sizes(cell: Cell, params: Params) -> tuple[int, list[int], Any]:
    """Return F, the K of each group that has gates, and the dtype."""
    affine, leaves = cast(Affine, cell.affine), jax.tree.leaves(params)
    recurred = jax.eval_shape(affine.recur, params, cell.zeros(1))
    F, K = sum(p.size // p.shape[-1] for p in leaves), leaves[0].shape[-1]
    return F, [K, K] if jax.tree.leaves(recurred) else [K], jnp.result_type(*leaves)


def in_shape(matrix: Float[Array, "F K"], shapes: Params) -> Params:
    """Reshape a matrix of all rows to the shapes of the parameters."""
    leaves, structure = jax.tree.flatten(shapes)
    ends = np.cumsum([p.size // p.shape[-1] for p in leaves])[:-1]
    rows = jnp.split(matrix, ends)
    return jax.tree.unflatten(
        structure, [r.reshape(p.shape) for r, p in zip(rows, leaves, strict=True)]
    )


def links(block: Block) -> list[Link]:
    """Compute φ and D of each group that has gates, at the first step of the block."""
    affine, params = cast(Affine, block.cell.affine), block.params
    now = jax.tree.map(lambda a: a[0], block.residuals)
    slopes = jax.vmap(lambda u: update_vjp(affine, now, u)[:2], 0, 1)(units.each_ones(now.before))
    inputs, before = jax.tree.map(lambda a: a[:, None], (now.inputs, now.before))
    maps = ((affine.project, inputs), (affine.recur, before))
    return [
        Link(jax.vmap(partial(features, f, params, weights=jnp.ones(1)))(at), joined(D, 2))
        for (f, at), D in zip(maps, slopes, strict=True)
        if jax.tree.leaves(D)
    ]


def features(
    map_: Callable[[Params, Any], Any], params: Params, at: Any, weights: Float[Array, "S"]
) -> Float[Array, "F"]:
    """Compute Σ_s w_s φ_s, as the derivative of the first gate of the first unit; `at` has leaves [S, …]."""
    out, vjp = jax.vjp(lambda p: map_(p, at), params)
    gates = joined(out, 1)
    first = jnp.zeros_like(gates).at[:, 0].set(weights.astype(gates.dtype))
    (found,) = vjp(gates_like(out, first))
    return jnp.concatenate([g[..., 0].ravel() for g in jax.tree.leaves(found)])


def gates_like(out: Any, vectors: Float[Array, "*lead K"]) -> Any:
    """Part vectors of all gates into a tree like the output of a map, leaves [S, …]."""
    return parted(vectors, jax.tree.map(lambda a: a[:1], out))


def check_products(cell: Cell, name: str, params: Params, inputs: Any) -> None:
    """Check, from shapes alone, that the gradient of each group is features ⊗ the cotangents of its gates.

    Raises:
      SettingError: For another cell.
    """
    affine, allowed = cast(Affine, cell.affine), f"{NEEDED}, for {name}"
    leaves = jax.tree.leaves(params)
    now = jax.ShapeDtypeStruct((1, *inputs.shape[2:]), inputs.dtype)
    rng = np.random.default_rng(0)

    def run(theta: Params, x: Array, h: State) -> list[tuple[Array, Array]]:
        pairs = []
        for map_, at in ((affine.project, x), (affine.recur, h)):
            out, vjp = jax.vjp(lambda p, m=map_, at=at: m(p, at), theta)
            if not jax.tree.leaves(out) and map_ is affine.project:
                raise SettingError("cell", "one whose `project` returns nothing", allowed, WAY_OUT)
            if not jax.tree.leaves(out):
                continue
            gates = joined(out, 1)
            gates = drawn(rng, gates).astype(gates.dtype)
            if any(p.shape[-1] != gates.shape[-1] for p in leaves):
                raise SettingError("cell", "one with parameters of other shapes", allowed, WAY_OUT)
            found = jax.tree.leaves(vjp(gates_like(out, gates))[0])
            each = jnp.concatenate([g.reshape(-1, gates.shape[-1]) for g in found])
            pairs.append((each, jnp.outer(features(map_, theta, at, jnp.ones(1)), gates)))
        return pairs

    with at_random_numbers():
        draw = lambda _: drawn(rng, shapes(params))  # noqa: E731
        others = lambda _: drawn(rng, (now, cell.zeros(1)))  # noqa: E731
        for _, pairs, most in tried(run, draw, others, cell.init, sizes=(0.5,)):
            if any(distance(*pair) > most for pair in pairs):
                raise SettingError("cell", "one with parameters of another kind", allowed, WAY_OUT)


def columns(link: Link, n: int) -> Float[Array, "B K n"]:
    """Write D of all gates as columns of the state; each has entries at its own unit alone."""
    B, S, K = link.slopes.shape
    H = n // S
    own = link.slopes.reshape(B, S, K // H, H)
    spread = own.transpose(0, 2, 3, 1)[..., None]  # [B, K/H, H, S, 1]
    return jnp.where(jnp.eye(H, dtype=bool)[:, None], spread, 0).reshape(B, K, n)
