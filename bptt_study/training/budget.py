"""The budget: the amount of training of a run."""

from dataclasses import dataclass

import numpy as np

from bptt_study.validation import SettingError, number, whole


@dataclass(frozen=True)
class Budget:
    """The amount of training of a run.

    Three settings are easily confused. The strategy decides how far gradients travel. `steps` is the number of
    time steps of one update. `reset_every` is the number of time steps after which the state returns to zero;
    it changes the objective itself. Validation never resets: its streams run on from the zero state.

    Args:
      steps: Time steps per update.
      batch_size: Sequences per update.
      updates: The number of updates of the parameters.
      logs: The number of log points after the start, evenly spaced.
      reset_every: Time steps between two resets of the state. None: the state resets only if the data start
        anew.
      divergence_bound: If the training loss exceeds this multiple of the loss of chance, the seed is stopped as
        diverged. Chance is the largest of the task's reference losses. If this is None, or no reference loss
        exceeds 0, only a loss or gradient norm that is not finite counts.
      split: The number of parts of a batch, each on its own device, for runs with fewer seeds than devices. It
        decides the last bits of the numbers.

    Raises:
      SettingError: For a number out of its range, and numbers that do not fit each other.
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
        """List the updates after which a row is logged.

        Returns:
          The numbers of the updates, including 0 and the last.
        """
        points = np.linspace(0, self.updates, min(self.logs, self.updates) + 1)
        return [int(p) for p in points.round()]
