"""Estimators of the gradient through time, one file each."""

from bptt_study.strategies.adaptive import adaptive
from bptt_study.strategies.checkpointed import checkpointed
from bptt_study.strategies.discounted import discounted
from bptt_study.strategies.eprop import eprop
from bptt_study.strategies.evolution import full_es, nres, pes, truncated_es
from bptt_study.strategies.fixed import fixed
from bptt_study.strategies.forward_errors import forward_errors
from bptt_study.strategies.forward_gradient import forward_gradient
from bptt_study.strategies.frozen import frozen
from bptt_study.strategies.full import full
from bptt_study.strategies.kf_rtrl import kf_rtrl
from bptt_study.strategies.laws import Law, constant, power_law
from bptt_study.strategies.ok import ok
from bptt_study.strategies.pp_prop import pp_prop
from bptt_study.strategies.randomized import randomized, randomized_constant, randomized_power_law
from bptt_study.strategies.reverse_kf import reverse_kf
from bptt_study.strategies.rflo import rflo
from bptt_study.strategies.rtrl import rtrl
from bptt_study.strategies.sketched import sketched
from bptt_study.strategies.snap import snap
from bptt_study.strategies.synthetic import bp_lambda, dni
from bptt_study.strategies.telescope import telescope, telescope_constant
from bptt_study.strategies.uoro import uoro

__all__ = [
    "Law",
    "adaptive",
    "bp_lambda",
    "checkpointed",
    "constant",
    "discounted",
    "dni",
    "eprop",
    "fixed",
    "forward_errors",
    "forward_gradient",
    "frozen",
    "full",
    "full_es",
    "kf_rtrl",
    "nres",
    "ok",
    "pes",
    "power_law",
    "pp_prop",
    "randomized",
    "randomized_constant",
    "randomized_power_law",
    "reverse_kf",
    "rflo",
    "rtrl",
    "sketched",
    "snap",
    "telescope",
    "telescope_constant",
    "truncated_es",
    "uoro",
]
