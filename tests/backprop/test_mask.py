"""A mask of booleans is made numbers one segment at a time: it takes no more memory than one of numbers."""

import jax
import jax.numpy as jnp
import pytest

import bptt_study as bs

T = 2**12


def held(dtype):
    """Bytes beside arguments and results of chunks of 16 steps, one sequence."""
    problem = bs.Problem(bs.cells.elman(5, 8), bs.readouts.linear(8, 5), bs.losses.cross_entropy)
    strategy = bs.strategies.fixed(problem, 16)
    params = problem.init(jax.random.key(0))
    ids = jax.ShapeDtypeStruct((T, 1), jnp.int32)
    batch = bs.Batch(ids, ids, jax.ShapeDtypeStruct((T, 1), dtype))
    run = jax.jit(strategy.estimate).lower(
        params, strategy.init(params, 1), batch, jax.random.key(1)
    )
    return run.compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_a_mask_of_booleans_is_not_copied_as_numbers():
    assert held(bool) < held(float) + T
