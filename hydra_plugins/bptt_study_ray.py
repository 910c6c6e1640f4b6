"""Hydra's launcher for Ray, started before JAX: to start Ray forks, which JAX's threads do not bear."""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext


class RayFirst(Launcher):
    """Takes what `hydra_ray_launcher` takes, whose package need not be there until it is set up."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings

    def setup(self, *, hydra_context: HydraContext, **parts: Any) -> None:
        from hydra_plugins.hydra_ray_launcher.ray_launcher import RayLauncher

        self.launcher = RayLauncher(**self.settings)
        self.hydra_context = hydra_context
        self.launcher.setup(hydra_context=hydra_context, **parts)
        from hydra_plugins.hydra_ray_launcher._launcher_util import start_ray

        start_ray(self.launcher.ray_cfg.init)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        self.launcher.hydra_context = self.hydra_context
        returns: Sequence[JobReturn] = self.launcher.launch(job_overrides, initial_job_idx)
        return returns
