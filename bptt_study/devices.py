"""Which device JAX uses, settled before its first computation."""

import os
from contextlib import suppress

from bptt_study.checks import SettingError, one_of

DEVICES = ("auto", "cpu", "gpu")


def use(device: str) -> None:
    """Make JAX compute on `device`: auto (the best there is), cpu, or gpu.

    On a CPU every core becomes a device of its own, over which a run's seeds are split (measured on
    two cores: 18.1 → 9.7 ms). Compiled programs are kept in the user's cache folder, so that what the
    jobs of a sweep share, and a second start, need no compilation.

    Raises SettingError if the device is not there.
    """
    one_of("device", device, DEVICES)
    import jax
    import pooch

    # both settings are ignored or refused once JAX has started, as in the second job of a sweep
    with suppress(RuntimeError):
        if "JAX_NUM_CPU_DEVICES" not in os.environ and "XLA_FLAGS" not in os.environ:
            jax.config.update("jax_num_cpu_devices", len(os.sched_getaffinity(0)))
    if not jax.config.read("jax_compilation_cache_dir"):  # a choice of the user's stays
        jax.config.update("jax_compilation_cache_dir", str(pooch.os_cache("bptt_study") / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        allowed = f"a platform that JAX finds here, cpu for one ({error or 'none found'})"
        raise SettingError("JAX_PLATFORMS", platforms, allowed) from error
    if device not in ("auto", found):
        raise SettingError("device", device, f"auto or {found}: JAX finds no {device} here")
