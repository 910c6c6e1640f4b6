"""A run from Python: `compose` a configuration as the command line does, and `run` it in this process.

cfg = bs.compose("strategy=fixed", "truncation=4", "size=smoke")
run = bs.run(cfg)
"""

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from bptt_study.paths import shipped
from bptt_study.runner import cli, configure
from bptt_study.runner.callbacks import check_own_files
from bptt_study.runner.results import Run
from bptt_study.validation import SettingError


def compose(*overrides: str) -> DictConfig:
    """Compose the configuration of one run from the shipped defaults.

    `hydra.compose` does the same for your own folder of configurations.

    Args:
      *overrides: Settings and groups as on the command line, such as "strategy=fixed".

    Returns:
      The configuration, with Hydra's own part.
    """
    with initialize_config_dir(str(shipped("conf", "config.yaml")), version_base="1.3"):
        return hydra_compose("config", overrides=list(overrides), return_hydra_config=True)


def run(cfg: DictConfig) -> Run:
    """Do one run in this process, unless it is finished, and return it ready for the instruments.

    The run belongs to its study, like a run of the command line.

    Args:
      cfg: A configuration from `compose`, or from `hydra.compose` with `return_hydra_config=True`.

    Returns:
      The finished run.

    Raises:
      SettingError: For the first setting that is wrong.
      RunError: If the run fails. Its `__cause__` is the original error.
    """
    if "hydra" not in cfg:
        way_out = "hydra.compose(…, return_hydra_config=True) keeps them, and bs.compose(…) does it for you."
        raise SettingError("cfg", "one without them", "composed with Hydra's own settings", way_out)
    check_own_files(cfg)
    _check_options(cfg)
    _, paths = cli.run_once(cfg, cfg.hydra.runtime.choices, alone=True, hydra_cfg=cfg.hydra)
    return Run(paths.run, paths.folder)


def _check_options(cfg: DictConfig) -> None:
    """Check that each group is what its option says, which names it in tables and figures.

    Raises:
      SettingError: If a shipped option was replaced in the composed configuration.
    """
    for group in (*configure.GROUPS[:4], "optimizer/schedule"):
        node = group.replace("/", ".")
        option = cfg.hydra.runtime.choices.get(group)
        file = shipped("conf", "config.yaml") / group / f"{option}.yaml"
        given = any(line.startswith(f"{node}._target_=") for line in cfg.hydra.overrides.task)
        if given or not file.is_file():
            continue
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        target = found.get(group, found)["_target_"]
        used = OmegaConf.select(cfg, f"{node}._target_")
        if used not in (None, target):  # a schedule may be null
            way_out = f'bs.compose("{group}=OPTION", …) chooses another option, under its own name.'
            raise SettingError(f"{node}._target_", used, target, way_out)
