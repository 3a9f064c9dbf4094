"""What a score must not depend on: padding, neighbours in the batch, the pieces in which logits are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from entropy_probe.config import ProbeConfig
from entropy_probe.estimators.policy import score_tokens
from entropy_probe.model.forward import BoundModel
from entropy_probe.report import InvarianceSection, WorstCase
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.steps import left_padded
from entropy_probe.stages.rounding import rounding
from entropy_probe.stages.scores import policy_scores, read_rows, rows_without_graph

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_ROWS = 3
_PIECE = 5
_WHOLE = 64  # positions of a row whose logits are held in one piece


def invariance(
    bound: BoundModel, float64: BoundModel, rollouts: Rollouts, config: ProbeConfig
) -> InvarianceSection:
    """Rows of different length, scored in ways that must agree, in true float64 and in the configured dtype:

        padding    alone and unpadded  =  together, padded right  =  together, padded left
        batch      `score_rows` alone  =  `score_rows` among the other rows
        chunk      whole logits        =  `score_rows` in pieces of 5 positions

    Masked attention adds terms of exactly zero, and a row's numbers are products with its own row alone: only the order
    of summation may change, and with it the last digits.
    """
    models = [float64] if bound.dtype is float64.dtype else [float64, bound]
    chosen = _some_rows(rollouts, config)
    with torch.no_grad():
        together = {model.dtype: generated(model, rollouts, chosen, config) for model in models}
    return InvarianceSection(
        padding=nearest(*(padding(model, rollouts, config) for model in models)),
        batch=nearest(*(batch(m, rollouts, config, together[m.dtype]) for m in models)),
        chunk=nearest(*(chunk(model, rollouts, config) for model in models)),
        precision=precision(bound, float64, rollouts, together),
        zero_step=None,
        scaling=None,
        num_examples=0,
    )


def nearest(*found: WorstCase) -> WorstCase:
    """The one that comes closest to its bound; the first of equals."""
    return max(found, key=lambda worst: worst.share)


@torch.no_grad()
def padding(model: BoundModel, rollouts: Rollouts, config: ProbeConfig) -> WorstCase:
    """Every token but the first of a row: alone, against all rows together padded right and padded left."""
    chosen = _some_rows(rollouts, config)
    totals = (rollouts.prompt_lens + rollouts.gen_lens)[chosen].tolist()
    rows = [
        rollouts.ids[i, :total].tolist() for i, total in zip(chosen.tolist(), totals, strict=True)
    ]
    longest = max(totals)
    padded = longest + 3
    width = max(longest, min(padded, model.longest_row or padded))
    right, left, mask = padded_to(rows, width)

    def differences() -> Iterator[tuple[str, Tensor, Tensor]]:
        of_right, of_left = every_token(model, right, None), every_token(model, left, mask)
        for i, row in enumerate(rows):
            alone = every_token(model, torch.tensor([row]), None)[0]
            where = f"row {int(chosen[i])} of {len(row)} tokens"
            yield f"{where}, padded right", alone, of_right[i, : len(row) - 1]
            yield f"{where}, padded left", alone, of_left[i, width - len(row) :]

    return worst_difference(model, width, differences())


@torch.no_grad()
def batch(
    model: BoundModel,
    rollouts: Rollouts,
    config: ProbeConfig,
    among: Float[Tensor, "R T 3"] | None = None,
) -> WorstCase:
    """The generated tokens of a row: alone, against the row `among` the others."""
    chosen = _some_rows(rollouts, config)

    def differences() -> Iterator[tuple[str, Tensor, Tensor]]:
        together = generated(model, rollouts, chosen, config) if among is None else among
        for i, row in enumerate(chosen):
            alone = generated(model, rollouts, row[None], config)[0]
            yield f"row {int(row)} among {len(chosen)}", alone, together[i, : len(alone)]

    return worst_difference(model, rollouts.ids.shape[1], differences())


@torch.no_grad()
def chunk(model: BoundModel, rollouts: Rollouts, config: ProbeConfig) -> WorstCase:
    """The generated tokens of a row: scored from whole logits, against scores read in small pieces."""
    policy = config.generation
    chosen = _some_rows(rollouts, config)

    def differences() -> Iterator[tuple[str, Tensor, Tensor]]:
        pieces = generated(model, rollouts, chosen, config, rows_at_once=_PIECE)
        for i, row in enumerate(chosen.tolist()):
            first, last = (
                int(rollouts.prompt_lens[row]),
                int((rollouts.prompt_lens + rollouts.gen_lens)[row]),
            )
            last = min(last, first + min(_WHOLE, model.positions_at_once(model.num_logits)))
            ids = rollouts.ids[row : row + 1, :last].to(model.device)
            logits = model.logits(ids, keep=slice(first - 1, last - 1))
            whole = scored_whole(logits, ids[:, first:], policy.temperature)[0]
            yield f"row {row} in pieces of {_PIECE}", whole, pieces[i, : len(whole)]

    return worst_difference(model, rollouts.ids.shape[1], differences())


@torch.no_grad()
def precision(
    bound: BoundModel,
    float64: BoundModel,
    rollouts: Rollouts,
    together: Mapping[torch.dtype, Float[Tensor, "R T 3"]],
) -> WorstCase:
    """The generated tokens of some rows `together`: in the configured precision, against true float64."""
    reference, configured = together[float64.dtype], together[bound.dtype]
    where = f"{len(reference)} rows against float64"
    return worst_difference(bound, rollouts.ids.shape[1], [(where, reference, configured)])


def padded_to(
    rows: list[list[int]], width: int
) -> tuple[Int[Tensor, "R W"], Int[Tensor, "R W"], Int[Tensor, "R W"]]:
    """(rows padded right, rows padded left, mask of the latter), `width` columns each."""
    widest = [*rows, [0] * width]  # makes the others as wide, and is dropped
    right = pad_sequence(list(map(torch.tensor, widest)), batch_first=True)[:-1]
    left, mask = (padded[:-1] for padded in left_padded(widest, pad=0))
    return right, left, mask


def _some_rows(rollouts: Rollouts, config: ProbeConfig) -> Tensor:
    """The shortest row, the longest and one of a length between; as many as a pass may have, but two at least."""
    order = torch.argsort(rollouts.prompt_lens + rollouts.gen_lens, stable=True)
    most = max(2, rows_without_graph(rollouts, config.generation))
    return order[torch.linspace(0, len(order) - 1, min(_ROWS, most, len(order))).long()]


def generated(
    model: BoundModel,
    rollouts: Rollouts,
    rows: Tensor,
    config: ProbeConfig,
    rows_at_once: int | None = None,
) -> Float[Tensor, "R T 3"]:
    """(log p, entropy, largest logit) of every generated token of some rows, as `score_rows` reads them."""
    policy = policy_scores(model, config.generation, config.precision)

    def read(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        logp, _, entropy, _ = policy(logits, tokens)
        return logp, entropy, top_logit(logits, config.generation.temperature)

    found = read_rows(model, rollouts, rows, read, rows_at_once=rows_at_once)
    return torch.stack([values.double() for values in found], -1)


def top_logit(logits: Float[Tensor, "... V"], temperature: float) -> Tensor:
    """The largest logit over the temperature: log p is what is left of it, and has its rounding."""
    return logits.detach().amax(-1).double() / temperature


def scored_whole(
    logits: Float[Tensor, "N L V"], tokens: Int[Tensor, "N L"], temperature: float
) -> Float[Tensor, "N L 3"]:
    """(log p, entropy, largest logit) of tokens from whole logits."""
    scored = score_tokens(logits, tokens, temperature, 1.0, torch.float64)
    return torch.stack([scored.logp, scored.entropy, top_logit(logits, temperature)], -1)


def every_token(model: BoundModel, ids: Tensor, mask: Tensor | None) -> Float[Tensor, "N L 3"]:
    """(log p, entropy, largest logit) of every token but the first, given those before it."""
    ids = ids.to(model.device)
    of_row, column = (
        i.flatten() for i in torch.meshgrid(*map(torch.arange, ids[:, 1:].shape), indexing="ij")
    )
    tokens = ids[:, 1:].flatten()

    def read(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
        scored = score_tokens(logits, tokens[part], 1.0, 1.0, torch.float64)
        return scored.logp, scored.entropy, top_logit(logits, 1.0)

    mask = None if mask is None else mask.to(model.device)
    scores = model.read_logits(
        ids, of_row.to(model.device), column.to(model.device), read, mask=mask
    )
    return torch.stack(scores, -1).reshape(*ids[:, 1:].shape, 3)


def worst_difference(
    model: BoundModel, width: int, differences: Iterable[tuple[str, Tensor, Tensor]]
) -> WorstCase:
    """The largest |difference| of log p or entropy of (where, reference, other), and its bound for rows of `width`
    columns."""
    worst, scale, example = 0.0, 1.0, "none"
    for where, reference, other in differences:
        one, two = reference[..., :2], other[..., :2]
        difference = float((two - one).masked_fill(two == one, 0.0).abs().max())  # −∞ equals −∞
        scale = max(scale, float(reference.nan_to_num(posinf=0.0, neginf=0.0).abs().max()))
        if difference > worst or (math.isnan(difference) and not math.isnan(worst)):
            worst, example = difference, f"{where}, {model.dtype}".replace("torch.", "")
    return WorstCase(worst=worst, bound=rounding(model, width, scale), example=example)
