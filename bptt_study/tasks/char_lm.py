"""Character-level language modelling: predict each character of a text from the characters before it."""

import math
import os
import re
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from bptt_study.losses import cross_entropy
from bptt_study.tasks import corpora, ngram
from bptt_study.types import Batch, Sampler, Task, Text
from bptt_study.validation import SettingError, flag, number, one_of, whole

VALIDATION_STREAMS = 64  # the largest number of streams; each starts from the zero state
BOOK_PREFIX = "time traveller"
PASSAGE = 160  # characters of a passage that `repeated` looks for


def char_lm(
    corpus: str | None = None,
    path: str | os.PathLike | None = None,
    alphabet: str | None = None,
    sampling: str = "sequential",
    validation_fraction: float = 0.1,
    prefix: str | None = None,
    distinct: bool = False,
) -> Task:
    """Predict the next character of a text: the targets are the inputs, shifted by one.

    >>> from pathlib import Path
    >>> _ = Path("machine.txt").write_text("machine learning " * 10)
    >>> task = char_lm(path="machine.txt")
    >>> sampler = task.sampler(6, 1)  # 6 time steps, 1 sequence
    >>> batch, fresh = sampler.sample(sampler.data, jax.random.key(0), 0)
    >>> for symbols in (batch.inputs, batch.targets):
    ...     print("".join(task.text.alphabet[i] for i in symbols[:, 0]))
    machin
    achine

    The validation part has at most 64 parallel streams, and never more streams than steps. The batch
    `training`, which probes evaluate, has the same layout. `references` are n-gram models of the training part
    (see `ngram`), evaluated on the same tokens as `validation`. `chance_accuracy` is the accuracy of one
    constant answer, the training part's most frequent character. `facts["repeated"]` is the share of the
    validation part that the training part gives away, see `repeated`.

    Args:
      corpus: `stdlib_docs`, `time_machine`, `random_letters` or `one_letter`, see `corpora`. None: the file at
        `path`, or `stdlib_docs` if there is no path either.
      path: A text file.
      alphabet: `letters` replaces everything between Latin letters by one blank and then lowers the case, which
        gives 27 symbols. `all` takes the characters as they are. None: `letters` for a named corpus, else
        `all`.
      sampling: `sequential` or `random`, see the functions of these names.
      validation_fraction: The share of the text, at its end, for validation; the rest is for training.
      prefix: The text that a sample continues. None: the book's "time traveller" if the alphabet has its
        letters, else the first ten characters of the text.
      distinct: Whether each paragraph is read only once, see `corpora.distinct`. It changes nothing in a text
        that repeats none, such as `stdlib_docs`.

    Returns:
      The task.

    Raises:
      SettingError: For a text that is not found or too short, and settings out of range; in `sampler`, if the
        training part is too short for its steps and batch size.

    References:
      Zhang et al. 2023, Dive into Deep Learning, sections 9.2 (text), 9.3 (sampling) and 9.5 (task).
    """
    one_of("sampling", sampling, SAMPLINGS)
    if number("validation_fraction", validation_fraction, above=0) >= 1:
        raise SettingError("validation_fraction", validation_fraction, "between 0 and 1")
    found, alphabet, text, symbols, always = _read(corpus, path, alphabet, distinct)
    size = round(len(text) * (1 - validation_fraction))
    _check_parts(size, len(text) - size, path, validation_fraction, alphabet)
    opening = text[:size][:80]
    codes = _encode(text, symbols)
    train, held_out = codes[:size], codes[size:]
    validation, used = _streams(held_out)

    def sampler(steps: int, batch_size: int) -> Sampler:
        starts, continues = SAMPLINGS[sampling](size, whole("budget.steps", steps), batch_size)

        def sample(data: Array, key: Key[Array, ""], update: Int[Array, ""]) -> tuple[Batch, Array]:
            start, fresh = starts(key, update)
            return _windows(data, start, steps), fresh

        return Sampler(jnp.asarray(train), sample, continues)

    return Task(
        inputs=len(symbols),
        outputs=len(symbols),
        loss=cross_entropy,
        steps=None,
        sampler=sampler,
        validation=validation,
        references=ngram.losses(train, used, len(symbols)),
        chance_accuracy=float(np.mean(used[1:] == np.bincount(train).argmax())),
        facts={
            "corpus": found.name,
            "corpus_sha256": found.sha256,
            "alphabet": alphabet,
            "sampling": sampling,
            "repeated": repeated(train, held_out),
        },
        text=Text(tuple(symbols), opening, _prefix(prefix, symbols, opening)),
        training=_streams(train)[0],
        unused={"distinct": False} if always else {},
    )


def _check_parts(
    train: int, held_out: int, path: str | os.PathLike | None, fraction: float, alphabet: str
) -> None:
    if min(train, held_out) < 4:
        name, value = ("path", path) if path else ("validation_fraction", fraction)
        counts = f"With alphabet={alphabet} they have {train} and {held_out}."
        raise SettingError(name, value, "such that both parts have 4 or more characters", counts)


def _read(
    corpus: str | None, path: str | os.PathLike | None, alphabet: str | None, distinct: bool
) -> tuple[corpora.Corpus, str, str, str, bool]:
    """Return a corpus, its alphabet's name, its text in it, the symbols, and whether no paragraph repeats."""
    found = corpora.find(corpus, path)
    if alphabet is None:
        alphabet = "all" if corpus is None and path is not None else "letters"
    reading = ALPHABETS[one_of("alphabet", alphabet, ALPHABETS)]
    plain, once = map(reading.normalise, (found.text, corpora.distinct(found.text)))
    text = once if flag("distinct", distinct) else plain
    return found, alphabet, text, reading.symbols(text), once == plain


# (key, update) -> where each sequence starts in the text, and whether the batch is fresh
Starts = Callable[[Key[Array, ""], Any], tuple[Int[Array, "B"], Array]]


def sequential(size: int, steps: int, batch_size: int) -> tuple[Starts, bool]:
    """Read B parallel streams: every update continues where the last one stopped, and carries its state.

    One epoch is one pass over the text, except for a remainder. Epoch 0 begins at offset 0 and each later
    epoch at a random offset, so that the boundaries between updates move.

    Args:
      size: The number of characters of the training part.
      steps: Time steps per update.
      batch_size: B.

    Returns:
      The function (key, update) -> (start of each sequence [B], whether the batch is fresh), and whether a
      batch may continue the one before it.

    Raises:
      SettingError: For a text that is too short.
    """
    _check_length(size, steps, batch_size, needed=steps * (batch_size + 1))
    updates = (size - steps) // (steps * batch_size)  # per epoch; at least `steps` offsets remain
    stream = updates * steps
    offsets = size - batch_size * stream

    def starts(key: Key[Array, ""], update: Any) -> tuple[Array, Array]:
        epoch, position = update // updates, update % updates
        drawn = jax.random.randint(jax.random.fold_in(key, epoch), (), 0, offsets)
        offset = jnp.where(epoch == 0, 0, drawn) + position * steps
        return offset + stream * jnp.arange(batch_size), jnp.asarray(position == 0)

    return starts, updates > 1


def random(size: int, steps: int, batch_size: int) -> tuple[Starts, bool]:
    """Draw B windows at independent, uniformly random places; every update starts from the zero state.

    Args:
      size: The number of characters of the training part.
      steps: Time steps per update.
      batch_size: B.

    Returns:
      The function (key, update) -> (start of each sequence [B], True), and False: batches do not continue.

    Raises:
      SettingError: For a text that is too short.
    """
    _check_length(size, steps, batch_size, needed=steps + 1)

    def starts(key: Key[Array, ""], update: Any) -> tuple[Array, Array]:
        places = jax.random.randint(jax.random.fold_in(key, update), (batch_size,), 0, size - steps)
        return places, jnp.asarray(True)

    return starts, False


SAMPLINGS = {"sequential": sequential, "random": random}


def _check_length(size: int, steps: int, batch_size: int, needed: int) -> None:
    whole("budget.batch_size", batch_size)
    if size < needed:
        raise SettingError(
            "budget.steps",
            steps,
            "small enough for the text",
            f"With batch_size={batch_size} it takes {needed} characters; the training part has {size}.",
        )


class Alphabet(NamedTuple):
    normalise: Callable[[str], str]
    symbols: Callable[[str], str]  # normalised text -> its possible characters, sorted


ALPHABETS = {
    "letters": Alphabet(
        normalise=lambda text: re.sub("[^A-Za-z]+", " ", text).lower(),
        symbols=lambda text: " " + string.ascii_lowercase,
    ),
    "all": Alphabet(normalise=str, symbols=lambda text: "".join(sorted(set(text)))),
}


def _encode(text: str, symbols: str) -> Int[np.ndarray, "N"]:
    """Number each character by its place among the sorted symbols."""
    known, asked = (np.frombuffer(part.encode("utf-32-le"), "<u4") for part in (symbols, text))
    return np.searchsorted(known, asked).astype(np.int32)


def _windows(codes: Int[Array, "N"], starts: Int[Array, "B"], steps: int) -> Batch:
    """Take `steps` characters from each start, and the character that follows each of them."""
    window = codes[starts + jnp.arange(steps + 1)[:, None]]
    return Batch(window[:-1], window[1:], jnp.ones((steps, len(starts))))


def _streams(codes: Int[np.ndarray, "N"]) -> tuple[Batch, Int[np.ndarray, "M"]]:
    """Cut the text into parallel streams of equal length; also return the part of the text that they use."""
    tokens = len(codes) - 1
    streams = min(VALIDATION_STREAMS, math.isqrt(tokens))
    steps = tokens // streams
    batch = _windows(jnp.asarray(codes), steps * jnp.arange(streams), steps)
    return batch, codes[: streams * steps + 1]


def repeated(
    train: Int[np.ndarray, "N"], held_out: Int[np.ndarray, "M"], length: int = PASSAGE
) -> float | None:
    """Compute the share of the passages of `held_out` that stand verbatim in `train`.

    Passages begin at every character. A random linear hash modulo 2⁶⁴ compares them: with V symbols, two
    passages that differ agree with a probability below V / 2⁶⁴.

    Args:
      train: The symbols of the training part.
      held_out: The symbols of the validation part.
      length: The number of symbols of a passage.

    Returns:
      The share. None if one of the parts is shorter than a passage.
    """
    if min(len(train), len(held_out)) < length:
        return None
    factors = np.random.default_rng(0).integers(2**64, size=length, dtype=np.uint64)
    own, asked = (
        np.convolve(part.astype(np.uint64), factors, "valid") for part in (train, held_out)
    )
    return float(np.isin(asked, own).mean())


def _prefix(prefix: str | None, symbols: str, opening: str) -> str:
    if prefix is None:
        return BOOK_PREFIX if set(BOOK_PREFIX) <= set(symbols) else opening[:10]
    unknown = sorted(set(str(prefix)) - set(symbols))
    if unknown or not prefix or not isinstance(prefix, str):
        allowed = f"one or more of the text's {len(symbols)} symbols"
        wrong = f"Not among them: {', '.join(map(repr, unknown))}." if unknown else ""
        raise SettingError("prefix", prefix, allowed, wrong)
    return prefix
