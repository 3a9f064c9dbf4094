"""Bytes that one of several processes sends, as a ring sends them: 2(N−1)/N of the length of each all-reduce.

sums of gradients      8·V·D, with V vectors: ΣX and ΣY of U and ΣX of E; four rows for the witness
Adam's moments         8 for each entry that is compared, 4096 of a tensor at most
of a response          8 for each number: sums of its scores, and its derivatives along v
of a token             8 for each number of the evidence: its scores, features and derivatives
of a prompt            8 for each number: projections by group of tensors, and by tensor for the evidence
of all pairs           Y of every unit, D numbers each, once for each matrix of products (`max_pairs_gib`)

Processes of one copy send nothing of D numbers: no sums of gradients, no rows, no Y.
"""

from __future__ import annotations

from dataclasses import dataclass

from entropy_probe.cost.sizes import Batch, Network, Run

_SUMS, _FEATURES = (
    5,
    7,
)  # of a response: S, log q, R, R of q, T; and Σφ, where a baseline may ask for it
_TOKEN = 6  # of a token: log p, log q, H and H of q; the mass before it in two orders
_ALONG = 8  # D_vS, D_vR, D²_vS, D²_vR; first and second derivative of what it says of ΔH and ΔL
_CHANGE = 2  # what it says of both at an η, and log p and H of every token there
_FOLDS, _OF_FOLD = (
    5,
    1 + 3 * _FEATURES + _FEATURES + 1 + _FEATURES * (_FEATURES + 1),
)  # estimators/baselines.py
_EMA, _GROUP = (
    2,
    9,
)  # sums a step: of `hk_ema`; of `hk_group`, for entropy and for length
_BASELINES = 5  # by each of which the slope of a prompt is known


@dataclass(frozen=True)
class Sent:
    """As `distributed` of the report has them."""

    bytes_sent_per_rank: float
    bytes_of_prompts_per_rank: float


def sent(network: Network, run: Run) -> Sent:
    """Of every process alike; 0 of one alone."""
    ring = 2 * (run.ranks - 1) / run.ranks
    of_batches = (2 if run.blocks else 1) * (2 if run.same_batch else 3)
    again = (2 if run.blocks else 1) if run.same_batch else 0
    again += 2  # of X per token: over units, which are the processes, and over prompts
    rows = 4 * (8 if run.float64 else 4)
    of_gradients = (8 * (of_batches + again) + rows) * network.trainable * (not run.one_copy)
    return Sent(ring * (of_gradients + 8 * network.entries), ring * _of_prompts(network, run))


def _steps(batch: Batch) -> float:
    """Tokens of its longest response."""
    return max(batch.response, batch.longest - batch.prompt)


def _of_prompts(network: Network, run: Run) -> float:
    e, u = run.e, run.update
    of_baselines = (_EMA + 2 * _GROUP) * _steps(e) + min(_FOLDS, e.prompts) * _OF_FOLD
    of_responses = e.rows * (1 + _SUMS + _FEATURES + run.etas * (_SUMS + _CHANGE) + _ALONG)
    if not run.same_batch:
        of_responses += u.rows * (_SUMS + (_FEATURES if run.rb else 0))
    paired, u_units = run.paired(network), run.units_u
    of_row = u_units if paired else 3  # what a unit of U says of its products: all of them, or sums
    across = run.units_e * u_units if paired else run.units_e + u_units
    of_units = u_units * (of_row * network.groups + (1 + of_row if run.same_batch else 0) + 1)
    if not run.same_batch:
        of_units += network.groups * across
    of_tokens = e.rows * _steps(e) * (_TOKEN + _FEATURES + 4 + run.etas * _CHANGE)
    if not run.same_batch:
        of_tokens += u.rows * _steps(u) * (_TOKEN + (_FEATURES if run.rb else 0))
        of_units += network.tensors * across + run.units_e
    of_units += u_units * (of_row * network.tensors + 3)
    if run.same_batch:
        of_units += u_units * 2 * (of_row * network.tensors + 1)
    tokens = sum(4 * batch.rows * batch.response for batch in run.batches) if run.sampled else 0.0
    return (
        8 * (of_tokens + of_responses + of_baselines + of_units + e.prompts * (_BASELINES + 1))
        + tokens
        + (_gradients(network, run) if paired and not run.one_copy else 0.0)
    )


def _gradients(network: Network, run: Run) -> float:
    """Y of U for U and E, each once for the figures and once for the evidence; of one batch for U and for two slopes
    that are cross-fitted."""
    matrices = 3 if run.same_batch else 2
    number = 8 if run.float64 else 4
    return 2 * matrices * run.units_u * network.trainable * number
