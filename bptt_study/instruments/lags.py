"""The gradient lag by lag: `bs.lags`.

`lag_table` computes what every loss sends k steps back, `lag_windows` which part of it a strategy keeps, and
`memory` how long the memory of a network is.
"""

from bptt_study.instruments.lag_table import (
    adjoint_norms,
    flows,
    gradients,
    norms,
    products,
    shared_flows,
    weighted_gradient,
    weighted_gradients,
)
from bptt_study.instruments.lag_windows import (
    bias,
    declared,
    estimated_window,
    expected_gradient,
    variance,
    weights,
    window,
)
from bptt_study.instruments.memory import Decay, decay_rate, effective_length, mass

__all__ = [
    "Decay",
    "adjoint_norms",
    "bias",
    "decay_rate",
    "declared",
    "effective_length",
    "estimated_window",
    "expected_gradient",
    "flows",
    "gradients",
    "mass",
    "norms",
    "products",
    "shared_flows",
    "variance",
    "weighted_gradient",
    "weighted_gradients",
    "weights",
    "window",
]
