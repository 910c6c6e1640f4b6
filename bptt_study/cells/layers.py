"""Cells one above the other."""

import inspect
from collections.abc import Callable, Sequence

import jax
from jaxtyping import Array, Key

from bptt_study.backprop.promises import vouch
from bptt_study.cells.diagonal import lru, min_gru
from bptt_study.cells.gated import gru, lstm
from bptt_study.cells.plain import elman, leaky, linear, mlp
from bptt_study.types import Cell, Layers, Params, State
from bptt_study.validation import SettingError, one_of, whole

LAYERS: dict[str, Callable[..., Cell]] = {
    "mlp": mlp,
    "linear": linear,
    "elman": elman,
    "leaky": leaky,
    "gru": gru,
    "lstm": lstm,
    "min_gru": min_gru,
    "lru": lru,
}


def stack(cells: Sequence[Cell]) -> Cell:
    """Put cells one above the other: each reads at step t what the one below it reads out at step t.

    Args:
      cells: From the bottom up. Each may be of any kind, a cell with `step` alone or a stack too.

    Returns:
      A cell whose parameters are the list of theirs, each drawn from a key of its own, whose state is the
      tuple of theirs, and whose `read` is that of the top one.

    Raises:
      SettingError: For no cell, and for one whose inputs are not what the one below it reads out.

    References:
      Graves 2013, "Generating sequences with recurrent neural networks", section 2.
    """
    layers = tuple(cells)
    if not layers or not all(isinstance(cell, Cell) for cell in layers):
        raise SettingError("cells", cells, "a list of at least one cell")
    for n in range(1, len(layers)):
        _check_fit(layers[n - 1], layers[n], n)

    def init(key: Key[Array, ""]) -> Params:
        keys = jax.random.split(key, len(layers))
        return [cell.init(own) for cell, own in zip(layers, keys, strict=True)]

    def step(params: Params, state: State, x: Array) -> State:
        found = []
        for cell, theta, own in zip(layers, params, state, strict=True):
            found.append(cell.step(theta, own, x))
            x = cell.read(found[-1])
        return tuple(found)

    # where no layer has a form of its own, layer by layer runs each step more often than all together
    formed = any(cell.affine is not None for cell in layers)
    cell = Cell(
        init=init,
        zeros=lambda batch_size: tuple(cell.zeros(batch_size) for cell in layers),
        step=step,
        read=lambda state: layers[-1].read(state[-1]),
        affine=Layers(layers) if formed else None,
    )
    return vouch(cell) if formed else cell


def stacked(
    inputs: int,
    hidden: int,
    layers: int = 2,
    of: str = "lstm",
    activation: str | None = None,
    spectral_radius: float | None = None,
) -> Cell:
    """Stack `layers` cells of one kind, each with `hidden` units.

    Args:
      inputs: D of the bottom layer.
      hidden: H of every layer.
      layers: How many.
      of: The kind, a name of `LAYERS`.
      activation: Of every layer, for a kind that has one; None: the kind's own.
      spectral_radius: Of every layer's `W_hh`, for a kind that has one; None: as drawn.

    Raises:
      SettingError: For a kind that does not exist, and for a setting that it does not have.
    """
    whole("layers", layers), whole("hidden", hidden)
    make = LAYERS[one_of("of", of, LAYERS)]
    given = {"activation": activation, "spectral_radius": spectral_radius}
    settings = {name: value for name, value in given.items() if value is not None}
    for name, value in settings.items():
        if name not in inspect.signature(make).parameters:
            raise SettingError(name, value, f"null for of={of}, which has no such setting")
    sizes = [inputs, *[hidden] * (layers - 1)]
    return stack([make(size, hidden, **settings) for size in sizes])


def _check_fit(below: Cell, above: Cell, n: int) -> None:
    """SettingError unless cells[n] takes what the cell below it reads out."""
    key = jax.random.key(0)
    x = jax.eval_shape(lambda: below.read(below.zeros(1)))
    try:
        jax.eval_shape(lambda x: above.step(above.init(key), above.zeros(1), x), x)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        shown = f"one that does not take them ({reason})"
        allowed = f"a cell whose inputs are the {x.shape[-1]} numbers that cells[{n - 1}] reads out"
        raise SettingError(f"cells[{n}]", shown, allowed) from error
