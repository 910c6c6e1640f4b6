"""The training of all seeds of a run in one program."""
