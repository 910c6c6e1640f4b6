"""The reference models for language: interpolated n-grams, counted on the training part.

They have Witten-Bell smoothing, recursively down to the uniform distribution, without a free parameter:

    p_n(w | h) = (c(hw) + N(h) p_{n-1}(w | h')) / (c(h) + N(h)),        p_0 = 1/V,

where c(hw) counts how often w follows the n-1 symbols h in training, c(h) = Σ_w c(hw), N(h) counts the distinct
symbols that follow h, and h' is h without its oldest symbol. After an unseen h, p_n = p_{n-1}.

References:
  Witten & Bell 1991, method C; in this form Chen & Goodman 1999.
"""

import numpy as np
from jaxtyping import Float, Int

NAMES = ("uniform", "unigram", "bigram", "trigram", "fourgram")

Codes = Int[np.ndarray, "N"]  # symbols 0 … V-1 in the order of the text


def losses(train: Codes, text: Codes, symbols: int) -> dict[str, float]:
    """Compute the mean -ln p of each model.

    The history of a symbol is the part of `text` before it, so the first symbols have a shorter one.

    Args:
      train: The symbols of the training part.
      text: The symbols to predict; the first one is not scored.
      symbols: V, the size of the alphabet.

    Returns:
      The losses by the names of the models, nats per token.
    """
    p = np.full(len(text), 1 / symbols)
    means = [np.log(symbols)]
    for n in range(1, len(NAMES)):
        p[n - 1 :] = interpolate(p[n - 1 :], *counts(train, text, n, symbols))
        means.append(-np.log(p[1:]).mean())
    return dict(zip(NAMES, map(float, means), strict=True))


def interpolate(
    lower: Float[np.ndarray, "M"],
    count: Int[np.ndarray, "M"],
    total: Int[np.ndarray, "M"],
    kinds: Int[np.ndarray, "M"],
) -> Float[np.ndarray, "M"]:
    """Compute p_n from p_{n-1}.

    Args:
      lower: p_{n-1} [M].
      count: c(hw) [M].
      total: c(h) [M].
      kinds: N(h) [M].

    Returns:
      p_n [M].
    """
    return (count + kinds * lower) / (total + kinds)


def counts(
    train: Codes, text: Codes, n: int, symbols: int
) -> tuple[Int[np.ndarray, "M"], Int[np.ndarray, "M"], Int[np.ndarray, "M"]]:
    """Count in `train` the M = len(text) - n + 1 n-grams hw of `text`.

    Args:
      train: The symbols of the training part.
      text: The symbols to predict.
      n: The length of an n-gram.
      symbols: V, the size of the alphabet.

    Returns:
      c(hw), c(h) and N(h), each [M]. For an h that is not in `train`, N(h) is 1, so that the lower order gets
      all the weight.
    """
    own, asked = _grams((train, text), n, symbols)
    grams, gram_count = np.unique(own, return_counts=True)
    histories, first, kinds = np.unique(grams // symbols, return_index=True, return_counts=True)
    total = np.add.reduceat(gram_count, first)  # sorted grams are sorted by history, too

    return (
        _look_up(grams, gram_count, asked, missing=0),
        _look_up(histories, total, asked // symbols, missing=0),
        _look_up(histories, kinds, asked // symbols, missing=1),
    )


def _grams(texts: tuple[Codes, Codes], n: int, symbols: int) -> list[Int[np.ndarray, "M"]]:
    """Number every n-gram of both texts, with its last symbol in the lowest digit.

    If numbers would exceed 2⁶³, the histories are numbered anew by their ranks.
    """
    found, bound = [np.zeros(len(text) + 1, np.int64) for text in texts], 1
    for i in range(n):
        if bound * symbols >= 2**63:
            ranks = np.unique(np.concatenate(found), return_inverse=True)[1]
            found, bound = np.split(ranks, [len(found[0])]), len(ranks)
        found = [g[:-1] * symbols + text[i:] for g, text in zip(found, texts, strict=True)]
        bound *= symbols
    return found


def _look_up(
    keys: Int[np.ndarray, "K"],
    values: Int[np.ndarray, "K"],
    asked: Int[np.ndarray, "M"],
    missing: int,
) -> Int[np.ndarray, "M"]:
    """Look up the value of each key in `asked`; a key that is not there gives `missing`. Keys are sorted."""
    i = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    return np.where(keys[i] == asked, values[i], missing)
