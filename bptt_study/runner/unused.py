"""Lines about settings that a user gave and that change nothing: each is said once, and nothing is refused.

A sweep may set the spectral radius of some cells and not of others. So no such setting is an error, but none is
taken without a word. The settings of a shipped experiment are not the user's, and stay silent.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from bptt_study.runner.run import RunConfig

log = logging.getLogger(__name__)

# the settings at the top level to which those of a group refer, and that group
REFERRED = {"hidden": "cell", "spectral_radius": "cell", "truncation": "strategy"}


class Composed(NamedTuple):
    """One run, and what it was made from."""

    cfg: DictConfig  # not resolved, without Hydra's own part
    choices: Mapping[str, str]  # the chosen option of each configuration group
    run: "RunConfig"


def say_unused(given: Iterable[str], runs: Sequence[Composed]) -> None:
    """Say which of the given settings change nothing in any run.

    In a sweep, a strategy without a length leaves the truncation length to the others. Only a setting that a
    run's cell has under a longer name is named although other runs use it.

    Args:
      given: The overrides that the user wrote.
      runs: All runs that have them.
    """
    parser = OverridesParser.create()
    for name in {parser.parse_override(line).key_or_group: None for line in given}:
        found = [_why_unused(name, *one) for one in runs]
        for why in dict.fromkeys(filter(None, found)):
            if all(found) or why.way_out:
                _say(f"{name} is not used with {why.where}{why.way_out}")


def say_one_run(sweeper: DictConfig) -> None:
    """Say that a single run does not do the grid or the tuning of its configuration.

    Args:
      sweeper: The node `hydra.sweeper`.
    """
    params, tune = sweeper.get("params"), sweeper.get("tune")
    left = [f"the grid over {', '.join(map(str, params))}"] if params else []
    left += [f"the tuning of {tune.get('setting')}"] if tune else []
    if left:
        them = "them" if len(left) > 1 else "it"
        _say(f"one run, without {' and '.join(left)}: a sweep does {them}, `bptt-study -m`")


@cache
def _say(line: str) -> None:
    log.warning("%s", line)


class _Why(NamedTuple):
    where: str
    way_out: str = ""


def _why_unused(
    name: str, cfg: DictConfig, choices: Mapping[str, str], run: "RunConfig"
) -> _Why | None:
    """Return why a setting changes nothing in a run; None if it may change something."""
    first, *rest = name.split(".")
    if name in REFERRED and not _referred(name, cfg):
        group = REFERRED[name]
        own = f"; {group}.{name} sets it there" if name in cfg[group] else ""
        return _Why(f"{group}={choices[group]}: no setting refers to it", own)
    if first in ("probe", "probes") and not run.snapshots:
        return _Why("snapshots=0")
    if first == "budgets" and rest and rest[0] in cfg.budgets and rest[0] != cfg.size:
        return _Why(f"size={cfg.size}")
    if first == "task" and rest and rest[0] in run.task.unused:
        corpus = run.task.facts.get("corpus")
        return _Why(f"corpus={corpus}" if corpus else f"task={choices['task']}")
    if name == "sample_length" and run.task.text is None:
        return _Why(f"task={choices['task']}, which writes no text")
    return None


def _referred(name: str, cfg: DictConfig) -> bool:
    """Return whether another setting refers to one at the top level, as `${name}` or within a resolver."""
    refers = re.compile(rf"\$\{{[^}}]*(?<![\w.]){name}\b")
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != name])
    return bool(refers.search(OmegaConf.to_yaml(own)))
