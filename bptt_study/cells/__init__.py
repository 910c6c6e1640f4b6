"""Recurrent cells: one time step each. No loop over time, no readout, no loss.

Initialisation, stated once: `W_xh ~ N(0, 1/D)`; every H×H block of `W_hh ~ N(0, 1/H)`, whose
spectral radius is near 1 (circular law), or that draw rescaled to have `spectral_radius` exactly;
biases 0, except the LSTM's forget gate at 1 (Jozefowicz, Zaremba & Sutskever 2015).
"""

from bptt_study.cells.gated import gru, lstm
from bptt_study.cells.parts import spectral_radius
from bptt_study.cells.plain import ACTIVATIONS, elman, influence, linear, mlp

__all__ = ["ACTIVATIONS", "elman", "gru", "influence", "linear", "lstm", "mlp", "spectral_radius"]
