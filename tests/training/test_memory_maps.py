"""Programs of shapes that no later run needs are let go: a process may have a limited number of maps."""

import ctypes

import jax
import jax.numpy as jnp
import many
import pytest
from support import TINY, resident, run_folders

from bptt_study.training import devices


@pytest.mark.slow
def test_compiled_programs_are_let_go():
    """One by one they add maps, and afterwards the maps are as before."""
    jax.clear_caches()
    f = jax.jit(lambda x: jnp.tanh(x @ x.T).sum())
    f(jnp.ones((2, 2)))
    few = devices.memory_maps()
    for n in range(3, 15):
        f(jnp.ones((n, n)))
    many = devices.memory_maps()
    assert many > few + 12
    assert not devices.let_go_of_programs()
    assert devices.let_go_of_programs(share=0)
    assert devices.memory_maps() < few + (many - few) / 2
    assert f(jnp.ones((2, 2))) == pytest.approx(4 * float(jnp.tanh(2.0)))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
@pytest.mark.slow
def test_freed_memory_goes_back_to_the_system():
    """A block in use above 120 MB of freed ones keeps these in the process until it asks."""
    blocks = [bytearray(60_000) for _ in range(2000)]
    above = blocks[-1]
    del blocks
    held = resident()
    assert devices.let_go_of_programs(share=0)
    assert resident() < held - 6e7
    assert len(above) == 60_000


@pytest.mark.slow
def test_every_run_asks(command, tmp_path, monkeypatch):
    """A sweep over sizes ends well when the programs are dropped after each of its runs."""
    asked = []
    let_go = devices.let_go_of_programs
    monkeypatch.setattr(devices, "let_go_of_programs", lambda: asked.append(let_go(0)))
    code, _, err = command("-m", *TINY[:2], *TINY[3:], "cell.hidden=2,3", "study=mine")
    assert code == 0, err
    assert asked == [True, True]
    assert len(run_folders(tmp_path / "results" / "runs" / "mine")) == 2


@pytest.mark.slow
def test_the_shapes_of_make_many():
    """Programs are let go after each run, at maps and memory that do not grow. If never, that shows nothing."""
    said: list[str] = []
    many.shapes(3, share=0, say=said.append)
    assert [line[:6] for line in said[1:]] == ["     1", "     2", "     3", *["let go"] * 3]
    with pytest.raises(AssertionError, match="no programs were let go"):
        many.shapes(2, share=9, say=said.append)
