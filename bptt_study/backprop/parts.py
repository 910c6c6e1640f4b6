"""A batch split over devices: each device computes its own sequences, and sums over the batch join them."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from bptt_study.backprop import BATCH_AXIS
from bptt_study.validation import SettingError

WHOLE = jax.sharding.PartitionSpec()  # the layout of arrays that every device has completely


def sequences(axis: int) -> jax.sharding.PartitionSpec:
    """Return the layout of arrays whose axis `axis` counts the sequences of the batch."""
    return jax.sharding.PartitionSpec(*[None] * axis, BATCH_AXIS)


def in_parts(
    run: Callable[..., tuple[Any, Any]], size: int, arguments: tuple[Any, ...], each: Any
) -> Callable[..., tuple[Any, Any]]:
    """Split a function over the devices of the current mesh, each with a part of the sequences.

    `training.devices.split_batch` sets the mesh; without one, the result is `run` itself.

    Args:
      run: A function that returns (sums over its sequences, values of each sequence).
      size: The number of sequences.
      arguments: The layout of each argument, a tree prefix.
      each: The layout of the values of each sequence, a tree prefix.

    Returns:
      The split function.

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
