"""macOS has no affinity of processes to cores, and Windows none of the signals: stand-ins for both."""

import os
import sys

import pytest

from bptt_study import __main__ as shell
from bptt_study.training import devices


def test_macos_leaves_processes_to_the_system(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    assert devices.granted() == 8
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert devices.granted() == 2
    devices.keep_to.cache_clear()
    assert devices.keep_to(1) == {}


def test_windows_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match=r"Linux and macOS.*WSL"):
        shell._install_handlers()
