"""Truncated BPTT as textbooks write it, in plain JAX: chunks of a fixed length, with the state carried on.

Run `python docs/minimal.py`. It needs JAX alone. tests/test_docs.py compares its gradient with that of
`bptt_study.strategies.fixed`, which computes the same in a fraction of the time.
"""

from functools import partial

import jax
import jax.numpy as jnp


def init(key, symbols, hidden):
    """Draw W ~ N(0, 1/fan-in); biases are 0."""
    xh, hh, hq = jax.random.split(key, 3)
    return {
        "W_xh": symbols**-0.5 * jax.random.normal(xh, (symbols, hidden)),
        "W_hh": hidden**-0.5 * jax.random.normal(hh, (hidden, hidden)),
        "b_h": jnp.zeros(hidden),
        "W_hq": hidden**-0.5 * jax.random.normal(hq, (hidden, symbols)),
        "b_q": jnp.zeros(symbols),
    }


def chunk_loss(params, state, inputs, targets):
    """Compute the summed cross-entropy in nats of one chunk, [L, B] ints, and its last state."""

    def step(h, x):
        h = jnp.tanh(params["W_xh"][x] + h @ params["W_hh"] + params["b_h"])
        return h, h

    state = jax.lax.stop_gradient(state)  # the cut: no gradient flows into the chunk before
    state, hs = jax.lax.scan(step, state, inputs)
    logits = jax.nn.log_softmax(hs @ params["W_hq"] + params["b_q"])
    return -jnp.take_along_axis(logits, targets[..., None], -1).sum(), state


@partial(jax.jit, static_argnames="window")
def loss_and_gradient(params, state, inputs, targets, window):
    """Compute the mean loss of a sequence [T, B] and its gradient, truncated at chunks of `window` steps."""
    loss, grads = 0.0, jax.tree.map(jnp.zeros_like, params)
    for start in range(0, len(inputs), window):
        x, y = inputs[start : start + window], targets[start : start + window]
        (own, state), found = jax.value_and_grad(chunk_loss, has_aux=True)(params, state, x, y)
        loss, grads = loss + own, jax.tree.map(jnp.add, grads, found)
    return loss / inputs.size, jax.tree.map(lambda g: g / inputs.size, grads), state


if __name__ == "__main__":
    text = jax.random.randint(jax.random.key(1), (65, 4), 0, 5)
    params, state = init(jax.random.key(0), symbols=5, hidden=8), jnp.zeros((4, 8))
    for _ in range(100):
        loss, grads, _ = loss_and_gradient(params, state, text[:-1], text[1:], window=16)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    print(f"loss after 100 updates: {loss:.3f} nats")
