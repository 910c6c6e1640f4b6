"""Which device JAX uses, settled before its first computation."""

import os

import pooch

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
    # read by JAX when it is first imported; what the user set stays
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(pooch.os_cache("bptt_study") / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    cores = {"JAX_NUM_CPU_DEVICES": str(len(os.sched_getaffinity(0)))}
    for name, value in (cache | ({} if "XLA_FLAGS" in os.environ else cores)).items():
        os.environ.setdefault(name, value)
    import jax

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
