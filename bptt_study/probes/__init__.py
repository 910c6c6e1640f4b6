"""Probes: instruments that a run calls at some log points. Their time does not count as the run's time.

A probe maps a `Snapshot` to rows of a table, `<probe>.csv.gz` of the study, and the run adds its name, the seed
and the update. Each probe has a factory, which a file in conf/probe/ names with its settings. Like a strategy,
the factory may live anywhere that Python can import.
"""

from bptt_study.probes.alignment import alignment
from bptt_study.probes.bit_responses import bit_responses
from bptt_study.probes.cut_variance import cut_variance
from bptt_study.probes.estimator_quality import estimator_quality
from bptt_study.probes.generalisation import generalisation
from bptt_study.probes.gradient_error import gradient_error
from bptt_study.probes.gradient_norms import gradient_norms
from bptt_study.probes.lag_mass import lag_mass
from bptt_study.probes.perturbation_variance import perturbation_variance
from bptt_study.probes.probe import Probe, Snapshot

__all__ = [
    "Probe",
    "Snapshot",
    "alignment",
    "bit_responses",
    "cut_variance",
    "estimator_quality",
    "generalisation",
    "gradient_error",
    "gradient_norms",
    "lag_mass",
    "perturbation_variance",
]
