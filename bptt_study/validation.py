"""Settings checked at the door, and the one line that names the setting, its value and what is allowed."""

import math
import numbers
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class SettingError(ValueError):
    """A setting outside its range. `str(error)` is the whole message for the user."""

    def __init__(self, name: str, value: object, allowed: str) -> None:
        self.name, self.value, self.allowed = name, value, allowed
        super().__init__(f"{name}={value}: allowed: {allowed}")

    def within(self, group: str) -> "SettingError":
        """The same error as seen from outside: `window` of the strategy is `strategy.window`."""
        if self.name.startswith(f"{group}."):
            return self
        return SettingError(f"{group}.{self.name}", self.value, self.allowed)


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value` if it is a whole number ≥ least, else SettingError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise SettingError(name, value, f"whole numbers ≥ {least}")
    return int(value)


def number(name: str, value: Any, above: float = -math.inf, least: float = -math.inf) -> float:
    """`value` as a float if it is finite, > above and ≥ least, else SettingError."""
    bound = f"> {above:g}" if above > -math.inf else f"≥ {least:g}" if least > -math.inf else ""
    good = not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)
    if not good or value <= above or value < least:
        raise SettingError(name, value, f"finite numbers {bound}".strip())
    return float(value)


def flag(name: str, value: Any) -> bool:
    """`value` if it is true or false, else SettingError."""
    if not isinstance(value, bool):
        raise SettingError(name, value, "true or false")
    return value


def one_of(name: str, value: Any, choices: Any) -> Any:
    """`value` if it is among the choices, else SettingError."""
    if value not in list(choices):  # a list can be asked for what has no hash
        raise SettingError(name, value, ", ".join(map(str, choices)))
    return value


def counted(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun if number == 1 else noun + 's'}"


@contextmanager
def one_line_errors(program: str, *wrong: type[Exception]) -> Iterator[None]:
    """A wrong setting (SettingError and what else is `wrong`) ends the program with one line and status 2.

    So does a disk that is full, read-only or gone.
    """
    try:
        yield
        return
    except (SettingError, *wrong) as error:  # type: ignore[misc]
        said = str(error).strip().splitlines()[0]
    except OSError as error:
        said = f"{error}; nothing finished is lost: mend that, and start the same command again"
    sys.stderr.write(f"{program}: {said}\n")
    sys.exit(2)
