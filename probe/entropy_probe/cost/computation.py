"""Floating-point operations of every stage: 2 for each multiply-add of a matrix product, and nothing else.

A forward of R rows of L tokens of which S are scored takes

    2·R·L·(weights of the linear layers) + 4·R·L²·a·layers + 2·R·S·h·V

of which a pass that reads prompts once has B·P and R·(T − 1) tokens, and so many queries of P + T keys (`scoring`); and
with a = heads·(size of a head): all L² pairs of tokens count, though a causal kernel may leave half of them out. Every
other pass is made of the same products, so many times (`Pass`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from entropy_probe.cost.sizes import Batch, Network, Run
from entropy_probe.stages.shared_prompts import FEWEST, MOST_SEEN, TOKENS, WORTH
from entropy_probe.stages.witnesses.properties import Case, Space, draw

_TOKENS = 4096  # of a pass without a graph, where `tf_batch_size` rows have fewer: stages/scores.py
LOGITS, _LOGIT_ROWS = 1 << 21, 64  # that are held at once: model/forward.py
_WITNESSED = 2  # units whose gradient is made by the loop
_PROJECTED = 2  # prompts of the other ways of a projection
_STEPPED = 2  # prompts of the real step, and responses of each
_LOOKED_UP = 4  # prompts of which one response says how far the slopes step: stages/slopes.py
_SOME_ROWS, _POSITIONS, _LOGIT_ETAS = 4, 8, 5  # of continuity: rows, and logits at ±η
_RESPONSES, _ETAS, _ETAS_THERE, _STENCILS = 4, 11, 8, 8  # of the Taylor tests
_PLAIN = 4  # responses of a prompt that are scored by the plain model: pipeline/again.py
_COLUMNS = 56  # that a drawn row has at most, on a model that takes as many
_INVARIANT_ROWS, _WHOLE = 3, 64  # of invariance: rows, and positions of one that are read at once


@dataclass(frozen=True)
class Pass:
    """How often each product of the forward is computed: y = xWᵀ with W frozen, and with W trained; attention's two;
    the output layer, frozen and trained. `again`: how often more that is computed where its graph is made of pieces."""

    frozen: float
    trained: float
    attention: float
    output: float
    output_trained: float
    again: int = 0


FORWARD = Pass(1, 1, 1, 1, 1)
# y = xWᵀ and ẏ = ẋWᵀ + xẆᵀ, of which a frozen W has no Ẇ (`model.precision.LeanTangents`)
JVP = Pass(2, 3, 3, 2, 3)
# the gradient of x, and of W; attention by the kernel that keeps its weights has four products in the backward
LOOP = Pass(2, 3, 3, 2, 3, again=1)
# the derivative of the backward's products towards the gradient alone, which α multiplies
ALPHA = Pass(3, 5, 5, 3, 5, again=1)
# the same towards x and W too, and a backward through the forward
SECOND = Pass(4, 9, 9, 4, 9, again=2)


# one more backward of a captured forward, and one more sum
AGAIN = Pass(1, 2, 2, 1, 2)


def capture(sums: int) -> Pass:
    """The gradient of x, and `sums` weighted sums of that of W."""
    return Pass(2, 2 + sums, 3 if sums == 1 else 3.5, 2, 2 + sums)


def of_pass(
    network: Network,
    kind: Pass,
    rows: float,
    length: float,
    scored: float,
    seen: float | None = None,
) -> float:
    """Flops of one pass over `rows` of `length`, each with `scored` positions; `seen`: keys that a query meets, where
    there are others than those of the row."""
    positions, output = rows * length, kind.output_trained if network.head_trained else kind.output
    linear = 2 * positions * (kind.frozen * network.frozen + kind.trained * network.trained)
    keys = length if seen is None else seen
    attention = kind.attention * 4 * positions * keys * network.attention * network.layers
    return linear + attention + output * 2 * rows * scored * network.hidden * network.vocabulary


def without_graph(network: Network, kind: Pass, batch: Batch, rows_at_once: int) -> float:
    """Flops of one pass over all rows of a batch, as many at once as `rows_without_graph` says."""
    columns = batch.sorted_by(rows_without_graph(batch, rows_at_once))
    return of_pass(network, kind, batch.rows, columns, batch.response)


def scoring(network: Network, run: Run, batch: Batch, kind: Pass = FORWARD) -> float:
    """Flops of one pass that scores a batch, or derives its scores along v: of whole rows, or of responses behind
    prompts that are read once."""
    if not shares_prompts(run, batch):
        return without_graph(network, kind, batch, run.rows_at_once)
    read = batch.responses.sorted_by(rows_without_graph(batch, run.rows_at_once)) - 1
    prompts = of_pass(network, kind, batch.prompts, batch.prompt, 0)
    seen = batch.prompt + read
    return prompts + of_pass(network, kind, batch.rows, read, batch.response, seen)


def shares_prompts(run: Run, batch: Batch) -> bool:
    """Whether prompts are read once (stages/shared_prompts.py), by a model that can."""
    if not run.share_prompts or batch.rows < FEWEST:
        return False
    at_once = rows_without_graph(batch, run.rows_at_once)
    read = batch.responses.sorted_by(at_once) - 1
    shared = batch.prompts * batch.prompt + batch.rows * read
    longest = batch.responses.longest_of(batch.rows)
    seen = min(at_once, batch.rows) * longest * (batch.prompt + longest)
    return shared <= WORTH * batch.rows * batch.sorted_by(at_once) and seen <= MOST_SEEN


def prompts_at_once(batch: Batch, rows_at_once: int) -> float:
    """Prompts that are read together."""
    rows = rows_without_graph(batch, rows_at_once)
    return max(1, min(batch.prompts, rows, TOKENS // max(batch.prompt, 1)))


def tried(network: Network, run: Run, batch: Batch) -> float:
    """Two responses of two prompts, in both ways, to see that they give the same."""
    some = batch.of(2)
    rows, read = some.prompts * min(some.group, 2), batch.response - 1
    behind = of_pass(network, FORWARD, rows, read, batch.response, batch.prompt + read)
    prompts = of_pass(network, FORWARD, some.prompts, batch.prompt, 0)
    return of_pass(network, FORWARD, rows, batch.length, batch.response) + prompts + behind


def rows_without_graph(batch: Batch, rows_at_once: int) -> float:
    """`tf_batch_size` rows, or up to 8 times as many where that is within 4096 tokens (stages/scores.py)."""
    fitting = _TOKENS // max(batch.longest, batch.length)
    return 1 if rows_at_once == 1 else max(rows_at_once, min(8 * rows_at_once, fitting))


def with_graph(network: Network, kind: Pass, run: Run, batch: Batch, rows_at_once: int) -> float:
    """The same where a graph is kept, `rows_at_once` rows at a time, those of a prompt together."""
    columns = batch.longest_of(min(batch.group, rows_at_once))
    if rows_at_once * batch.response > in_a_piece(network, run):
        kind = replace(
            kind, output=kind.output + kind.again, output_trained=kind.output_trained + kind.again
        )
    return of_pass(network, kind, batch.rows, columns, batch.response)


def in_a_piece(network: Network, run: Run, logits: int = LOGITS) -> int:
    """Positions that go through the output layer at once."""
    most = max(_LOGIT_ROWS, logits // network.vocabulary)
    return (
        most
        if run.logits_at_once is None
        else max(1, min(most, run.logits_at_once // network.vocabulary))
    )


def whole_columns(network: Network, run: Run, rows: int, columns: float) -> float:
    """Columns of so many rows whose whole logits are read: four pieces in all, or one of each (`spread_over`)."""
    most = max(1, 4 * (run.logits_at_once or LOGITS) // (rows * min(network.vocabulary, LOGITS)))
    return columns if columns <= most else math.ceil(columns / math.ceil(columns / most))


def some_rows(run: Run, most: int = _SOME_ROWS) -> int:
    """Rows of E on which continuity and invariance are checked."""
    return int(min(most, max(2, rows_without_graph(run.e, run.rows_at_once)), run.e.rows))


def flops(network: Network, run: Run) -> dict[str, float]:
    """By stage, as `timing` of the report names them, of the process that computes most (rank 0)."""
    e, u, at_once = run.own(run.e), run.own(run.update), run.rows_at_once
    scored = scoring(network, run, e)
    few = run.e.of(_STEPPED)
    few = replace(few, group=min(few.group, _STEPPED))
    of_few = without_graph(network, FORWARD, few, at_once)
    return {
        "integrity": 0.0,
        "rollouts": sum(sampling(network, run, batch) for batch in run.batches),
        "scores": scored + _scores_of_u(network, run, e, u),
        "gradients": _gradients(network, run, e, u),
        "slopes": _slopes(network, run, e) + _slope_products(network, run, e, u),
        "first order": _products(network, run),
        "update": 0.0,
        "entropy change": run.etas * scored,
        "real step": 0.0 if run.leaves_out("real step") else 4 * of_few,
        "witnesses": _witnesses(network, run),
        "evidence": _evidence(network, run),
        "properties": _properties(network, run),
        "continuity": _continuity(network, run),
    }


def _scores_of_u(network: Network, run: Run, e: Batch, u: Batch) -> float:
    """Of U, where it is another batch; and whether prompts can be read once is tried."""
    shared = shares_prompts(run, e) or (not run.same_batch and shares_prompts(run, u))
    found = tried(network, run, e) if shared else 0.0
    return found if run.same_batch else found + scoring(network, run, u)


GROWING = (
    "rollouts", "scores", "gradients", "slopes", "first order", "entropy change", "evidence"
)  # fmt: skip
"""The stages that grow with the number of prompts, and are split over processes; the others are on a few."""


def sampling(network: Network, run: Run, batch: Batch) -> float:
    """Every prompt read once, then token by token; and two prompts of E twice again, to see that they come again."""
    if not run.sampled:
        return 0.0
    own = run.own(batch)
    drawn = own.prompts + (4 if batch is run.e else 0)
    prompts = of_pass(network, FORWARD, drawn, own.prompt, 1)
    rows, mean_length = drawn * own.group, own.prompt + own.response / 2
    return (
        prompts
        + of_pass(network, FORWARD, rows * own.response, 1, 1)
        + (4 * rows * own.response * mean_length * network.attention * network.layers)
    )


def _gradients(network: Network, run: Run, e: Batch, u: Batch) -> float:
    """X and Y of U in one pass, or by Rao-Blackwell in two; X of E, and X̄ per token from the same forward."""
    once = with_graph(network, capture(1), run, u, run.rows_at_once)
    of_u = 2 * once if run.rb else with_graph(network, capture(2), run, u, run.rows_at_once)
    if run.same_batch:
        return of_u
    of_e = with_graph(network, capture(1), run, e, run.rows_at_once)
    if run.shares_a_forward(network):
        of_e += with_graph(network, AGAIN, run, e, run.rows_at_once)
    return of_u + of_e


def _products(network: Network, run: Run) -> float:
    """X_nᵀPY_m of all pairs of U, with P and without, and of E against U; of several processes the rows of the own
    units, or r_n from sums."""
    d, units = network.trainable, run.units_u
    own = -(-units // run.ranks)
    if run.paired(network):
        return 2 * d * units * (own + (0 if run.same_batch else -(-run.units_e // run.ranks)))
    if run.ranks > 1:
        return 2 * d * (2 * own + (0 if run.same_batch else own + -(-run.units_e // run.ranks)))
    return 2 * d * units * (2 * units + (0 if run.same_batch else run.units_e))


def _slopes(network: Network, run: Run, e: Batch) -> float:
    """D_v at θ ± hv in float64; at θ too where the run is in float64, else of one response of a few prompts."""
    of_all = scoring(network, run, e, JVP)
    if run.float64:
        return 3 * of_all
    few = without_graph(network, JVP, replace(e.of(_LOOKED_UP), group=1), run.rows_at_once)
    tried_again = tried(network, run, e) if shares_prompts(run, e) else 0.0
    return 2 * of_all + few + tried_again


def _slope_products(network: Network, run: Run, e: Batch, u: Batch) -> float:
    """X̄ per token by one more pass of E, where X did not bring it along, and its products and those of X̄; of one batch
    X_n per token too, and two slopes that are cross-fitted."""
    d, units = network.trainable, -(-run.units_u // run.ranks)
    found = 2.0 * (2 * d * units)
    if not run.shares_a_forward(network):
        found += with_graph(network, capture(1), run, e, run.rows_at_once)
    if run.same_batch:
        columns = run.units_u if run.ranks == 1 or run.paired(network) else 2
        found += 2 * (2 * d * units * columns)
        found += with_graph(network, capture(1), run, u, run.rows_at_once)
    return found


def _witnesses(network: Network, run: Run) -> float:
    """Two units by the loop, two prompts (or one block) by a JVP and by the α-trick, one twice in reverse."""
    of_units = run.update.of(_WITNESSED * -(-run.update.prompts // run.units_u))
    looped = with_graph(network, LOOP, run, of_units, 1) * (2 if run.rb else 1)
    if run.leaves_out("projections"):
        return looped
    few, at_once = (
        run.e.of(_PROJECTED if run.blocks is None else -(-run.e.prompts // run.units_e)),
        run.few_at_once,
    )
    short, ways = few.short, without_graph(network, JVP, few, run.rows_at_once)
    along_v = 2 * network.trainable * (-(-run.units_e // run.ranks) + _PROJECTED)
    if not run.second_order:
        return looped + ways + along_v
    ways += with_graph(network, ALPHA, run, short, at_once)
    if short != few:  # X and D along PȲ of the same rows
        ways += with_graph(network, capture(1), run, short, run.rows_at_once)
        ways += without_graph(network, JVP, short, run.rows_at_once)
    of_one = run.e.of(1)
    if run.leaves_out("curvature witness"):
        return looped + ways + along_v
    second = with_graph(network, SECOND, run, of_one.short, at_once)
    if of_one.short != of_one:  # the central difference, of the same rows
        second += 3 * without_graph(network, JVP, of_one.short, run.rows_at_once)
    return looped + ways + along_v + second


def _evidence(network: Network, run: Run) -> float:
    """The products of gradients once more; and by the plain model some responses of two prompts of each batch, those of
    E twice, one at a time with the logits of every position."""
    d, own = network.trainable, -(-run.units_u // run.ranks)
    of_all = run.ranks == 1 or run.paired(network)
    if of_all:
        own_e = 0 if run.same_batch else -(-run.units_e // run.ranks)
        products = own * (run.units_u + 1) + own_e * run.units_u
    else:
        products = 3 * own + (0 if run.same_batch else own + -(-run.units_e // run.ranks))
    if (
        run.same_batch
    ):  # with D, and with v₀, for the slope that is cross-fitted and for the one that predicts
        products += 2 * (own * run.units_u + own if of_all else 3 * own)
    total = 2.0 * d * products
    for batch in run.batches:
        rows = min(batch.prompts, 2) * min(batch.group, _PLAIN)
        scored = of_pass(network, FORWARD, rows, batch.length, batch.length)
        total += scored * (2 if batch is run.e else 1)
    return total


def _continuity(network: Network, run: Run) -> float:
    """Logits of 4 rows at six points; the Taylor tests on 4 responses; invariance on 3 rows."""
    e, models = run.e, 1 if run.float64 else 2
    rows = some_rows(run)
    longest = e.longest_of(rows)
    total = 6 * of_pass(network, FORWARD, rows, longest, whole_columns(network, run, rows, longest))
    if not run.leaves_out("taylor"):
        count = min(e.prompts, _RESPONSES)
        some = replace(e, prompts=count, group=min(e.group, -(-_RESPONSES // count)))
        points = 1 + _STENCILS + 2 * _ETAS + (models - 1) * (1 + _ETAS_THERE)
        total += points * without_graph(network, FORWARD, some, run.rows_at_once)
        total += without_graph(network, JVP, some, run.rows_at_once)
        total += (1 + 2 * _LOGIT_ETAS) * of_pass(
            network, FORWARD, rows, longest, min(_POSITIONS, longest)
        )
    rows, whole = some_rows(run, _INVARIANT_ROWS), min(_WHOLE, e.response)
    longest = e.longest_of(rows)
    alone = of_pass(network, FORWARD, rows, e.length, e.length)
    padded = of_pass(network, FORWARD, rows, longest, longest)
    together = of_pass(network, FORWARD, rows, longest, e.response)
    among = of_pass(network, FORWARD, rows, e.length, e.response)
    in_whole = of_pass(network, FORWARD, rows, e.prompt + whole, whole)
    return total + models * (2 * padded + alone + 2 * together + among + in_whole)


def drawn_cases(network: Network, run: Run) -> list[Case]:
    """Those of the drawn properties: lengths of rows, the same ones for a seed."""
    return draw(
        Space(network.vocabulary, _COLUMNS, tuple(map(str, range(network.tensors))), ()),
        run.cases,
        run.seed,
    )


def _properties(network: Network, run: Run) -> float:
    """The cases that are drawn: up to 8 rows of up to 48 tokens, the same for a seed whatever the model."""
    models, total = 1 if run.float64 else 2, 0.0
    for case in drawn_cases(network, run):
        rows, longest, alone = len(case.rows), max(case.lengths), case.lengths[case.chosen]
        width, own = min(longest + case.padding, _COLUMNS), case.rows[case.chosen].response
        responses = sum(row.response for row in case.rows) / rows
        of_model = (
            of_pass(network, FORWARD, 1, alone, alone)
            + 2 * of_pass(network, FORWARD, rows, width, width - 1)
            + of_pass(network, FORWARD, rows, longest, responses)
            + of_pass(network, FORWARD, 1, alone, own)
        )
        total += models * of_model + 2 * of_pass(network, FORWARD, 1, alone, alone)
        total += 2 * of_pass(
            network, FORWARD, rows, longest, whole_columns(network, run, rows, longest)
        )
    return total
