"""What every strategy must hold to, driven by its claim alone; plain functions that raise AssertionError.

A strategy from outside the package is checked like our own, under pytest or from a script:

    from bptt_study import battery
    battery.check(lambda problem: my_strategy(problem, window=3))

The references are a plain Python loop over `cell.step`, differentiated by JAX, and finite differences. Sizes
are tiny; call it with `jax_enable_x64` on.
"""

from collections.abc import Callable, Mapping
from functools import cache, cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import cdist
from tqdm import tqdm

import bptt_study as bs
from bptt_study.types import Batch, Claim, Problem, Strategy

T, B, D, H, Q = 7, 2, 3, 3, 3
DRAWS = 3000
LONG = 1024  # steps, where memory is measured

CELLS: dict[str, Callable[[int, int], Any]] = {
    "mlp": bs.cells.mlp,
    "linear": bs.cells.linear,
    "elman_tanh": bs.cells.elman,
    "elman_relu": lambda inputs, hidden: bs.cells.elman(inputs, hidden, activation="relu"),
    "gru": bs.cells.gru,
    "lstm": bs.cells.lstm,
}
LOSSES = dict.fromkeys(("linear", "lstm"), "squared_error")  # the others: cross_entropy
INTEGER_INPUTS = ("elman_tanh", "gru")
# states held at once for n times as many steps, by how the claim says it
GROWTH: dict[str, Callable[[float], float]] = {
    "T": lambda n: n,
    "√T": np.sqrt,
    "window": lambda n: 1,
    "segment": lambda n: 1,
    "m": lambda n: 1,
}
structure: Callable[[Any], Any] = jax.tree.structure  # typed as something that has no ==
MakeStrategy = Callable[[Problem], Strategy]


class Example(NamedTuple):
    problem: Problem
    params: Any
    earlier: Batch  # makes a state that is not zero
    batch: Batch
    state: Any  # hidden state after `earlier`


def problem_of(cell: str) -> Problem:
    loss = getattr(bs.losses, LOSSES.get(cell, "cross_entropy"))
    return Problem(CELLS[cell](D, H), bs.readouts.linear(hidden=H, outputs=Q), loss)


@cache
def example(cell: str, steps: int = T, sequences: int = B, seed: int = 0) -> Example:
    """A problem with random parameters (biases too), a mask with zeros, h_0 ≠ 0."""
    rng = np.random.default_rng(seed)
    problem, classes = problem_of(cell), cell not in LOSSES
    params = jax.tree.map(
        lambda p: p + 0.3 * rng.standard_normal(p.shape), problem.init(jax.random.key(seed))
    )

    def batch() -> Batch:
        shape = (steps, sequences)
        mask = np.ones(shape)
        mask[0, 0] = mask[steps // 2, -1] = 0
        inputs = rng.standard_normal((*shape, D))
        targets = rng.integers(Q, size=shape)
        return Batch(
            jnp.asarray(rng.integers(D, size=shape) if cell in INTEGER_INPUTS else inputs),
            jnp.asarray(targets if classes else rng.standard_normal((*shape, Q))),
            jnp.asarray(mask),
        )

    earlier, now = batch(), batch()
    state = plain_loss(problem, params, problem.cell.zeros(sequences), earlier)[1]
    assert all(jnp.abs(leaf).max() > 0.01 for leaf in jax.tree.leaves(state))
    return Example(problem, params, earlier, now, state)


def plain_loss(problem: Problem, params: Any, state: Any, batch: Batch, cut: Any = ()) -> Any:
    """Mean loss and last state by a plain Python loop; the state is detached before the steps in `cut`."""
    outputs = []
    for t in range(len(batch.mask)):
        state = jax.lax.stop_gradient(state) if t in cut else state
        state = problem.cell.step(params["cell"], state, batch.inputs[t])
        outputs.append(problem.readout.apply(params["readout"], problem.cell.read(state)))
    tokens = problem.loss(jnp.stack(outputs), batch.targets)
    return (tokens * batch.mask).sum() / batch.mask.sum(), state


@cache
def reference(cell: str) -> tuple[float, Any]:
    """Loss and gradient of example(cell) by JAX through the plain loop, with a live model."""
    problem, params, _, batch, state = example(cell)
    (loss, _), grads = jax.value_and_grad(
        lambda p: plain_loss(problem, p, state, batch), has_aux=True
    )(params)
    assert all(jnp.abs(g).max() > 1e-3 for g in jax.tree.leaves(grads)), (
        "a dead model tests nothing"
    )
    return float(loss), grads


def vector(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Equal trees of arrays up to `tolerance` of the largest number expected."""
    assert structure(actual) == structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        atol = tolerance * max(1e-3, np.abs(e).max(initial=0))
        np.testing.assert_allclose(a, e, rtol=0, atol=atol)


class Subject:
    """A strategy on one cell, with what the checks share: one compilation, run over many keys."""

    def __init__(self, make_strategy: MakeStrategy, cell: str) -> None:
        self.cell, self.example, self.make_strategy = cell, example(cell), make_strategy
        self.strategy = make_strategy(self.example.problem)
        self.keys = jax.random.split(jax.random.key(7), DRAWS)

    @cached_property
    def claim(self) -> Claim:
        return self.strategy.claim

    @cached_property
    def start(self) -> Any:
        """The state after the earlier batch."""
        params, earlier = self.example.params, self.example.earlier
        zero = self.strategy.init(params, B)
        return jax.tree.map(lambda s: s[0], self._run(params, zero, earlier, self.keys)[1])

    @cached_property
    def draws(self) -> Any:
        """Estimate and next state for every key, under jit: leading axis DRAWS."""
        return self._run(self.example.params, self.start, self.example.batch, self.keys)

    @cached_property
    def _run(self) -> Any:
        estimate = self.strategy.estimate
        return jax.jit(
            lambda params, state, batch, keys: jax.lax.map(
                lambda key: estimate(params, state, batch, key), keys
            )
        )

    @cached_property
    def first(self) -> Any:
        return jax.tree.map(lambda a: a[0], self.draws)

    def deviation(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws minus the gradient [DRAWS, P], the gradient [P], a fixed direction [P]."""
        exact = vector(reference(self.cell)[1])
        leaves = [np.reshape(g, (DRAWS, -1)) for g in jax.tree.leaves(self.draws[0].grads)]
        direction = np.random.default_rng(3).standard_normal(exact.shape) / np.sqrt(exact.size)
        return np.concatenate(leaves, axis=1) - exact, exact, direction


def check_shapes(subject: Subject) -> None:
    """Gradients look like the parameters; the loss is a scalar; metrics are arrays."""
    (loss, grads, metrics), _ = subject.first
    params = subject.example.params
    assert structure(grads) == structure(params)
    for g, p in zip(jax.tree.leaves(grads), jax.tree.leaves(params), strict=True):
        assert (g.shape, g.dtype) == (p.shape, p.dtype)
    assert (loss.shape, loss.dtype) == ((), np.float64)
    assert isinstance(metrics, dict)
    assert all(isinstance(m, jax.Array) for m in metrics.values())
    assert np.isfinite(vector(grads)).all()
    assert np.abs(vector(grads)).max() > 1e-6, "no gradient at all"


def check_state_closed(subject: Subject) -> None:
    """The state that comes out can go in again, from the first call on."""
    estimate, params = subject.strategy.estimate, subject.example.params
    state = subject.strategy.init(params, B)
    shapes = _shapes(state)
    for batch in (subject.example.earlier, subject.example.batch):
        _, state = jax.eval_shape(estimate, params, state, batch, subject.keys[0])
        assert _shapes(state) == shapes, f"{_shapes(state)} after {shapes}"


def check_traced_once(subject: Subject) -> None:
    """Calls with new numbers, the returned state among them, run the same program."""
    count, params = [], subject.example.params

    @jax.jit
    def counted(params: Any, state: Any, batch: Batch, key: Any) -> Any:
        count.append(1)
        return subject.strategy.estimate(params, state, batch, key)

    # .trace goes through jit's cache of traces like a call, and compiles nothing
    counted.trace(
        params, subject.strategy.init(params, B), subject.example.earlier, subject.keys[0]
    )
    _, state = counted.trace(params, subject.start, subject.example.batch, subject.keys[1]).out_info
    counted.trace(params, state, subject.example.batch, subject.keys[2])
    assert len(count) == 1, f"traced {len(count)} times"


def check_jit(subject: Subject) -> None:
    """The compiled estimate is the one without jit."""
    params, batch = subject.example.params, subject.example.batch
    close(subject.strategy.estimate(params, subject.start, batch, subject.keys[0]), subject.first)


def check_loss(subject: Subject) -> None:
    """The loss is the plain forward loss from the carried state, whatever the key."""
    np.testing.assert_allclose(subject.draws[0].loss, reference(subject.cell)[0], rtol=1e-12)


def check_float32(subject: Subject) -> None:
    """Without x64, float32 comes out wherever float64 did with it."""

    def narrow(a: Any) -> Any:
        kinds = {np.dtype("float64"): np.float32, np.dtype("int64"): np.int32}
        return jax.ShapeDtypeStruct(a.shape, kinds.get(a.dtype, a.dtype))

    params, batch = subject.example.params, subject.example.batch
    wide = jax.eval_shape(subject.strategy.estimate, params, subject.start, batch, subject.keys[0])
    with jax.enable_x64(False):
        arguments = jax.tree.map(narrow, (params, subject.start, batch))
        actual = jax.eval_shape(subject.strategy.estimate, *arguments, subject.keys[0])
        zero = jax.eval_shape(lambda p: subject.strategy.init(p, B), arguments[0])
    assert _shapes(actual) == _shapes(jax.tree.map(narrow, wide))
    assert _shapes(zero) == _shapes(arguments[1])


def check_exact(subject: Subject) -> None:
    """Every draw is the gradient of the plain loop, and agrees with finite differences."""
    deviation, exact, _ = subject.deviation()
    assert np.abs(deviation).max() <= 1e-12 * np.abs(exact).max()
    problem, params, _, batch, state = subject.example
    rng = np.random.default_rng(5)
    for _ in range(3):
        ray = jax.tree.map(lambda p: rng.standard_normal(p.shape), params)

        def along(e: float, ray: Any = ray) -> Any:
            moved = jax.tree.map(lambda p, r: p + e * r, params, ray)
            return plain_loss(problem, moved, state, batch)[0]

        np.testing.assert_allclose(
            vector(subject.first[0].grads) @ vector(ray),
            (along(1e-5) - along(-1e-5)) / 2e-5,
            atol=1e-8,
        )


def check_unbiased(subject: Subject) -> None:
    """The mean over keys is the gradient within 4 standard errors, which are at most a tenth of it."""
    _no_mean(*subject.deviation())


def check_lag_weights(subject: Subject) -> None:
    """The mean over keys is what the declared weights keep of the lag table, as sharply as unbiased."""
    deviation, exact, direction = subject.deviation()
    problem, params, _, batch, state = subject.example
    weights = bs.lags.weights(subject.strategy, T, T)
    expected = vector(bs.lags.weighted_gradient(problem, params, batch, weights, state))
    _no_mean(deviation + exact - expected, expected, direction)


def _no_mean(deviation: np.ndarray, exact: np.ndarray, direction: np.ndarray) -> None:
    error = deviation.std(axis=0, ddof=1) / np.sqrt(DRAWS)
    along = deviation @ direction
    rounding = 1e-10 * np.linalg.norm(exact)
    assert np.linalg.norm(error) <= 0.1 * np.linalg.norm(exact), "too noisy to tell"
    assert np.linalg.norm(deviation.mean(axis=0)) <= 4 * np.linalg.norm(error) + rounding
    assert abs(along.mean()) <= 4 * along.std(ddof=1) / np.sqrt(DRAWS) + rounding


def check_enumeration(subject: Subject) -> None:
    """Every way to draw, as the claim lists them: likely in sum 1, on average the declared weights (1 for an
    unbiased claim), and each estimate is one of them, for every sequence its own.
    """
    problem, params, _, batch, state = subject.example
    declared = bs.lags.declared(subject.strategy)
    assert declared.patterns is not None
    weights, probability = declared.patterns(T)
    np.testing.assert_allclose(probability.sum(), 1, rtol=1e-12)
    mean = jnp.tril(jnp.einsum("n,nsk->sk", probability, weights))
    expected = jnp.ones((T, T)) if subject.claim.unbiased else declared.weights(T, T)
    np.testing.assert_allclose(mean, jnp.tril(expected), atol=1e-12)
    if declared.draws > 1:
        return  # an average of patterns, too many to list
    alone = [
        np.stack(
            [
                vector(
                    bs.lags.weighted_gradient(problem, params, batch, w[..., None] * b, state)[
                        "cell"
                    ]
                )
                for w in weights
            ]
        )
        for b in jnp.eye(B)
    ]
    scale = np.abs(alone).max()
    for n in range(5):
        drawn = vector(jax.tree.map(lambda a, n=n: a[n], subject.draws[0].grads["cell"]))
        assert cdist(drawn - alone[0], alone[1], "chebyshev").min() <= 1e-10 * scale, "none of them"


def check_memory(subject: Subject) -> None:
    """Four times the steps take no more temporary memory than the claim's states grow to."""
    growth = GROWTH.get(subject.claim.memory)
    assert growth is not None, f"claim.memory={subject.claim.memory}: allowed: {', '.join(GROWTH)}"

    def held(steps: int) -> int:
        """The compiler's, of which nothing is run: shapes will do. Metrics die, as in training."""
        strategy, params = subject.strategy, subject.example.params
        start = strategy.init(params, 8)
        batch = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct((steps, 8, *a.shape[2:]), a.dtype), subject.example.batch
        )

        def trained(*arguments: Any) -> Any:
            estimate, state = strategy.estimate(*arguments)
            return estimate.loss, estimate.grads, state

        return bs.measure.temporary_bytes(trained, params, start, batch, subject.keys[0])

    assert held(4 * LONG) <= 1.1 * growth(4) * held(LONG), "more memory than claimed"


def check_bias_shows(subject: Subject) -> None:
    """A strategy that claims no unbiasedness fails the check of it, unless it cut nothing here."""
    deviation, exact, _ = subject.deviation()
    if np.abs(deviation).max() <= 1e-9 * np.abs(exact).max():
        return
    try:
        check_unbiased(subject)
    except AssertionError as error:
        if "too noisy" in str(error):
            raise
        return
    raise AssertionError("no bias to see: claim unbiasedness, or the check is blind here")


def checks(claim: Claim) -> list[Callable[[Subject], None]]:
    """The checks that go with a claim."""
    assert claim.unbiased or not claim.exact, "what is exact is unbiased"
    always: list[Callable[[Subject], None]] = [
        check_shapes,
        check_state_closed,
        check_traced_once,
        check_jit,
        check_loss,
        check_float32,
        check_memory,
    ]
    if claim.exact:
        always.append(check_exact)
    if claim.lag_weights is not None:
        always.append(check_lag_weights)
        if claim.lag_weights.patterns is not None:
            always.append(check_enumeration)
    return [*always, check_unbiased if claim.unbiased else check_bias_shows]


def check(make_strategy: MakeStrategy, cells: Any = tuple(CELLS)) -> None:
    """All checks on all cells, in float64; says on stderr what it does."""
    with jax.enable_x64(True):
        bar = tqdm(cells, desc="battery", unit="cell")
        for cell in bar:
            subject = Subject(make_strategy, cell)
            for one in checks(subject.claim):
                bar.set_postfix_str(f"{cell}: {one.__name__}")
                one(subject)


def properties(strategies: Mapping[str, Strategy]) -> str:
    """What each strategy claims, as a table in Markdown: the README's."""
    head = ["strategy", "gradient", "states held", "sequential steps backward", "source"]
    rows = [
        [
            f"`{name}`",
            "exact" if claim.exact else "unbiased" if claim.unbiased else "biased",
            claim.memory,
            claim.steps,
            claim.source,
        ]
        for name, claim in ((name, strategy.claim) for name, strategy in strategies.items())
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def _shapes(tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    return [(a.shape, a.dtype) for a in leaves], structure
