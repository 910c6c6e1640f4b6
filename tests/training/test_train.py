"""Training against a plain Python loop, and the three settings that are easily confused."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bptt_study as bs
from bptt_study.backprop.forward import generate
from bptt_study.optimizers import Optimizer, clipped
from bptt_study.testing.examples import close
from bptt_study.training.budget import Budget
from bptt_study.training.resets import fold, make_sampler
from bptt_study.training.train import make_train, run_keys
from bptt_study.types import Batch, Level, Sampler, Task
from bptt_study.validation import SettingError

V, H = 3, 4
CLIP = 0.6  # between the smallest and the largest norm of these runs


@cache  # so that runs of the same problem share their compiled programs
def toy(continues=True, length=1000) -> Task:
    """Streams over a fixed random text, as long as wanted, started anew every 5 updates."""
    text = jax.random.randint(jax.random.key(9), (length,), 0, V)

    def sampler(steps, batch_size):
        def sample(data, key, update):
            start = jax.random.randint(key, (batch_size,), 0, length // 2)
            at = start + (update % 5) * steps * continues + jnp.arange(steps)[:, None]
            fresh = (update % 5 == 0) | (not continues)
            return Batch(data[at], data[at + 1], jnp.ones(at.shape)), fresh

        return Sampler(text, sample, continues)

    held_out = Batch(text[:20].reshape(10, 2), text[1:21].reshape(10, 2), jnp.ones((10, 2)))
    return Task(V, V, bs.losses.cross_entropy, None, sampler, held_out, {}, None, {})


PROBLEM = bs.Problem(bs.cells.elman(V, H), bs.readouts.linear(H, V), bs.losses.cross_entropy)
FULL = bs.strategies.full(PROBLEM)
RANDOM = bs.strategies.randomized_constant(PROBLEM, mean_length=3)


@pytest.fixture
def problem():
    return PROBLEM


def sgd(**settings):
    return clipped(optax.sgd, **{"learning_rate": 0.5, "clip_norm": CLIP} | settings)


class WithoutHash:
    """A callable object that compares by its contents, and has no hash."""

    def __init__(self, f):
        self.f = f

    def __call__(self, *arguments):
        return self.f(*arguments)

    def __eq__(self, other):
        return isinstance(other, WithoutHash) and self.f == other.f


def test_an_optimizer_with_other_parameters_as_its_answer_is_refused(problem):
    """The scores would be of the parameters at which it takes gradients."""
    free = clipped(optax.contrib.schedule_free_sgd, learning_rate=0.1)
    train = make_train(problem, FULL, free, Budget(steps=2, batch_size=2, updates=2, logs=1), toy())
    with pytest.raises(SettingError, match="got one with a ScheduleFreeState"):
        train(jax.random.key(0))


def test_updates_without_a_token_count_in_no_mean_and_no_level(problem):
    """Two of three batches have none: their loss of 0 is no success."""
    task, budget = toy(continues=False), Budget(steps=2, batch_size=2, updates=6, logs=2)
    whole = task.sampler(2, 2)

    def sample(data, key, update, easy):
        batch, fresh = whole.sample(data, key, update)
        return batch._replace(mask=batch.mask * (update % 3 == 0)), fresh

    level = Level(
        lambda: (jnp.zeros((), jnp.int32),),
        lambda level, metrics: (level[0] + (metrics["train_loss"] < 1e9),),
        lambda level: {"easy": level[0]},
    )
    sampler = Sampler(whole.data, sample, False, level)
    task = task._replace(sampler=lambda steps, batch_size: sampler)
    still = sgd(learning_rate=0.0)
    records = make_train(problem, FULL, still, budget, task)(jax.random.key(0)).records
    init_key, data_key, _ = run_keys(jax.random.key(0))
    params = problem.init(init_key)
    for record, update in zip(records[1:], (0, 3), strict=True):
        batch, _ = sample(whole.data, data_key, update, 0)
        found, _ = FULL.estimate(params, problem.cell.zeros(2), batch, data_key)
        np.testing.assert_allclose(record["train_loss"], found.loss, rtol=1e-6)
        norm = optax.tree.norm(found.grads)
        np.testing.assert_allclose(record["gradient_norm"], norm, rtol=1e-5)
        np.testing.assert_array_equal(record["clipped_fraction"], norm > CLIP)
    assert [int(record["easy"][0]) for record in records] == [0, 1, 2]


def test_no_token_in_any_update_gives_no_number(problem):
    task = toy(continues=False)
    whole = task.sampler(2, 2)

    def sample(data, key, update):
        batch, fresh = whole.sample(data, key, update)
        return batch._replace(mask=0 * batch.mask), fresh

    task = task._replace(sampler=lambda steps, batch_size: Sampler(whole.data, sample, False))
    budget = Budget(steps=2, batch_size=2, updates=2, logs=1)
    last = make_train(problem, FULL, sgd(), budget, task)(jax.random.key(0)).records[-1]
    assert np.isnan(last["train_loss"]).all() and np.isfinite(last["validation_loss"]).all()
    assert not last["diverged"].any()


@pytest.mark.slow
def test_functions_without_a_hash():
    cell = PROBLEM.cell._replace(step=WithoutHash(PROBLEM.cell.step), affine=None)
    problem = PROBLEM._replace(cell=cell, loss=WithoutHash(PROBLEM.loss))
    task, budget = toy(), Budget(steps=2, batch_size=2, updates=2, logs=1)
    task = task._replace(sampler=WithoutHash(task.sampler))
    optimizer = sgd(schedule=WithoutHash(lambda n: 1.0))
    runs = [
        make_train(problem, bs.strategies.full(problem), optimizer, budget, task),
        make_train(PROBLEM, FULL, sgd(), budget, toy()),
    ]
    params = [train(jax.random.key(0)).progress.params for train in runs]
    close(*params, 1e-12)


@cache
def compiled(estimate):
    return jax.jit(estimate)


def by_hand(problem, strategy, budget, task, key, reset=lambda update: False):
    """The run of one seed as a plain loop, with optax's parts put together by hand."""
    init_key, data_key, draw_key = jax.random.split(key, 3)
    params, sampler = problem.init(init_key), task.sampler(budget.steps, budget.batch_size)
    state = strategy.init(params, budget.batch_size)
    norms, losses, estimate_of = [], [], compiled(strategy.estimate)
    for update in range(budget.updates):
        batch, fresh = sampler.sample(sampler.data, data_key, update)
        if fresh or reset(update):
            state = strategy.init(params, budget.batch_size)
        draw = jax.random.fold_in(draw_key, update)
        estimate, state = estimate_of(params, state, batch, draw)
        norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(estimate.grads)))
        scale = 0.5 * min(1, CLIP / norm)
        params = jax.tree.map(lambda p, g, scale=scale: p - scale * g, params, estimate.grads)
        norms.append(norm)
        losses.append(float(estimate.loss))
    return params, state, np.array(norms), np.array(losses)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [FULL, RANDOM], ids=["full", "random"])
def test_equals_a_plain_loop(problem, strategy):
    budget = Budget(steps=4, batch_size=2, updates=7, logs=3)
    key = jax.random.key(3)
    trained = make_train(problem, strategy, sgd(), budget, toy())(key)
    params, state, norms, losses = by_hand(problem, strategy, budget, toy(), key)

    assert np.abs(np.asarray(state)).max() > 0.01
    close(jax.tree.map(lambda p: p[0], trained.progress.params), params)
    close(trained.progress.strategy[0], state)
    assert budget.log_points == [0, 2, 5, 7]
    for record, since, point in zip(trained.records[1:], [0, 2, 5], [2, 5, 7], strict=True):
        own = slice(since, point)  # a metric is the mean since the log point before
        np.testing.assert_allclose(record["gradient_norm"], norms[own].mean())
        np.testing.assert_allclose(record["train_loss"], losses[own].mean())
        np.testing.assert_allclose(record["clipped_fraction"], (norms[own] > CLIP).mean())
    assert 0 < (norms > CLIP).mean() < 1, norms
    loss, _ = problem_loss(problem, params, toy().validation)
    np.testing.assert_allclose(record["validation_loss"], loss)


@pytest.mark.parametrize("made", [jnp.asarray, np.asarray])
def test_keys_of_two_words_are_the_same_keys(problem, made):
    """As `jax.random.PRNGKey` makes them, several or one."""
    train = make_train(
        problem, FULL, sgd(), Budget(steps=4, batch_size=2, updates=2, logs=1), toy()
    )
    words = made(jnp.stack([jax.random.PRNGKey(3), jax.random.PRNGKey(4)]))
    assert words.dtype == jnp.uint32
    typed = jax.vmap(jax.random.key)(jnp.array([3, 4]))
    own, expected = (train(keys).progress.params for keys in (words, typed))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), own, expected))
    one = train(words[0]).progress.params
    assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a[0], b[0]), one, expected))


def test_a_fresh_sequence_resets_what_the_strategy_renews(problem):
    """A count of all calls survives where h starts from zero; without `renew` it starts again, too."""
    full = FULL

    def estimate(params, state, batch, key):
        result, last = full.estimate(params, state[0], batch, key)
        return result, (last, state[1] + 1)

    def init(params, size):
        return full.init(params, size), jnp.zeros((), jnp.int32)

    def renew(params, state):
        return jax.tree.map(jnp.zeros_like, state[0]), state[1]

    budget = Budget(steps=4, batch_size=2, updates=7, logs=1)  # the sixth update is fresh
    whole = by_hand(problem, full, budget, toy(), jax.random.key(3))
    for strategy, calls in (
        (bs.Strategy(init, estimate, renew=renew), 7),
        (bs.Strategy(init, estimate), 2),
    ):
        train = make_train(problem, strategy, sgd(), budget, toy())
        h, count = train(jax.random.key(3)).progress.strategy
        close(h[0], whole[1])
        assert int(count[0]) == calls


def problem_loss(problem, params, batch):
    """Mean loss and accuracy by a plain loop from state zero."""
    state, losses, hits = problem.cell.zeros(batch.mask.shape[1]), [], []
    for x, y in zip(batch.inputs, batch.targets, strict=True):
        state = problem.cell.step(params["cell"], state, x)
        outputs = problem.readout.apply(params["readout"], state)
        losses.append(-jax.nn.log_softmax(outputs)[jnp.arange(len(y)), y])
        hits.append(outputs.argmax(1) == y)
    return np.mean(losses), np.mean(hits)


def test_strategies_see_the_same_weights_and_data(problem):
    seen = []

    def spy(problem):
        full = FULL

        def estimate(params, state, batch, key):
            jax.debug.callback(lambda *a: seen.append(np.asarray(a[0]).sum()), batch.inputs)
            return full.estimate(params, state, batch, key)

        return full._replace(estimate=estimate)

    budget = Budget(steps=4, batch_size=2, updates=3, logs=3)
    starts = []
    for make in (spy, spy, partial(bs.strategies.fixed, window=2)):
        trained = make_train(problem, make(problem), sgd(), budget, toy())(jax.random.key(0))
        starts.append(trained.records[0]["validation_loss"])
    jax.effects_barrier()
    assert seen[:3] == seen[3:]
    assert starts[0] == starts[1] == starts[2]


@pytest.mark.slow
def test_seeds_in_one_job_equal_single_runs(problem):
    budget = Budget(steps=4, batch_size=2, updates=5, logs=2)
    train = make_train(problem, RANDOM, sgd(), budget, toy())
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    together = train(keys)
    for i in range(3):
        alone = train(keys[i])
        close(
            jax.tree.map(lambda p: p[0], alone.progress.params),
            jax.tree.map(lambda p, i=i: p[i], together.progress.params),
        )
    losses = together.records[-1]["validation_loss"]
    assert len(set(losses.tolist())) == 3, "the seeds must differ"


@pytest.mark.slow
def test_each_seed_draws_the_noise_of_the_optimizer_anew(problem):
    """All seeds had the same noise. Strategies still share that of a seed, so comparisons stay paired."""
    noise = optax.chain(optax.set_to_zero(), optax.add_noise(0.01, 0.55, key=0))
    budget, keys = Budget(steps=4, batch_size=2, updates=2), jax.vmap(jax.random.key)(jnp.arange(2))

    def noise_of(strategy):
        train = make_train(problem, strategy, Optimizer(noise, np.inf), budget, toy())
        params = []
        train(keys, lambda _, progress: params.append(progress.params))
        moved = jax.tree.map(lambda start, end: (end - start).reshape(2, -1), params[0], params[-1])
        return np.concatenate(jax.tree.leaves(moved), axis=1)

    full, random = noise_of(FULL), noise_of(RANDOM)
    np.testing.assert_allclose(full, random, atol=1e-12)
    assert abs(np.corrcoef(full)[0, 1]) < 0.5


def test_a_reset_every_few_updates(problem):
    """reset_every beyond steps zeroes the state between updates; the truncation stays as it is."""
    budget = Budget(steps=4, batch_size=2, updates=7, logs=1, reset_every=8)
    trained = make_train(problem, FULL, sgd(), budget, toy())(jax.random.key(3))
    reset = by_hand(problem, FULL, budget, toy(), jax.random.key(3), lambda u: u % 2 == 0)[0]
    never = by_hand(problem, FULL, budget, toy(), jax.random.key(3))[0]
    close(jax.tree.map(lambda p: p[0], trained.progress.params), reset)
    with pytest.raises(AssertionError):
        close(never, reset)


def test_a_reset_within_an_update_is_another_forward_pass(problem):
    """reset_every below steps: the loss is that of short sequences, not of a cut gradient."""
    budget = Budget(steps=6, batch_size=2, updates=1, reset_every=3)
    key, params = jax.random.key(0), problem.init(jax.random.key(1))
    sampler = make_sampler(toy(), budget)
    folded, fresh = sampler.sample(sampler.data, key, jnp.asarray(2))
    whole = toy().sampler(6, 2).sample(sampler.data, key, jnp.asarray(2))[0]
    assert fresh
    assert folded.inputs.shape == (3, 4)

    loss, zero = 0.0, problem.cell.zeros(2)
    for part in (slice(0, 3), slice(3, 6)):
        loss += problem_loss(problem, params, Batch(*(a[part] for a in whole)))[0] / 2
    estimate_of = compiled(FULL.estimate)
    estimate, _ = estimate_of(params, problem.cell.zeros(4), folded, key)
    np.testing.assert_allclose(estimate.loss, loss)
    carried, _ = estimate_of(params, zero, whole, key)
    assert abs(carried.loss - loss) > 1e-4


def test_fold_keeps_every_token_in_order():
    a = jnp.arange(24).reshape(6, 2, 2)
    folded = fold(a, 3)
    assert folded.shape == (3, 4, 2)
    pieces = {tuple(np.asarray(folded[:, i, 0])) for i in range(4)}
    assert pieces == {(0, 4, 8), (2, 6, 10), (12, 16, 20), (14, 18, 22)}


def test_a_norm_at_which_the_transform_does_not_clip_is_refused(problem):
    """All its updates would count as clipped. The controls: those that clip, whatever else they do."""
    budget, adam = Budget(steps=2, batch_size=2, updates=2, logs=1), optax.adam(0.05)

    def make(*parts, norm=0.3):
        return make_train(problem, FULL, Optimizer(optax.chain(*parts), norm), budget, toy())

    allowed = (
        r"`optimizer\.clip_norm` must be the norm at which its transform clips, or inf; got 0\.3"
    )
    for parts in (
        [adam],
        [optax.clip_by_global_norm(3), adam],
        [optax.sgd(1.0)],
        [optax.clip(0.3)],
    ):
        with pytest.raises(SettingError, match=allowed):
            make(*parts)
    clip = optax.clip_by_global_norm(0.3)
    make(clip, adam)
    make(clip, optax.add_decayed_weights(0.1), optax.lion(0.05))
    make(optax.MultiSteps(optax.chain(clip, adam), 2).gradient_transformation())
    make(adam, norm=np.inf)


def test_schedule_and_no_clipping(problem):
    """A schedule that ends at zero stops the parameters; without clipping nothing counts as clipped."""
    budget = Budget(steps=4, batch_size=2, updates=6, logs=2)
    optimizer = sgd(clip_norm=None, schedule=lambda n: jnp.where(n < 3, 1.0, 0.0))
    middle, end = [], []
    make_train(problem, FULL, optimizer, budget, toy())(
        jax.random.key(0),
        lambda record, p: (middle if record["update"][0] == 3 else end).append(p.params),
    )
    close(middle[0], end[-1])
    with pytest.raises(AssertionError):
        close(end[0], end[-1])  # update 0 against update 6


@pytest.mark.parametrize("schedule", [None, lambda n: 1 / (1 + n)])
def test_a_grid_of_rates_is_one_program(schedule):
    """The rate is state: what compiles is the same for all rates, what it computes is not."""
    grads = {"w": jnp.ones(3)}

    def step(rate):
        update = sgd(learning_rate=rate, schedule=schedule).transform
        state = update.init(grads)
        moved = jax.jit(update.update)
        return moved.lower(grads, state, grads).as_text(), moved(grads, state, grads)[0]["w"]

    (program, slow), (other, fast) = step(0.25), step(0.5)
    assert program == other
    np.testing.assert_allclose(2 * slow, fast, rtol=1e-15)


def test_divergence_is_a_row():
    problem = bs.Problem(bs.cells.linear(V, H), bs.readouts.linear(H, V), bs.losses.cross_entropy)
    budget = Budget(steps=40, batch_size=2, updates=4, logs=4)
    optimizer = sgd(clip_norm=None, learning_rate=1e30)
    trained = make_train(problem, bs.strategies.full(problem), optimizer, budget, toy())(
        jax.random.key(0)
    )
    flags = [bool(r["diverged"][0]) for r in trained.records]
    assert flags == [False, *flags[1:-1], True]
    assert len(trained.records) == 5


def test_parameters_that_the_last_update_ruined_are_diverged():
    """No later update tells, and an argmax over numbers that are none would be a score like any other."""
    problem = bs.Problem(bs.cells.linear(V, H), bs.readouts.linear(H, V), bs.losses.cross_entropy)
    budget = Budget(steps=40, batch_size=2, updates=1, logs=1)
    for rate, diverged in ((1e300, True), (1e-3, False)):
        optimizer = sgd(clip_norm=None, learning_rate=rate)
        train = make_train(problem, bs.strategies.full(problem), optimizer, budget, toy())
        last = train(jax.random.key(0)).records[-1]
        assert bool(last["diverged"][0]) is diverged
        assert np.isfinite(last["validation_loss"][0]) == (not diverged)
        assert np.isnan(last["accuracy"][0]) == diverged
        assert np.isnan(last["diverged_at"][0]), (
            "the update was done, and its parameters are finite"
        )


def test_a_validation_loss_that_is_not_finite_stops_no_seed():
    """States may grow beyond all numbers in a longer sequence alone; the seed was said to have stopped."""
    problem = bs.Problem(bs.cells.linear(V, H), bs.readouts.linear(H, V), bs.losses.cross_entropy)
    wide = {"W_xh": jnp.ones((V, H)), "W_hh": 1e35 * jnp.eye(H), "b_h": jnp.zeros(H)}
    growing = problem._replace(cell=problem.cell._replace(init=lambda key: wide))
    budget = Budget(steps=4, batch_size=2, updates=2, logs=2)
    still = sgd(clip_norm=None, learning_rate=1e-300)
    records = make_train(growing, bs.strategies.full(growing), still, budget, toy(False))(
        jax.random.key(0)
    ).records
    assert all(r["diverged"][0] and not np.isfinite(r["validation_loss"][0]) for r in records)
    assert np.isnan([r["diverged_at"][0] for r in records]).all()
    assert np.isfinite([r["train_loss"][0] for r in records[1:]]).all(), "training goes on"


def test_a_start_without_a_loss_is_diverged():
    """The first row is of update 0; the loss of the data before it is infinite."""
    problem = bs.Problem(bs.cells.linear(V, H), bs.readouts.linear(H, V), bs.losses.cross_entropy)
    start = {"W_xh": jnp.full((V, H), jnp.inf), "W_hh": jnp.eye(H), "b_h": jnp.zeros(H)}
    nowhere = problem._replace(cell=problem.cell._replace(init=lambda key: start))
    budget = Budget(steps=40, batch_size=2, updates=2, logs=2)
    train = make_train(nowhere, bs.strategies.full(nowhere), sgd(), budget, toy())
    records = train(jax.random.key(0)).records
    assert [bool(r["diverged"][0]) for r in records] == [True, True, True]
    assert [float(r["diverged_at"][0]) for r in records] == [0, 1, 1]
    assert np.isnan(records[0]["accuracy"][0])


def test_sums_of_short_floats_go_on_growing(problem):
    """In bfloat16 a sum of ones ends at 256."""
    short = lambda tree: jax.tree.map(lambda a: a.astype("bfloat16"), tree)  # noqa: E731
    cell, readout, loss = problem
    cell = cell._replace(
        init=lambda key: short(problem.cell.init(key)),
        zeros=lambda size: short(problem.cell.zeros(size)),
    )
    readout = readout._replace(init=lambda key: short(problem.readout.init(key)))
    strategy = bs.strategies.full(bs.Problem(cell, readout, loss))
    budget = Budget(steps=2, batch_size=2, updates=400, logs=1)
    optimizer = sgd(learning_rate=0.0, clip_norm=1e-3)
    train = make_train(bs.Problem(cell, readout, loss), strategy, optimizer, budget, toy(False))
    last = train(jax.random.key(0)).records[-1]
    assert last["clipped_fraction"][0] == 1
    assert last["gradient_norm"][0].dtype == last["train_loss"][0].dtype == np.float32


def test_the_estimate_is_traced_once_and_log_points_end_where_they_should(problem):
    traces, full = [], bs.strategies.full(problem)

    def estimate(*args):
        traces.append(1)
        return full.estimate(*args)

    budget = Budget(steps=4, batch_size=2, updates=10, logs=4)
    train = make_train(problem, full._replace(estimate=estimate), sgd(), budget, toy())
    trained = train(jax.random.key(0))
    points = [int(r["update"][0]) for r in trained.records]
    assert points == budget.log_points == [0, 2, 5, 8, 10]
    assert len(traces) <= 2, "one for shapes, one for the program; none per interval"
    assert int(trained.progress.update[0]) == 10


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"steps": 0}, "`steps` .*; got 0"),
        ({"batch_size": -1}, "`batch_size` .*; got -1"),
        ({"updates": 1.5}, "`updates` .*; got 1.5"),
        ({"reset_every": 5}, "`reset_every` .*; got 5"),
    ],
)
def test_budget_out_of_range(settings, name):
    with pytest.raises(SettingError, match=name):
        Budget(**{"steps": 4, "batch_size": 2, "updates": 3} | settings)


def test_reset_beyond_a_batch_that_starts_anew_is_refused():
    with pytest.raises(SettingError, match=r"`budget\.reset_every` must be .*; got 8"):
        make_sampler(toy(continues=False), Budget(steps=4, batch_size=2, updates=1, reset_every=8))


@pytest.mark.parametrize(
    "settings", [{"learning_rate": -1}, {"clip_norm": 0}, {"learning_rate": float("nan")}]
)
def test_optimizer_out_of_range(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        sgd(**settings)


def test_generate_follows_the_model(problem):
    """Drawn symbols are those of a plain loop with the same keys."""
    params = problem.init(jax.random.key(0))
    prefix, key = jnp.array([0, 2, 1]), jax.random.key(5)
    drawn = generate(problem, params, prefix, 12, key)
    state = problem.cell.zeros(1)
    for x in prefix:
        state = problem.cell.step(params["cell"], state, x[None])
    for k, symbol in zip(jax.random.split(key, 12), drawn, strict=True):
        expected = jax.random.categorical(k, problem.readout.apply(params["readout"], state))
        assert expected[0] == symbol
        state = problem.cell.step(params["cell"], state, expected)
