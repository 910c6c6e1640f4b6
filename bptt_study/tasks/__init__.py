"""Data with a known floor and ceiling: one factory of a `Task` per file."""

from bptt_study.tasks.add import add
from bptt_study.tasks.char_lm import char_lm
from bptt_study.tasks.copy import copy
from bptt_study.tasks.digits import digits
from bptt_study.tasks.influence_balancing import influence_balancing

__all__ = ["add", "char_lm", "copy", "digits", "influence_balancing"]
