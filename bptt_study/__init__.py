"""bptt_study: how far must a recurrent network's gradient travel back in time?

Modules load on first use, so that `bptt-study --help` and tab completion do not import jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bptt_study import (
        battery,
        cells,
        checkpoints,
        closed_forms,
        devices,
        lags,
        losses,
        measure,
        readouts,
        strategies,
        tasks,
        train,
        unroll,
    )
    from bptt_study.types import (
        Batch,
        Cell,
        Claim,
        Estimate,
        LagWeights,
        Problem,
        Readout,
        Strategy,
        Task,
    )

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Cell",
    "Claim",
    "Estimate",
    "LagWeights",
    "Problem",
    "Readout",
    "Strategy",
    "Task",
    "battery",
    "cells",
    "checkpoints",
    "closed_forms",
    "devices",
    "lags",
    "losses",
    "measure",
    "readouts",
    "strategies",
    "tasks",
    "train",
    "unroll",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name[0].isupper():
        return getattr(import_module("bptt_study.types"), name)
    return import_module(f"bptt_study.{name}")
