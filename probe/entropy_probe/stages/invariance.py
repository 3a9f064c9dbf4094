"""What a score must not depend on: the side and the amount of padding, and the neighbours in the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.rollouts import Rollouts
from entropy_probe.stages.sampling import left_padded

_ROWS = 6


@dataclass(frozen=True)
class WorstDifference:
    """The largest |difference| of a token's log-probability, its bound from rounding, and where it was found."""

    worst: float
    bound: float
    example: str


@torch.no_grad()
def padding_invariance(float64: BoundModel, rollouts: Rollouts) -> WorstDifference:
    """Rows of different length: each alone and unpadded, against all together padded right and padded left.

    In true float64, so that only a fault can make a difference: masked attention adds terms of exactly zero, and
    changes nothing but the order of summation.
    """
    totals = rollouts.prompt_lens + rollouts.gen_lens
    order = torch.argsort(totals, stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(_ROWS, len(order))).long()].tolist()
    rows = [rollouts.ids[i, : totals[i]].tolist() for i in chosen]
    alone = [_token_logp(float64, torch.tensor([row]), None)[0] for row in rows]
    longest = max(map(len, rows))
    model_limit = getattr(getattr(float64.language_model, "config", None), "max_position_embeddings", None)
    width = max(longest, min(longest + 3, model_limit or longest + 3))
    right = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        right[i, : len(row)] = torch.tensor(row)
    # a last row of full width makes the others as wide, and is dropped
    left, mask = (padded[:-1] for padded in left_padded([*rows, [0] * width], pad=0))
    padded = {
        "padded right": [s[: len(row) - 1] for s, row in zip(_token_logp(float64, right, None), rows, strict=True)],
        "padded left": [s[width - len(row) :] for s, row in zip(_token_logp(float64, left, mask), rows, strict=True)],
    }
    worst, example = 0.0, "none"
    for side, scored in padded.items():
        for i, (scores, reference) in enumerate(zip(scored, alone, strict=True)):
            difference = float((scores - reference).abs().max())
            if difference > worst or (math.isnan(difference) and not math.isnan(worst)):
                worst, example = difference, f"row {chosen[i]} of {len(rows[i])} tokens, {side}"
    scale = max(float(reference.abs().max()) for reference in alone)
    # Summing L float64 terms in another order moves a logit by at most L·eps of their size, per layer; depth × 8
    # sums of that kind stand between the two sides and the score.
    depth = getattr(getattr(float64.language_model, "config", None), "num_hidden_layers", 32)
    return WorstDifference(worst, 8 * depth * width * torch.finfo(torch.float64).eps * max(1.0, scale), example)


def _token_logp(bound: BoundModel, ids: Tensor, mask: Tensor | None) -> Tensor:
    """[N, L−1]: log p of every token but the first, given those before it."""
    ids = ids.to(bound.device)
    logits = bound.logits(ids, mask=None if mask is None else mask.to(bound.device))[:, :-1]
    return torch.log_softmax(logits.double(), -1).gather(-1, ids[:, 1:, None])[..., 0].cpu()
