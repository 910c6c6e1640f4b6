"""bptt_study: how far must a recurrent network's gradient travel back in time?

Modules load on first use, so that `bptt-study --help` and tab completion do not import jax.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bptt_study import cells, losses, probes, readouts, strategies, tasks, testing
    from bptt_study.backprop.scan import scan
    from bptt_study.instruments import jacobians, lags, measure
    from bptt_study.report.study import Study
    from bptt_study.runner import array_files as checkpoints
    from bptt_study.runner import results
    from bptt_study.runner.notebook import compose, run
    from bptt_study.testing import closed_forms
    from bptt_study.training import devices, train
    from bptt_study.types import (
        Affine,
        Batch,
        Cell,
        Claim,
        Derivative,
        Estimate,
        LagWeights,
        Problem,
        Readout,
        Strategy,
        Task,
    )

__version__ = "0.1.0"
__all__ = [
    "Affine",
    "Batch",
    "Cell",
    "Claim",
    "Derivative",
    "Estimate",
    "LagWeights",
    "Problem",
    "Readout",
    "Strategy",
    "Study",
    "Task",
    "cells",
    "checkpoints",
    "closed_forms",
    "compose",
    "devices",
    "jacobians",
    "lags",
    "losses",
    "measure",
    "probes",
    "readouts",
    "results",
    "run",
    "scan",
    "strategies",
    "tasks",
    "testing",
    "train",
]
# the module behind a public name, where it is not `bptt_study.NAME`
MODULES = {
    "checkpoints": "runner.array_files",
    "closed_forms": "testing.closed_forms",
    "devices": "training.devices",
    "jacobians": "instruments.jacobians",
    "lags": "instruments.lags",
    "measure": "instruments.measure",
    "results": "runner.results",
    "train": "training.train",
}

# the module in which the attribute NAME is public, where it is not `bptt_study.types`
ATTRIBUTES = {
    "Study": "report.study",
    "compose": "runner.notebook",
    "run": "runner.notebook",
    "scan": "backprop.scan",
}


def __dir__() -> list[str]:
    """Return the public names."""
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name[0].isupper() or name in ATTRIBUTES:
        return getattr(import_module(f"bptt_study.{ATTRIBUTES.get(name, 'types')}"), name)
    return import_module(f"bptt_study.{MODULES.get(name, name)}")
