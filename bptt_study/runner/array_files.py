"""Trees of arrays in npz files: named leaves without pickle, and one checksum over all leaves.

The name of a leaf is its path, such as `params/cell/W_hh`. A PRNG key is stored as its words, and numbers that
NumPy does not know, such as bfloat16, as their bits. `load` is for a notebook; `read` and `restore` are for a
run that continues.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bptt_study import files
from bptt_study.validation import SettingError

FORMAT = 1
ABOUT = "about.json"


class UnusableError(ValueError):
    """A file cannot be used; the message gives the reason."""


def save(file: Path | str, tree: Any, about: Mapping[str, Any] | None = None) -> None:
    """Write the leaves of a tree to a file, completely or not at all.

    Args:
      file: The path, such as `params.npz`.
      tree: A tree of arrays.
      about: Facts about the tree, which JSON can hold.

    Raises:
      OSError: If the disk is full, or the folder is missing or read-only.
    """
    files.write(Path(file), dump(tree, about))


def dump(tree: Any, about: Mapping[str, Any] | None = None) -> bytes:
    """Pack a tree as the bytes of an npz file.

    Args:
      tree: A tree of arrays.
      about: Facts about the tree, which JSON can hold.

    Returns:
      The bytes.

    Raises:
      SettingError: If two leaves have one name, or one is another's folder.
    """
    leaves = {name: np.asarray(_words(leaf)) for name, leaf in named(tree).items()}
    kinds = {name: str(leaf.dtype) for name, leaf in leaves.items() if leaf.dtype.kind == "V"}
    leaves |= {name: leaves[name].view(f"u{leaves[name].itemsize}") for name in kinds}
    said = {**(about or {}), "format": FORMAT, "sha256": _checksum(leaves)}
    said |= {"dtypes": kinds} if kinds else {}
    stored: dict[str, Any] = {**leaves, ABOUT: np.array(json.dumps(said))}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:  # np.savez takes some names for its own settings
        for name, leaf in stored.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, leaf, allow_pickle=False)
    return buffer.getvalue()


def read(file: Path | str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read the leaves by name, and the facts about the tree.

    Args:
      file: A file that `save` has written.

    Returns:
      The leaves by their paths in the tree, such as `cell/W_hh`, and the facts.

    Raises:
      UnusableError: For a file that is missing, truncated, edited or of another format.
    """
    try:
        with np.load(io.BytesIO(Path(file).read_bytes()), allow_pickle=False) as stored:
            leaves = {name: stored[name] for name in stored.files}
        about = json.loads(str(leaves.pop(ABOUT)))
        whole = about["sha256"] == _checksum(leaves)
        kinds = about.get("dtypes", {})
        leaves |= {name: leaves[name].view(jnp.dtype(kind)) for name, kind in kinds.items()}
    except (
        Exception
    ) as error:  # a flipped bit can make zipfile and NumPy raise an error of any kind
        raise UnusableError(f"it cannot be read ({type(error).__name__}: {error})") from error
    if about.get("format") != FORMAT:
        raise UnusableError(f"its format is {about.get('format')}; this version reads {FORMAT}")
    if not whole:
        raise UnusableError("its checksum does not match: it was edited")
    return leaves, about


def load(file: Path | str) -> dict[str, Any]:
    """Read a tree as nested dicts of arrays.

    Args:
      file: A file that `save` has written, such as a run's params.npz.

    Returns:
      The tree. The leaves of a params.npz are [S, …] for S seeds.

    Raises:
      UnusableError: For a file that is missing, truncated, edited or of another format.
    """
    tree: dict[str, Any] = {}
    for name, leaf in read(file)[0].items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def restore(leaves: Mapping[str, np.ndarray], like: Any) -> Any:
    """Put the leaves into a tree with the structure of `like`, on its devices.

    Args:
      leaves: Arrays by name, as `read` returns them.
      like: A tree of arrays, JAX's or NumPy's, of numbers, or of their shapes from `jax.eval_shape`.

    Returns:
      The tree, of JAX's arrays.

    Raises:
      UnusableError: If names, shapes or dtypes differ from those of `like`. A key is known by the number of its
        words alone, so one of `rbg` passes for one of `unsafe_rbg`.
    """
    expected = named(like)
    if set(leaves) != set(expected):
        raise UnusableError(f"its leaves differ: {', '.join(sorted(set(leaves) ^ set(expected)))}")
    for name, leaf in expected.items():
        words, found = jax.eval_shape(_words, leaf) if _is_key(leaf) else leaf, leaves[name]
        words = words if hasattr(words, "dtype") else np.asarray(words)
        if (words.shape, words.dtype) != (found.shape, found.dtype):
            said = f"{found.dtype}{list(found.shape)} instead of {words.dtype}{list(words.shape)}"
            raise UnusableError(f"{name} is {said}")

    def put(path: Any, leaf: Any) -> Any:
        words: Any = leaves[_name(path)]
        if _is_key(leaf):
            kinds: list[Any] = []
            # key_impl takes no shapes, but it takes what eval_shape makes of them
            jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), leaf)
            words = jax.random.wrap_key_data(jnp.asarray(words), impl=kinds[0])
        return jax.device_put(words, getattr(leaf, "sharding", None))

    return jax.tree_util.tree_map_with_path(put, like)


def named(tree: Any) -> dict[str, Any]:
    """Name the leaves of a tree by their paths, such as `cell/W_hh`, for a file with a member for each.

    Args:
      tree: A tree of arrays.

    Returns:
      The leaves by name.

    Raises:
      SettingError: If two leaves have one name, such as those of {"a/b": x, "a": {"b": y}}, or one has the
        name of another's folder or of the file's own member.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    found = {_name(path): leaf for path, leaf in leaves}
    if len(found) < len(leaves):
        names = [_name(path) for path, _ in leaves]
        twice = next(name for name in names if names.count(name) > 1)
        raise SettingError("tree", f"two leaves {twice}", "one whose leaves have different paths")
    for name in found:
        if name == ABOUT or any(other.startswith(f"{name}/") for other in found):
            allowed = f"no {ABOUT}, and of no leaf that is the beginning of another's path"
            raise SettingError("tree", f"one with a leaf {name}", allowed)
    return found


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(getattr(leaf, "dtype", float), jax.dtypes.prng_key))


def _words(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _checksum(leaves: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves.items()):
        digest.update(f"{name} {leaf.dtype.str} {leaf.shape}".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()
