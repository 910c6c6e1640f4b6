"""Hydra's launcher for Ray, started before JAX: Ray forks at its start, which JAX's threads do not survive."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext

PACKAGE = "hydra_plugins.hydra_ray_launcher"  # what must be installed; this file itself always is


class RayFirst(Launcher):
    """The launcher with the settings of `hydra_ray_launcher`; `setup` imports that package."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, **parts: Any) -> None:
        """Import the launcher and start Ray."""
        from hydra_plugins.hydra_ray_launcher.ray_launcher import RayLauncher

        self.launcher = RayLauncher(**self.settings)
        self.hydra_context = hydra_context
        self.launcher.setup(hydra_context=hydra_context, **parts)
        from hydra_plugins.hydra_ray_launcher._launcher_util import start_ray

        start_ray(self.launcher.ray_cfg.init)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Do these runs."""
        self.launcher.hydra_context = self.hydra_context
        returns: Sequence[JobReturn] = self.launcher.launch(job_overrides, initial_job_idx)
        return returns
