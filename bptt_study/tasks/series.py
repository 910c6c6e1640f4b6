"""Chaotic series of which one coordinate is seen: predict it ahead, or recall it."""

from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from bptt_study.losses import squared_error
from bptt_study.types import Batch, Sampler, Task
from bptt_study.validation import SettingError, one_of, whole

TRANSIENT = 1000  # points until the orbit is on its attractor
TRAINING = 2**16  # points
VALIDATION_STEPS, VALIDATION_SEQUENCES = 200, 64
LONGEST = 100  # time steps between input and target


def series(system: str = "henon", horizon: int = 1) -> Task:
    """Predict x_{t+horizon} from x_1 … x_t, of a system with more coordinates than the one that is seen.

    Input and target are the first coordinate, with mean 0 and variance 1, so that twice the loss is the
    normalised squared error: 1 for whoever answers with the mean. A negative horizon asks for a past input,
    which nothing but the network's memory has:

    >>> task = series("henon", horizon=-2)
    >>> sampler = task.sampler(5, 1)  # 5 time steps, 1 sequence
    >>> batch, fresh = sampler.sample(sampler.data, jax.random.key(0), 1)
    >>> bool((batch.targets[2:, 0] == batch.inputs[:-2, 0, 0]).all())
    True

    The systems are `henon` (x' = 1 - 1.4 x² + y, y' = 0.3 x), `lorenz` (σ = 10, ρ = 28, β = 8/3, every second
    step of Euler's method with dt = 0.01), and `mackey_glass` (x' = x + 0.2 d/(1 + d¹⁰) - 0.1 x, d the
    value 17 steps before x').

    Inputs are float [T, B, 1], targets [T, B]. Every sequence is a stream from a random point of one orbit. An
    update continues where the last one stopped, and carries its state. After half of the training part all
    sequences start at new points. Where a target lies before the start of its stream, the mask is 0. The
    orbit's next part is for validation, 64 sequences of 200 steps.

    Args:
      system: One of `SYSTEMS`.
      horizon: Time steps from the input to the target; 0 is the input itself, and -k the input k steps ago.

    Raises:
      SettingError: For an unknown system and a horizon beyond ±100, and in `sampler` for more steps than half
        of the training part has.

    References:
      Hénon 1976; Lorenz 1963; Mackey & Glass 1977. Settings as in Yi & Wang 2026 (sketched RTRL).
    """
    one_of("system", system, SYSTEMS)
    if abs(whole("horizon", horizon, least=-LONGEST)) > LONGEST:
        raise SettingError("horizon", horizon, f"between -{LONGEST} and {LONGEST}")
    orbit = jnp.asarray(points(system), jnp.result_type(float))
    before = max(0, -horizon)  # steps of a stream whose target came before it

    def windows(orbit: Array, starts: Int[Array, "B"], steps: int, age: Int[Array, ""]) -> Batch:
        """The steps from each start on, of streams that are `age` steps old."""
        at = starts + jnp.arange(steps)[:, None]
        seen = age + jnp.arange(steps) >= before
        mask = jnp.broadcast_to(1.0 * seen[:, None], at.shape)
        return Batch(orbit[at][..., None], orbit[at + horizon], mask)

    def sampler(steps: int, batch_size: int) -> Sampler:
        half = TRAINING // 2
        if whole("budget.steps", steps) > half:
            raise SettingError("budget.steps", steps, f"between 1 and {half}")
        whole("budget.batch_size", batch_size)
        updates = half // steps  # of an epoch

        def sample(data: Array, key: Key[Array, ""], update: Int[Array, ""]) -> tuple[Batch, Array]:
            epoch, position = update // updates, update % updates
            own = jax.random.fold_in(key, epoch)
            starts = jax.random.randint(own, (batch_size,), LONGEST, half - LONGEST)
            age = position * steps
            return windows(data, starts + age, steps, age), jnp.asarray(position == 0)

        return Sampler(orbit, sample, continues=updates > 1)

    starts = TRAINING + VALIDATION_STEPS * jnp.arange(VALIDATION_SEQUENCES)
    return Task(
        inputs=1,
        outputs=1,
        loss=squared_error,
        steps=None,
        sampler=sampler,
        validation=windows(orbit, starts, VALIDATION_STEPS, jnp.array(0)),
        references={"nothing": 0.5},  # the mean
        chance_accuracy=None,
        facts={},
    )


@lru_cache
def points(system: str) -> Float[np.ndarray, "N"]:
    """The orbit on its attractor, training and validation part, with mean 0 and variance 1."""
    count = TRAINING + VALIDATION_STEPS * VALIDATION_SEQUENCES + LONGEST
    orbit = np.fromiter(islice(SYSTEMS[system](), TRANSIENT, TRANSIENT + count), float)
    return (orbit - orbit.mean()) / orbit.std()


def henon() -> Iterator[float]:
    """x of Hénon's map."""
    x, y = 0.1, 0.0
    while True:
        yield x
        x, y = 1 - 1.4 * x * x + y, 0.3 * x


def lorenz() -> Iterator[float]:
    """x of Lorenz's system, every 0.02 units of time."""
    x, y, z, dt = 1.0, 1.0, 1.0, 0.01
    while True:
        yield x
        for _ in range(2):
            dx, dy, dz = 10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z
            x, y, z = x + dt * dx, y + dt * dy, z + dt * dz


def mackey_glass() -> Iterator[float]:
    """x of the equation with delay 17, by steps of one unit of time."""
    last = deque([1.2] * 17, maxlen=17)
    while True:
        x, delayed = last[-1], last[0]
        yield x
        square = delayed * delayed
        tenth = square * square * square * square * square  # the same on every machine; pow is not
        last.append(x + 0.2 * delayed / (1 + tenth) - 0.1 * x)


SYSTEMS = {"henon": henon, "lorenz": lorenz, "mackey_glass": mackey_glass}
