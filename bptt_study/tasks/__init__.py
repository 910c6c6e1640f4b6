"""Tasks: data whose lowest and highest reachable loss are known. Each file has one factory of a `Task`."""

from bptt_study.tasks.add import add
from bptt_study.tasks.char_lm import char_lm
from bptt_study.tasks.copy import copy
from bptt_study.tasks.copy_curriculum import copy_curriculum
from bptt_study.tasks.digits import digits
from bptt_study.tasks.influence_balancing import influence_balancing
from bptt_study.tasks.series import series

__all__ = ["add", "char_lm", "copy", "copy_curriculum", "digits", "influence_balancing", "series"]
