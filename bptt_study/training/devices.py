"""The device that JAX uses, and the number of cores: both must be set before JAX's first computation."""

import ctypes
import gc
import math
import os
import platform
import signal
import socket
import sys
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from functools import cache
from importlib.metadata import entry_points
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from bptt_study.backprop import BATCH_AXIS
from bptt_study.training import compile_cache
from bptt_study.validation import SettingError, instance, one_of, whole

if TYPE_CHECKING:  # JAX is imported by `use`, after its settings
    from bptt_study.types import Batch, Params, Strategy

DEVICES = ("auto", "cpu", "gpu")
# XLA divides large sums among the threads of its pool, so their number decides the last bits. Therefore it is
# the same for every process of a machine, and a process is limited by its cores instead.
THREADS = os.cpu_count() or 1
# This level compiles in half to four fifths of the time of the default, 3, and the programs are as fast. Most
# runs of a study are shorter than their compilation. It has not been measured on a GPU
COMPILER = "--xla_backend_optimization_level=1"


def use(device: str, cores: int | None = None) -> None:
    """Make JAX compute on `device`: auto (the best there is), cpu, or gpu.

    On a CPU every core becomes a separate device, and a run's seeds are split over these devices. Compiled
    programs are stored in the user's cache folder: the runs of a sweep share them, and a second start compiles
    nothing.

    Args:
      device: The kind of device.
      cores: The number of cores of a CPU. None: as many as are granted.

    Raises:
      SettingError: For a device that JAX does not find, and for another number of cores than the devices of a
        CPU that the environment sets.
    """
    one_of("device", device, DEVICES)
    count = min(granted() if cores is None else whole("cores", cores), THREADS)
    # JAX reads these when it is first imported, XLA when it starts; a value that the user has set stays
    settings = {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "NPROC": str(THREADS),
    }
    if device == "cpu" or not entry_points(group="jax_plugins"):
        settings["XLA_FLAGS"] = COMPILER
    if folder := compile_cache.default_folder():
        settings["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    for name, value in settings.items():
        os.environ.setdefault(name, value)
    compile_cache.remove_truncated(Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", os.devnull)))
    # Ctrl-C waits: within this import it would end in tracebacks, or in a core dump
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        import jax
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    said = os.environ.get("JAX_NUM_CPU_DEVICES") or "device_count" in flags
    # flags of one's own may ask for any program, but they do not undo a number of cores
    if not said and (cores is not None or flags in ("", COMPILER)):
        _split(count)
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        allowed = "a platform that JAX finds here, such as cpu"
        why = f"JAX reports: {error}." if str(error) else "JAX finds none."
        raise SettingError("JAX_PLATFORMS", platforms, allowed, why) from error
    if device not in ("auto", found):
        raise SettingError("device", device, f"auto or {found}", f"JAX finds no {device} here.")
    if cores is not None and found == "cpu" and said and jax.device_count() not in (cores, count):
        why = "XLA_FLAGS or JAX_NUM_CPU_DEVICES sets the number of devices."
        raise SettingError("cores", cores, str(jax.device_count()), why)


def processor(file: Path = Path("/proc/cpuinfo")) -> str:
    """Name the processor with its family and model, which decide instructions and so the last bits of a sum.

    Args:
      file: What Linux says of its processors.

    Returns:
      Such as "AMD EPYC, family 23, model 49"; what Python knows where the system does not say more.
    """
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # only Linux has it
        lines = []
    pairs = (line.partition(":") for line in lines)
    said = {name.strip(): text.strip() for name, _, text in pairs}
    if "model name" not in said:
        return platform.processor() or platform.machine()
    more = [f"{n.removeprefix('cpu ')} {said[n]}" for n in ("cpu family", "model") if n in said]
    return ", ".join([said["model name"], *more])


def threads() -> int:
    """Read the number of XLA's threads. It decides how large sums are divided, and so their last bits.

    Returns:
      What the variable NPROC says; the number of all cores if it says no whole number from 1 on.
    """
    said = os.environ.get("NPROC", "")
    return int(said) if said.isdecimal() and int(said) else THREADS


def let_go_of_programs(share: float = 0.4) -> bool:
    """Drop the compiled programs of earlier runs if they use too many of the process's memory maps.

    Every program takes some hundreds of maps, and beyond the kernel's limit XLA aborts the process. A program
    that is needed later is compiled again, or read from the cache on disk.

    Args:
      share: The share of the kernel's limit from which programs are dropped.

    Returns:
      Whether programs were dropped.
    """
    import jax

    from bptt_study.training.programs import programs

    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # only Linux has such a limit
        return False
    if memory_maps() < share * limit:
        return False
    programs.cache_clear()
    jax.clear_caches()
    gc.collect()
    with suppress(AttributeError):  # glibc alone has the call, and keeps freed memory until then
        ctypes.CDLL(None).malloc_trim(0)
    return True


def memory_maps() -> int:
    """Count the memory maps of this process.

    Returns:
      The number; 0 if the system does not report it.
    """
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0


@cache
def _split(count: int) -> None:
    """Make `count` devices of the CPU.

    This does not set the environment, which workers would inherit although they have their own cores.
    """
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as error:
        if jax.default_backend() != "cpu" or jax.device_count() == count:
            return  # JAX has started, as it would
        raise RuntimeError(
            "`bs.devices.use` must come before JAX's first computation. Start Python again and call it first, "
            "or leave it out: then one device of the CPU computes everything."
        ) from error


def split_batch(parts: int | None = None) -> AbstractContextManager[None]:
    """Make a context in which an estimate computes its batch in parts, each on its own device.

    Every device has the parameters. Loss and gradient equal those of one device to rounding, because the sum
    over the batch is taken in parts. The size of a batch must be a multiple of `parts`. On a CPU, wait for each
    result with `jax.block_until_ready` before you start another such program: the parts of one wait for each
    other, and XLA ends the process if two programs hold the threads that each other needs.

    Args:
      parts: The number of parts. None: one for every device; `use` makes a device of every core.

    Returns:
      The context.

    Raises:
      SettingError: For more parts than devices.
    """
    import jax

    count = jax.device_count() if parts is None else whole("parts", parts)
    if count > jax.device_count():
        allowed = f"between 1 and the number of devices ({jax.device_count()})"
        raise SettingError("parts", parts, allowed)
    axis = (jax.sharding.AxisType.Auto,)
    return jax.set_mesh(jax.make_mesh((count,), (BATCH_AXIS,), axis, devices=jax.devices()[:count]))


def compile(strategy: "Strategy", metrics: Collection[str] = ()) -> "Strategy":
    """Make the estimate of a strategy as fast as possible in one call: compiled, and on all devices.

    Each device computes a part of the batch's sequences; after `use("cpu")` every core is a device. One device
    computes everything if it is the only one, if the sequences cannot be divided, or if the strategy's estimate
    does not split its batch. Loss and gradient equal those of one device to rounding. The call changes no
    setting of JAX. Within another program, such as your own `jax.jit`, the estimate stays as it was. It keeps
    the arguments of its last call, so that arrays that come again are not copied again. If several devices of a
    CPU share the batch, a call returns when its result is there, and calls of several threads wait in turn.

    Args:
      strategy: Any strategy.
      metrics: Names of the metrics that the estimate returns. The others cost no time and no memory.

    Returns:
      The same strategy with the faster `estimate`. Its arguments may lie on any device.

    Raises:
      SettingError: For an object that is no strategy; in `estimate`, for a metric that it does not have.
    """
    import jax

    from bptt_study.backprop.arguments import as_batch
    from bptt_study.types import Strategy

    instance("strategy", strategy, Strategy)
    if isinstance(metrics, str):
        raise SettingError("metrics", metrics, "a list of names")

    def wanted(*arguments: Any) -> Any:
        estimate, state = strategy.estimate(*arguments)
        for name in {*metrics} - {*estimate.metrics}:
            allowed = f"names among the strategy's: {', '.join(estimate.metrics) or 'it has none'}"
            raise SettingError("metrics", name, allowed)
        return estimate._replace(metrics={name: estimate.metrics[name] for name in metrics}), state

    on_devices: dict[int, Callable[..., Any]] = {}  # by the number of sequences

    def estimate(params: "Params", state: Any, batch: "Batch", key: Any) -> Any:
        batch = as_batch(batch)
        arguments = params, state, batch, key
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(arguments)):
            return wanted(*arguments)
        size = batch.mask.shape[1]
        if size not in on_devices:
            on_devices[size] = _on_devices(wanted, _divide(wanted, size, arguments))
        return on_devices[size](*arguments)

    return strategy._replace(estimate=estimate)


def _divide(f: Callable[..., Any], size: int, arguments: Any) -> int:
    """Return the number of parts into which f divides `size` sequences: the number of devices, or 1."""
    import jax

    parts = math.gcd(size, jax.device_count())
    with split_batch(parts):
        program = jax.make_jaxpr(f)(*arguments)
    return parts if "shard_map" in str(program) else 1


# Devices of a CPU share its threads. If two programs whose parts wait for each other run at once, each can hold
# the thread that the other needs, and after 40 seconds XLA ends the process.
_ONE_AT_A_TIME = Lock()


def _on_devices(f: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """Compile f with its batch split over `parts` devices; on a CPU, a call waits for its result.

    Python between two computations runs with cold caches, several times slower than in a loop of its own. So a
    call enters no mesh: the compiled function names it, and the arguments lie on it.
    """
    import jax

    with split_batch(parts):
        mesh = jax.sharding.get_mesh()

    def split(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return f(*arguments)

    compiled, placed = jax.jit(split), _placing(mesh)

    def run(*arguments: Any) -> Any:
        return compiled(*placed(arguments))

    def run_alone(*arguments: Any) -> Any:
        with _ONE_AT_A_TIME:
            return jax.block_until_ready(run(*arguments))

    return run_alone if parts > 1 and mesh.devices.flat[0].platform == "cpu" else run


def _placing(mesh: Any) -> Callable[[Any], Any]:
    """Make the function that puts the leaves of a tree on all devices of a mesh.

    Leaves that lie there in parts stay as they are. A leaf of the call before is not copied again, so a batch
    or parameters that come again cost nothing. Only JAX's arrays count as the same, since others may change.
    """
    import jax

    everywhere = jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
    devices = set(mesh.devices.flat)
    before: dict[int, tuple[Any, Any]] = {}  # the leaf is held, so that its id stays its own

    def placed(tree: Any) -> Any:
        nonlocal before
        known = before
        leaves, structure = jax.tree.flatten(tree)
        now = {id(leaf): known.get(id(leaf), (leaf, leaf)) for leaf in leaves}
        new = [i for i in now if i not in known and not _lies_on(devices, now[i][0])]
        if new:
            copies = jax.device_put([_seen_by_numpy(now[i][0]) for i in new], everywhere)
            now |= {i: (now[i][0], copy) for i, copy in zip(new, copies, strict=True)}
        before = {i: pair for i, pair in now.items() if isinstance(pair[0], jax.Array)}
        return jax.tree.unflatten(structure, [now[id(leaf)][1] for leaf in leaves])

    return placed


def _lies_on(devices: set[Any], leaf: Any) -> bool:
    import jax

    return isinstance(leaf, jax.Array) and leaf.sharding.device_set == devices


def _seen_by_numpy(leaf: Any) -> Any:
    """View an array of the CPU as NumPy does: several devices copy it from there in half the time."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    plain = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, np.number)  # no key
    if not plain or leaf.weak_type or {d.platform for d in leaf.devices()} != {"cpu"}:
        return leaf
    return np.asarray(leaf)


def granted() -> int:
    """Return the number of cores that this process may use.

    Launchers put it into the environment: joblib and Ray as OMP_NUM_THREADS, SLURM as SLURM_CPUS_PER_TASK.

    Returns:
      The smallest of these numbers and the number of cores that the system allows.
    """
    said = (os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "SLURM_CPUS_PER_TASK"))
    return min([len(_open_cores()), *(int(n) for n in said if n.isdecimal() and int(n))])


def _open_cores() -> list[int]:
    """List the cores that this process may run on; macOS allows all."""
    if sys.platform != "linux":
        return list(range(os.cpu_count() or 1))
    return sorted(os.sched_getaffinity(0))


@cache  # keeps the locks as long as the process lives
def keep_to(cores: int | None = None) -> dict[int, socket.socket]:
    """Restrict this process to cores that no other process has locked.

    If too few cores are free, or all are asked for, the process may run on all.

    Args:
      cores: The number of cores. None: as many as are granted.

    Returns:
      The locks by core.
    """
    count = granted() if cores is None else cores
    open_to_it = _open_cores()
    if count >= len(open_to_it) or sys.platform != "linux":  # only Linux binds processes to cores
        return {}
    free = ((core, lock) for core in open_to_it if (lock := _lock(core)))
    locks = dict(islice(free, count))
    if len(locks) < count:
        for lock in locks.values():
            lock.close()
        return {}
    for thread in Path("/proc/self/task").iterdir():  # XLA may have started its threads already
        os.sched_setaffinity(int(thread.name), locks)
    return locks


def _lock(core: int) -> socket.socket | None:
    """Bind a name that only one process of the machine can hold, until it ends; None if it is taken."""
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(f"\0bptt_study core {core}")
    except OSError:
        lock.close()
        return None
    return lock
