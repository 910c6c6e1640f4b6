"""Parallel seeds: all seeds of a run in one program, over all devices."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from bptt_study.backprop import BATCH_AXIS
from bptt_study.validation import SettingError


def over_seeds(f: Callable[..., Any], seeds: int, split: int = 1) -> Any:
    """Compile `f(data, scalar, per_seed)` for a leading axis of seeds in its last argument and its output.

    The seeds are split over groups of `split` devices, which split each batch. If they do not divide evenly,
    the first are computed twice, so that all devices do the same. On a CPU each device takes its seeds one
    after the other, which is faster there than vmap.

    Args:
      f: A function for one seed.
      seeds: How many.
      split: Devices that share a batch.

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
    # an axis of one device is left out: with it XLA compiles another program, whose last bits differ
    axes = {"seeds": count} | ({BATCH_AXIS: split} if split > 1 else {})
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
        in_specs=(P(), P(), P("seeds")),
        out_specs=P("seeds"),
        axis_names={"seeds"},
        check_vma=False,
    )
    again = -seeds % count

    def even(data: Any, scalar: Array, per_seed: Any) -> Any:
        filled = jax.tree.map(lambda a: jnp.concatenate([a, a[:again]]), per_seed)
        return jax.tree.map(lambda a: a[:seeds], over(data, scalar, filled))

    # a run's state lies as the next program wants it
    out = jax.sharding.NamedSharding(mesh, P() if again else P("seeds"))
    return jax.jit(even if again else over, out_shardings=out)


def devices_for(seeds: int, split: int = 1) -> int:
    """The least number of groups of `split` devices with which no group has more seeds than necessary."""
    if split > jax.device_count():
        allowed = f"between 1 and the number of devices ({jax.device_count()})"
        why = "On a CPU every core is a device."
        raise SettingError("budget.split", split, allowed, why)
    each = -(-seeds // (jax.device_count() // split))
    return -(-seeds // each)
