"""Cores: how many a process takes, that two never take the same, and that results do not depend on them."""

import os
import platform
import subprocess
import sys
import zlib

import pytest

from bptt_study.tasks import corpora
from bptt_study.training import compile_cache, devices
from bptt_study.validation import SettingError

PROGRAM = """
import os, sys
from bptt_study import devices
devices.keep_to(1)
print(*os.sched_getaffinity(0), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
    ("said", "cores"),
    [
        ({}, 4),
        ({"OMP_NUM_THREADS": "2"}, 2),
        ({"OMP_NUM_THREADS": "3", "SLURM_CPUS_PER_TASK": "1"}, 1),
        ({"OMP_NUM_THREADS": "64"}, 4),
        ({"OMP_NUM_THREADS": "0"}, 4),
        ({"OMP_NUM_THREADS": "2,1"}, 4),
        ({"OMP_NUM_THREADS": ""}, 4),
    ],
)
def test_cores_are_what_the_launcher_says_if_there_are_so_many(said, cores, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 4, 6})
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert devices.granted() == cores


def test_processes_keep_to_cores_of_their_own_and_leave_them_when_they_die():
    available = len(os.sched_getaffinity(0))
    if available < 2:
        pytest.skip("one core: nothing to divide")
    keep = [sys.executable, "-c", PROGRAM]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    alive = [subprocess.Popen(keep, **pipes) for _ in range(available + 1)]
    kept = [process.stdout.readline().split() for process in alive]
    own = [cores[0] for cores in kept if len(cores) == 1]
    # other tests may hold some
    assert len(own) == len(set(own)) >= 1
    assert all(len(cores) == available for cores in kept if len(cores) != 1)
    assert available in map(len, kept), "for one process too many there is no core left"
    for process in alive:
        process.kill()
        process.communicate()
    again = subprocess.run(keep, input="", capture_output=True, text=True, check=True)
    assert len(again.stdout.split()) == 1


CONTRACTION = """
import sys, hashlib
from bptt_study import devices
devices.use("cpu", int(sys.argv[1]))
devices.keep_to(int(sys.argv[1]))
import jax
adjoints = jax.random.normal(jax.random.key(0), (2**14, 128))
digest = hashlib.md5(jax.jit(lambda a: a.T @ a)(adjoints).tobytes()).hexdigest()
print(jax.device_count(), digest)
"""


EPYC = "processor\t: 0\ncpu family\t: 23\nmodel\t\t: 49\nmodel name\t: AMD EPYC\n\n"
ARM = "processor\t: 0\nCPU implementer\t: 0x41\n\n"


@pytest.mark.parametrize(
    ("said", "name"),
    [
        (EPYC + EPYC, "AMD EPYC, family 23, model 49"),  # a hypervisor may hide more of the name
        ("model name\t: A: 1\n", "A: 1"),
        (ARM, platform.processor() or platform.machine()),
        (None, platform.processor() or platform.machine()),
    ],
)
def test_a_processor_is_named_with_what_decides_its_instructions(said, name, tmp_path):
    if said is not None:
        (tmp_path / "cpuinfo").write_text(said)
    assert devices.processor(tmp_path / "cpuinfo") == name


@pytest.mark.parametrize(
    ("said", "threads"),
    [("7", 7), ("0", devices.THREADS), ("", devices.THREADS), ("x", devices.THREADS)],
)
def test_threads_are_those_of_all_cores_or_what_is_said(said, threads, monkeypatch):
    monkeypatch.setenv("NPROC", said)
    assert devices.threads() == threads


def contraction(cores, **environment):
    """Number of devices and digest of a contraction so long that XLA divides it among its threads."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
    done = subprocess.run(
        [sys.executable, "-c", CONTRACTION, str(cores)],
        capture_output=True,
        text=True,
        env=inherited | environment,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.slow
def test_results_do_not_depend_on_the_cores():
    (one, digest), (two, same) = contraction(1), contraction(2)
    assert (one, two) == ("1", "2")
    assert digest == same
    # what they would depend on: a pool of another size
    assert contraction(1, NPROC="1")[1] != digest


@pytest.mark.slow
def test_flags_of_the_user_stay_and_those_of_the_process_before_are_no_users():
    assert contraction(2, XLA_FLAGS=devices.COMPILER)[0] == "2"
    # a number of cores that was asked for is granted, or refused where the user has set another
    assert contraction(2, XLA_FLAGS="--xla_backend_optimization_level=2")[0] == "2"
    three = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}
    for own in (three, {"JAX_NUM_CPU_DEVICES": "3"}):
        with pytest.raises(subprocess.CalledProcessError) as error:
            contraction(2, **own)
        assert "`cores` must be 3; got 2. XLA_FLAGS or JAX_NUM_CPU_DEVICES" in error.value.stderr
        assert contraction(3, **own)[0] == "3"  # whatever the machine has, as both say so


PROGRAMS = {
    "zlib": zlib.compress(bytes(range(256)) * 9),
    # made by zstandard 0.25: b"program" with a checksum, and 300,000 zeros in three blocks
    "zstd": bytes.fromhex("28b52ffd240739000070726f6772616d4752cc67"),
    "blocks": bytes.fromhex("28b52ffda0e09304005400001000000100fbff39c00202001000039f0400"),
    "unknown": b"\x01",
}


@pytest.mark.parametrize("kind", ["zlib", "zstd", "blocks"])
def test_an_entry_that_is_cut_anywhere_is_not_whole(kind):
    program = PROGRAMS[kind]
    assert compile_cache._whole(program)
    assert not any(compile_cache._whole(program[:n]) for n in range(len(program)))


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_truncated_entry_of_the_cache_is_replaced(tmp_path, kind):
    """JAX compiles it again at every start, and says so each time, but leaves it."""
    whole, cut, empty = (tmp_path / f"{name}-cache" for name in ("whole", "cut", "empty"))
    program = PROGRAMS[kind]
    for file, length in ((whole, None), (cut, -5), (empty, 0)):
        file.write_bytes(program[:length])
    assert set(compile_cache.remove_truncated(tmp_path)) == {cut, empty}
    assert whole.exists() and not cut.exists()
    long_ago = whole.stat().st_mtime - 9
    whole.write_bytes(b"")
    os.utime(whole, (long_ago, long_ago))
    assert compile_cache.remove_truncated(tmp_path) == [], "what is older was checked before"
    assert compile_cache.remove_truncated(tmp_path / "nowhere") == []


def test_a_user_without_a_home(monkeypatch):
    """A container starts processes under a number that /etc/passwd does not have."""

    def unknown(*_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert compile_cache.default_folder() is None
    with pytest.raises(SettingError, match=r"must be a text with SHA-1 .*download failed"):
        corpora.time_machine()
    with pytest.raises(SettingError, match=r"must be a readable UTF-8 text file"):
        corpora.text_file("~/text")
