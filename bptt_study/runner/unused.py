"""Lines about settings that a user gave and that change nothing: each is said once, and nothing is refused.

A sweep may set the spectral radius of some cells and not of others. So no such setting is an error, but none is
taken without a word. The settings of a shipped experiment are not the user's, and stay silent.
"""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from bptt_study.runner import configure

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
    names = _names(given)
    for name in names:
        found = [_why_unused(name, *one) for one in runs]
        for why in dict.fromkeys(filter(None, found)):
            if all(found) or why.way_out:
                _say(f"{name} is not used with {why.where}{why.way_out}")
    for cfg, _, _ in runs:
        _say_replaced(cfg, names)


def _names(given: Iterable[str]) -> dict[str, None]:
    parser = OverridesParser.create()
    return {parser.parse_override(line).key_or_group: None for line in given}


def _say_replaced(cfg: DictConfig, names: Collection[str]) -> None:
    """Say which numbers of the size give way to others, unless the user wrote one of the two.

    The numbers of `budget` refer to the size's.
    """
    for name, value in cfg.budgets[cfg.size].items():
        size, setting = f"budgets.{cfg.size}.{name}", _decided(cfg, str(name))
        written = name in cfg.budget or size in names or setting in names
        if not written and (used := OmegaConf.select(cfg, setting)) != value:
            _say(f"{size}={value} is not used: {setting} is {used}")


def _decided(cfg: DictConfig, name: str) -> str:
    """Return the setting that a number of the size decides, if the setting refers to it."""
    if name in cfg.budget:
        return f"budget.{name}"
    return name if name in configure.BY_SIZE else f"task.{name}"


def say_one_run(hydra_cfg: DictConfig) -> None:
    """Say that a single run does not do the grid or the tuning of its configuration, or use a sweep's settings.

    Args:
      hydra_cfg: Hydra's own part.
    """
    for name in _names(hydra_cfg.overrides.hydra):
        if re.match(r"hydra[./](sweep|launcher)(?!er\.(params|tune)\b)", name):
            _say(f"{name} is not used with one run: a sweep uses it, `bptt-study -m`")
    sweeper = hydra_cfg.sweeper
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
    if first == "budgets" and rest and rest[0] in cfg.budgets:
        if rest[0] != cfg.size:
            return _Why(f"size={cfg.size}")
        if rest[1:]:
            name = _decided(cfg, rest[1])
            return _of_its_own(name, cfg) or _why_unused(name, cfg, choices, run)
    if first == "task" and rest and rest[0] in run.task.unused:
        corpus = run.task.facts.get("corpus")
        return _Why(f"corpus={corpus}" if corpus else f"task={choices['task']}")
    if name == "sample_length" and run.task.text is None:
        return _Why(f"task={choices['task']}, which writes no text")
    return None


def _of_its_own(setting: str, cfg: DictConfig) -> _Why | None:
    """Return why a setting does not follow its size: it has a value, and refers to nothing."""
    group, _, name = setting.rpartition(".")
    node = cfg[group] if group else cfg
    if OmegaConf.is_interpolation(node, name):
        return None
    return _Why(f"{setting}={'null' if node[name] is None else node[name]}")


def _referred(name: str, cfg: DictConfig) -> bool:
    """Return whether another setting refers to one at the top level, as `${name}` or within a resolver."""
    refers = re.compile(rf"\$\{{[^}}]*(?<![\w.]){name}\b")
    own = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != name])
    return bool(refers.search(OmegaConf.to_yaml(own)))
