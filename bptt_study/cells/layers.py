"""Layers: cells one above the other."""

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

MOST_LAYERS = (
    1000  # JAX traces each one apart, and the compiler's time grows faster than their number
)
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
    """Make one cell of several layers: the input of each layer at step t is the output of the layer below it.

    Args:
      cells: The layers, from the bottom up. Each may be any cell: one with `step` alone, or another stack.

    Returns:
      The cell. Its parameters are the list of the layers' parameters, each drawn from its own key. Its state
      is the tuple of their states, and its `read` is that of the top layer.

    Raises:
      SettingError: For no cell, and for a cell whose input does not fit the output of the cell below it.

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

    # if no layer has an affine form, layer by layer runs each step more often than all layers together
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
      layers: The number of layers.
      of: The kind of cell, a name of `LAYERS`.
      activation: φ of every layer, for a kind with an activation. None: the kind's default.
      spectral_radius: The radius of every layer's `W_hh` at the start, for a kind with one. None: as drawn.

    Returns:
      The cell, as `stack` makes it.

    Raises:
      SettingError: For a kind that does not exist, for a setting that the kind does not have, and for more than
        1000 layers.
    """
    whole("hidden", hidden)
    if whole("layers", layers) > MOST_LAYERS:
        raise SettingError("layers", layers, f"a whole number of at most {MOST_LAYERS}")
    make = LAYERS[one_of("of", of, LAYERS)]
    given = {"activation": activation, "spectral_radius": spectral_radius}
    settings = {name: value for name, value in given.items() if value is not None}
    for name, value in settings.items():
        if name not in inspect.signature(make).parameters:
            raise SettingError(name, value, f"null for of={of}, which has no such setting")
    sizes = [inputs, *[hidden] * (layers - 1)]
    return stack([make(size, hidden, **settings) for size in sizes])


def _check_fit(below: Cell, above: Cell, n: int) -> None:
    """Raise SettingError unless the input of cells[n] fits the output of the cell below it."""
    key = jax.random.key(0)
    x = jax.eval_shape(lambda: below.read(below.zeros(1)))
    try:
        jax.eval_shape(lambda x: above.step(above.init(key), above.zeros(1), x), x)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        shown = f"one that does not take them ({reason})"
        allowed = f"a cell whose inputs are the {x.shape[-1]} numbers that cells[{n - 1}] reads out"
        raise SettingError(f"cells[{n}]", shown, allowed) from error
