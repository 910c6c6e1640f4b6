"""Handwritten digits, read pixel by pixel: the answer comes after 64 steps."""

import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from bptt_study.losses import cross_entropy
from bptt_study.types import Batch, Sampler, Task
from bptt_study.validation import SettingError, number, one_of, whole

PIXELS, CLASSES = 64, 10
ORDERS = {
    "rows": np.arange(PIXELS),
    "permuted": np.random.default_rng(0).permutation(PIXELS),  # one permutation for all images
}


def digits(order: str = "rows", validation_fraction: float = 0.2) -> Task:
    """Classify scikit-learn's 1797 images of 8 × 8 pixels, read one pixel per step, after the last pixel.

    Inputs are floats [64, B, 1], the ink of a pixel in [0, 1]. This fixed scale needs no statistics of the
    data, and blank paper is 0. Targets, int [64, B], hold the class at every step; the mask is 1 at the last
    step only. Training takes the images in a new random order each epoch, without replacement, and leaves out
    the remainder that fills no batch. Every update starts from the zero state. `chance_accuracy` is the
    accuracy of one constant answer, the training part's most frequent class.

    Args:
      order: `rows` from the top left, or `permuted` by one fixed permutation (NumPy's default generator, seed
        0), which spreads neighbours over all distances in time.
      validation_fraction: The share of the images held out, by a fixed, stratified split.

    Returns:
      The task.

    Raises:
      SettingError: For settings out of range, and in `sampler` for steps other than 64 and for batches larger
        than the training part.

    References:
      Alpaydin & Kaynak 1998 (the images, by `sklearn.datasets.load_digits`); Le, Jaitly & Hinton 2015.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    one_of("order", order, ORDERS)
    if not 0.01 <= number("validation_fraction", validation_fraction) <= 0.99:  # 10 images or more
        raise SettingError("validation_fraction", validation_fraction, "between 0.01 and 0.99")
    images, labels = (part.astype(np.uint8) for part in load_digits(return_X_y=True))
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=validation_fraction, stratify=labels, random_state=0
    )
    pixels = jnp.asarray(images[:, ORDERS[order]] / 16)
    classes = jnp.asarray(labels, jnp.int32)
    most_frequent = np.bincount(labels[train]).argmax()

    def sampler(steps: int, batch_size: int) -> Sampler:
        if steps != PIXELS:
            way_out = "There is one step for each pixel."
            raise SettingError("budget.steps", steps, f"{PIXELS}", way_out)
        if whole("budget.batch_size", batch_size) > len(train):
            allowed = f"at most the number of training images ({len(train)})"
            raise SettingError("budget.batch_size", batch_size, allowed)
        updates = len(train) // batch_size  # per epoch

        def sample(data: Any, key: Key[Array, ""], update: Int[Array, ""]) -> tuple[Batch, Array]:
            epoch, position = update // updates, update % updates
            shuffled = jax.random.permutation(jax.random.fold_in(key, epoch), len(train))
            chosen = jax.lax.dynamic_slice_in_dim(shuffled, position * batch_size, batch_size)
            pixels, classes = data
            return _batch(pixels, classes, chosen), jnp.asarray(True)

        return Sampler((pixels[train], classes[train]), sample, continues=False)

    return Task(
        inputs=1,
        outputs=CLASSES,
        loss=cross_entropy,
        steps=PIXELS,
        sampler=sampler,
        validation=_batch(pixels, classes, held_out),
        references={"uniform": math.log(CLASSES)},
        chance_accuracy=float(np.mean(labels[held_out] == most_frequent)),
        facts={
            "corpus": "digits",
            "corpus_sha256": hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest(),
            "order": order,
        },
        training=_batch(pixels, classes, train),
    )


def _batch(pixels: Array, classes: Array, chosen: Int[Array, "B"]) -> Batch:
    """Make a time-major batch of the chosen rows of pixels [N, 64] and classes [N]."""
    inputs = pixels[chosen].T[..., None]
    targets = jnp.broadcast_to(classes[chosen], inputs.shape[:2])
    return Batch(inputs, targets, jnp.zeros(inputs.shape[:2]).at[-1].set(1))
