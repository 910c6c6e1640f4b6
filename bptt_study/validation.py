"""Checks of settings, and the error that names the setting, its value and the allowed values."""

import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Kind = TypeVar("Kind")
Thing = TypeVar("Thing")
Done = TypeVar("Done")

QUOTED = """In quotes a setting stays a text, such as 'study="007"' in a shell."""


class SettingError(ValueError):
    """A setting outside its range: "`strategy.window` must be a whole number of at least 1; got 0."

    Args:
      name: The setting, as a user writes it.
      value: Its value.
      allowed: A phrase that follows "must be".
      way_out: A second sentence, where there is more to say.
    """

    def __init__(self, name: str, value: object, allowed: str, way_out: str = "") -> None:
        self.name, self.value, self.allowed, self.way_out = name, value, allowed, way_out
        self.others: list[SettingError] = []  # errors of other studies, see `each`
        super().__init__(f"`{name}` must be {allowed}; got {_shown(value)}. {way_out}".rstrip())

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickle makes the error from: its four arguments. A worker sends errors to its parent."""
        return type(self), (self.name, self.value, self.allowed, self.way_out)

    def within(self, group: str) -> "SettingError":
        """Return the same error with the setting's full name: `window` becomes `strategy.window`.

        Args:
          group: The configuration group.

        Returns:
          An error whose name starts with the group.
        """
        if self.name.startswith(f"{group}."):
            return self
        return SettingError(f"{group}.{self.name}", self.value, self.allowed, self.way_out)


def _shown(value: object) -> str:
    """Return the value as a user writes it, with quotes if the text is empty or looks like a number."""
    if not isinstance(value, str):
        return str(value)
    try:
        float(value or "0")
    except ValueError:
        return value
    return repr(value)


# The largest whole number of a setting. XLA counts sizes and steps in 32 bits, and aborts beyond that
MOST = 2**31 - 1


def whole(name: str, value: Any, least: int = 1) -> int:
    """Check that a setting is a whole number.

    Args:
      name: The setting, as a user writes it.
      value: Its value.
      least: The smallest value that is allowed.

    Returns:
      The value as an int.

    Raises:
      SettingError: Unless the value is a whole number from `least` to `MOST`.
    """
    number = int(value) if isinstance(value, numbers.Integral) else None
    if isinstance(value, bool) or number is None or number < least:
        raise SettingError(name, value, f"a whole number of at least {least}")
    if number > MOST:
        raise SettingError(name, value, f"a whole number of at most {MOST}")
    return number


def fits(name: str, value: Any, numbers: float) -> None:
    """Raise SettingError if so many numbers of 4 bytes exceed the memory of this machine."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if 4 * numbers > memory:
        way_out = f"It takes {4 * numbers / 2**30:.3g} GiB at least; this machine has {memory / 2**30:.3g}."
        raise SettingError(name, value, "such that the run fits into memory", way_out)


def number(name: str, value: Any, above: float = -math.inf, least: float = -math.inf) -> float:
    """Check that a setting is a finite number.

    Args:
      name: The setting, as a user writes it.
      value: Its value.
      above: A bound that the value must exceed.
      least: The smallest value that is allowed.

    Returns:
      The value as a float.

    Raises:
      SettingError: Unless the value is finite, greater than `above` and at least `least`.
    """
    bound = f" greater than {above:g}" if above > -math.inf else ""
    bound += f" of at least {least:g}" if least > -math.inf else ""
    good = not isinstance(value, bool) and isinstance(value, numbers.Real) and math.isfinite(value)
    if not good or value <= above or value < least:
        raise SettingError(name, value, f"a finite number{bound}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """Check that a setting is true or false.

    Args:
      name: The setting, as a user writes it.
      value: Its value.

    Returns:
      The value.

    Raises:
      SettingError: For any other value.
    """
    if not isinstance(value, bool):
        raise SettingError(name, value, "true or false")
    return value


def one_of(name: str, value: Any, choices: Any) -> Any:
    """Check that a setting is one of several choices.

    Args:
      name: The setting, as a user writes it.
      value: Its value.
      choices: The values that are allowed.

    Returns:
      The value.

    Raises:
      SettingError: For a value that is not among the choices.
    """
    if value not in list(choices):  # a list can be searched for a value without a hash, too
        raise SettingError(name, value, f"one of {', '.join(map(str, choices))}")
    return value


def instance(name: str, value: Any, kind: type[Kind]) -> Kind:
    """Check that an argument is one of the package's named tuples.

    Args:
      name: The argument.
      value: Its value.
      kind: The class.

    Returns:
      The value.

    Raises:
      SettingError: For an object of another class.
    """
    if not isinstance(value, kind):
        found = (
            f"the class {value.__name__}"
            if isinstance(value, type)
            else f"a {type(value).__name__}"
        )
        raise SettingError(name, found, f"a {kind.__name__} of bptt_study")
    return value


# beside what separates lines and cells, and the return to the start of a line, which a progress bar needs
_STEERING = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
_ESCAPED = {code: repr(chr(code))[1:-1] for code in _STEERING if chr(code) not in "\t\n\r"}


def printable(text: str) -> str:
    """The text with escapes such as `\\x1b` in place of characters that would steer a terminal."""
    return text.translate(_ESCAPED)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 run`, `2 runs`."""
    return f"{number} {noun if number == 1 else noun + 's'}"


def one_line(error: BaseException) -> str:
    """Write an error as one line of a message."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def each(things: Iterable[Thing], do: Callable[[Thing], Done]) -> Iterator[Done]:
    """Do something for each of several studies, whatever is wrong with another.

    Args:
      things: The studies.
      do: The function of one.

    Yields:
      The result of `do` for each study that is not wrong.

    Raises:
      SettingError: The first one that `do` raised, after all others were done, with the other errors.
    """
    wrong: list[SettingError] = []
    for thing in things:
        try:
            found = do(thing)
        except SettingError as error:
            wrong.append(error)
        else:
            yield found
    if wrong:
        wrong[0].others = wrong[1:]
        raise wrong[0]


def _said(error: BaseException) -> str:
    """Write the first line of an error's message, and its notes but that of JAX on its own frames."""
    first = str(error).strip().splitlines()[0]
    notes = [note for note in getattr(error, "__notes__", []) if not note.startswith("---")]
    return " ".join([f"{first.rstrip('.')}.", *notes]) if notes else first


@contextmanager
def one_line_errors(program: str, *wrong: type[Exception]) -> Iterator[None]:
    """End the program with one line and status 2 when a setting is wrong or the disk fails.

    Each of the error's others is a line more.

    Args:
      program: The name of the program, which starts the line.
      *wrong: Exceptions beside SettingError that mean a wrong setting.
    """
    try:
        yield
        return
    except (SettingError, *wrong) as error:  # type: ignore[misc]
        messages = [*map(_said, [error, *getattr(error, "others", [])])]
    except OSError as error:
        messages = [
            f"{error}. No finished run is lost. Fix the cause and start the same command again"
        ]
    for message in messages:
        sys.stderr.write(f"{program}: {message.strip().splitlines()[0]}\n")
    sys.exit(2)
