"""The settings of JAX and of the machine that decide a run's numbers, beside its configuration."""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

# JAX's defaults. A setting with another value is part of a run's identity. A setting with its default is not,
# so that the runs of earlier versions keep their names.
DEFAULTS = {
    "enable_x64": False,
    "default_prng_impl": "threefry2x32",
    "threefry_partitionable": True,
    "default_matmul_precision": None,
    "numpy_dtype_promotion": "standard",
    "random_seed_offset": 0,
    "high_dynamic_range_gumbel": False,  # of jax.random.categorical, too
    "disable_jit": False,
    "disable_most_optimizations": False,
    "platform": "cpu",
    "xla_flags": [],
    "nvidia_tf32_override": None,
}
# those that decide what a key draws, and so the data of a task; weights also depend on enable_x64
DRAWS = (
    "default_prng_impl", "threefry_partitionable", "random_seed_offset", "high_dynamic_range_gumbel"
)  # fmt: skip
# those that are no setting of JAX's own, by the environment variable that decides them
VARIABLES = {
    "platform": "JAX_PLATFORMS", "xla_flags": "XLA_FLAGS", "nvidia_tf32_override": "NVIDIA_TF32_OVERRIDE"
}  # fmt: skip
OF_JAX = [name for name in DEFAULTS if name not in VARIABLES]
# XLA's flags that change no number: what it writes down, the number of devices, the effort of its compiler (0
# rounds in another way). Every other flag counts, even if it only changes last bits: training multiplies them
CHANGES_NOTHING = re.compile(
    r"--xla_(dump_.*|force_host_platform_device_count=.*|backend_optimization_level=[123])"
)


def environment() -> dict[str, Any]:
    """Read the settings that decide numbers, for the record of a run.

    Returns:
      The values by name.
    """
    import jax

    flags = _xla_flags()
    return _of_jax() | {
        "platform": jax.default_backend(),
        "xla_flags": [flag for flag in flags if not CHANGES_NOTHING.fullmatch(flag)],
        "all_xla_flags": flags,
        "nvidia_tf32_override": os.environ.get("NVIDIA_TF32_OVERRIDE"),
    }


def _xla_flags() -> list[str]:
    """Read XLA's flags. Of two values of a flag the last one counts; a text without a flag names their file."""
    text = os.environ.get("XLA_FLAGS", "")
    if not text.lstrip().startswith("-"):
        with suppress(OSError, UnicodeDecodeError):  # XLA ends the process in a line
            text = Path(text).read_text(encoding="utf-8")
    return sorted({flag.partition("=")[0]: flag for flag in text.split()}.values())


def _of_jax() -> dict[str, Any]:
    """Read the settings of JAX itself; this does not start it."""
    import jax

    # a setting that a context can change is an attribute, any other only one of the values
    values = jax.config.values
    found = {name: values.get(f"jax_{name}", DEFAULTS[name]) for name in OF_JAX}
    return {name: getattr(jax.config, f"jax_{name}", value) for name, value in found.items()}


def uncommon() -> dict[str, Any]:
    """Read the settings that differ from JAX's defaults: they are part of a run's identity.

    Returns:
      The values by name.
    """
    found = environment()
    return {name: found[name] for name, usual in DEFAULTS.items() if found[name] != usual}


def variables(uncommon: Mapping[str, Any]) -> list[str]:
    """Write the variables that set these settings for a shell.

    Args:
      uncommon: Values by name, as `uncommon` returns them and tables note them.

    Returns:
      One NAME=VALUE for each.
    """
    texts = {
        VARIABLES.get(name, f"JAX_{name.upper()}"): " ".join(v) if isinstance(v, list) else str(v)
        for name, v in uncommon.items()
    }
    return [f"{name}={shlex.quote(text)}" for name, text in texts.items()]


def command() -> str:
    """Write the command of this process for a shell: as it was typed, after the variables that it needs.

    These are PYTHONPATH, which finds code of one's own, and the settings of JAX that decide numbers. JAX need
    not be imported yet: the first run says on which devices it starts.

    Returns:
      The command.
    """
    inherited = {
        "PYTHONPATH": True,
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS") not in ("", DEFAULTS["platform"]),
        "XLA_FLAGS": not all(map(CHANGES_NOTHING.fullmatch, _xla_flags())),
        "NVIDIA_TF32_OVERRIDE": True,
    }
    needed = {
        name: os.environ[name] for name, used in inherited.items() if used and name in os.environ
    }
    names = {name: f"JAX_{name.upper()}" for name in OF_JAX}
    if "jax" in sys.modules:  # its settings may be others by now
        now = _of_jax()
        needed |= {names[n]: str(value) for n, value in now.items() if value != DEFAULTS[n]}
    else:
        needed |= {name: os.environ[name] for name in names.values() if name in os.environ}
    variables = [f"{name}={shlex.quote(value)}" for name, value in needed.items()]
    return " ".join([*variables, shlex.join(["bptt-study", *sys.argv[1:]])])
