"""The columns of the tables, with units and meanings; the identity and the settings of a run as columns."""

import hashlib
import json
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd

from bptt_study.validation import SettingError


class Column(NamedTuple):
    """The description of a column."""

    # key: identifies the row; setting: part of the configuration; result: measured; cost: depends on the clock
    # and the machine, and so stands in provenance.json
    kind: str
    unit: str
    meaning: str
    group: str = ""  # the configuration group that it belongs to: of "task", a task may fill it in
    worst: float = math.inf  # the rank of a diverged seed: -inf if larger is better


def _columns(kind: str, text: str, group: str = "", worst: float = math.inf) -> dict[str, Column]:
    rows = (line.split("|") for line in text.strip().splitlines())
    return {
        name.strip(): Column(kind, unit.strip(), meaning.strip(), group, worst)
        for name, unit, meaning in rows
    }


COLUMNS: dict[str, Column] = {
    **_columns(
        "key",
        """
        study  | | the study that the run belongs to
        run    | | identity: hash of the resolved configuration, 12 hex digits
        seed   | | fixes initial weights, data and draws
        update | updates | number of updates of the parameters so far; 0 is the initial model
        """,
    ),
    **_columns(
        "setting",
        """
        task          | | char_lm, digits, copy, copy_curriculum, add, series, influence_balancing, or your own
        corpus        | | the text or the images
        corpus_sha256 | | SHA-256 of the corpus, UTF-8 bytes before any normalisation
        alphabet      | | letters: a-z and space; all: characters as they are
        distinct      | | whether each paragraph is read only once; False where none repeats, as in stdlib_docs
        sampling      | | sequential: state carried over; random: windows from state zero
        order         | | order of the pixels: rows or permuted
        lag           | time steps | lag of the dependency in the copy task
        t1            | time steps | lag of the bit that adds ½ to the probability in the add task
        t2            | time steps | lag of the bit that subtracts ¼ from it
        system        | | system of the series task: henon, lorenz or mackey_glass
        horizon       | time steps | time from the input to its target in the series task; negative: recall
        states        | | number of variables of the influence balancing task
        positive      | | number of variables on which the parameter acts as +1
        burn_in       | time steps | first steps of every update, whose losses do not count
        prefix        | | text that the sample continues
        symbols       | | number of different symbols in the copy task
        validation_fraction | | share of the data held out
        path          | | file of the corpus, if it was given
        """,
        "task",
    ),
    **_columns(
        "setting",
        """
        cell          | | mlp, linear, elman, gru, lstm, min_gru, lru, leaky, stacked, or your own
        hidden        | units | size of the hidden state
        activation    | | φ of the mlp, elman and leaky cells
        spectral_radius | | spectral radius of W_hh at the start (each gate's block); empty: as drawn
        input_scale   | | standard deviation of W_xh at the start; empty: 1/√inputs
        parameters    | | number of trained numbers
        theta         | | influence cell: its one parameter before training
        """,
        "cell",
    ),
    **_columns(
        "setting",
        """
        strategy      | | configuration name of the gradient estimator
        window        | time steps | k2 of TBPTT(k1, k2)
        stride        | time steps | k1 of TBPTT(k1, k2); equal to the window: chunks
        mean_length   | time steps | mean segment length of randomized truncation
        alpha         | | exponent of the power law
        compensate    | | whether adjoints that pass are scaled by 1/π
        draws         | | number of draws that one estimate of a randomized strategy averages
        block         | time steps | time between two updates of a carried influence; empty: the cheapest
        carried       | | whether an influence goes on from update to update
        rank          | | number of products that ok keeps, or rank of the rest that sketched keeps
        leak          | | leak of rflo's trace, per time step; empty: that of the cell
        feedback      | | exact: the readout's weights; random: fixed random weights
        shared        | | whether all sequences of a batch share one random influence
        decay         | | decay of pp_prop's traces, per time step
        truncation_length | time steps | window or mean_length; empty if a strategy has neither
        exact         | | the strategy's claim: it is the gradient
        unbiased      | | the strategy's claim: its mean over draws is the gradient
        """,
        "strategy",
    ),
    **_columns(
        "setting",
        """
        optimizer     | | configuration name
        learning_rate | | learning rate before the schedule
        clip_norm     | | global norm above which gradients are clipped; empty: never
        schedule      | | configuration name
        """,
        "optimizer",
    ),
    **_columns(
        "setting",
        """
        budget        | | configuration name
        logs          | | number of log points after the start
        steps         | time steps | time steps per update
        batch_size    | sequences | sequences per update
        updates       | updates | updates in the whole run
        divergence_bound | | multiple of the loss of chance above which a training loss counts as diverged
        split         | | number of parts of a batch, each on its own device; decides the last bits
        reset_every   | time steps | time between two resets of the state; empty: when the data start anew
        """,
        "budget",
    ),
    **_columns(
        "setting",
        """
        seeds         | | number of seeds of the run
        first_seed    | | the smallest seed
        snapshots     | | number of calls of the probes: 1 at the start, 2 at start and end, …
        sample_length | symbols | number of symbols that a text model writes after training
        environment | | settings of JAX that differ from its defaults, as JSON; only where there are any
        """,
    ),
    **_columns(
        "result",
        """
        loss_unit       | | nats for a cross-entropy; empty for a loss without a unit, as in regression
        tokens          | | time steps × sequences so far
        train_loss      | nats per token | mean over the updates since the row before, without those of no token
        validation_loss | nats per token | loss of the whole validation part; the state starts from zero
        perplexity      | | exp(validation_loss), if that is in nats
        bits_per_character | bits | validation_loss / ln 2, text only
        """,
    ),
    **_columns(
        "result",
        "accuracy | | share of validation tokens whose largest output is the target",
        worst=-math.inf,
    ),
    **_columns(
        "result",
        "longest | symbols | copy_curriculum: the largest length so far",
        "task",
        worst=-math.inf,
    ),
    **_columns(
        "result",
        """
        gradient_norm   | | global norm before clipping, mean over the same updates
        clipped_fraction | | share of the same updates that was clipped
        diverged        | | whether a loss or gradient norm is not finite, or a training loss beyond the bound
        diverged_at     | updates | the update that diverged and was not done, or that ruined the parameters
        stopped         | | probes: True if the parameters of the seed are of an older update, or not finite
        """,
    ),
    **_columns(
        "result",
        """
        uniform_loss    | nats per token | chance: every symbol equally likely
        nothing_loss    | nats per token | the lowest loss without the input
        t1_loss         | nats per token | add task: the lowest loss with x_{t-t1} alone
        t2_loss         | nats per token | add task: the lowest loss with x_{t-t2} alone
        both_loss       | nats per token | add task: the lowest loss of all
        unigram_loss    | nats per token | 1-gram model of the training part on the validation part
        bigram_loss     | nats per token | the same, n = 2
        trigram_loss    | nats per token | the same, n = 3
        fourgram_loss   | nats per token | the same, n = 4
        repeated        | | share of the 160-character passages of the validation part that stand verbatim in \
the training part; empty: a part is shorter
        chance_accuracy | | accuracy of always answering the most frequent target
        """,
        "task",
    ),
    **_columns(
        "result",
        """
        gradient_share    | | influence balancing: expected gradient ÷ full gradient; < 0 leads away from θ*
        turning_window    | time steps | the least whole window or mean length from which gradient_share is > 0
        predicted_window  | time steps | the same, for shares that training can tell from 0
        observed_window   | time steps | the least trained window from which all trained windows converge
        failed_windows    | time steps | the trained windows that do not converge
        converged_windows | time steps | the trained windows that converge
        unroll      | time steps | influence balancing: K of an update; the losses of `counted` steps count
        leads       | | where training leads: to θ*, away (a higher loss than at the start), or neither
        published   | | the same as published
        loss_to_rtrl | | last loss ÷ that of RTRL; loss_to_tbptt: ÷ that of BPTT through one step
        unrolls     | | perturbation noise: parts of a sequence, in each of which pes draws anew
        noise       | | variance of a perturbed pass ÷ squared norm of the gradient
        ratio       | | the same ÷ that of nres
        lower       | | whether the whole interval of the ratio lies below 1
        """,
    ),
    **_columns(
        "cost",
        """
        seconds  | s | training without compilation and validation; wall clock of the run ÷ seeds
        compile_seconds | s | tracing and compilation of the run, all seeds together
        device   | | kind of device
        processor | | the CPU: name, family and model
        threads  | | number of XLA's threads, that of all cores unless NPROC is set
        devices  | | number of devices over which the seeds, or the parts of a batch, were split
        launcher | | Hydra's launcher; seconds compare only between runs that ran alone
        python   | | version of Python
        jax      | | version of JAX
        optax    | | version of optax
        version  | | version of bptt_study
        commit   | | commit of the checkout, with + for uncommitted changes; empty: none
        """,
    ),
}

# columns of the probe estimator_quality, bias_variance and estimator_errors, beside the keys and settings above
BIAS_VARIANCE: dict[str, Column] = _columns(
    "result",
    """
    estimator  | | the strategy that was measured; `strategy` is the one that the run trained with
    length     | time steps | its window, mean length, block or hold; the rank of ok and sketched, the number \
of tangents of forward_gradient and of pairs of nres; empty: none
    setting    | | the name of the setting that the length is; empty: window or mean length, or none
    arithmetic | operations | floating-point operations of one estimate on a batch, without metrics; if values \
decide them, the mean over calls that follow each other: as many as the probe has draws, rounded up to whole \
periods of the strategy's claim (`adaptive` measures once in each)
    relative_arithmetic | | arithmetic ÷ that of full, the median over the seeds
    forward_arithmetic | operations | operations of running the states of a batch forward once
    states     | states of a sequence | the largest number of states held at once; for random cuts the mean \
over 1,000 draws, which are the same in all runs
    numbers    | | numbers of a sequence held at once: those states, and what the claim names beside them
    relative_numbers | | numbers ÷ that of full
    cost       | | frontiers.csv: arithmetic or numbers, each ÷ that of full, in the column relative_cost
    over       | | draws: the strategy on one batch, against the batch's gradient g; batches: E[ĝ] on each \
training batch, against their mean gradient; both: one draw on one batch, with both variances added
    bias2      | | ‖E[ĝ] - g‖²; over batches without the noise of the mean, so possibly below 0
    variance   | | E‖ĝ - E[ĝ]‖²
    mse        | | bias2 + variance
    relative_bias2    | | bias2 / norm2
    relative_variance | | variance / norm2
    relative_mse      | | mse / norm2
    norm2      | | ‖g‖² of the batch; over batches its mean
    cosine     | | cosine of E[ĝ] and g; over batches the mean cosine of a batch and the mean gradient
    exact      | | whether the variance over draws is in closed form; if not, it is sampled_variance
    sampled_bias2    | | the same number from draws or batches alone; with _low and _high its 95 % interval \
(jackknife over draws or batches), here and below
    sampled_variance | | the same
    sampled_mse      | | the same
    moment     | | start, middle, end of training; the update if there are more moments
    n          | seeds | number of seeds behind the median
    _low       | | lower end of the 95 % bootstrap interval of the median over seeds, as a suffix
    _high      | | upper end
    budget     | full gradients | arithmetic spent; 1 is a full gradient of one batch. In crossings.csv \
that from which the unbiased estimator has the smaller mse, 0: always, inf: never
    batches    | training batches | number of batches that the budget pays for
    best       | | whether this estimator has the least mse of all for the budget
    unbiased   | | the unbiased estimator that wins from there on
    rival      | | the biased estimator of the same length
    """,
)

OF_SEEDS = ("n", "values", "had", "median", "low", "high")  # columns of `tables.aggregate`
NORM_KEYS = ("study", "run", "task", "cell", "spectral_radius", "strategy", "truncation_length")
COST_KEYS = ("run", "seed", "update")


def identity(config: Mapping[str, Any]) -> str:
    """Compute the identity of a run, the hash of its resolved configuration.

    Args:
      config: The configuration, without results folder and launcher.

    Returns:
      12 hex digits.
    """
    canonical = json.dumps(config, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def settings(choices: Mapping[str, str], groups: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Write the configuration as columns: the chosen option of each group, and all its settings.

    A nested setting is a column under its full name, such as `optimizer.transform.b1`; a list becomes JSON.

    Args:
      choices: The chosen option of each group.
      groups: The settings of each group.

    Returns:
      The values by column.
    """
    row: dict[str, Any] = {}
    for group, values in groups.items():
        row |= {group: choices[group]} if group in choices else {}
        row |= {column(name): value for name, value in _leaves(group, values)}
    return row


def _leaves(name: str, node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the settings below a node with their full names, except Hydra's own (such as `_partial_`)."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            if not str(key).startswith("_") or key == "_target_":
                yield from _leaves(f"{name}.{key}", value)
    else:
        yield name, json.dumps(node) if isinstance(node, list) else node


def brought(where: str, values: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Check the columns that a task brings: they say nothing about anything else, and fit into a cell.

    Args:
      where: The part of the task, for messages, such as `task.facts`.
      values: The values by column.
      row: The other columns. The task may repeat what they say, and fill in its own empty settings.

    Returns:
      The values as plain numbers, texts, flags or None.

    Raises:
      SettingError: For a name of another column, and a value such as a list.
    """
    plain = {
        str(name): value.item() if getattr(value, "shape", None) == () else value
        for name, value in values.items()
    }
    for name, value in plain.items():
        if not isinstance(value, str | numbers.Real | None):
            raise SettingError(f"{where}.{name}", value, "a number, a text, a flag or null")
        check_cell(f"{where}.{name}", value)
        others = name in OF_SEEDS or (kind(name) is not None and group(name) != "task")
        if others or row.get(name) not in (None, value):
            way_out = "Another column has this name."
            raise SettingError(f"{where}.{name}", value, "named otherwise", way_out)
    return plain


def check_cell(name: str, value: Any) -> None:
    """Check that a table holds a value as it is.

    Raises:
      SettingError: For a text with a byte that was not UTF-8, and for a whole number beyond 2**53, which a
        column with gaps would round.
    """
    try:
        str(value).encode()
    except UnicodeEncodeError as error:
        raise SettingError(name, ascii(value), "a text in UTF-8") from error
    if isinstance(value, numbers.Integral) and abs(int(value)) > 2**53:
        raise SettingError(name, value, "a whole number of at most 2**53, or a text")


def kind(column: str) -> str | None:
    """Return the kind of a column: that in COLUMNS, or `setting` for a full name, or None."""
    return COLUMNS[column].kind if column in COLUMNS else "setting" if "." in column else None


def worst(column: str) -> float:
    """Return the rank of a diverged seed: -inf if larger is better, as COLUMNS says, or else inf."""
    return COLUMNS[column].worst if column in COLUMNS else math.inf


def exact(column: str) -> bool:
    """Return True if the numbers of a column keep all digits: a setting, or the length of `tables.lengths`."""
    return kind(column) == "setting" or column == "length"


def group(column: str) -> str:
    """Return the configuration group of a setting; empty if it has none."""
    return COLUMNS[column].group if column in COLUMNS else column.rpartition(".")[0].split(".")[0]


def column(setting: str) -> str:
    """Return the column of the setting `group.name`: its name alone if COLUMNS has it for this group."""
    owner, _, name = setting.rpartition(".")
    return name if name in COLUMNS and COLUMNS[name].group == owner else setting


def frame(constants: Mapping[str, Any], columns: Mapping[str, Any]) -> pd.DataFrame:
    """Make a table of `columns`, which vary, and `constants`, which do not, in the order of COLUMNS."""
    known = [name for name in COLUMNS if name in columns or name in constants]
    extra = [name for name in {**constants, **columns} if name not in COLUMNS]
    table = pd.DataFrame(dict(columns))
    values = {name: columns.get(name, constants.get(name)) for name in known + extra}
    return pd.DataFrame(values, index=table.index)


def split(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split the rows of a run into results and settings (rows.csv), and costs (costs.csv)."""
    cost = [name for name in rows if name in COLUMNS and COLUMNS[name].kind == "cost"]
    return rows.drop(columns=cost), rows[["study", *COST_KEYS, *cost]]
