"""`check_strategy` over the package's strategies, and planted faults that it must find."""

import re
from contextlib import nullcontext
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import STRATEGY_FILES, configured

import bptt_study as bs
from bptt_study.backprop.backpropagate import Truncation, backpropagate
from bptt_study.strategies.randomized import cuts
from bptt_study.testing import (
    draw_checks,
    examples,
    gradient_checks,
    noise_checks,
    protocol_checks,
)
from bptt_study.testing.check_strategy import ONCE, checks
from bptt_study.testing.errors import CheckError
from bptt_study.testing.subject import Subject
from bptt_study.types import Claim, Estimate
from bptt_study.validation import SettingError

STRATEGIES = {file.stem: configured(file) for file in STRATEGY_FILES} | {
    "tbptt_2_5": lambda problem: bs.strategies.fixed(problem, window=5, stride=2),
    "uncompensated_power_law": lambda problem: bs.strategies.randomized_power_law(
        problem, mean_length=3, compensate=False
    ),
    "three_draws": lambda problem: bs.strategies.randomized_constant(
        problem, mean_length=3, draws=3
    ),
}

TRUNCATIONS = ("full", "fixed", "randomized", "randomized_uncompensated", "tbptt_2_5")

# relu differs from tanh in one pointwise function: the tests of cells and of backpropagate know both
CELLS = [cell for cell in examples.CELLS if cell != "elman_relu"]
LIAR = "elman_tanh"  # the cell on which faults are planted


# cells that no form of the fast path fits, or that fit it layer by layer or unit by unit
OTHERS = {
    "stacked": partial(bs.cells.stacked, layers=2, of="lstm"),
    "step_only": lambda inputs, hidden: bs.cells.gru(inputs, hidden)._replace(affine=None),
    "lru": bs.cells.lru,
    "min_gru": bs.cells.min_gru,
}


@cache
def subject(name, cell):
    return Subject(STRATEGIES[name], OTHERS.get(cell, cell))


def cells_of(name):
    """Draws are averaged in one place, whatever the cell."""
    return [LIAR] if name == "three_draws" else [*CELLS, *OTHERS]


PROBLEMS = {cell: examples.problem_of(OTHERS.get(cell, cell)) for cell in [*CELLS, *OTHERS]}


def claim_of(name, cell):
    """None: the strategy refuses the cell."""
    try:
        return STRATEGIES[name](PROBLEMS[cell]).claim
    except SettingError:
        return None


def thorough(name, cell):
    """The truncations are checked on every cell of `CELLS` each time, the other strategies on one."""
    always = cell == LIAR or (name in TRUNCATIONS and cell in CELLS)
    return [] if always else [pytest.mark.thorough]


# these learn from the parameters' shapes, in the first call, that a cell is no product of features and gates
BY_PRODUCTS = ("kf_rtrl", "ok", "pp_prop", "reverse_kf")

CLAIMS = {(name, cell): claim_of(name, cell) for name in STRATEGIES for cell in cells_of(name)}
CASES = [
    pytest.param(
        name, cell, check, id=f"{name}-{cell}-{check.__name__[6:]}", marks=thorough(name, cell)
    )
    for (name, cell), claim in CLAIMS.items()
    if claim is not None and not (cell == "lru" and name in BY_PRODUCTS)
    for check in checks(claim)
    if check not in ONCE
    or cell == LIAR
    or (check is protocol_checks.check_memory and cell in OTHERS)
]


@pytest.mark.parametrize("name", BY_PRODUCTS)
def test_products_of_features_and_gates_refuse_lru(name):
    with pytest.raises(SettingError, match=r"features × .* Use uoro with this cell"):
        protocol_checks.check_state_closed(subject(name, "lru"))


BY_UNITS = {"eprop", "kf_rtrl", "ok", "pp_prop", "reverse_kf", "rflo", "sketched", "snap"}


def test_only_strategies_that_need_the_units_refuse_a_cell():
    refused = {where for where, claim in CLAIMS.items() if claim is None}
    assert refused == {(name, cell) for name in BY_UNITS for cell in ("stacked", "step_only")}


@pytest.mark.parametrize(("name", "cell", "check"), CASES)
def test_strategy(name, cell, check):
    check(subject(name, cell))


def lying(change, make=STRATEGIES["full"], claim=None):
    """The strategy of `make` with its estimate changed: a check must notice."""

    def make_liar(problem):
        honest = make(problem)

        def estimate(params, state, batch, key):
            return change(*honest.estimate(params, state, batch, key))

        return honest._replace(estimate=estimate, claim=claim or honest.claim)

    return make_liar


def weighing(name, **weights):
    """A strategy that declares other lag weights."""
    claim = STRATEGIES[name](examples.problem_of(LIAR)).claim
    lag_weights = claim.lag_weights._replace(**weights)
    return lambda problem: STRATEGIES[name](problem)._replace(
        claim=claim._replace(lag_weights=lag_weights)
    )


def without_an_end(problem):
    """TBPTT(4, 16) whose declared window has no end."""
    strategy = bs.strategies.fixed(problem, window=16, stride=4)
    weights = strategy.claim.lag_weights._replace(window=jnp.ones)
    return strategy._replace(claim=strategy.claim._replace(lag_weights=weights))


def claiming(make, claim):
    """The strategy of `make` with another claim, or with a claim that differs as the dict says."""

    def make_liar(problem):
        honest = make(problem)
        lie = honest.claim._replace(**claim) if isinstance(claim, dict) else claim
        return honest._replace(claim=lie)

    return make_liar


def gated(xi, sequences=None, draws=None):
    """Link weights xi(kept, π) for the constant law of mean length 3, with the claim of `randomized`.

    sequences: how many have draws of their own, None for all. draws: (claimed, different).
    """

    def make(problem):
        law = bs.strategies.constant(3)
        claimed, different = draws or (1, 1)

        def estimate(params, state, batch, key):
            steps, size = batch.mask.shape
            shape = (different, steps, sequences or size)
            uniforms = jnp.broadcast_to(jax.random.uniform(key, shape), (different, steps, size))
            weights = jax.vmap(lambda u: xi(*cuts(law, u)))(uniforms)
            truncation = Truncation(link_weights=weights if different > 1 else weights[0])
            return backpropagate(problem, params, state, batch, truncation)

        return bs.strategies.randomized(problem, law, draws=claimed)._replace(estimate=estimate)

    return make


def compensated(kept, pi, power=1.0):
    return jnp.where(kept, pi**-power, 0)


def doubled(where, make=STRATEGIES["full"]):
    """A gradient that is doubled for some masks."""

    def make_liar(problem):
        honest = make(problem)

        def estimate(params, state, batch, key):
            result, last = honest.estimate(params, state, batch, key)
            factor = jnp.where(where(batch.mask), 2, 1)
            return result._replace(grads=jax.tree.map(lambda g: factor * g, result.grads)), last

        return honest._replace(estimate=estimate)

    return make_liar


def by_length(mask):
    return len(mask) > 8


def by_sequences(mask):
    return mask.shape[1] > 4


def by_a_sequence_without_tokens(mask):
    return jnp.any(mask.sum(axis=0) == 0)


def by_an_empty_last_step(mask):
    return mask[-1].sum() == 0


def by_the_mask_up_to_1(problem):
    honest = STRATEGIES["full"](problem)

    def estimate(params, state, batch, key):
        return honest.estimate(params, state, batch._replace(mask=jnp.minimum(batch.mask, 1)), key)

    return honest._replace(estimate=estimate)


def by_sign_of_the_mask(problem):
    honest = STRATEGIES["full"](problem)

    def estimate(params, state, batch, key):
        return honest.estimate(params, state, batch._replace(mask=jnp.sign(batch.mask)), key)

    return honest._replace(estimate=estimate)


def with_metric(change, make=STRATEGIES["full"]):
    return lying(lambda r, s: (r._replace(metrics=r.metrics | change(r.metrics)), s), make)


def nan_without_tokens(problem):
    honest = STRATEGIES["full"](problem)

    def estimate(params, state, batch, key):
        result, last = honest.estimate(params, state, batch, key)
        share = batch.mask.sum() / batch.mask.sum()
        return result._replace(grads=jax.tree.map(lambda g: share * g, result.grads)), last

    return honest._replace(estimate=estimate)


def with_more_state(problem):
    """Full BPTT that carries three numbers of each sequence which nobody asked for."""
    honest = STRATEGIES["full"](problem)

    def estimate(params, state, batch, key):
        result, last = honest.estimate(params, state[0], batch, key)
        return result, (last, state[1])

    return honest._replace(
        init=lambda params, size: (honest.init(params, size), jnp.zeros((size, 3))),
        estimate=estimate,
    )


def per_loss(problem):
    """Full BPTT that goes back from each loss alone, T times T states, and claims T."""
    honest = bs.strategies.full(problem)

    def estimate(params, state, batch, key):
        def one(step):
            own = batch._replace(mask=batch.mask * (jnp.arange(len(batch.mask)) == step)[:, None])
            result, last = backpropagate(problem, params, state, own)
            share = own.mask.sum() / batch.mask.sum()
            return jax.tree.map(lambda a: share * a, (result.loss, result.grads)), last

        (losses, grads), last = jax.vmap(one)(jnp.arange(len(batch.mask)))
        loss, grads = jax.tree.map(lambda a: a.sum(axis=0), (losses, grads))
        return Estimate(loss, grads, {}), jax.tree.map(lambda h: h[0], last)

    return honest._replace(estimate=estimate)


def halved(result, state):
    return result._replace(grads=jax.tree.map(lambda g: 0.5 * g, result.grads)), state


def forgetful(problem):
    """Full BPTT from the zero state, whatever was carried."""
    honest = STRATEGIES["full"](problem)

    def estimate(params, state, batch, key):
        return honest.estimate(params, jax.tree.map(jnp.zeros_like, state), batch, key)

    return honest._replace(estimate=estimate)


def noisy_readout(problem):
    """Randomized truncation whose readout's gradient has noise of its own, with mean 0."""
    honest = STRATEGIES["randomized"](problem)

    def estimate(params, state, batch, key):
        found, last = honest.estimate(params, state, batch, key)
        noise = 1 + 0.1 * jax.random.normal(jax.random.fold_in(key, 9))
        readout = jax.tree.map(lambda g: noise * g, found.grads["readout"])
        return found._replace(grads=found.grads | {"readout": readout}), last

    return honest._replace(estimate=estimate)


def losing_masked_ends(problem):
    """Full BPTT that returns the state 0 for each sequence whose last token does not count."""
    honest = STRATEGIES["full"](problem)

    def estimate(params, state, batch, key):
        found, last = honest.estimate(params, state, batch, key)
        return found, last * (batch.mask[-1] > 0)[:, None]

    return honest._replace(estimate=estimate)


def minding_masked_targets(problem):
    """Full BPTT whose loss depends on targets that do not count."""
    honest = STRATEGIES["full"](problem)

    def estimate(params, state, batch, key):
        found, state = honest.estimate(params, state, batch, key)
        return found._replace(loss=found.loss * (1 + jnp.sum(batch.targets < 0))), state

    return honest._replace(estimate=estimate)


def overstated(make):
    """A claim whose patterns are 1 % likelier than they are."""
    claim = make(examples.problem_of("elman_tanh")).claim
    weights = claim.lag_weights

    def patterns(steps):
        w, probability = weights.patterns(steps)
        return w, 1.01 * probability

    return claim._replace(lag_weights=weights._replace(patterns=patterns))


COUNTER = iter(range(10**6))
sizes, metrics = gradient_checks.check_sizes, protocol_checks.check_metrics
enumeration = draw_checks.check_enumeration
UNBIASED = Claim(unbiased=True)
# check, strategy that fails it, part of what the check says
FAULTS = {
    "missing_grads": (
        protocol_checks.check_shapes,
        lying(lambda r, s: (r._replace(grads={"cell": r.grads["cell"]}), s)),
        "gradient is",
    ),
    "zero_grads": (
        protocol_checks.check_shapes,
        lying(lambda r, s: (r._replace(grads=jax.tree.map(jnp.zeros_like, r.grads)), s)),
        "no gradient at all",
    ),
    "half_precision": (
        protocol_checks.check_float32,
        lying(
            lambda r, s: (
                r._replace(
                    loss=r.loss.astype("float64" if jax.config.jax_enable_x64 else "float16")
                ),
                s,
            )
        ),
        "float16",
    ),
    "state_grows": (
        protocol_checks.check_state_closed,
        lying(lambda r, s: (r, (s, s))),
        "the state is",
    ),
    "state_of_weak_type": (
        protocol_checks.check_traced_once,
        lying(lambda r, s: (r, jnp.broadcast_to(jnp.asarray(0.5), s.shape))),
        r"traced \d times",
    ),
    "depends_on_tracing": (
        protocol_checks.check_jit,
        lying(lambda r, s: (r._replace(loss=r.loss + next(COUNTER)), s)),
        "without jit",
    ),
    "other_loss": (
        protocol_checks.check_loss,
        lying(lambda r, s: (r._replace(loss=1.001 * r.loss), s)),
        r"off by 0\.001 of itself",
    ),
    "h_0_ignored": (protocol_checks.check_loss, forgetful, "loss is off"),
    "masked_ends_lose_the_state": (
        protocol_checks.check_loss,
        losing_masked_ends,
        "the loss after a call with an empty mask is off",
    ),
    "mask_by_its_sign": (protocol_checks.check_loss, by_sign_of_the_mask, "loss is off"),
    "renew_that_keeps_the_state": (
        protocol_checks.check_state_closed,
        lambda problem: STRATEGIES["full"](problem)._replace(renew=lambda params, state: state),
        "after renew the loss is off by",
    ),
    "masked_targets_count": (
        protocol_checks.check_loss,
        minding_masked_targets,
        "with others where the mask is 0",
    ),
    "other_norms": (
        metrics,
        with_metric(lambda m: {"adjoint_norms": m["adjoint_norms"] + 1}),
        "adjoint_norms are off by",
    ),
    "norms_not_finite": (
        metrics,
        with_metric(lambda m: {"adjoint_norms": m["adjoint_norms"].at[2, 1].set(jnp.nan)}),
        "1 of 14 adjoint_norms are not finite",
    ),
    "norms_without_the_batch": (
        metrics,
        with_metric(lambda m: {"adjoint_norms": m["adjoint_norms"][:, 0]}),
        r"the shape \(7,\)",
    ),
    "cuts_that_are_numbers": (metrics, with_metric(lambda m: {"cuts": 1.0 * m["cuts"]}), "dtype"),
    "cuts_before_the_first_step": (
        metrics,
        with_metric(lambda m: {"cuts": ~m["cuts"]}, STRATEGIES["sliding"]),
        "before the first step",
    ),
    "cuts_of_what_is_exact": (
        metrics,
        with_metric(lambda m: {"cuts": m["cuts"].at[1:].set(True)}),
        "exact, with 12 links cut",
    ),
    "more_state_than_claimed": (
        protocol_checks.check_numbers,
        with_more_state,
        "3 numbers per sequence are kept; claimed 0",
    ),
    "truncates_and_claims_exact": (
        gradient_checks.check_exact,
        claiming(STRATEGIES["tbptt_2_5"], Claim(exact=True, unbiased=True)),
        "off from the exact gradient",
    ),
    "scaled_and_claims_exact": (gradient_checks.check_exact, lying(halved), "by 0.5 of it"),
    "a_window_of_7_claims_exact": (
        sizes,
        claiming(
            partial(bs.strategies.fixed, window=7, stride=1), {"exact": True, "unbiased": True}
        ),
        "steps = 70",
    ),
    "chunks_of_64_claim_exact": (
        sizes,
        claiming(partial(bs.strategies.fixed, window=64), Claim(exact=True, unbiased=True)),
        "steps = 70",
    ),
    "chunks_of_100_claim_exact": (
        sizes,
        claiming(partial(bs.strategies.fixed, window=100), Claim(exact=True, unbiased=True)),
        "steps = 260",
    ),
    "doubled_beyond_8_steps": (sizes, doubled(by_length), "steps = 70"),
    "doubled_beyond_8_steps_at_random": (
        sizes,
        doubled(by_length, STRATEGIES["randomized"]),
        "steps = 10",
    ),
    "doubled_beyond_4_sequences": (sizes, doubled(by_sequences), "sequences = 5"),
    "doubled_with_a_sequence_without_tokens": (
        sizes,
        doubled(by_a_sequence_without_tokens),
        "sequences = 5",
    ),
    "doubled_with_a_last_step_without_tokens": (
        sizes,
        doubled(by_an_empty_last_step),
        "steps = 70",
    ),
    "mask_up_to_1": (sizes, by_the_mask_up_to_1, "steps = 70"),
    "another_draw_than_declared_of_a_smoothed_estimate": (
        noise_checks.check_smoothed,
        lying(halved, partial(bs.strategies.pes, hold=1)),
        "from what any signs give",
    ),
    "truncates_and_claims_unbiased": (
        gradient_checks.check_unbiased,
        claiming(STRATEGIES["sliding"], UNBIASED),
        "standard errors; allowed 4",
    ),
    "uncompensated_and_claims_unbiased": (
        gradient_checks.check_unbiased,
        claiming(STRATEGIES["randomized_uncompensated"], UNBIASED),
        "standard errors",
    ),
    "compensated_by_the_wrong_power": (
        gradient_checks.check_unbiased,
        gated(partial(compensated, power=0.5)),
        "standard errors",
    ),
    "compensated_twice": (
        gradient_checks.check_unbiased,
        gated(partial(compensated, power=2)),
        "standard errors",
    ),
    "not_among_its_draws": (
        enumeration,
        gated(partial(compensated, power=1.01)),
        "off from all listed draws",
    ),
    "draws_more_likely_than_declared": (
        enumeration,
        claiming(STRATEGIES["randomized"], overstated(STRATEGIES["randomized"])),
        "sum to 1 up to 0.01",
    ),
    "cuts_shared_by_the_batch": (enumeration, gated(compensated, sequences=1), "the same draw"),
    "one_draw_counted_three_times": (
        enumeration,
        gated(compensated, draws=(3, 1)),
        "standard errors off",
    ),
    "fewer_draws_than_declared": (
        enumeration,
        gated(compensated, draws=(4, 3)),
        "that of 4 independent draws",
    ),
    "more_draws_than_declared": (enumeration, gated(compensated, draws=(1, 2)), "listed draws"),
    "window_off_by_one": (
        gradient_checks.check_lag_weights,
        claiming(
            partial(bs.strategies.fixed, window=4, stride=1),
            STRATEGIES["sliding"](examples.problem_of(LIAR)).claim,
        ),
        "off from its lag weights",
    ),
    "noise_of_the_readout_alone": (
        gradient_checks.check_lag_weights,
        noisy_readout,
        "off from the readout's gradient",
    ),
    "another_window": (
        gradient_checks.check_window,
        weighing("fixed", window=lambda lags: 0.9 ** jnp.arange(lags)),
        "the window is off from the weights",
    ),
    "a_window_without_an_end": (
        gradient_checks.check_window,
        without_an_end,
        "the window is off from the weights",
    ),
    "another_variance": (
        draw_checks.check_variance,
        weighing("randomized", spread=lambda steps: np.zeros((steps,) * 3)),
        "times that of its closed form",
    ),
    "other_link_weights": (
        draw_checks.check_link_weights,
        weighing("randomized", link_weights=lambda uniforms: 1.0 * (uniforms > 0.5)),
        "is not the weight of lag 1",
    ),
    "draws_and_claims_to_draw_nothing": (
        gradient_checks.check_lag_weights,
        claiming(STRATEGIES["randomized"], STRATEGIES["full"](examples.problem_of(LIAR)).claim),
        "differs between keys by .* names no draws",
    ),
    "nan_without_tokens": (
        protocol_checks.check_loss,
        nan_without_tokens,
        "gradient of an empty mask is nan, not 0",
    ),
    "quadratic_memory": (protocol_checks.check_memory, per_loss, "more memory than claimed"),
    "states_that_pass_for_numbers_of_tokens": (
        protocol_checks.check_memory,
        claiming(STRATEGIES["full"], {"memory": "segment", "per_token": 5}),
        "more memory than claimed",
    ),
    "memory_that_grows_online": (
        protocol_checks.check_memory,
        claiming(STRATEGIES["full"], {"online": True}),
        "more memory than claimed",
    ),
    "unknown_memory": (
        protocol_checks.check_memory,
        claiming(STRATEGIES["full"], {"memory": "little"}),
        "must be one of",
    ),
    "unbiased_and_claims_nothing": (
        gradient_checks.check_bias_shows,
        claiming(STRATEGIES["randomized"], Claim()),
        "no bias to see",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(fault):
    check, make_liar, said = FAULTS[fault]
    with pytest.raises(CheckError, match=said):
        check(Subject(make_liar, LIAR))


def looks_up(inputs, hidden):
    base = bs.cells.elman(inputs, hidden)

    def step(params, h, x):
        rows = params["W_xh"].at[x].get(mode="fill", fill_value=jnp.nan)
        return jnp.tanh(rows + h @ params["W_hh"] + params["b_h"])

    return base._replace(step=step, affine=None)


def one_hot(inputs, hidden):
    base = bs.cells.elman(inputs, hidden)
    return base._replace(
        step=lambda params, h, x: base.step(params, h, jax.nn.one_hot(x, inputs)), affine=None
    )


@pytest.mark.parametrize("cell", [looks_up, one_hot])
def test_a_cell_that_takes_ids_alone(cell):
    found = Subject(bs.strategies.full, cell)
    assert found.example.batch.inputs.dtype == int
    gradient_checks.check_exact(found)


REFUSING = {
    "dni": (lambda p: bs.strategies.dni(p, block=3, future=False), "steps = 1, .*`block` must be"),
    "telescope": (
        lambda p: bs.strategies.telescope(p, kind="single", tuned=[1.0] * 7),
        "steps = 10, .*`tuned` must be",
    ),
}


@pytest.mark.parametrize("name", REFUSING)
def test_a_strategy_may_refuse_a_length(name):
    make, said = REFUSING[name]
    assert re.search(said, gradient_checks.check_sizes(Subject(make, LIAR)))


@pytest.mark.parametrize("fault", ["a_window_of_7_claims_exact", "doubled_beyond_8_steps"])
def test_seven_steps_alone_are_blind(fault):
    """So that the other sizes are what finds these."""
    gradient_checks.check_exact(Subject(FAULTS[fault][1], LIAR))


def test_a_dead_model_is_no_reference():
    """Of which every strategy's gradient is zero."""
    dead = bs.cells.elman(1, 1)._replace(step=lambda params, state, x: state + 0.1)
    with pytest.raises(CheckError, match="dead model"):
        examples.reference(lambda inputs, hidden: dead._replace(zeros=lambda n: jnp.zeros((n, 1))))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda problem: 3, "must return a Strategy; got a int"),
        (bs.strategies.full(examples.problem_of(LIAR)), "must be a function .* got a Strategy"),
        (bs.strategies.fixed, "must take a problem alone: missing a required argument: 'window'"),
    ],
)
def test_what_makes_no_strategy(make, said):
    with pytest.raises(CheckError, match=f"make_strategy {said}"):
        bs.testing.check_strategy(make, cell=LIAR, quiet=True)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"exact": True}, "exact is unbiased"),
        ({"passes": "sideways"}, "claim.passes must be one of"),
        ({"reach": "past"}, "claim.reach"),
        ({"smoothed": 0.1}, "needs claim.noise"),
    ],
)
def test_claims_that_contradict_themselves(claim, said):
    with pytest.raises(CheckError, match=said):
        checks(Claim(**claim))


BIASED = [
    n
    for n, make in STRATEGIES.items()
    if not make(examples.problem_of("gru")).claim.unbiased
    if n != "adaptive"  # which cuts nothing where its bias is small enough
]


@pytest.mark.parametrize(
    ("name", "cell"),
    [pytest.param(n, cell, marks=thorough(n, cell)) for cell in CELLS[1:] for n in BIASED],
)
def test_biased_settings_cut_something(name, cell):
    """So that check_bias_shows, which lets uncut settings pass, had something to see."""
    deviation, exact, _ = subject(name, cell).deviation()
    assert np.linalg.norm(deviation.mean(axis=0)) > 0.001 * np.linalg.norm(exact)


@pytest.mark.parametrize("claimed", ["T", "segment"])
def test_many_draws_store_all_states(claimed):
    make = STRATEGIES["three_draws"]
    assert make(examples.problem_of(LIAR)).claim.memory == "T"
    liar = Subject(claiming(make, {"memory": claimed, "per_token": 0}), LIAR)
    if claimed == "T":
        return protocol_checks.check_memory(liar)
    with pytest.raises(CheckError, match="more memory"):
        protocol_checks.check_memory(liar)


# The function itself


@pytest.mark.slow
def test_own_cells_and_what_held(capsys):
    held = bs.testing.check_strategy(STRATEGIES["full"], cells={"mine": bs.cells.elman})
    assert {"shapes", "exact", "sizes", "memory"} <= set(held)
    assert set(map(tuple, held.values())) == {("mine",)}
    said = capsys.readouterr().out
    assert "held on mine" in said
    assert "exact" in said
    with pytest.raises(CheckError, match=r"mine, exact: off from the exact gradient by 0\.5"):
        bs.testing.check_strategy(lying(halved), cells={"mine": bs.cells.elman}, quiet=True)
    assert capsys.readouterr().out == ""
    with pytest.raises(SettingError, match="cell"):
        bs.testing.check_strategy(STRATEGIES["full"], cell="elmo")


def test_the_function_stays_where_its_file_is_imported():
    from bptt_study.testing import check_strategy

    assert callable(check_strategy)
    assert bs.testing.check_strategy is check_strategy


@pytest.mark.parametrize(("per_token", "fits"), [(4, True), (0, False)])
def test_numbers_of_each_token_are_claimed(per_token, fits):
    """Random cuts hold their draws; a claim without them is found out."""

    def make(problem):
        strategy = bs.strategies.randomized(problem, bs.strategies.constant(4.0))
        return strategy._replace(claim=strategy.claim._replace(per_token=per_token))

    subject = Subject(make, "elman_tanh")
    with nullcontext() if fits else pytest.raises(CheckError, match="more memory than claimed"):
        protocol_checks.check_memory(subject)


def dropping(inputs, hidden):
    """An Elman cell whose units are dropped by the keys in its state."""
    elman = bs.cells.elman(inputs, hidden)

    def step(params, state, x):
        h, keys = state
        own, keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (hidden,)))(own)
        return jnp.where(kept, elman.step(params, h, x), 0), keys

    def zeros(size):
        return elman.zeros(size), jax.random.split(jax.random.key(0), size)

    return bs.Cell(elman.init, zeros, step, lambda state: state[0])


def turning(inputs, hidden):
    """A cell of complex numbers, each with its own rate and phase."""

    def init(key):
        parts = dict(zip(("rate", "phase", "B"), jax.random.split(key, 3), strict=True))
        shapes = {"rate": (hidden,), "phase": (hidden,), "B": (inputs, hidden)}
        return {name: jax.random.normal(own, shapes[name]) for name, own in parts.items()}

    def step(params, h, x):
        return jnp.exp(-jnp.exp(params["rate"]) + 1j * params["phase"]) * h + x @ params["B"]

    def zeros(size):
        return jnp.zeros((size, hidden)) * 1j

    return bs.Cell(init, zeros, step, lambda h: h.real + h.imag)


@pytest.mark.slow
@pytest.mark.parametrize("cell", [dropping, turning])
def test_random_and_complex_cells_of_ones_own(cell):
    own = Subject(STRATEGIES["full"], cell)
    for check in (
        protocol_checks.check_float32,
        protocol_checks.check_jit,
        gradient_checks.check_exact,
    ):
        check(own)


def of_complex_weights(inputs, hidden):
    cell = turning(inputs, hidden)
    return cell._replace(init=lambda key: cell.init(key) | {"B": 1j + cell.init(key)["B"]})


@pytest.mark.parametrize(("name", "cell"), [("pes", dropping), ("dni", of_complex_weights)])
def test_numbers_of_random_and_complex_cells(name, cell):
    """Keys are no numbers; what a synthesiser predicts of complex states is two real numbers of each."""
    own = Subject(STRATEGIES[name], cell)
    protocol_checks.check_numbers(own)
    if name == "dni":
        assert not jnp.iscomplexobj(own.first[1].synthesiser.W)


def test_weights_with_a_long_tail_have_no_window_yet():
    """Segments whose lengths have almost no mean are not stationary for long."""
    make = partial(bs.strategies.randomized_power_law, mean_length=16, compensate=False)
    for alpha, said in ((2.1, "its weights still change after 1,680 steps"), (6.0, None)):
        own = Subject(partial(make, alpha=alpha), LIAR)
        assert gradient_checks.check_window(own) == said
