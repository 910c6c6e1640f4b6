"""Parallel seeds: all seeds of a run in one program, over all devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bptt_study.backprop import BATCH_AXIS, SEED_AXIS
from bptt_study.validation import SettingError


def over_seeds(f: Callable[..., Any], seeds: int, split: int = 1) -> Any:
    """Compile `f(data, scalar, per_seed)` for a leading axis of seeds in its last argument and its output.

    The seeds are split over groups of `split` devices, and the devices of a group share each batch. If the
    seeds do not divide evenly, the first seeds are computed twice, so that all devices do the same work. On a
    CPU each device computes its seeds one after the other, which is faster there than vmap.

    Args:
      f: A function for one seed.
      seeds: S, the number of seeds.
      split: The number of devices that share a batch.

    Returns:
      The compiled function (data, scalar, per_seed with leaves [S, …]) -> a tree with leaves [S, …].

    Raises:
      SettingError: For more parts than there are devices.
    """
    devices, count = jax.devices(), devices_for(seeds, split)
    one_by_one = devices[0].platform == "cpu" or split > 1

    def each(data: Any, scalar: Array, per_seed: Any) -> Any:
        g = partial(f, data, scalar)
        return lax.map(g, per_seed) if one_by_one else jax.vmap(g)(per_seed)

    if count * split == 1:
        return jax.jit(each)
    P = jax.sharding.PartitionSpec
    # an axis of one device would make XLA compile another program, whose last bits differ
    axes = {SEED_AXIS: count} | ({BATCH_AXIS: split} if split > 1 else {})
    mesh = jax.make_mesh(
        tuple(axes.values()),
        tuple(axes),
        (jax.sharding.AxisType.Auto,) * len(axes),
        devices=devices[: count * split],
    )
    # scans start from constants, which carry no device axis to check
    over = jax.shard_map(
        each,
        mesh=mesh,
        in_specs=(P(), P(), P(SEED_AXIS)),
        out_specs=P(SEED_AXIS),
        axis_names={SEED_AXIS},
        check_vma=False,
    )
    again = -seeds % count

    def even(data: Any, scalar: Array, per_seed: Any) -> Any:
        filled = jax.tree.map(lambda a: jnp.concatenate([a, a[:again]]), per_seed)
        return jax.tree.map(lambda a: a[:seeds], over(data, scalar, filled))

    # the state of a run gets the layout that the next program expects
    out = jax.sharding.NamedSharding(mesh, P() if again else P(SEED_AXIS))
    return jax.jit(even if again else over, out_shardings=out)


def devices_for(seeds: int, split: int = 1) -> int:
    """Compute the smallest number of groups of devices whose largest group has as few seeds as possible.

    Args:
      seeds: The number of seeds.
      split: The number of devices of a group.

    Returns:
      The number of groups.

    Raises:
      SettingError: For a split larger than the number of devices.
    """
    if split > jax.device_count():
        allowed = f"between 1 and the number of devices ({jax.device_count()})"
        why = "On a CPU every core is a device."
        raise SettingError("budget.split", split, allowed, why)
    each = -(-seeds // (jax.device_count() // split))
    return -(-seeds // each)
