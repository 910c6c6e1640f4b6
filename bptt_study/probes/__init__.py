"""Probes: what is looked at beside the loss, at some log points of a run and outside of its time.

A probe maps a `Scene` to rows of a table, `<probe>.csv.gz` of the study; the run's name, seed and update are
added to them. A factory per probe, named with its settings in conf/probe/; like a strategy, it may live
anywhere that Python can import.
"""

from bptt_study.probes.bit_responses import bit_responses
from bptt_study.probes.cut_variance import cut_variance
from bptt_study.probes.estimator_quality import estimator_quality
from bptt_study.probes.generalisation import generalisation
from bptt_study.probes.gradient_error import gradient_error
from bptt_study.probes.gradient_norms import gradient_norms
from bptt_study.probes.lag_mass import lag_mass
from bptt_study.probes.probe import Probe, Scene

__all__ = [
    "Probe",
    "Scene",
    "bit_responses",
    "cut_variance",
    "estimator_quality",
    "generalisation",
    "gradient_error",
    "gradient_norms",
    "lag_mass",
]
