"""Measurements of a strategy's gradient and its cost, outside of any timed run: `bs.measure`."""

from bptt_study.instruments.costs import arithmetic, arithmetic_of_calls, temporary_bytes
from bptt_study.instruments.exact_quality import Moments, exact_quality
from bptt_study.instruments.norms import gradient_norms
from bptt_study.instruments.quality import (
    Interval,
    Quality,
    compare,
    over_batches,
    quality,
)

__all__ = [
    "Interval",
    "Moments",
    "Quality",
    "arithmetic",
    "arithmetic_of_calls",
    "compare",
    "exact_quality",
    "gradient_norms",
    "over_batches",
    "quality",
    "temporary_bytes",
]
