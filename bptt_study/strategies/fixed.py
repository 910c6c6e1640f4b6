"""Truncation after a fixed number of steps: chunks, the sliding window, and all between."""

from bptt_study.checks import SettingError, whole
from bptt_study.types import Claim, Problem, Strategy
from bptt_study.unroll import backpropagate


def fixed(problem: Problem, window: int, stride: int | None = None) -> Strategy:
    """TBPTT(k1 = stride, k2 = window) (Williams & Peng 1990, BPTT(h; h')).

    Losses come in blocks of `stride` time steps; each block is back-propagated to `window - stride`
    steps before its start. stride None: equal to the window, chunks; 1: the sliding window, which
    keeps lags 0 … window - 1 of every loss. window ≥ T with chunks is full BPTT.

    Raises SettingError for a window or stride below 1, or a stride above the window.
    """
    whole("window", window)
    if stride is not None and whole("stride", stride) > window:
        raise SettingError("stride", stride, f"1 … window ({window}), or null for chunks")
    return Strategy(
        init=lambda params, batch_size: problem.cell.zeros(batch_size),
        estimate=lambda params, state, batch, key: backpropagate(
            problem, params, state, batch, window=window, stride=stride
        ),
        claim=Claim(steps="window", source="Williams & Peng 1990"),
    )
