"""Evolution strategies through time: they differ in when a perturbation is drawn and in what it accumulates."""

from functools import partial

from bptt_study.backprop.perturbed import Course, accumulate, differences, keep, restart
from bptt_study.strategies.fixed import lag_weights
from bptt_study.strategies.perturbed import (
    all_lags,
    cell_size,
    derivative,
    of_blocks,
    of_course,
    of_one_block,
    with_lags,
)
from bptt_study.strategies.validated import validated
from bptt_study.types import Problem, Strategy
from bptt_study.validation import number, whole


@validated
def full_es(problem: Problem, sigma: float, pairs: int = 1) -> Strategy:
    """Make an evolution strategy on the loss of each call, with perturbations drawn anew for the call.

    Args:
      problem: Cell, readout and loss.
      sigma: σ, the size of a perturbation in each parameter.
      pairs: The number of antithetic pairs of particles, whose estimates are averaged.

    Returns:
      The strategy.

    Raises:
      SettingError: For a sigma of 0 or less, and for fewer than one pair.

    References:
      Salimans et al. 2017.
    """
    course = Course(differences(number("sigma", sigma, above=0)), None, restart)
    return of_course(problem, course, pairs, "Salimans et al. 2017", smoothed=sigma)


@validated
def truncated_es(
    problem: Problem, sigma: float | None = 0.1, pairs: int = 1, hold: int = 1
) -> Strategy:
    """Make an evolution strategy whose perturbations end with each block of `hold` steps: biased as chunks are.

    Args:
      problem: Cell, readout and loss.
      sigma: σ, the size of a perturbation in each parameter. None: tangents.
      pairs: The number of antithetic pairs of particles, or of tangents, whose estimates are averaged.
      hold: Steps of a block, counted from the start of the call.

    Returns:
      The strategy.

    Raises:
      SettingError: For a sigma of 0 or less, fewer than one pair, and a hold below 1.

    References:
      Metz et al. 2019.
    """
    course = Course(derivative(sigma), whole("hold", hold), restart)
    strategy = of_course(problem, course, pairs, "Metz et al. 2019", unbiased=False)
    chunks = lag_weights(hold, hold)._replace(draws=pairs)
    return strategy if sigma is not None else with_lags(strategy, chunks)


@validated
def pes(problem: Problem, sigma: float | None = 0.1, pairs: int = 1, hold: int = 1) -> Strategy:
    """Make persistent evolution strategies, whose particles go on through blocks and calls.

    The particles respond to the sum of all perturbations since they were fresh, so that truncation causes no
    bias. GPES_K is `hold` = K (Li et al. 2023), and DODGE_K is the same with sigma None.

    Args:
      problem: Cell, readout and loss.
      sigma: σ, the size of a perturbation in each parameter. None: tangents.
      pairs: The number of antithetic pairs of particles, or of tangents, whose estimates are averaged.
      hold: Steps of a block, counted from the start of the call. Each block draws another perturbation.

    Returns:
      The strategy.

    Raises:
      SettingError: For a sigma of 0 or less, fewer than one pair, and a hold below 1.

    References:
      Vicol et al. 2021.
    """
    course = Course(derivative(sigma), whole("hold", hold), accumulate)
    strategy = of_course(problem, course, pairs, "Vicol et al. 2021", sigma, carried=True)
    if sigma is not None:
        return strategy
    spread = partial(of_blocks, cell_size(problem), hold)
    return with_lags(strategy, all_lags(pairs, spread))


@validated
def nres(problem: Problem, sigma: float | None = 0.1, pairs: int = 1) -> Strategy:
    """Make noise-reuse evolution strategies (ES-Single): one perturbation as long as the sequences continue.

    Args:
      problem: Cell, readout and loss.
      sigma: σ, the size of a perturbation in each parameter. None: tangents.
      pairs: The number of antithetic pairs of particles, or of tangents, whose estimates are averaged.

    Returns:
      The strategy.

    Raises:
      SettingError: For a sigma of 0 or less, and for fewer than one pair.

    References:
      Li et al. 2023; Vicol 2023.
    """
    course = Course(derivative(sigma), None, keep)
    strategy = of_course(problem, course, pairs, "Li et al. 2023; Vicol 2023", sigma, carried=True)
    if sigma is not None:
        return strategy
    spread = partial(of_one_block, cell_size(problem) - 1)
    return with_lags(strategy, all_lags(pairs, spread))
