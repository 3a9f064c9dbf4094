"""Bytes of tensors: what is held through a run, and the most that every stage holds.

What the interpreter and its libraries take comes on top, some 0.4 GiB of a process on the CPU, and what the allocator
keeps of freed memory. Four kinds of things add up:

    held           θ, Adam's moments, gradients, P, v and the copy in float64: multiples of N and D (`held`)
    activations    of the rows that are computed together: multiples of h, f and heads·L for each token (`Kept`), and
                   in place of heads·L, where rows are long, of the scores of one block (`model/attention.py`)
    logits         of one piece of positions: multiples of V (`BYTES_OF_A_LOGIT`)
    whole logits   of a few rows, by the checks of continuity alone (`_whole`)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from entropy_probe.cost.computation import (
    LOGITS,
    drawn_cases,
    in_a_piece,
    prompts_at_once,
    rows_without_graph,
    shares_prompts,
    some_rows,
    whole_columns,
)
from entropy_probe.cost.sizes import Batch, Network, Run
from entropy_probe.model.attention import is_long, scores_of_a_block
from entropy_probe.stages import made


@dataclass(frozen=True)
class Kept:
    """Numbers for each token: multiples of h, of f (the gated MLP) and of heads·L (attention's weights); of every layer
    where a graph is kept, else of one, where MLP and attention follow one another. Of long rows no weights are kept,
    `blocks` multiples of the scores of one block are held, and `long` stands for h and f: the MATH kernel of short rows
    keeps q and k scaled too."""

    h: float
    f: float
    pairs: float
    in_every_layer: bool
    blocks: float = 0.0
    long: tuple[float, float] | None = None

    def numbers(
        self, network: Network, rows: float, length: float, *, again: bool = False
    ) -> float:
        """Of all tokens of so many rows; `again`: layers keep their inputs, and one at a time is run again."""
        tokens, scores, h, f = rows * length, rows * network.heads * length**2, self.h, self.f
        of_weights, of_block = self.pairs * scores, 0.0
        if is_long(int(scores)):
            of_weights, of_block = 0.0, self.blocks * scores_of_a_block(scores, length)
            h, f = self.long or (h, f)
        of_states, of_mlp = h * network.hidden * tokens, f * network.intermediate * tokens
        if not self.in_every_layer:
            return of_states + max(of_mlp, of_weights + of_block)
        of_layer = of_states + of_mlp + of_weights
        if again:
            return INPUTS * network.hidden * network.layers * tokens + of_layer + of_mlp / f
        return of_layer * network.layers + of_block


# Measured by counting live tensors on Qwen2 with LoRA on all linear layers: 4 and 8 layers, h 128 and 256, f 384 and
# 768, 4 heads, L 128 and 256. They hold to 10 % there, and are those of Llama (`tests/test_cost.py` counts again).
FORWARD = Kept(4, 4, 0, in_every_layer=False)
JVP = Kept(8, 12, 7, in_every_layer=False, blocks=7)
CAPTURE = LOOP = Kept(9, 5, 0, in_every_layer=True)
# where the true derivative is asked for, attention of short rows keeps its weights
BY_WEIGHTS = Kept(9, 5, 1, in_every_layer=True, long=(8, 4.5))
ALPHA = Kept(19, 12, 4, in_every_layer=True, blocks=8)
SECOND = Kept(20, 12, 5, in_every_layer=True, blocks=8)
# Of h for each token of a response behind a prompt that is read already: while it attends, and in the MLP. Measured in
# the same way, with 2 and 4 prompts of 20 to 200 tokens and responses of 20 to 80.
_ATTENDING, _BEHIND = 7, 5.7
INPUTS = 1.4  # of h for each token and layer, where layers are run again: x, and what else they are given

# Bytes for each logit of a piece, with its temporaries; of a forward in float32, 4 more in float64. Of U, Σ_i p_i S_i
# takes most.
BYTES_OF_A_LOGIT = {
    "forward": 20,
    "mass": 20,
    "mean_s": 28,
    "jvp": 32,
    "capture": 12,
    "loop": 36,
    "alpha": 32,
    "second": 40,
}
# The same where entropy is differentiated, token by token (`estimator: rb`).
BYTES_WITH_ENTROPY = {"capture": 24, "loop": 40}
# Of every logit of a pass: what the graph of a gradient keeps of all pieces; with entropy where it is in there.
BYTES_IN_GRAPH = {"alpha": 9, "second": 25}
BYTES_IN_GRAPH_WITH_ENTROPY = {"alpha": 25}
_DIFFERENTIATED = 3 << 21  # logits of a piece: model/forward.py
_IN_FLOAT64 = (
    1 << 22
)  # numbers of the rows of all units that are multiplied at once: stages/gradients.py


def held(network: Network, run: Run) -> dict[str, float]:
    """What stays in memory from where it is made to the end, by name (v₀, D and X per token up to the evidence).

    Of processes of one copy the part of each: a machine holds so many times as much.
    """
    n, d, dtype = network.parameters, network.trainable, _dtype(run)
    together = run.ranks if run.one_copy else 1
    few = d <= made.FEW
    if run.one_copy:
        own_u, own_e, sums = run.units_u / together, run.units_e / together, 0
    else:
        own_u, own_e = -(-run.units_u // run.ranks), -(-run.units_e // run.ranks)
        sums = 8 * d * (2 if run.same_batch else 4) * (run.ranks > 1)
    means = 8 * d * (2 if run.same_batch else 3) * (run.one_copy and few)  # X̄ and Ȳ of U, X̄ of E
    rows = 0 if run.on_disk else dtype * d * (2 * own_u + (0 if run.same_batch else own_e))
    crossed = dtype * d * own_u if run.same_batch and not run.on_disk else 0
    lent = run.one_copy and 2 * d < n
    in_float64 = 0 if run.float64 else _in_float64(network, replace(run, lent=run.lent or lent))
    return {
        "θ": (dtype * n + (4 * n if run.float64 else 0)) / together,
        "moments": 8 * d / together,
        "X, Y": rows + sums + means / together,
        "θ in float64": in_float64 / (1 if lent else together),
        "Ȳ": 8 * d if run.ranks == 1 and few else 0,
        "P": 8 * d / together if few else 0,
        "v": 8 * d / together,
        "v₀, D": 16 * d / together if few else 0,
        "X per token": (8 * d / together if few else 0 if run.on_disk else dtype * d) + crossed,
    }


def _in_float64(network: Network, run: Run) -> float:
    """A copy of all; where frozen parameters are lent, of what is trained and of one layer, or of the output layer."""
    if not run.lent or network.parameters == network.trainable:
        return 8 * network.parameters
    of_layer = network.frozen / network.layers
    return 8 * (network.trainable + max(of_layer, network.hidden * network.vocabulary))


_MADE_IN = {
    "scores": ("θ in float64",),
    "gradients": ("X, Y",),
    "first order": ("Ȳ", "P"),
    "update": ("v", "v₀, D"),
    "entropy change": ("X per token",),
}
_ORDER = (
    "scores", "gradients", "first order", "update", "slopes", "entropy change", "real step", "witnesses",
)  # fmt: skip
_OF_THE_STEP = ("v₀, D", "X per token")  # is gone once the evidence is made
_OF_ALL = ("scores", "gradients", "first order", "slopes", "entropy change")
"""Stages in which all processes take part; what others hold beside what they keep, rank 0 holds alone."""
_IN_MEMORY = ("moments", "X, Y", "Ȳ", "P", "v", *_OF_THE_STEP)


def peaks(network: Network, run: Run, *, on_accelerator: bool = False) -> dict[str, float]:
    """The most that each stage holds, with all that is held by then; `on_accelerator`: there, without what stays in
    memory beside it."""
    parts, above = held(network, run), _above(network, run, there=on_accelerator)
    if on_accelerator:
        parts |= dict.fromkeys(_IN_MEMORY, 0)
        if run.one_copy:  # a layer at a time, in either precision
            parts |= {"θ": 8 * _lent_at_once(network), "θ in float64": 0}
    return _with_held(parts, above)


def of_machine(network: Network, run: Run, *, on_accelerators: bool = False) -> dict[str, float]:
    """The most that all processes of a machine hold together in its memory, by stage; `on_accelerators`: beside what
    these hold, which is θ too where each process has a model of its own."""
    of_each, above = held(network, run), _above(network, run, there=False)
    if on_accelerators:
        if not run.one_copy:
            of_each |= {"θ": 0.0, "θ in float64": 0.0}
        above = dict.fromkeys(above, 0.0)
        if run.one_copy:  # θ + ηv is beside θ
            bytes_of = {"slopes": 8, "entropy change": _dtype(run), "real step": 8, "continuity": 8}
            above |= {stage: of * network.trainable / run.ranks for stage, of in bytes_of.items()}
    parts = {name: run.ranks * of for name, of in of_each.items()}
    together = {stage: (run.ranks if stage in _OF_ALL else 1) * of for stage, of in above.items()}
    return _with_held(parts, together)


def _lent_at_once(network: Network) -> float:
    """Numbers of the largest part that is lent: a layer, or the output layer."""
    of_layers = (network.frozen + network.trained) / network.layers
    return max(of_layers, network.hidden * network.vocabulary)


def _with_held(parts: dict[str, float], above: dict[str, float]) -> dict[str, float]:
    found, now = dict[str, float](), parts["θ"] + parts["moments"]
    for stage in _ORDER:
        now += sum(parts[name] for name in _MADE_IN.get(stage, ()))
        found[stage] = now + above[stage]
    now -= sum(parts[name] for name in _OF_THE_STEP)
    return found | {stage: now + above[stage] for stage in ("properties", "continuity")}


def _dtype(run: Run) -> int:
    return 8 if run.float64 else 4


def _above(network: Network, run: Run, *, there: bool) -> dict[str, float]:
    """By stage, beside what is held; `there`: on an accelerator, to which v is copied and from which sums are moved."""
    d, own_e, own_u = network.trainable, run.own(run.e), run.own(run.update)
    bytes_of, units = _dtype(run), -(-run.units_u // run.ranks)
    few, jvp = (
        d <= made.FEW,
        _moved(network, run, 8, there) + _derived(network, run, own_e),
    )
    scored = _transient(network, run, FORWARD, own_e, bytes_of, "forward")
    at_once = run.rows_at_once
    of_u = (
        min(at_once, run.e.group * -(-run.update.prompts // run.units_u)) if run.blocks else at_once
    )
    of_e = min(at_once, run.e.group * -(-run.e.prompts // run.units_e)) if run.blocks else at_once

    def sums(sides: int, rows: int) -> float:
        """Gradients of the units of so many rows, before they are moved."""
        together = 1 if run.blocks else max(1, rows // run.e.group)
        return bytes_of * d * sides * together if there else 0.0

    above = {
        "scores": max(
            _transient(network, run, FORWARD, own_u, bytes_of, "mean_s"),
            _transient(network, run, FORWARD, own_e, bytes_of, "mass"),
        ),
        "gradients": max(
            sums(1 if run.rb else 2, of_u)
            + graph_of(
                network, run, BY_WEIGHTS if run.rb else CAPTURE, own_u, of_u, bytes_of, "capture"
            ),
            0.0
            if run.same_batch
            else sums(1, of_e)
            + graph_of(
                network,
                run if not run.shares_a_forward(network) else replace(run, rb=True),
                BY_WEIGHTS,
                own_e,
                of_e,
                bytes_of,
                "capture",
            ),
        ),
        "first order": 0.0
        if there
        else max(  # a mean; or rows in float64, twice
            8 * (d if few else network.largest),
            16 * min(units * network.largest, _IN_FLOAT64),
        ),
        "update": 0.0 if there else 10 * 8 * network.largest,  # torch's own step of one tensor
        # X per token, and one tensor of D, which is made as in the update, by rows of U
        "slopes": max(
            jvp, held(network, run)["X per token"] + (0.0 if there else 10 * 8 * network.largest)
        ),
        "entropy change": _moved(network, run, bytes_of, there, ways=1) + scored,
        "real step": 0.0,
        "witnesses": _witnesses(network, run, there=there),
        "properties": _properties(network, run),
        "continuity": _continuity(network, run, jvp),
    }
    if not run.leaves_out("real step"):
        above["real step"] = real_step(network, run)
    return above


def real_step(network: Network, run: Run) -> float:
    """A copy, and one tensor's gradient and moments, or a pass in float64."""
    scored = _transient(network, run, FORWARD, run.e.of(4), 8, "forward")
    return 8 * network.trainable + max(4 * 8 * network.largest, scored)


def _moved(network: Network, run: Run, bytes_of: int, there: bool, ways: int = 2) -> float:
    """θ + ηv, and v where there are two `ways`, for a pass of all processes."""
    if not run.one_copy:
        return _point(network, bytes_of, there) if ways == 2 else bytes_of * network.trainable
    return (
        ways * bytes_of * _lent_at_once(network)
        if there
        else bytes_of * network.trainable / run.ranks
    )


def _point(network: Network, bytes_of: int, there: bool) -> float:
    """θ + ηv and v where a JVP is: v in another precision, or on an accelerator, is a copy."""
    return bytes_of * network.trainable * (2 if there or bytes_of == 4 else 1)


def _transient(
    network: Network, run: Run, kept: Kept, batch: Batch, bytes_of: int, read: str
) -> float:
    """Without a graph: the activations of a layer, or the hidden states and a piece of logits."""
    if kept is FORWARD and shares_prompts(run, batch):
        return behind_prompts(network, run, batch, bytes_of, read)
    rows = min(rows_without_graph(batch, run.rows_at_once), batch.rows)
    columns = batch.longest_of(rows)
    states = rows * columns * network.hidden * bytes_of
    logits = states + _piece(network, run, rows * batch.response, bytes_of, read)
    return max(kept.numbers(network, rows, columns) * bytes_of, logits)


def _piece(network: Network, run: Run, positions: float, bytes_of: int, read: str) -> float:
    """The logits of so many positions, or of those that are read at once."""
    of_logit = BYTES_OF_A_LOGIT[read] + (bytes_of - 4 if read == "forward" else 0)
    return min(positions, in_a_piece(network, run)) * network.vocabulary * of_logit


def _derived(network: Network, run: Run, batch: Batch) -> float:
    """Derivatives along v in float64: of one whole row of each prompt, then of all."""
    if not shares_prompts(run, batch):
        return _transient(network, run, JVP, batch, 8, "jvp")
    few = _transient(network, run, JVP, replace(batch, group=1), 8, "jvp")
    return max(few, derived_behind_prompts(network, run, batch))


def derived_behind_prompts(network: Network, run: Run, batch: Batch) -> float:
    """As `behind_prompts`, with tangents, in float64."""
    h, at_once = network.hidden, _Behind.of(network, run, batch)
    weights = JVP.pairs * network.heads * at_once.columns * at_once.keys
    attending = JVP.h * h * at_once.tokens + 2 * at_once.met + weights
    of_mlp = (JVP.h * h + JVP.f * network.intermediate) * at_once.tokens
    of_prompts = JVP.numbers(network, at_once.prompts, batch.prompt)
    numbers = 2 * at_once.held + max(of_prompts, attending, of_mlp)
    logits = _piece(network, run, at_once.rows * batch.response, 8, "jvp")
    return max(8 * numbers, 8 * (2 * at_once.held + 4 * at_once.tokens * h) + logits)


def behind_prompts(network: Network, run: Run, batch: Batch, bytes_of: int, read: str) -> float:
    """Keys and values of the prompts that are read together; beside them the activations of a layer, of prompts or of
    responses with the keys and values that they meet, or hidden states and a piece of logits."""
    h, at_once = network.hidden, _Behind.of(network, run, batch)
    seen = at_once.columns * at_once.keys  # a mask of bools, and of numbers while a kernel adds it
    attending = _ATTENDING * h * at_once.tokens + at_once.met + seen
    of_mlp = (_BEHIND * h + FORWARD.f * network.intermediate) * at_once.tokens
    of_prompts = FORWARD.numbers(network, at_once.prompts, batch.prompt)
    numbers = at_once.held + max(of_prompts, attending, of_mlp)
    logits = _piece(network, run, at_once.rows * batch.response, bytes_of, read)
    states = (at_once.held + 2 * at_once.tokens * h) * bytes_of
    return max(numbers * bytes_of + seen, states + logits)


@dataclass(frozen=True)
class _Behind:
    """Prompts, and rows of `columns` tokens behind them, that are read together: all their `tokens`, and the `keys`
    that each row sees. Numbers of the prompts' keys, values and last states (`held`), and of a layer's keys and values
    that the rows have `met`."""

    prompts: float
    rows: float
    columns: float
    tokens: float
    keys: float
    held: float
    met: float

    @classmethod
    def of(cls, network: Network, run: Run, batch: Batch) -> _Behind:
        prompts = prompts_at_once(batch, run.rows_at_once)
        rows = min(rows_without_graph(batch, run.rows_at_once), prompts * batch.group)
        columns = batch.responses.longest_of(rows) - 1
        keys = rows * (batch.prompt + columns)
        held = prompts * batch.prompt * (2 * network.layers * network.keys + network.hidden)
        repeated = network.attention if network.keys < network.attention else 0
        met = 2 * (network.keys + repeated) * keys
        return cls(prompts, rows, columns, rows * columns, keys, held, met)


def graph_of(
    network: Network, run: Run, kept: Kept, batch: Batch, rows: int, bytes_of: int, read: str
) -> float:
    """The graph of so many rows, and a piece of logits, or what is kept of all."""
    rows = min(max(rows // batch.group * batch.group, min(rows, batch.group)), batch.rows)
    columns, logits = batch.longest_of(rows), _DIFFERENTIATED if read == "capture" else LOGITS
    positions = min(rows * batch.response, in_a_piece(network, run, logits))
    of_piece, in_graph = BYTES_OF_A_LOGIT, BYTES_IN_GRAPH
    if run.rb:
        of_piece, in_graph = of_piece | BYTES_WITH_ENTROPY, in_graph | BYTES_IN_GRAPH_WITH_ENTROPY
    in_all = rows * batch.response * in_graph.get(read, 0) * network.vocabulary
    of_logits = positions * of_piece[read] * network.vocabulary
    again = run.recompute and read in ("capture", "loop")
    graph = bytes_of * kept.numbers(network, rows, columns, again=again)
    if read == "alpha":  # pieces are read while there is the forward's graph alone
        forward = bytes_of * BY_WEIGHTS.numbers(network, rows, columns)
        return in_all + max(graph, forward + of_logits)
    return in_all + graph + of_logits


def _witnesses(network: Network, run: Run, *, there: bool) -> float:
    """Rows of two units in two ways, with the graph of one response; or a few prompts differentiated twice."""
    d, bytes_of = network.trainable, _dtype(run)
    # X and Y of two units by the loop, and of several processes those beside them
    rows = 0 if there or run.on_disk else (8 if run.ranks > 1 else 4)
    products = 0 if there else 16 * min(2 * network.largest, _IN_FLOAT64)
    looped = rows * bytes_of * d + max(products, loop(network, run))
    if run.leaves_out("projections"):
        return looped
    direction = 8 * d if not there and d <= made.FEW else 0
    by_jvp = direction + _point(network, bytes_of, there)
    by_jvp += _transient(network, run, JVP, run.e.of(2), bytes_of, "jvp")
    if not run.second_order:
        return max(looped, by_jvp)
    ways = max(looped, by_jvp, direction + alpha(network, run))
    if run.leaves_out("curvature witness"):
        return ways
    return max(ways, second(network, run, there=there))


def loop(network: Network, run: Run) -> float:
    """The graph of one response, or its gradient: the one is freed as the other is made."""
    bytes_of = _dtype(run)
    graph = graph_of(network, run, LOOP, run.update, 1, bytes_of, "loop")
    return max(graph, bytes_of * network.trainable)


def alpha(network: Network, run: Run) -> float:
    """v in the precision of the gradient, the gradient, and what its derivative keeps of both."""
    bytes_of, few = _dtype(run), run.e.of(2).short
    graph = graph_of(network, run, ALPHA, few, run.few_at_once, bytes_of, "alpha")
    return 4 * bytes_of * network.trainable + graph


def second(network: Network, run: Run, *, there: bool) -> float:
    """θ + ηv and the gradient in float64; on an accelerator v, which is in memory elsewhere."""
    few = run.e.of(1).short
    graph = graph_of(network, run, SECOND, few, run.few_at_once, 8, "second")
    return (24 if there else 16) * network.trainable + graph


def _whole(
    network: Network, run: Run, rows: int, columns: float, bytes_of: int, sets: int = 3
) -> float:
    """Three sets of whole logits, as two are compared."""
    columns = whole_columns(network, run, rows, columns)
    return sets * bytes_of * rows * columns * network.vocabulary


def _continuity(network: Network, run: Run, jvp: float) -> float:
    """θ + ηv in float64 and logits of 4 rows, at θ, at two steps and their difference; with the Taylor tests a JVP."""
    rows = some_rows(run)
    columns = run.e.longest_of(rows)
    of_layer = FORWARD.numbers(network, rows, columns) * 8
    compared = 8 * network.trainable + max(_whole(network, run, rows, columns, 8, sets=4), of_layer)
    return compared if run.leaves_out("taylor") else max(compared, jvp)


def _properties(network: Network, run: Run) -> float:
    """The drawn case with most tokens: all rows in the configured dtype, one in float64 while all are scored."""
    most = 0.0
    for case in drawn_cases(network, run):
        rows, longest, alone = len(case.rows), max(case.lengths), case.lengths[case.chosen]
        pieces = min(rows * longest, in_a_piece(network, run)) * 2 * BYTES_OF_A_LOGIT["forward"]
        scored = (8 * alone + pieces) * network.vocabulary
        most = max(most, _whole(network, run, rows, longest, _dtype(run)), scored)
    return most
