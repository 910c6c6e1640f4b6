"""Check the claim of a gradient estimator, on cells of this package or on your own."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from tqdm import tqdm

from bptt_study.testing.draw_checks import (
    check_enumeration,
    check_link_weights,
    check_variance,
)
from bptt_study.testing.errors import CheckError
from bptt_study.testing.examples import CELLS, MakeCell
from bptt_study.testing.gradient_checks import (
    check_bias_shows,
    check_sizes,
    check_window,
    of_gradient,
)
from bptt_study.testing.noise_checks import check_noise, check_smoothed
from bptt_study.testing.protocol_checks import (
    check_float32,
    check_jit,
    check_loss,
    check_memory,
    check_metrics,
    check_numbers,
    check_passes,
    check_shapes,
    check_state_closed,
    check_traced_once,
)
from bptt_study.testing.stream_checks import check_online
from bptt_study.testing.subject import MakeStrategy, Subject
from bptt_study.types import Claim, Strategy
from bptt_study.validation import one_of

Check = Callable[[Subject], Any]  # raises CheckError, or returns the reason why it could not check
# These checks do not depend on the cell, so they run on one cell.
ONCE: tuple[Check, ...] = (
    check_jit,
    check_memory,
    check_sizes,
    check_window,
    check_link_weights,
    check_variance,
)
PASSES = ("reverse", "forward", "evaluations")


def check_strategy(
    make_strategy: MakeStrategy,
    cell: str | None = None,
    cells: Mapping[str, MakeCell] | None = None,
    quiet: bool = False,
) -> dict[str, list[str]]:
    """Check the claim of a strategy on every cell, in float64.

    The references are a plain loop over `cell.step` that JAX differentiates, finite differences, the lag table,
    and enumeration. Sizes are tiny.

    Args:
      make_strategy: Problem -> Strategy, such as `lambda problem: mine(problem, window=3)`.
      cell: One of the package's cells by its name. None: all of them.
      cells: Your own cells in place of the package's, name -> (inputs, hidden) -> Cell.
      quiet: Whether to print neither progress nor results.

    Returns:
      The checks that held, by name, each with the cells on which it held.

    Raises:
      CheckError: For the first promise that does not hold, with the cell, the check and numbers.
      SettingError: For a cell that does not exist.
    """
    chosen: dict[str, Any] = dict(cells) if cells is not None else {name: name for name in CELLS}
    if cell is not None:
        chosen = {cell: chosen[one_of("cell", cell, chosen)]}
    once = next((name for name in ("elman_tanh", *chosen) if name in chosen), None)
    held: dict[Check, list[str]] = {}
    notes: list[str] = []
    with jax.enable_x64(True):
        bar = tqdm(chosen.items(), desc="check_strategy", unit="cell", disable=quiet, leave=False)
        for name, make_cell in bar:
            subject = Subject(make_strategy, make_cell)
            for check in checks(subject.claim):
                if check in ONCE and name != once:
                    continue
                where = f"{name}, {_name(check)}"
                bar.set_postfix_str(where)
                try:
                    note = check(subject)
                except CheckError as error:
                    raise CheckError(f"{where}: {error}") from error
                if note:
                    notes.append(f"{where}: not checked, {note}")
                else:
                    held.setdefault(check, []).append(name)
    if not quiet:
        sys.stdout.write(_table(held, list(chosen), notes))
    return {_name(check): found for check, found in held.items()}


def checks(claim: Claim) -> list[Check]:
    """List the checks that go with a claim.

    Args:
      claim: The claim.

    Returns:
      The checks, in the order in which they run.

    Raises:
      CheckError: For a claim that contradicts itself.
    """
    if claim.exact and not claim.unbiased:
        raise CheckError(
            "a claim of exact=True must have unbiased=True: all that is exact is unbiased"
        )
    if claim.passes not in PASSES:
        raise CheckError(f"claim.passes must be one of {', '.join(PASSES)}; got {claim.passes}")
    if claim.reach not in ("call", "stream"):
        raise CheckError(f"claim.reach must be call or stream; got {claim.reach}")
    if claim.smoothed is not None and claim.noise is None:
        raise CheckError("claim.smoothed needs claim.noise, over whose signs its mean is taken")
    chosen: list[Check] = [
        check_shapes,
        check_metrics,
        check_state_closed,
        check_traced_once,
        check_jit,
        check_loss,
        check_float32,
        check_numbers,
        check_memory,
        *of_gradient(claim),
    ]
    if (weights := claim.lag_weights) is not None:
        chosen.append(check_window)
        chosen += [check_enumeration] if weights.patterns is not None else []
        chosen += [check_link_weights] if weights.link_weights is not None else []
        chosen += [check_variance] if weights.spread and claim.reach == "call" else []
    if not claim.unbiased:
        chosen.append(check_bias_shows)
    if claim.online:
        chosen.append(check_online)
    if claim.noise is not None and claim.unbiased:
        chosen.append(check_noise if claim.smoothed is None else check_smoothed)
    if claim.passes != "reverse":
        chosen.append(check_passes)
    return [*chosen, check_sizes]


def _name(check: Check) -> str:
    return check.__name__.removeprefix("check_")


def properties(strategies: Mapping[str, Strategy]) -> str:
    """Write the claims of strategies as a table in Markdown.

    Args:
      strategies: The strategies by name.

    Returns:
      The table.
    """
    head = [
        *("strategy", "gradient", "of", "states held", "online"),
        *("sequential steps backward", "derivatives", "source"),
    ]
    rows = [[f"`{name}`", *_promised(strategy.claim)] for name, strategy in strategies.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _promised(claim: Claim) -> list[str]:
    gradient = "exact" if claim.exact else "unbiased" if claim.unbiased else "biased"
    estimand = f"the {claim.reach}"
    if claim.smoothed is not None:
        estimand += ", smoothed"
    online = "yes" if claim.online else "no"
    passes = {"reverse": "reverse", "forward": "forward", "evaluations": "none"}[claim.passes]
    return [gradient, estimand, claim.memory, online, claim.steps, passes, claim.source]


def _table(held: dict[Check, list[str]], cells: list[str], notes: list[str]) -> str:
    """Write the checks that held, a line for each check."""
    width = max((len(_name(check)) for check in held), default=0)
    lines = [f"held on {', '.join(cells)}, or on the cells named:"]
    for check, found in held.items():
        where = "" if found == cells else f"  ({', '.join(found)})"
        said = (check.__doc__ or "").splitlines()[0]
        lines.append(f"  {_name(check):<{width}}  {said}{where}")
    return "\n".join([*lines, *notes]) + "\n"
