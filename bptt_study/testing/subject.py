"""A strategy on one cell, with the results that its checks share: one compilation, run over many keys."""

import inspect
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bptt_study.testing.errors import CheckError, rows, vector
from bptt_study.testing.examples import Example, MakeCell, example, reference
from bptt_study.types import Batch, Claim, Problem, Strategy

MakeStrategy = Callable[[Problem], Strategy]

DRAWS = 3000  # number of keys for a strategy that draws
KEYS = 30  # for a strategy that draws nothing: the keys must not matter


class Subject:
    """A strategy on one example.

    Args:
      make_strategy: Problem -> strategy.
      cell: A name among `examples.CELLS`, or a function (inputs, hidden) -> Cell.
      size: Sizes of the example, as `examples.example` names them.
    """

    def __init__(self, make_strategy: MakeStrategy, cell: str | MakeCell, **size: int) -> None:
        self.make_strategy, self.cell, self.size = make_strategy, cell, size
        self.example: Example = example(cell, **size)
        self.strategy = _made(make_strategy, self.example.problem)

    @property
    def claim(self) -> Claim:
        return self.strategy.claim

    @property
    def draws_nothing(self) -> bool:
        """True if, by the claim, no estimate depends on the key."""
        weights, noise = self.claim.lag_weights, self.claim.noise
        unspread = weights is not None and weights.patterns is None and weights.spread is None
        return self.claim.exact or (unspread and noise is None)

    @cached_property
    def keys(self) -> Any:
        """The keys, one for every draw."""
        return jax.random.split(jax.random.key(7), KEYS if self.draws_nothing else DRAWS)

    @property
    def sequences(self) -> int:
        return self.example.batch.mask.shape[1]

    @cached_property
    def zero(self) -> Any:
        """The state of fresh sequences."""
        return self.strategy.init(self.example.params, self.sequences)

    @cached_property
    def start(self) -> Any:
        """The state after the earlier batch, with the first key."""
        return self._earlier[1][1]

    @cached_property
    def _earlier(self) -> Any:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(self.keys)
        starts = self._for_each_key(self.zero)
        return self._run(self.example.params, starts, self.example.earlier, keys)

    @cached_property
    def draws(self) -> Any:
        """The estimate and next state for every key, under jit, with a leading axis [draws].

        If the claim reaches through the stream, each key has drawn the earlier batch's estimate too.
        """
        return self._now[0]

    @cached_property
    def first(self) -> Any:
        """Estimate and next state of the first key."""
        return self._now[1]

    @cached_property
    def _now(self) -> Any:
        return self._run(self.example.params, self.starts, self.example.batch, self.keys)

    @cached_property
    def starts(self) -> Any:
        """The state from which each draw starts, leading axis [draws]."""
        if self.claim.reach == "stream":
            return self._earlier[0][1]
        return self._for_each_key(self.start)

    def _for_each_key(self, tree: Any) -> Any:
        return jax.tree.map(lambda s: jnp.broadcast_to(s, (len(self.keys), *s.shape)), tree)

    @cached_property
    def _run(self) -> Any:
        """(params, state of each key, batch, keys) -> what comes out of all keys, and of the first."""

        @jax.jit
        def run(params: Any, states: Any, batch: Batch, keys: Any) -> Any:
            found = jax.lax.map(
                lambda each: self.strategy.estimate(params, each[0], batch, each[1]),
                (states, keys),
            )
            return found, jax.tree.map(lambda a: a[0], found)

        return run

    def again(self, state: Any, batch: Batch) -> Any:
        """Return estimate and next state of the first key for another state or batch, by the same program."""
        states = self._for_each_key(state)
        return self._run(self.example.params, states, batch, self.keys)[1]

    @cached_property
    def reference(self) -> tuple[float, Any]:
        """The loss and gradient by a loop, as far back as the claim reaches."""
        return reference(self.cell, self.claim.reach, **self.size)

    @cached_property
    def estimates(self) -> np.ndarray:
        """The gradients of all draws, [draws, P]."""
        return rows(self.draws[0].grads)

    def deviation(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The draws minus the gradient [draws, P], the gradient [P], and a fixed direction [P]."""
        exact = vector(self.reference[1])
        direction = np.random.default_rng(3).standard_normal(exact.shape) / np.sqrt(exact.size)
        return self.estimates - exact, exact, direction


def _made(make_strategy: Any, problem: Problem) -> Strategy:
    """Call the function under test; raise CheckError if it does not make a strategy of a problem alone."""
    if not callable(make_strategy):
        kind = type(make_strategy).__name__
        raise CheckError(f"make_strategy must be a function Problem -> Strategy; got a {kind}")
    try:
        inspect.signature(make_strategy).bind(problem)
    except TypeError as error:
        raise CheckError(f"make_strategy must take a problem alone: {error}") from error
    made = make_strategy(problem)
    if not isinstance(made, Strategy):
        raise CheckError(f"make_strategy must return a Strategy; got a {type(made).__name__}")
    return made
