"""Recurrent cells: one time step each, and `stack`, which makes several of them the layers of one cell.

A cell has no loop over time, no readout and no loss.

All cells are initialised alike: `W_xh ~ N(0, 1/D)`; every H×H block of `W_hh ~ N(0, 1/H)`, whose
spectral radius is near 1 (circular law), or that draw rescaled to have `spectral_radius` exactly;
biases 0, except the LSTM's forget gate at 1 (Jozefowicz, Zaremba & Sutskever 2015). The LRU has its own.
"""

from bptt_study.cells.diagonal import lru, min_gru
from bptt_study.cells.gated import gru, lstm
from bptt_study.cells.layers import LAYERS, stack, stacked
from bptt_study.cells.parts import spectral_radius
from bptt_study.cells.plain import ACTIVATIONS, elman, influence, leaky, linear, mlp

__all__ = [
    "ACTIVATIONS",
    "LAYERS",
    "elman",
    "gru",
    "influence",
    "leaky",
    "linear",
    "lru",
    "lstm",
    "min_gru",
    "mlp",
    "spectral_radius",
    "stack",
    "stacked",
]
