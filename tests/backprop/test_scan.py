"""`bs.scan`, the definition, against a plain Python loop with `stop_gradient`, and against `lax.scan`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import bptt_study as bs
from bptt_study.validation import SettingError

D, H, T, B = 2, 3, 11, 2


def two_layers(params, carry, x):
    """tanh upon tanh; what is returned beside the top layer depends on both."""
    below = jnp.tanh(jnp.concatenate([x, carry[0]], -1) @ params["below"])
    top = jnp.tanh(jnp.concatenate([below, carry[1]], -1) @ params["top"])
    return (below, top), (top, below.sum())


def lstm(params, carry, x):
    h, c = carry
    i, f, g, o = jnp.split(jnp.concatenate([x, h], -1) @ params["W"], 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), (h, (h * c).sum())


def ode(params, carry, x):
    """An Euler step of a damped oscillator, which divides."""
    p, v = carry
    force = -p / (1 + p * p) @ params["A"] - 0.1 * v + x @ params["B"]
    return (p + 0.1 * v, v + 0.1 * force), (p, (v / (1 + jnp.abs(p))).sum())


STEPS = {
    "two_layers": (two_layers, {"below": (D + H, H), "top": (2 * H, H)}),
    "lstm": (lstm, {"W": (D + H, 4 * H)}),
    "ode": (ode, {"A": (H, H), "B": (D, H)}),
}


def example(name, steps=T):
    rng = np.random.default_rng(0)
    f, shapes = STEPS[name]
    params = {k: jnp.asarray(0.6 * rng.standard_normal(s)) for k, s in shapes.items()}
    init = tuple(jnp.asarray(rng.standard_normal((B, H))) for _ in range(2))
    return f, params, init, jnp.asarray(rng.standard_normal((steps, B, D)))


def loss(out):
    (first, _), (ys, sums) = out
    weights = jnp.arange(1, len(ys) + 1)[:, None, None]
    return (jnp.sin(ys) * weights).sum() + (first**2).sum() + (sums**2).sum()


def loop(f, init, xs, window=None, stride=None, link_weights=None):
    """Block after block, each from its detached start; the same values as `lax.scan`."""
    steps = len(xs)
    stride = stride or window or steps
    window = window or steps
    carry, carries = init, [init]
    for x in xs:
        carry, _ = f(carry, x)
        carries.append(lax.stop_gradient(carry))
    ys = []
    for start in range(0, steps, stride):
        begin = max(0, start - (window - stride))
        carry = carries[begin]
        for t in range(begin, min(steps, start + stride)):
            if link_weights is not None:
                xi = link_weights[t].reshape(-1, 1)
                carry = jax.tree.map(
                    lambda a, xi=xi: xi * a + lax.stop_gradient((1 - xi) * a), carry
                )
            carry, y = f(carry, xs[t])
            if t >= start:
                ys.append(y)
    return carry, jax.tree.map(lambda *a: jnp.stack(a), *ys)


def gradients(scan, name, steps=T, **settings):
    f, *arguments = example(name, steps)

    def total(params, init, xs):
        return loss(scan(partial(f, params), init, xs, **settings))

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(*arguments)


def error(actual, expected):
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.abs(a - e).max() / jnp.maximum(jnp.abs(e).max(), 1e-3)) for a, e in pairs)


def random_settings(count):
    rng = np.random.default_rng(2)
    for n in range(count):
        stride = int(rng.integers(1, 5))
        window = stride + int(rng.integers(0, 5)) * int(rng.integers(0, 2))
        kept = rng.random((T, B)) > 0.3
        xi = (None, kept[:, 0] * rng.uniform(0.5, 2, T), kept * rng.uniform(0.5, 2, (T, B)))[n % 3]
        weights = None if xi is None else jnp.asarray(xi)
        yield (
            list(STEPS)[n % len(STEPS)],
            {
                "window": window,
                "stride": stride,
                "link_weights": weights,
            },
        )


FIXED = [
    {"window": w, "stride": s}
    for s, w in [(5, 5), (1, 4), (3, 7), (6, 6), (5, 40), (None, T), (None, 1), (T, None)]
]


@pytest.mark.parametrize(
    ("name", "settings"),
    [("two_layers", s) for s in FIXED] + list(random_settings(6)),
    ids=lambda v: v if isinstance(v, str) else f"{v['window']}-{v['stride']}",
)
def test_values_and_gradients_are_those_of_a_plain_loop(name, settings):
    """Gradients of parameters, initial carry and inputs; a window one step shorter is told apart."""
    actual = gradients(bs.scan, name, **settings)
    assert error(actual, gradients(loop, name, **settings)) < 3e-14
    if settings.get("link_weights") is None and 1 < (settings["window"] or T) <= T // 2:
        other = settings | {"window": settings["window"] + 1}
        assert error(actual, gradients(loop, name, **other)) > 1e-4


@pytest.mark.parametrize("name", STEPS)
def test_without_settings_it_is_the_scan_of_jax(name):
    """And with a window that holds all steps; link weights of 1 change nothing either."""
    exact = gradients(lambda f, init, xs: lax.scan(f, init, xs), name)
    assert error(gradients(bs.scan, name), exact) == 0
    assert error(gradients(bs.scan, name, window=T), exact) == 0
    assert error(gradients(bs.scan, name, link_weights=jnp.ones(T)), exact) < 1e-14


def test_values_are_those_of_the_scan_of_jax_bit_by_bit():
    f, params, init, xs = example("lstm")
    actual = bs.scan(partial(f, params), init, xs, window=4, stride=2)
    expected = lax.scan(partial(f, params), init, xs)
    assert error(actual, expected) == 0


def truncated(params, window=5, stride=2):
    f, _, init, xs = example("two_layers")
    return loss(bs.scan(partial(f, params), init, xs, window=window, stride=stride))


@pytest.mark.slow
def test_inside_another_gradient():
    """The derivative of a function of the truncated gradient, against finite differences of it."""
    params = example("two_layers")[1]

    def squared(params):
        return sum((g**2).sum() for g in jax.tree.leaves(jax.grad(truncated)(params)))

    rng = np.random.default_rng(4)
    ray = jax.tree.map(lambda p: rng.standard_normal(p.shape), params)
    ends = [squared(jax.tree.map(lambda p, r, e=e: p + e * r, params, ray)) for e in (1e-5, -1e-5)]
    along = sum(jnp.vdot(g, r) for g, r in zip(
        jax.tree.leaves(jax.grad(squared)(params)), jax.tree.leaves(ray), strict=True
    ))  # fmt: skip
    np.testing.assert_allclose(along, (ends[0] - ends[1]) / 2e-5, rtol=1e-7)


SECOND = {
    "window": lambda f, h, x: bs.scan(f, h, x.ravel(), 4, 2),
    "window and link weights": lambda f, h, x: bs.scan(
        f, h, x.ravel(), 4, 2, jnp.tile(jnp.asarray([1, 0, 0.5, 1]), 6)
    ),
    "scan in a scan": lambda f, h, x: bs.scan(partial(bs.scan, f, window=2), h, x, 3),
    "scan in two scans": lambda f, h, x: bs.scan(
        lambda h, x: bs.scan(partial(bs.scan, f, window=1), h, x, 2), h, x.reshape(4, 3, 2), 2
    ),
}


@pytest.mark.parametrize("scanned", SECOND.values(), ids=SECOND)
def test_a_second_derivative_is_that_of_the_gradient(scanned, rng):
    """By central differences of the gradient itself, truncated as it is."""
    x = jnp.asarray(rng.standard_normal((6, 4)))

    def loss(w):
        _, ys = scanned(lambda h, x: (jnp.tanh(w * h + x),) * 2, jnp.zeros(()), x)
        return jnp.sum(ys**2)

    slope, w, d = jax.jit(jax.grad(loss)), 0.7, 1e-5
    by_differences = (slope(w + d) - slope(w - d)) / (2 * d)
    np.testing.assert_allclose(jax.jit(jax.grad(slope))(w), by_differences, rtol=1e-7)


@pytest.mark.parametrize("window", [None, 4])
def test_the_gradient_has_a_derivative_by_the_link_weights(window, rng):
    """By central differences; where a weight is 0 the link stays cut, and the derivative is 0."""
    x, xi = jnp.asarray(rng.standard_normal(7)), jnp.asarray([0.3, 1, 0.5, 0, 2, 1, 0.7])

    def loss(w, xi):
        f = lambda h, x: (jnp.tanh(w * h + x),) * 2  # noqa: E731
        return jnp.sum(bs.scan(f, jnp.ones(()), x, window, link_weights=xi)[1] ** 2)

    def slope(xi):
        return jax.grad(loss)(0.7, xi)

    found, d = jax.grad(slope)(xi), 1e-5 * jnp.eye(7)
    expected = [(slope(xi + e) - slope(xi - e)) / 2e-5 for e in d]
    np.testing.assert_allclose(found, jnp.asarray(expected) * (xi != 0), atol=1e-9)
    assert (jnp.abs(found) > 1e-3).sum() >= 4
    assert (jax.grad(loss, 1)(0.7, xi) == 0).all()  # the values do not depend on them


def test_many_seeds_side_by_side():
    params = example("two_layers")[1]
    seeds = [jax.tree.map(lambda p, s=s: s * p, params) for s in (1.0, 0.5, -0.7)]
    together = jax.vmap(jax.grad(truncated))(jax.tree.map(lambda *a: jnp.stack(a), *seeds))
    for n, own in enumerate(seeds):
        alone = jax.grad(truncated)(own)
        assert error(jax.tree.map(lambda a, n=n: a[n], together), alone) < 1e-13


@pytest.mark.slow
def test_any_tree_as_carry_and_recomputation_within_a_step():
    """A key, a count and a custom tree in the carry, integers in the inputs, `jax.checkpoint` in `f`."""
    xs = {"x": jnp.linspace(-1, 1, 12)[:, None], "n": jnp.arange(12)}

    def step(w, carry, x):
        key, own = jax.random.split(carry["key"])
        kept = jax.random.bernoulli(own, 0.7, carry["h"].shape)
        h = jnp.tanh(w * carry["h"] + x["x"]) * kept
        return {"key": key, "n": carry["n"] + x["n"], "h": h}, (h, carry["n"])

    def total(w, again, scan, **settings):
        f = partial(step, w)
        init = {"key": jax.random.key(1), "n": 0, "h": jnp.ones(3)}
        last, (hs, _) = scan(jax.checkpoint(f) if again else f, init, xs, **settings)
        return (hs**2).sum() + last["h"].sum()

    def by_loop(f, init, xs, window):
        carry, hs = init, []
        for t in range(12):
            carry = lax.stop_gradient(carry) if t % window == 0 else carry
            carry, y = f(carry, jax.tree.map(lambda a, t=t: a[t], xs))
            hs.append(y)
        return carry, jax.tree.map(lambda *a: jnp.stack(a), *hs)

    expected = jax.grad(lambda w: total(w, False, by_loop, window=4))(0.8)
    for again in (False, True):
        found = jax.grad(lambda w, again=again: total(w, again, bs.scan, window=4))(0.8)
        np.testing.assert_allclose(found, expected, rtol=1e-13)


@pytest.mark.parametrize("traced", [False, True])
def test_what_f_closes_over_may_be_integers_and_may_be_traced(traced):
    """Indices that vmap and jit trace are no parameters, and no error."""
    f, params, init, xs = example("two_layers")

    def picked(params, index):
        def step(carry, x):
            carry, (top, below) = f(params, carry, x)
            return carry, (top[:, index][:, None], below)

        return loss(bs.scan(step, init, xs, window=3))

    run = jax.vmap(jax.grad(picked), (None, 0))
    run = jax.jit(run) if traced else run
    together = run(params, jnp.arange(H))
    alone = jax.grad(picked)(params, 2)
    assert error(jax.tree.map(lambda a: a[2], together), alone) < 1e-13


OUTER = {
    "vmap": lambda loss, keys: lambda p: jax.vmap(partial(loss, p))(keys).sum(),
    "jit": lambda loss, keys: lambda p: jax.jit(loss)(p, keys[0]),
    "checkpoint": lambda loss, keys: lambda p: jax.checkpoint(loss)(p, keys[0]),
    "scan": lambda loss, keys: lambda p: lax.scan(lambda s, k: (s + loss(p, k), 0.0), 0.0, keys)[0],
}


@pytest.mark.parametrize("outer", OUTER)
def test_keys_that_f_closes_over_are_traced_within_a_gradient(outer):
    """The everyday form: a gradient of the mean over sequences, each with its own key."""
    f, params, init, xs = example("two_layers")

    def noisy(scanned, params, key):
        step = lambda c, x: f(params, c, x + jax.random.normal(key, x.shape))  # noqa: E731
        return loss(scanned(step, init, xs, window=5, stride=2))

    keys = jax.random.split(jax.random.key(0), 2)
    found = jax.grad(OUTER[outer](partial(noisy, bs.scan), keys))(params)
    count = len(keys) if outer in ("vmap", "scan") else 1
    each = [jax.grad(partial(noisy, loop))(params, key) for key in keys[:count]]
    assert error(found, jax.tree.map(lambda *a: sum(a), *each)) < 1e-12


@pytest.mark.parametrize("where", ["carry", "closure", "seed", "raw"])
def test_keys_that_give_other_numbers_beside_others_are_refused(where):
    """A block runs again beside others, where JAX's rbg keys drop other units than in the forward pass."""
    key = jax.random.key(1, impl="rbg")
    raw = jax.random.key_data(key)

    def step(carry, x):
        h, own = carry
        if where == "carry":
            own, used = jax.random.split(own)
        elif where == "closure":
            used = key
        else:
            used = jax.random.key(2, impl="rbg")
        noise = jax.random.normal(used, (H,))
        if where == "raw":
            noise = lax.rng_bit_generator(raw, (H,), jnp.uint32)[1].astype(float)
        return (jnp.tanh(h + x + noise), own), h

    init = jnp.zeros(H), key if where == "carry" else 0
    xs = jnp.ones((T, H))
    with pytest.raises(SettingError, match=r"`f` must be one whose keys are threefry2x32"):
        bs.scan(step, init, xs, window=3)
    bs.scan(step, init, xs)  # as `lax.scan`


def test_a_stride_without_a_window_truncates_nothing():
    """Whether or not it divides the sequence."""
    f, params, init, xs = example("lstm")
    grads = [
        jax.grad(lambda p, own=own: loss(bs.scan(partial(f, p), init, xs, **own)))(params)
        for own in ({}, {"stride": 2}, {"stride": 11}, {"stride": 50})
    ]
    assert all(error(found, grads[0]) < 1e-15 for found in grads)


def test_plain_numbers_take_the_types_of_the_steps():
    """As with `lax.scan`, whose carry of weak type is promoted before f is traced."""
    xs = jnp.linspace(0.5, 2, 5)
    for init, f in ((0, lambda c, x: (c // 2 + x, c)), (0.0, lambda c, x: (c * x + 1, c))):
        for setting in ({"window": 2}, {"link_weights": jnp.full(5, 0.5)}):
            last, ys = bs.scan(f, init, xs, **setting)
            expected = lax.scan(f, init, xs)
            assert jax.tree.all(jax.tree.map(np.array_equal, (last, ys), expected))
            assert last.dtype == expected[0].dtype


@pytest.mark.parametrize("setting", [{}, {"link_weights": jnp.ones(0)}, {"stride": 3}])
def test_no_steps(setting):
    last, ys = bs.scan(lambda c, x: (c + x, c), jnp.ones(2), jnp.ones((0, 2)), **setting)
    assert np.array_equal(last, jnp.ones(2)) and ys.shape == (0, 2)


@pytest.mark.parametrize("xs", [[1.0, 2.0], {"a": jnp.ones(3), "b": jnp.ones(())}, None])
def test_inputs_without_time(xs):
    with pytest.raises(SettingError, match="xs"):
        bs.scan(lambda c, x: (c, c), jnp.ones(2), xs, window=2)


@pytest.mark.parametrize(
    "settings", [{}, {"window": 4}, {"window": 5, "stride": 2}, {"link_weights": jnp.full(T, 0.7)}]
)
@pytest.mark.parametrize("nothing", [None, {"a": None}])
def test_a_length_instead_of_inputs(settings, nothing):
    """As `lax.scan` has it: the step gets `xs` as it is, and no leaf of it."""
    f, params, init, xs = example("ode")

    def of(p, xs, **length):
        def step(carry, x):
            assert isinstance(x, jax.Array) or x == nothing
            return f(p, carry, jnp.ones((B, D)))

        return loss(bs.scan(step, init, xs, **settings, **length))

    found, expected = (jax.grad(of)(params, nothing, length=T), jax.grad(of)(params, xs))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    last, ys = bs.scan(lambda c, _: (c + 1, c), 0, length=4)
    assert last == 4 and ys.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("xs", "length"), [(jnp.ones(3), 4), (None, -1), (None, 2.5)])
def test_a_length_that_cannot_be(xs, length):
    with pytest.raises(SettingError, match=r"xs|length"):
        bs.scan(lambda c, x: (c, c), 0.0, xs, length=length)


def test_memory_grows_with_the_sequence_and_not_with_its_blocks():
    """A sliding window holds the residuals of one group of blocks, not of T windows."""

    def held(steps, window, stride):
        f, params, init, xs = example("lstm", steps)
        run = jax.grad(lambda p: loss(bs.scan(partial(f, p), init, xs, window, stride)))
        return bs.measure.temporary_bytes(run, params)

    assert held(4096, 16, 1) < 1.5 * held(4096, None, None)


def test_forward_mode_is_refused_by_name():
    params = example("two_layers")[1]
    f, _, init, xs = example("two_layers")
    with pytest.raises(
        TypeError, match=r"bs\.scan with a window has a reverse-mode derivative only"
    ):
        jax.jvp(truncated, (params,), (params,))
    with pytest.raises(TypeError, match="custom_vjp"):  # JAX's own words, where jit hides ours
        jax.jvp(jax.jit(truncated), (params,), (params,))

    def weighted(params):  # without a window there is forward mode, and it agrees
        return loss(bs.scan(partial(f, params), init, xs, link_weights=jnp.full(T, 0.7)))

    _, along = jax.jvp(weighted, (params,), (params,))
    gradient = jax.grad(weighted)(params)
    expected = sum(jnp.vdot(g, p) for g, p in zip(gradient.values(), params.values(), strict=True))
    np.testing.assert_allclose(along, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"window": 0}, "window"),
        ({"window": 2.5}, "window"),
        ({"window": 4, "stride": 0}, "stride"),
        ({"window": 4, "stride": 5}, "window"),
        ({"link_weights": jnp.ones(T + 1)}, "link_weights"),
        ({"link_weights": jnp.ones((T, B + 1))}, "link_weights"),
        ({"link_weights": jnp.ones((T, B, H))}, "link_weights"),
        ({"link_weights": 1j * jnp.ones(T)}, "link_weights"),
    ],
)
def test_bad_settings(settings, name):
    f, params, init, xs = example("two_layers")
    with pytest.raises(SettingError, match=name):
        bs.scan(partial(f, params), init, xs, **settings)


def test_inputs_of_different_lengths():
    with pytest.raises(SettingError, match="xs"):
        bs.scan(lambda c, x: (c, x[0]), 0.0, (jnp.ones(3), jnp.ones(4)), window=2)


def test_arrays_of_numpy_and_a_sequence_without_a_step():
    """As with `lax.scan`: NumPy's arrays cannot be indexed by a traced number."""
    f, params, init, xs = example("ode")

    def gradient(init, xs):
        return jax.grad(lambda p: loss(bs.scan(partial(f, p), init, xs, window=3)))(params)

    own, expected = (gradient(*to) for to in (jax.tree.map(np.asarray, (init, xs)), (init, xs)))
    assert jax.tree.all(jax.tree.map(np.array_equal, own, expected))
    last, (ys, _) = bs.scan(partial(f, params), init, xs[:0], window=3)
    assert jax.tree.all(jax.tree.map(np.array_equal, last, init)) and ys.shape == (0, B, H)


@pytest.mark.parametrize("link_weights", [None, jnp.ones(T), jnp.ones((T, B))])
def test_it_promotes_no_ranks(link_weights):
    """Code that lets JAX refuse them may use it."""
    f, params, init, xs = example("two_layers")

    def of(params):
        ys = bs.scan(partial(f, params), init, xs, 4, 2, link_weights)[1]
        return sum(y.sum() for y in ys)

    expected = jax.jit(jax.grad(of))(params)
    with jax.numpy_rank_promotion("raise"):
        found = jax.jit(jax.grad(lambda params: of(params)))(params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("init", [(), None, {}], ids=str)
@pytest.mark.parametrize(("window", "stride"), [(4, None), (3, 2)])
def test_a_carry_without_leaves(init, window, stride):
    """Nothing passes from step to step, so a window changes nothing."""
    xs, W = jax.random.normal(jax.random.key(0), (T, D)), jnp.ones((D, H))

    def loss(W, **settings):
        return jnp.sum(bs.scan(lambda carry, x: (carry, x @ W), init, xs, **settings)[1] ** 2)

    found = jax.grad(loss)(W, window=window, stride=stride)
    np.testing.assert_allclose(found, jax.grad(loss)(W), rtol=1e-12)
