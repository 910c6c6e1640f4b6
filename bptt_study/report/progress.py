"""The progress of work that may take long, on stderr: nothing for a few seconds, then a bar, or lines."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

SECONDS = 3  # after which a bar appears
SECONDS_BETWEEN_LINES = 10  # if there is no terminal

Item = TypeVar("Item")


def shown(items: Iterable[Item], what: str) -> Iterator[Item]:
    """Yield the items, and show how many are done.

    Args:
      items: The items.
      what: The words for what is done with them.

    Yields:
      Each item.
    """
    items, said = list(items), time.monotonic()
    with tqdm(total=len(items), desc=what, delay=SECONDS, disable=None, leave=False) as bar:
        for done, item in enumerate(items):
            if bar.disable and time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                tqdm.write(f"{what}: {done} of {len(items)}", file=sys.stderr)
            yield item
            bar.update()
