"""The tasks: what is sampled, what is held out, and the reference losses against slow oracles."""

import doctest
import hashlib
import importlib
import itertools
import math
import string
from collections import Counter
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bptt_study import tasks
from bptt_study.tasks import ngram
from bptt_study.validation import SettingError

TIME_MACHINE = Path(__file__).parents[3] / "shared/data/timemachine.txt"
KEY = jax.random.key(0)
# `tasks.char_lm` and `tasks.series` are the factories
char_lm, series = (importlib.import_module(f"bptt_study.tasks.{n}") for n in ("char_lm", "series"))


@pytest.mark.parametrize(
    "name", ["add", "char_lm", "copy", "copy_curriculum", "corpora", "digits", "series"]
)
def test_worked_examples(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    outcome = doctest.testmod(importlib.import_module(f"bptt_study.tasks.{name}"))
    assert outcome.failed == 0
    assert outcome.attempted > 0 or name == "digits"


# char_lm ------------------------------------------------------------------------------------------


def text_task(tmp_path, text: str, **settings):
    path = tmp_path / "text.txt"
    path.write_bytes(text.encode())
    return tasks.char_lm(path=path, **settings)


@pytest.fixture
def positions(tmp_path):
    """A task over a text of distinct characters: every symbol is its own position in the text."""

    def make(training: int, validation: int = 10, **settings):
        size = training + validation
        text = "".join(chr(0x4E00 + i) for i in range(size))
        return text_task(tmp_path, text, validation_fraction=validation / size, **settings)

    return make


def draw(sampler, updates, key=KEY):
    """The batches of these updates and whether they are fresh, stacked."""
    return jax.jit(jax.vmap(sampler.sample, in_axes=(None, None, 0)))(
        sampler.data, key, jnp.asarray(updates)
    )


def test_sequential_batches_continue_each_other(positions):
    steps, batch_size = 5, 3
    sampler = positions(70).sampler(steps, batch_size)  # 4 updates an epoch, 60 of 69 tokens
    batch, fresh = draw(sampler, range(12))
    assert sampler.continues
    assert fresh.tolist() == [True, False, False, False] * 3
    assert batch.inputs[0, 0, 0] == 0  # the text's first characters come first
    for i in range(11):
        if not fresh[i + 1]:
            assert (batch.inputs[i + 1, 0] == batch.targets[i, -1]).all()
    np.testing.assert_array_equal(batch.targets, batch.inputs + 1)
    np.testing.assert_array_equal(np.diff(batch.inputs, axis=1), 1)
    for epoch in np.split(np.asarray(batch.inputs), 3):  # every token at most once an epoch
        assert len(np.unique(epoch)) == epoch.size == 60
        assert epoch.max() < 69


@pytest.mark.parametrize(("training", "updates"), [(70, 4), (61, 3)])  # 61 would just hold 4
def test_sequential_boundaries_move_between_epochs(positions, training, updates):
    sampler = positions(training).sampler(5, 3)
    epochs = updates * np.arange(1, 400)
    offsets = draw(sampler, epochs)[0].inputs[:, 0, 0]
    assert set(offsets.tolist()) == set(range(training - 15 * updates))
    other = draw(sampler, epochs, jax.random.key(1))[0].inputs[:, 0, 0]
    assert (offsets != other).any()
    assert draw(sampler, [0], jax.random.key(1))[0].inputs[0, 0, 0] == 0


@pytest.mark.parametrize(("sampling", "least"), [("sequential", 5 * (3 + 1)), ("random", 5 + 1)])
def test_the_shortest_text_that_fits(positions, sampling, least):
    task = positions(least, sampling=sampling)
    sampler = task.sampler(5, 3)
    batch, fresh = draw(sampler, range(100))
    assert not sampler.continues
    assert fresh.all()
    np.testing.assert_array_equal(batch.targets, batch.inputs + 1)
    assert (batch.targets.min(), batch.targets.max()) == (1, least - 1)
    with pytest.raises(
        SettingError, match=f"`budget.steps` .*; got 6. .*batch_size=3.*part has {least}"
    ):
        task.sampler(6, 3)


def test_random_windows(positions):
    sampler = positions(70, sampling="random").sampler(5, 3)
    batch, fresh = draw(sampler, range(2000))
    assert not sampler.continues
    assert fresh.all()
    np.testing.assert_array_equal(batch.targets, batch.inputs + 1)
    np.testing.assert_array_equal(np.diff(batch.inputs, axis=1), 1)
    # 2000 draws of 3 from 65 places: every sequence finds each of them, on its own
    assert all(set(column.tolist()) == set(range(65)) for column in batch.inputs[:, 0].T)
    assert len({tuple(starts) for starts in batch.inputs[:, 0].tolist()}) > 1950


@pytest.mark.parametrize("sampling", ["sequential", "random"])
def test_a_batch_depends_on_key_and_update_only(positions, sampling):
    sampler = positions(70, sampling=sampling).sampler(5, 3)
    plain = sampler.sample(sampler.data, KEY, 9)
    jitted = jax.jit(sampler.sample)(sampler.data, KEY, jnp.int32(9))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(jitted), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    batch = plain[0]
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (5, 3)
    assert batch.inputs.dtype == batch.targets.dtype == jnp.int32
    assert batch.mask.dtype == jnp.ones(()).dtype
    assert (batch.mask == 1).all()


@pytest.mark.parametrize("validation", [4, 10, 700, 5000])
def test_validation_is_the_end_of_the_text(positions, validation):
    task = positions(30, validation)
    inputs, targets, mask = task.validation
    steps, streams = inputs.shape
    assert streams == min(64, math.isqrt(validation - 1))
    assert validation - 1 - inputs.size < streams  # what is left fills no step
    # disjoint from training, each token once, the streams side by side
    np.testing.assert_array_equal(inputs.T.reshape(-1), 30 + np.arange(steps * streams))
    np.testing.assert_array_equal(targets, inputs + 1)
    assert (mask == 1).all()
    assert mask.shape == inputs.shape
    np.testing.assert_array_equal(task.sampler(2, 3).data, np.arange(30))


def test_symbols_of_all_characters(tmp_path):
    text = "Ünïcode, too: 1 + 1 = 2 😀\n" * 10
    task = text_task(tmp_path, text)
    assert task.text.alphabet == tuple(sorted(set(text)))
    assert task.inputs == task.outputs == len(set(text))
    codes = np.concatenate([task.sampler(2, 2).data, task.validation.inputs.T.reshape(-1)])
    decoded = "".join(task.text.alphabet[i] for i in codes)
    assert text.startswith(decoded)
    assert task.text.opening == text[:80]
    assert task.text.prefix == text[:10]  # no v for a traveller
    assert task.facts == {
        "corpus": "text.txt",
        "corpus_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "alphabet": "all",
        "sampling": "sequential",
        "repeated": None,  # the validation part has 27 characters
    }


def test_symbols_of_letters(tmp_path):
    task = text_task(tmp_path, "It's 1895 -- é!\n\nNow\n" * 9, alphabet="letters")
    assert "".join(task.text.alphabet) == " abcdefghijklmnopqrstuvwxyz"
    assert task.text.opening.startswith("it s now it s now it")
    assert task.text.prefix == "time traveller"
    assert [task.text.alphabet[i] for i in task.sampler(2, 2).data[:4]] == ["i", "t", " ", "s"]


def test_the_named_corpora_are_read_as_letters():
    task = tasks.char_lm()
    assert task.facts["corpus"] == "stdlib_docs"
    assert task.inputs == 27
    assert task.validation.inputs.shape[1] == 64
    assert tasks.char_lm(alphabet="all").inputs > 60


def test_repeated_passages_are_counted():
    """The oracle looks for each passage as a text. The parts share one passage of 9 and one of 4 symbols."""
    drawn = np.random.default_rng(1).integers(3, 30, 300).astype(np.int32)
    train, held_out = drawn[:200], drawn[200:].copy()
    held_out[10:19], held_out[50:54] = train[40:49], train[7:11]
    train_text, text = ("".join(map(chr, part)) for part in (train, held_out))
    for length in (1, 3, 4, 5, 9, 10):
        passages = [text[i : i + length] for i in range(len(text) - length + 1)]
        share = np.mean([passage in train_text for passage in passages])
        assert char_lm.repeated(train, held_out, length) == share, length
    assert char_lm.repeated(train, held_out, 9) == 1 / 92
    assert char_lm.repeated(train, held_out, 101) is None


@pytest.mark.slow
def test_validation_is_not_given_away_by_the_training_part(tmp_path):
    for alphabet in ("letters", "all"):
        assert tasks.char_lm(alphabet=alphabet).facts["repeated"] == 0
    assert tasks.char_lm("one_letter").facts["repeated"] == 1
    letters = np.random.default_rng(0).choice(list(string.ascii_lowercase), (50, 40))
    text = "\n\n".join(map("".join, letters[[*range(50), *range(5)]]))
    shares = [
        text_task(tmp_path, text, validation_fraction=0.25, distinct=distinct).facts["repeated"]
        for distinct in (False, True)
    ]
    assert shares[0] > 0 and shares[1] == 0


def test_chance_is_the_most_frequent_training_character(tmp_path):
    text = "aab" * 12 + "bbbabbbb"  # the validation part prefers b
    task = text_task(tmp_path, text, validation_fraction=8 / 44)
    assert task.chance_accuracy == 1 / 6  # of targets bbabbb, in two streams of three


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": "shuffled"}, "`sampling` must be one of sequential, random; got shuffled"),
        ({"distinct": 1}, "`distinct` must be true or false; got 1"),
        ({"alphabet": "greek"}, "`alphabet` must be one of letters, all; got greek"),
        ({"alphabet": ""}, "`alphabet` must be one of letters, all; got ''"),
        ({"validation_fraction": 0}, "`validation_fraction` .*; got 0"),
        ({"validation_fraction": 1}, "`validation_fraction` .*; got 1"),
        ({"validation_fraction": "most"}, "`validation_fraction` .*; got most"),
        ({"validation_fraction": 0.001}, "`path` .*4 or more characters"),
        ({"alphabet": "letters", "prefix": "über"}, "`prefix` .*; got über. Not among them: 'ü'"),
        ({"prefix": "Now!"}, "`prefix` .*; got Now!. Not among them: '!', 'N'"),
        ({"prefix": ""}, "`prefix` .*; got ''"),
        ({"prefix": 3}, "`prefix` .*; got 3"),
    ],
)
def test_settings_out_of_range(tmp_path, settings, message):
    with pytest.raises(SettingError, match=f"^{message}"):
        text_task(tmp_path, "so it will be convenient " * 9, **settings)


def test_texts_that_are_too_short(tmp_path):
    with pytest.raises(SettingError, match=r"^`path` .*4 or more"):
        text_task(tmp_path, "machine")
    with pytest.raises(SettingError, match=r"^`path` .*alphabet=letters they have 1 and 0"):
        text_task(tmp_path, "言語" * 100, alphabet="letters")
    with pytest.raises(SettingError, match=r"^`validation_fraction` "):
        tasks.char_lm(validation_fraction=1e-6)


@pytest.mark.parametrize(
    ("steps", "batch_size", "name"),
    [(0, 1, "budget.steps"), (1.5, 1, "budget.steps"), (1, 0, "budget.batch_size")],
)
@pytest.mark.parametrize("sampling", ["sequential", "random"])
def test_budgets_out_of_range(positions, sampling, steps, batch_size, name):
    with pytest.raises(SettingError, match=f"^`{name}` "):
        positions(30, sampling=sampling).sampler(steps, batch_size)


# n-grams ------------------------------------------------------------------------------------------


def witten_bell(train: str, history: str, symbol: str, symbols: int) -> float:
    """p(symbol | history), by the definition, one count after the other."""

    def p(h: str) -> float:
        lower = p(h[1:]) if h else 1 / symbols
        followers = [
            train[i + len(h)] for i in range(len(train) - len(h)) if train[i:].startswith(h)
        ]
        if not followers:
            return lower
        kinds = len(set(followers))
        return (followers.count(symbol) + kinds * lower) / (len(followers) + kinds)

    return p(history)


TRAIN, VALIDATION, SYMBOLS = "abracadabra abracad cadabra", "abracabadab xxrac a", "abcdrx "


def numbers(text: str) -> np.ndarray:
    return np.array([SYMBOLS.index(c) for c in text], np.int32)


def test_ngrams_equal_the_definition():
    losses = ngram.losses(numbers(TRAIN), numbers(VALIDATION), len(SYMBOLS))
    assert list(losses) == ["uniform", "unigram", "bigram", "trigram", "fourgram"]
    assert losses.pop("uniform") == pytest.approx(math.log(7), rel=1e-15)
    for n, (name, loss) in enumerate(losses.items(), 1):
        oracle = [
            -math.log(witten_bell(TRAIN, VALIDATION[max(0, i - n + 1) : i], VALIDATION[i], 7))
            for i in range(1, len(VALIDATION))
        ]
        assert loss == pytest.approx(math.fsum(oracle) / len(oracle), rel=1e-14), name


@pytest.mark.parametrize("history", ["bra", "xbr", "aax", "xxx", "cad"])
@pytest.mark.parametrize("name", ngram.NAMES)
def test_ngrams_sum_to_one(history, name):
    def total(text: str) -> float:  # -ln p(text[1:] | text[0])
        return (len(text) - 1) * ngram.losses(numbers(TRAIN), numbers(text), len(SYMBOLS))[name]

    p = [math.exp(total(history) - total(history + symbol)) for symbol in SYMBOLS]
    assert math.fsum(p) == pytest.approx(1, rel=1e-13)
    assert min(p) > 0


@pytest.mark.parametrize("symbols", [50_000, 60_000, 1_114_112])  # 55,109⁴ > 2⁶³
def test_ngram_codes_do_not_collide_in_a_large_alphabet(symbols):
    codes = np.random.default_rng(0).integers(0, symbols, 200)
    codes[100:] = codes[99::-1]
    losses = ngram.losses(codes, codes, symbols)
    dense = np.unique(codes, return_inverse=True)[1]
    count, total, _ = ngram.counts(codes, codes, 4, symbols)
    expected = ngram.counts(dense, dense, 4, 200)
    np.testing.assert_array_equal((count, total), expected[:2])
    assert losses["fourgram"] < losses["unigram"] < losses["uniform"]


def entropies(stream: str) -> tuple[float, float]:
    """Unigram and in-sample bigram maximum likelihood, from dictionaries."""
    single, pairs = Counter(stream), Counter(pairwise(stream))
    first = Counter(stream[:-1])
    unigram = -sum(c * math.log(c / len(stream)) for c in single.values()) / len(stream)
    bigram = -sum(c * math.log(c / first[a]) for (a, _), c in pairs.items()) / (len(stream) - 1)
    return unigram, bigram


def check_in_sample(stream: str) -> tuple[float, float]:
    codes = np.unique(list(stream), return_inverse=True)[1]
    likelihoods = []
    for n in (1, 2):
        count, total, _ = ngram.counts(codes, codes, n, 128)
        likelihoods.append(-np.log(count / total).mean())
    assert likelihoods == pytest.approx(entropies(stream), rel=1e-10)
    return entropies(stream)


def test_in_sample_likelihood_equals_the_entropies(tmp_path):
    check_in_sample(tasks.char_lm.__doc__ * 3)


@pytest.mark.skipif(not TIME_MACHINE.exists(), reason=f"no {TIME_MACHINE} on this machine")
def test_the_time_machine_has_the_known_entropies():
    task = tasks.char_lm("time_machine", path=TIME_MACHINE, validation_fraction=0.5)
    first = task.sampler(35, 32).data
    last = np.concatenate([task.validation.inputs.T.reshape(-1), task.validation.targets[-1:, -1]])
    assert len(first) == 173_428 / 2
    assert 0 <= 173_428 - len(first) - len(last) < 64

    from bptt_study.tasks import corpora
    from bptt_study.tasks.char_lm import ALPHABETS

    stream = ALPHABETS["letters"].normalise(corpora.time_machine(TIME_MACHINE).text)
    assert len(stream) == 173_428
    assert task.references["uniform"] == pytest.approx(3.296, abs=5e-4)
    assert check_in_sample(stream) == pytest.approx((2.827, 2.271), abs=5e-4)


def test_references_are_of_the_validation_tokens(tmp_path):
    task = text_task(tmp_path, TRAIN + VALIDATION, validation_fraction=19 / 46)
    inputs, targets, _ = task.validation
    used = np.append(inputs.T.reshape(-1), targets[-1, -1])  # 17 of 19 characters
    assert inputs.shape == (4, 4)
    train = np.asarray(task.sampler(2, 2).data)
    assert task.references == ngram.losses(train, used, task.inputs)
    assert task.references["bigram"] < task.references["unigram"] < task.references["uniform"]


# digits -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows():
    return tasks.digits()


def images(batch) -> Counter:
    """The images of a batch with their labels, as sklearn has them."""
    pixels = np.asarray(batch.inputs[..., 0].T * 16).astype(int)
    return Counter(
        (*image, label)
        for image, label in zip(pixels.tolist(), batch.targets[-1].tolist(), strict=True)
    )


def test_digits_are_split_into_all_of_them(rows):
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    everything = Counter(
        (*p, y) for p, y in zip(pixels.astype(int).tolist(), labels.tolist(), strict=True)
    )
    train, _ = draw(rows.sampler(64, 1437), [0])
    train = jax.tree.map(lambda leaf: leaf[0], train)
    assert rows.validation.inputs.shape == (64, 360, 1)
    assert images(train) + images(rows.validation) == everything
    shares = [
        np.bincount(batch.targets[-1]) / batch.targets.shape[1]
        for batch in (train, rows.validation)
    ]
    np.testing.assert_allclose(*shares, atol=0.002)
    assert rows.chance_accuracy == pytest.approx(0.1, abs=0.005)
    assert rows.references == {"uniform": pytest.approx(2.302585, abs=1e-6)}
    assert (rows.inputs, rows.outputs, rows.steps) == (1, 10, 64)


def test_digits_batch(rows):
    batch, fresh = rows.sampler(64, 7).sample(rows.sampler(64, 7).data, KEY, 3)
    assert bool(fresh)
    assert not rows.sampler(64, 7).continues
    assert batch.inputs.shape == (64, 7, 1)
    assert batch.inputs.dtype == batch.mask.dtype == jnp.ones(()).dtype
    assert (batch.inputs.min(), batch.inputs.max()) == (0, 1)
    assert (batch.targets == batch.targets[-1]).all()
    assert batch.targets.dtype == jnp.int32
    assert batch.mask[-1].tolist() == [1] * 7
    assert batch.mask.sum() == 7


def test_digits_come_once_an_epoch_in_a_new_order(rows):
    sampler = rows.sampler(64, 200)  # 7 updates, 37 images are left out
    batch, _ = draw(sampler, range(14))
    everything = images(jax.tree.map(lambda leaf: leaf[0], draw(rows.sampler(64, 1437), [0])[0]))
    epochs = [
        sum((images(jax.tree.map(lambda leaf, i=i: leaf[i], batch)) for i in part), Counter())
        for part in (range(7), range(7, 14))
    ]
    assert all(epoch.total() == 1400 and epoch <= everything for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert (batch.inputs[0] != batch.inputs[7]).any()
    again = sampler.sample(sampler.data, KEY, 9)[0]
    np.testing.assert_array_equal(again.inputs, batch.inputs[9])
    assert (draw(sampler, [0], jax.random.key(1))[0].inputs[0] != batch.inputs[0]).any()


def test_permuted_digits_are_the_same_images_in_one_other_order(rows):
    permuted = tasks.digits("permuted")
    order = importlib.import_module("bptt_study.tasks.digits").ORDERS["permuted"]
    assert sorted(order) == list(range(64))
    assert order[:8].tolist() == [16, 36, 27, 8, 44, 23, 53, 4]  # NumPy promises no stream
    np.testing.assert_array_equal(permuted.validation.inputs, rows.validation.inputs[order])
    np.testing.assert_array_equal(permuted.validation.targets, rows.validation.targets)
    assert permuted.facts["corpus_sha256"] == rows.facts["corpus_sha256"]
    assert (permuted.facts["order"], rows.facts["order"]) == ("permuted", "rows")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "spiral"}, "`order` must be one of rows, permuted; got spiral"),
        ({"validation_fraction": 0}, "`validation_fraction` .*; got 0"),
        ({"validation_fraction": 1.0}, "`validation_fraction` .*; got 1.0"),
    ],
)
def test_digits_settings_out_of_range(settings, message):
    with pytest.raises(SettingError, match=f"^{message}"):
        tasks.digits(**settings)


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_digits_have_every_class_on_both_sides(fraction):
    task = tasks.digits(validation_fraction=fraction)
    size = 1797 - task.validation.inputs.shape[1]
    labels = task.sampler(64, size).data[1]
    assert set(labels.tolist()) == set(task.validation.targets[-1].tolist()) == set(range(10))


@pytest.mark.parametrize(
    ("steps", "batch_size", "message"),
    [
        (63, 4, "`budget.steps` must be 64; got 63"),
        (64, 1438, r"`budget.batch_size` must be at most .* \(1437\); got 1438"),
        (64, 0, "`budget.batch_size` .*; got 0"),
    ],
)
def test_digits_budgets_out_of_range(rows, steps, batch_size, message):
    with pytest.raises(SettingError, match=f"^{message}"):
        rows.sampler(steps, batch_size)


# copy ---------------------------------------------------------------------------------------------


def test_copy_by_hand():
    task = tasks.copy(lag=4, length=2, symbols=3)
    batch, fresh = draw(task.sampler(6, 50), [0, 1])
    assert fresh.all()
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (2, 6, 50)
    assert batch.inputs.dtype == batch.targets.dtype == jnp.int32
    for inputs, targets, mask in zip(
        *(np.moveaxis(a, 1, -1).reshape(-1, 6) for a in batch), strict=True
    ):
        a, b = inputs[:2]
        assert inputs.tolist() == [a, b, 3, 3, 4, 4]
        assert targets.tolist() == [0, 0, 0, 0, a, b]
        assert mask.tolist() == [0, 0, 0, 0, 1, 1]
    assert Counter(batch.inputs[:, :2].reshape(-1).tolist()).keys() == {0, 1, 2}
    assert (batch.inputs[0] != batch.inputs[1]).any()  # new sequences for each update


@pytest.mark.parametrize(("lag", "length"), [(20, 5), (5, 5), (1, 1), (50, 1)])
def test_looking_back_by_the_lag_answers_the_copy(lag, length):
    task = tasks.copy(lag, length)
    inputs, targets, mask = task.validation
    assert inputs.shape == (lag + length, 512) == (task.steps, 512)
    assert mask.sum() == length * 512

    def loss(back: int) -> float:
        outputs = 30.0 * jax.nn.one_hot(jnp.roll(inputs, back, axis=0), task.outputs)
        return float((task.loss(outputs, targets) * mask).sum() / mask.sum())

    assert loss(lag) < 1e-9
    assert loss(lag - 1) > 1.0  # negative controls
    assert loss(lag + 1) > 1.0
    assert task.references["uniform"] == pytest.approx(
        float(task.loss(jnp.zeros((1, 1, 8)), targets[-1:, :1])[0, 0])
    )
    assert task.chance_accuracy == pytest.approx(
        float(((targets == 0) * mask).sum() / mask.sum()), abs=0.05
    )


def test_copy_is_no_function_of_the_clock():
    task = tasks.copy()
    sampler = task.sampler(25, 4)
    assert not sampler.continues
    plain = sampler.sample(sampler.data, KEY, 5)[0]
    jitted = jax.jit(sampler.sample)(sampler.data, KEY, jnp.int32(5))[0]
    np.testing.assert_array_equal(plain.inputs, jitted.inputs)
    np.testing.assert_array_equal(tasks.copy().validation.inputs, task.validation.inputs)
    assert (plain.inputs != sampler.sample(sampler.data, jax.random.key(1), 5)[0].inputs).any()
    assert (task.inputs, task.outputs, task.facts) == (10, 8, {"lag": 20})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lag": 4}, r"`lag` must be at least the length \(5\); got 4"),
        ({"lag": 2.5}, "`lag` .*; got 2.5"),
        ({"length": 0}, "`length` .*; got 0"),
        ({"symbols": 1}, "`symbols` must be a whole number of at least 2; got 1"),
    ],
)
def test_copy_settings_out_of_range(settings, message):
    with pytest.raises(SettingError, match=f"^{message}"):
        tasks.copy(**settings)


def test_copy_budgets_out_of_range():
    with pytest.raises(SettingError, match=r"^`budget.steps` must be lag \+ length \(25\); got 24"):
        tasks.copy().sampler(24, 1)
    with pytest.raises(SettingError, match=r"^`budget.batch_size` .*; got 0"):
        tasks.copy().sampler(25, 0)


# add ----------------------------------------------------------------------------------------------


def test_add_entropies_by_counting_cases():
    """Sixteen equally likely cases (x_{t-t1}, x_{t-t2}, y), and what is left where some of it is known."""
    cases: Counter = Counter()
    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
        ones = 2 + 2 * a - b
        cases += Counter({(a, b, 1): ones, (a, b, 0): 4 - ones})

    def left(*known: int) -> float:
        both, alone = Counter(), Counter()
        for case, count in cases.items():
            told = tuple(case[i] for i in known)
            both[told, case[2]] += count
            alone[told] += count
        return -sum(n / 16 * math.log(n / alone[told]) for (told, _), n in both.items())

    by_hand = {"nothing": left(), "t1": left(0), "t2": left(1), "both": left(0, 1)}
    assert tasks.add().references == pytest.approx(by_hand, rel=1e-14)
    ladder = {
        "nothing": 0.6616,
        "t1": 0.5192,
        "t2": 0.6277,
        "both": 0.4545,
    }  # estimators.md, section 4
    assert {name: round(value, 4) for name, value in tasks.add().references.items()} == ladder


@pytest.mark.parametrize(("t1", "t2"), [(4, 12), (1, 2), (3, 8)])
def test_add_looking_back_by_the_lags_climbs_the_ladder(t1, t2):
    """Losses of the best predictors on the validation part; by other lags they know nothing."""
    task = tasks.add(t1, t2)
    inputs, targets, mask = task.validation
    assert inputs.shape == (t2 + 512, 256)
    assert mask[:t2].sum() == 0
    assert mask.sum() == 512 * 256

    def loss(first, second) -> float:
        p = np.clip(0.5 + 0.5 * first - 0.25 * second, 1e-9, 1 - 1e-9) + np.zeros(inputs.shape)
        tokens = task.loss(np.log(np.stack([1 - p, p], axis=-1)), targets)
        return float((tokens * mask).sum() / mask.sum())

    bits = np.asarray(inputs, float)
    first, second = (np.roll(bits, t, axis=0) for t in (t1, t2))
    ladder = task.references  # 131,072 tokens: a standard error of .001
    assert loss(first, second) == pytest.approx(ladder["both"], abs=0.004)
    assert loss(first, 0.5) == pytest.approx(ladder["t1"], abs=0.004)
    assert loss(0.5, second) == pytest.approx(ladder["t2"], abs=0.004)
    assert loss(0.5, 0.5) == pytest.approx(ladder["nothing"], abs=0.004)
    assert loss(np.roll(first, 1, axis=0), 0.5) > ladder["nothing"] + 0.01  # negative controls
    assert loss(second, first) > ladder["nothing"] + 0.01
    always = float((targets * mask).sum() / mask.sum())
    assert task.chance_accuracy == pytest.approx(always)
    assert always == pytest.approx(0.625, abs=0.004)


def test_add_updates_continue_each_other():
    """Across the updates' borders too the odds are those of the stream; what lies before it is masked."""
    task, steps = tasks.add(t1=3, t2=7), 8
    sampler = task.sampler(steps, 300)
    batch, fresh = draw(sampler, range(20))
    assert sampler.continues
    assert fresh.tolist() == [True] + [False] * 19
    assert batch.inputs.dtype == batch.targets.dtype == jnp.int32
    x, y, mask = (np.concatenate(a) for a in batch)
    assert (mask[:, 0] == (np.arange(160) >= 7)).all()
    sure = (x[4:-3] == 1) & (x[:-7] == 0)
    assert (y[7:][sure] == 1).all()
    assert (y[7:][(x[4:-3] == 1) & (x[:-7] == 1)]).mean() == pytest.approx(0.75, abs=0.02)
    assert (y[7:][(x[4:-3] == 0) & (x[:-7] == 0)]).mean() == pytest.approx(0.5, abs=0.02)
    assert (y[7:][(x[4:-3] == 0) & (x[:-7] == 1)]).mean() == pytest.approx(0.25, abs=0.02)
    assert (y[8:][sure[:-1]] == 1).mean() < 0.8  # negative control: one step off
    assert abs(np.corrcoef(x[:8].ravel(), x[8:16].ravel())[0, 1]) < 0.1


def test_add_is_no_function_of_the_clock():
    sampler = tasks.add().sampler(16, 4)
    plain = sampler.sample(sampler.data, KEY, 5)[0]
    jitted = jax.jit(sampler.sample)(sampler.data, KEY, jnp.int32(5))[0]
    np.testing.assert_array_equal(plain.targets, jitted.targets)
    np.testing.assert_array_equal(tasks.add().validation.targets, tasks.add().validation.targets)
    assert (plain.inputs != sampler.sample(sampler.data, jax.random.key(1), 5)[0].inputs).any()
    assert tasks.add().facts == {"t1": 4, "t2": 12}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"t1": 12}, r"`t1` must be between 1 and t2 - 1 \(11\); got 12"),
        ({"t1": 0}, "`t1` must be a whole number of at least 1; got 0"),
        ({"t2": 1}, "`t2` must be a whole number of at least 2; got 1"),
        ({"t2": 12.5}, "`t2` .*; got 12.5"),
    ],
)
def test_add_settings_out_of_range(settings, message):
    with pytest.raises(SettingError, match=f"^{message}"):
        tasks.add(**settings)


def test_add_budgets_out_of_range():
    with pytest.raises(
        SettingError, match=r"^`budget.steps` must be greater than task.t2 \(12\); got 12"
    ):
        tasks.add().sampler(12, 1)
    with pytest.raises(SettingError, match=r"^`budget.batch_size` .*; got 0"):
        tasks.add().sampler(13, 0)


# series -------------------------------------------------------------------------------------------

# what the next point must be, from the orbit itself: the residual of the recurrence of one coordinate
RECURRENCES = {
    # x'' = 1 - 1.4 x'² + 0.3 x
    "henon": lambda x: 1 - 1.4 * x[1:-1] ** 2 + 0.3 * x[:-2] - x[2:],
    # the 17th value before the new one
    "mackey_glass": lambda x: (
        x[16:-1] + 0.2 * x[:-17] / (1 + x[:-17] ** 10) - 0.1 * x[16:-1] - x[17:]
    ),
}


@pytest.mark.parametrize("system", RECURRENCES)
def test_series_obey_their_equations(system):
    raw = np.fromiter(itertools.islice(series.SYSTEMS[system](), 3000), float)
    assert np.abs(RECURRENCES[system](raw)).max() < 1e-12
    assert np.abs(RECURRENCES[system](raw[::-1])).max() > 0.1  # the control
    assert raw[1000:].std() > 0.1  # no fixed point


def test_lorenz_is_euler_s_method_seen_every_second_step():
    s, seen = np.ones(3), []
    for _ in range(2000):
        seen.append(s[0])
        for _ in range(2):
            x, y, z = s
            s = s + 0.01 * np.array([10 * (y - x), x * (28 - z) - y, x * y - 8 * z / 3])
    raw = np.fromiter(itertools.islice(series.lorenz(), 2000), float)
    np.testing.assert_allclose(raw[:500], seen[:500], rtol=1e-6)  # later ones feel the last bits
    assert (raw[1000:] > 5).any() and (raw[1000:] < -5).any()  # on both wings


def test_series_are_normalised_and_held_out():
    for system in series.SYSTEMS:
        points = series.points(system)
        assert points.mean() == pytest.approx(0, abs=1e-9)
        assert points.std() == pytest.approx(1, rel=1e-9)
    task = tasks.series("lorenz")
    assert 2 * task.references["nothing"] == 1
    first = float(task.validation.inputs[0, 0, 0])
    assert first == pytest.approx(series.points("lorenz")[series.TRAINING], rel=1e-6)
    assert task.validation.inputs.shape == (200, 64, 1)
    assert task.validation.mask.all()


@pytest.mark.parametrize("horizon", [3, 0, -4])
def test_series_targets_lie_a_horizon_ahead(horizon):
    """Also across updates; what lies before the start of a stream is masked."""
    steps, half = 5, series.TRAINING // 2
    sampler = tasks.series("henon", horizon).sampler(steps, 6)
    epoch = half // steps
    batch, fresh = draw(sampler, range(epoch - 4, epoch + 4))
    assert fresh.tolist() == [False] * 4 + [True] + [False] * 3
    x, y, mask = (np.concatenate(a[4:]) for a in batch)  # 20 steps from a fresh start on
    wanted = x[max(0, horizon) : 20 + min(0, horizon), :, 0]
    np.testing.assert_array_equal(y[max(0, -horizon) : 20 - max(0, horizon)], wanted)
    assert (mask[:, 0] == (np.arange(20) >= -horizon)).all()
    assert len(np.unique(x[0])) == 6  # every stream starts elsewhere
    before = np.concatenate(batch.inputs[:4])[:, :, 0]
    assert np.abs(before - x[:, :, 0]).min() > 0  # and elsewhere than in the epoch before
    held = tasks.series("henon", horizon).validation
    assert (held.mask[:, 0] == (np.arange(200) >= -horizon)).all()


def test_series_depend_on_key_and_update_only():
    sampler = tasks.series().sampler(4, 3)
    plain = sampler.sample(sampler.data, KEY, 5)[0]
    jitted = jax.jit(sampler.sample)(sampler.data, KEY, jnp.int32(5))[0]
    np.testing.assert_array_equal(plain.inputs, jitted.inputs)
    assert (plain.inputs != sampler.sample(sampler.data, jax.random.key(1), 5)[0].inputs).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tasks.series("rossler"), "`system` must be one of henon, lorenz, mackey_glass"),
        (lambda: tasks.series(horizon=101), "`horizon` must be between -100 and 100; got 101"),
        (lambda: tasks.series(horizon=-101), "`horizon` must be a whole number of at least -100"),
        (lambda: tasks.series(horizon=0.5), "`horizon` .*; got 0.5"),
        (lambda: tasks.series().sampler(2**15 + 1, 1), "`budget.steps` .*32768; got 32769"),
        (lambda: tasks.series().sampler(1, 0), "`budget.batch_size` .*; got 0"),
    ],
)
def test_series_settings_out_of_range(make, message):
    with pytest.raises(SettingError, match=f"^{message}"):
        make()
