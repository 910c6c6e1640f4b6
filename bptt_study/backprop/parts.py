"""A batch split over devices: each computes its own sequences, which meet only in the sums over the batch."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from bptt_study.backprop import BATCH_AXIS
from bptt_study.validation import SettingError

WHOLE = jax.sharding.PartitionSpec()  # the same on every device


def sequences(axis: int) -> jax.sharding.PartitionSpec:
    """The layout of arrays whose axis `axis` counts the sequences of the batch."""
    return jax.sharding.PartitionSpec(*[None] * axis, BATCH_AXIS)


def in_parts(
    run: Callable[..., tuple[Any, Any]], size: int, arguments: tuple[Any, ...], each: Any
) -> Callable[..., tuple[Any, Any]]:
    """The same function, a part of the sequences on each device of the mesh that is set.

    See `training.devices.split_batch`; without a mesh it is `run` itself.

    Args:
      run: It returns (sums over its sequences, what each sequence has).
      size: The number of sequences.
      arguments: The layout of each argument, a tree prefix.
      each: The layout of what each sequence has, a tree prefix.

    Raises:
      SettingError: For a batch that does not divide evenly.
    """
    parts = dict(jax.sharding.get_abstract_mesh().shape).get(BATCH_AXIS, 1)
    if size % parts:
        raise SettingError("batch_size", size, f"a multiple of the devices that share it ({parts})")

    def part(*arguments: Any) -> tuple[Any, Any]:
        sums, own = run(*arguments)
        return lax.psum(sums, BATCH_AXIS), own

    if parts == 1:
        return run
    return jax.shard_map(
        part,
        in_specs=arguments,
        out_specs=(WHOLE, each),
        axis_names={BATCH_AXIS},
        check_vma=False,  # scans start from constants, which carry no device axis to check
    )
