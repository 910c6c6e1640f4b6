"""How much training a run gets."""

from dataclasses import dataclass

import numpy as np

from bptt_study.validation import SettingError, number, whole


@dataclass(frozen=True)
class Budget:
    """How much training, and three things that are easily confused kept apart.

    The strategy says how far gradients travel; `steps` how many time steps make one update;
    `reset_every` after how many time steps the state returns to zero (None: only where the data
    start anew), a different forward objective.

    steps: time steps per update. batch_size: sequences. updates: of the parameters. logs: log points
    after the start, evenly spaced. divergence_bound: times the loss of chance, the largest of the task's
    reference losses; a seed whose training loss exceeds it is stopped as diverged (None, or a task without
    references: only if loss or gradient are not finite). split: into how many parts a batch is split, each
    computed on a device of its own, for fewer seeds than there are devices; it decides the last bits.
    """

    steps: int
    batch_size: int
    updates: int
    logs: int = 20
    reset_every: int | None = None
    divergence_bound: float | None = None
    split: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "updates", "logs", "split"):
            whole(name, getattr(self, name))
        if self.batch_size % self.split:
            allowed = f"a divisor of budget.batch_size ({self.batch_size})"
            raise SettingError("split", self.split, allowed)
        if self.divergence_bound is not None:
            number("divergence_bound", self.divergence_bound, least=1)
        if (r := self.reset_every) is not None:
            whole("reset_every", r)
            if self.steps % r and r % self.steps:
                raise SettingError(
                    "reset_every",
                    r,
                    f"a divisor or a multiple of budget.steps ({self.steps}), or null for no resets",
                )

    @property
    def log_points(self) -> list[int]:
        """Updates after which a row is logged, 0 and the last among them."""
        points = np.linspace(0, self.updates, min(self.logs, self.updates) + 1)
        return [int(p) for p in points.round()]
