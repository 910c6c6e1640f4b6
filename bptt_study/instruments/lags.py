"""The gradient lag by lag: `bs.lags`.

`lag_table` computes the gradient that every loss sends k steps back, `lag_products` the products of its parts,
`lag_windows` the share of it that a strategy keeps, and `memory` the length of a network's memory.
"""

from bptt_study.instruments.lag_products import flows, products, shared_flows
from bptt_study.instruments.lag_table import (
    adjoint_norms,
    gradients,
    norms,
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
