"""The vocabulary of the package: named tuples that the other modules fill in. There is no mathematics here.

Axes: T time steps, B sequences, D input features, H hidden units, Q outputs.
Everything is time-major, and floats follow JAX's default (`jax_enable_x64`).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Key, Shaped

Params = Any  # tree of arrays, named as the equations name them: params["cell"]["W_hh"]
State = Any  # tree of arrays [..., H]: the hidden state h, for the LSTM the pair (h, c)


class Batch(NamedTuple):
    """B sequences of T steps; the loss is the mean over the tokens where the mask is set.

    A masked target may be anything. A masked input is still an input: it must be finite, or an id that exists,
    such as 0, since the state passes through it.
    """

    inputs: Shaped[Array, "T B *D"]  # int [T, B]: rows of W_xh; float [T, B, D]: features
    targets: Shaped[Array, "T B *Q"]  # int [T, B]: classes; float [T, B, Q]: regression
    mask: Shaped[Array, "T B"]  # 1 where a token counts, 0 where it does not


class Derivative(NamedTuple):
    """The derivative of a pointwise update, written out where it stores less than `jax.vjp` does."""

    # (project, recur, h_{t-1}) -> (h_t, residuals: what else the VJP needs of this step)
    forward: Callable[[Any, Any, State], tuple[State, Any]]
    # (residuals, h_{t-1}, h_t), λ_t -> its cotangents for (project, recur, h_{t-1})
    vjp: Callable[[tuple[Any, State, State], State], tuple[Any, Any, State]]


class Affine(NamedTuple):
    """A step in three parts: h_t = update(project(θ, x_t), recur(θ, h_{t-1}), h_{t-1}).

    A cell that offers this form takes the fast path. The input's map needs no past, so one product serves
    all time steps; `recur` is affine in h, so its derivative is the same everywhere; `update` acts on each
    unit alone and uses no parameters, so its derivative stores no copy of them.
    Every function takes any leading axes: [B], [T, B], none.
    """

    project: Callable[[Params, Array], Any]  # x_t -> its part of the pre-activation
    recur: Callable[[Params, State], Any]  # h_{t-1} -> its part of the pre-activation
    update: Callable[[Any, Any, State], State]  # (project, recur, h_{t-1}) -> h_t
    derivative: Derivative | None = None  # of the update; None: `jax.vjp`

    def step(self, params: Params, state: State, x: Array) -> State:
        """Compute h_t = f(h_{t-1}, x_t).

        Args:
          params: The cell's parameters.
          state: h_{t-1}, leaves [B, H].
          x: x_t, int [B] or float [B, D].

        Returns:
          h_t, leaves [B, H].
        """
        return self.update(self.project(params, x), self.recur(params, state), state)


class Layers(NamedTuple):
    """The cells of a stack: at each step, the input of a cell is the output of the cell below it."""

    cells: "tuple[Cell, ...]"


class Cell(NamedTuple):
    """One time step of a recurrent network.

    `init`, `zeros`, `step` and `read` are enough; `affine` is the optional form of the fast path. Each promise
    that it makes is checked against `step`, and one that does not hold is an error.

    Every leaf of the state has the leading axis B, and `step` sees each sequence of a batch alone. A random
    cell, such as one with dropout, carries a key for each sequence in its state and splits it at every step.
    """

    init: Callable[[Key[Array, ""]], Params]
    zeros: Callable[[int], State]  # batch size -> h_0, the same for each sequence; most often 0
    step: Callable[[Params, State, Array], State]  # (θ, h_{t-1}, x_t) -> h_t
    read: Callable[[State], Float[Array, "... H"]]  # what the readout sees
    affine: Affine | Layers | None = None


class Readout(NamedTuple):
    """The map from hidden states to outputs, O = readout(H), [..., H] -> [..., Q]."""

    init: Callable[[Key[Array, ""]], Params]
    apply: Callable[[Params, Float[Array, "... H"]], Float[Array, "... Q"]]


class Problem(NamedTuple):
    """The network and its loss: a cell, a readout, and a loss per token, `loss(outputs, targets) -> [T, B]`."""

    cell: Cell
    readout: Readout
    loss: Callable[[Array, Array], Float[Array, "T B"]]

    def init(self, key: Key[Array, ""]) -> Params:
        """Draw initial parameters.

        Args:
          key: The key, of which the cell and the readout each get a half.

        Returns:
          The tree {"cell": …, "readout": …}.
        """
        cell, readout = jax.random.split(key)
        return {"cell": self.cell.init(cell), "readout": self.readout.init(readout)}


class Estimate(NamedTuple):
    """One gradient estimate; metrics are for looking at and are dropped inside a training loop."""

    loss: Float[Array, ""]  # mean over unmasked tokens, nats for cross-entropy
    grads: Params  # same tree as params
    # adjoint_norms [T, B]: ‖∂L/∂h_t‖ as the strategy sees it; cuts [T, B]: links that pass nothing
    metrics: dict[str, Array]


class LagWeights(NamedTuple):
    """The share of each lag that a truncation keeps on average, in closed form: E[ĝ] = Σ_s Σ_k w[s,k] G[s,k].

    G[s,k] is the gradient that the loss of step s sends k steps back into the cell's parameters. The weights
    depend neither on parameters nor on data. `window` is the mean of `weights` over s in an endless sequence:
    it holds for a long text that is cut at an arbitrary place. A strategy that draws lists its draws in
    `patterns`, or says how they spread.
    """

    window: Callable[[int], Float[Array, "K"]]  # K -> w_0 … w_{K-1}
    weights: Callable[[int, int], Float[Array, "T K"]]  # (T, K) -> w[s,k], s = 0 … T-1, for k ≤ s
    # T -> all draws of w for one sequence, for k ≤ s, and their probabilities. None: there is no draw
    patterns: Callable[[int], tuple[Float[Array, "N T T"], Float[Array, "N"]]] | None = None
    draws: int = 1  # number of such patterns that one estimate averages
    # T -> c: one draw's variance is Σ c times the table, for "flows" Σ c[j,t,u] ⟨F[j,t], F[j,u]⟩
    spread: Callable[[int], Float[np.ndarray, "T T *T"]] | None = None
    # "flows", "shared_flows" where all sequences of a batch share what is drawn, or "products" of lags,
    # functions of `lags`
    table: str = "flows"
    # uniform numbers in [0, 1) -> as many link weights ξ, for any axes after time. None: no ξ is drawn
    link_weights: Callable[[Float[Array, "T *n"]], Float[Array, "T *n"]] | None = None


class Claim(NamedTuple):
    """The promises of a strategy. `testing.check_strategy` checks them, and docs/strategies.md lists them."""

    exact: bool = False  # the estimate is the gradient
    unbiased: bool = False  # its mean over keys is the gradient
    memory: str = "T"  # states held at once, as a key of `testing.protocol_checks.GROWTH`
    per_token: int = 0  # numbers held for each token of a call beside those states, such as draws
    steps: str = "T"  # sequential steps of the backward pass
    source: str = ""
    lag_weights: LagWeights | None = None  # None: the estimate is no weighting of lags, or unknown
    # The gradient that `exact` and `unbiased` refer to. "call": of this call's loss, h_0 detached; "stream":
    # the same differentiated through all steps since the state was fresh, at these parameters.
    reach: str = "call"
    # a call of 12 steps is two of 6, the state handed on; nothing grows with T
    online: bool = False
    # kept per sequence beside the hidden state, the leaves of its state; None: 0
    numbers: int | None = None
    # derivatives that it takes: "reverse", "forward" (jvp) or "evaluations" (none)
    passes: str = "reverse"
    # σ of the smoothed gradient that it is unbiased for, see `strategies.perturbed`; None: the gradient itself
    smoothed: float | None = None
    # (steps, batch_size, params) -> shapes of its random signs, see `Strategy.given`
    noise: Callable[[int, int, Params], Any] | None = None
    held: int | None = None  # the number of states held at once, of a window or blocks
    period: int = 1  # the calls after which its work repeats, as one in so many does more


class Strategy(NamedTuple):
    """A gradient estimator: pure functions that jit, traced once for repeated calls.

    `init(params, batch_size)` is the zero state. `estimate(params, state, batch, key)` returns the
    estimate and the state after the last step, through which no gradient flows.
    """

    init: Callable[[Params, int], Any]
    estimate: Callable[[Params, Any, Batch, Key[Array, ""]], tuple[Estimate, Any]]
    claim: Claim = Claim()
    # (params, state, batch, noise) -> (Estimate, state). `estimate` draws the noise; here it is an argument, so
    # that a check can enumerate all its values
    given: Callable[[Params, Any, Batch, Any], tuple[Estimate, Any]] | None = None
    # (params, state) -> the state for fresh sequences, which keeps what has been learned. None: `init`
    renew: Callable[[Params, Any], Any] | None = None


class Level(NamedTuple):
    """The difficulty of the batches, if it depends on how well the network does; by default there is none.

    The level is a tuple of arrays. Training carries it from update to update and into checkpoints. An update
    whose batch has no token that counts does not change it. Each field is a function; `start` has no arguments
    and returns the first level.
    """

    start: Callable[[], Any] = tuple  # () -> the level before the first update
    # (level, metrics of an update, such as train_loss) -> the level after it
    advance: Callable[[Any, dict[str, Array]], Any] = lambda level, metrics: level
    # level -> numbers by name, which each log point shows
    scores: Callable[[Any], dict[str, Array]] = lambda level: {}


class Sampler(NamedTuple):
    """Training batches as a pure function of the update's number and the level, so that a whole run compiles.

    `sample(data, key, update, *level)` returns the batch and whether it is fresh: True where its
    sequences do not continue those of the update before, so that the state must start from zero. The
    arrays it reads are passed in as `data`, not closed over, or they would be constants of the program.
    """

    data: Any  # tree of arrays
    sample: Callable[..., tuple[Batch, Bool[Array, ""]]]
    continues: bool  # whether a batch may continue the one before it
    level: Level = Level()


class Text(NamedTuple):
    """The part of a task that only texts have: the symbols, and characters to start from."""

    alphabet: tuple[str, ...]  # symbol i of the inputs and outputs
    opening: str  # the first characters of the training part
    prefix: str  # the text that a sample continues, in symbols of the alphabet


class Task(NamedTuple):
    """Data with a known floor and ceiling; made by a factory in `bptt_study.tasks`."""

    inputs: int  # size of the alphabet for int inputs, number of features for float inputs
    outputs: int
    loss: Callable[[Array, Array], Array]
    steps: int | None  # length of a sequence where the task fixes it
    sampler: Callable[[int, int], Sampler]  # (steps, batch_size); SettingError if they do not fit
    validation: Batch  # all of it, as one batch of B sequences; state from zero, carried to the end
    # name -> validation loss of a reference model, nats per token; the largest is that of chance. Those named
    # uniform, unigram or nothing need no input: `learned` says whether a score lies below them
    references: dict[str, float]
    chance_accuracy: float | None  # a share from 0 to 1
    # columns of every result row: corpus, its SHA-256, …; numbers, texts, flags or None, and no other's name
    facts: dict[str, Any]
    text: Text | None = None
    # the name of the only cell that the task allows, with its values of the settings that both have. None: any
    cell: str | None = None
    readout: Readout | None = None  # the readout that the task brings. None: a linear one
    # the training part, laid out as `validation` is. None: no data come twice
    training: Batch | None = None
    # settings that change nothing in these data, and their value in every run, such as distinct=False
    unused: Mapping[str, Any] = MappingProxyType({})
