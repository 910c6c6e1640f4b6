"""Gradient estimators through time, one file each."""

from bptt_study.strategies.checkpointed import checkpointed
from bptt_study.strategies.discounted import discounted
from bptt_study.strategies.fixed import fixed
from bptt_study.strategies.full import full
from bptt_study.strategies.perturbed import forward_gradient, full_es, nres, pes, truncated_es
from bptt_study.strategies.randomized import (
    Law,
    constant,
    power_law,
    randomized,
    randomized_constant,
    randomized_power_law,
)
from bptt_study.strategies.synthetic import bp_lambda, dni
from bptt_study.strategies.telescope import telescope, telescope_constant

__all__ = [
    "Law",
    "bp_lambda",
    "checkpointed",
    "constant",
    "discounted",
    "dni",
    "fixed",
    "forward_gradient",
    "full",
    "full_es",
    "nres",
    "pes",
    "power_law",
    "randomized",
    "randomized_constant",
    "randomized_power_law",
    "telescope",
    "telescope_constant",
    "truncated_es",
]
