"""The logits of the next token of rows that grow by a token at a time: over the model's cache, or from whole rows.

What is scored are whole rows. A cache gives the same logits, unless what the model does with a token depends on more
than the cache holds: an adapter that is switched on by tokens of the prompt, positions or masks that the model takes
no notice of, a layer whose state knows of no padding. `way_of` finds out on two prompts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from entropy_probe.errors import CacheError
from entropy_probe.model.forward import BoundModel, said
from entropy_probe.report import WorstCase
from entropy_probe.stages.rounding import rounding

if TYPE_CHECKING:
    from jaxtyping import Float, Int

TOKENS = 6
"""Of each of two prompts."""
SLACK = 10
"""Times the bound of another order of summation: 1.9 was the most over 180 architectures, and the least difference of
another kind was 8000 times it (tests/architectures.py)."""


class OverCache:
    """`logits` [N, V] of the token that follows each row; a prompt is read once, and its cache serves its rows."""

    takes_lengths = True
    """Whether prompts may have different lengths."""

    def __init__(
        self,
        bound: BoundModel,
        prompts: Sequence[Sequence[int]],
        override: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._bound, self._override = bound, override
        ids, self._mask = (tensor.to(bound.device) for tensor in left_padded(prompts, pad=0))
        self.logits, self._cache = bound.next_logits(ids, self._said, override=override)

    @property
    def _said(self) -> Tensor | None:
        """The mask that the model is given."""
        return self._mask if self.takes_lengths else None

    def branch(self, rows: Tensor, *, last: bool) -> OverCache:
        """Other steps that begin as `rows` of these, each as often as it is in there; after the `last` none follow."""
        made = copy.copy(self)
        if not last:
            made._cache = copy.deepcopy(self._cache)
        made.keep(rows)
        return made

    def keep(self, rows: Tensor) -> None:
        """`rows` alone, in that order."""
        rows = rows.to(self._bound.device)
        self.logits, self._mask = self.logits[rows], self._mask[rows]
        try:  # it selects rows in every kind of cache, of which only some can `batch_select_indices`
            self._cache.reorder_cache(rows if self._bound.on_one_device else rows.cpu())
        except (AttributeError, NotImplementedError, RuntimeError, TypeError) as error:
            problem = f"rows of the cache of {self._bound.kind} cannot be taken ({said(error)})"
            raise CacheError("sampling", problem, "give --probe-rollouts") from error

    def read(self, tokens: Int[Tensor, " N"]) -> None:
        """One token more in every row."""
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self.logits, self._cache = self._bound.next_logits(
            tokens[:, None], self._said, self._cache, override=self._override
        )


class Unpadded(OverCache):
    """The same for prompts of one length: without a mask, and positions are the model's own."""

    takes_lengths = False


class WholeRows:
    """The same without a cache: each row is read from its beginning for every token, as it will be scored."""

    takes_lengths = True

    def __init__(
        self,
        bound: BoundModel,
        prompts: Sequence[Sequence[int]],
        override: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._bound, self._override = bound, override
        self._rows = [list(prompt) for prompt in prompts]
        self._find()

    def branch(self, rows: Tensor, *, last: bool) -> WholeRows:
        made = copy.copy(self)
        made._rows = [list(row) for row in self._rows]
        made.keep(rows)
        return made

    def keep(self, rows: Tensor) -> None:
        self.logits = self.logits[rows.to(self.logits.device)]
        self._rows = [list(self._rows[i]) for i in rows.tolist()]

    def read(self, tokens: Int[Tensor, " N"]) -> None:
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.append(token)
        self._find()

    def _find(self) -> None:
        ends = [[len(row) - 1] for row in self._rows]
        self.logits = scored_logits(self._bound, self._rows, ends, self._override)[:, 0]


Steps = OverCache | WholeRows


@torch.no_grad()
def scored_logits(
    bound: BoundModel,
    rows: Sequence[Sequence[int]],
    columns: Sequence[Sequence[int]],
    override: Mapping[str, Tensor] | None = None,
) -> Float[Tensor, "N K V"]:
    """The logits at K columns of each row, as a row is scored: padded right, without a cache."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(bound.device)
    wanted = torch.tensor(columns, device=bound.device)
    of_row = torch.arange(len(rows), device=bound.device).repeat_interleave(wanted.shape[1])
    (logits,) = bound.read_logits(
        ids, of_row, wanted.flatten(), lambda logits, _: (logits,), override=override
    )
    return logits.reshape(*wanted.shape, -1)


@dataclass(frozen=True)
class Way:
    """The steps in which rows are read, and `why` not in better ones."""

    steps: type[OverCache] | type[WholeRows]
    why: str = ""

    def off(
        self,
        bound: BoundModel,
        prompts: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        tokens: int,
    ) -> WorstCase:
        """`agreement` of these prompts together, or where they must have one length, of each alone: the one nearest to
        its bound."""
        pairs = list(zip(prompts, responses, strict=True))
        parts = [pairs] if self.steps.takes_lengths else [[pair] for pair in pairs]
        found = [
            agreement(bound, self.steps, [p for p, _ in part], [r for _, r in part], tokens)
            for part in parts
        ]
        return max(found, key=lambda worst: worst.share)


def way_of(bound: BoundModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Way:
    """The first way in which two prompts and a continuation have the logits that whole rows have: over the cache; over
    it without padding; from whole rows.

    The continuation begins with the padding token, which RoBERTa's kind passes over as it counts positions; likeliest
    tokens follow. Found out once for a model, whose `ways` then hold it.
    """
    if not bound.ways:
        two = [prompts[n] for n in two_of(prompts)]
        bound.ways.append(_first_right(bound, two, min(TOKENS, max_new_tokens)))
    return bound.ways[0]


def _first_right(bound: BoundModel, two: list[Sequence[int]], tokens: int) -> Way:
    config = getattr(bound.language_model, "config", None)
    pad, why = getattr(config, "pad_token_id", None) or 0, ""
    first = (pad,) if 0 <= pad < bound.vocabulary else ()
    for steps in (OverCache, Unpadded):
        try:
            worst = Way(steps).off(bound, two, [first] * len(two), tokens)
        except CacheError as error:
            why = why or error.problem
            continue
        if worst.worst <= worst.bound:
            return Way(steps, why)
        why = (
            why
            or f"with its cache, logits differ by up to {worst.worst:.2g} from those of whole rows"
        )
    return Way(WholeRows, why)


def agreement(
    bound: BoundModel,
    way: type[OverCache] | type[WholeRows],
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    tokens: int,
) -> WorstCase:
    """The largest |difference| of a logit between steps taken in that way and the whole rows, which are scored.

    At the first `tokens` places of each response; one that ends before goes on with its likeliest tokens.
    """
    room = (bound.longest_row or 2**62) - max(map(len, prompts)) + 1
    count = len(prompts)
    order = (
        torch.arange(count).flip(0).repeat(2)
    )  # a prompt's cache serves several rows, which leave
    prompts, responses = prompts[::-1], responses[::-1]
    rows = [list(prompt) for prompt in prompts]
    steps = way(bound, prompts[::-1]).branch(order, last=False)
    found = [steps.logits[:count]]
    for t in range(max(1, min(tokens, room)) - 1):
        likeliest = found[-1].argmax(-1).tolist()
        own = [r[t] if t < len(r) else one for r, one in zip(responses, likeliest, strict=True)]
        for row, token in zip(rows, own, strict=True):
            row.append(token)
        steps.read(torch.tensor(own if t else own * 2, device=bound.device))
        if not t:
            steps.keep(torch.arange(count))
        found.append(steps.logits)
    columns = [[len(prompt) - 1 + t for t in range(len(found))] for prompt in prompts]
    scored = scored_logits(bound, rows, columns)
    off = torch.stack(found, 1) - scored
    off = off.masked_fill(torch.stack(found, 1) == scored, 0.0).abs().amax(-1)  # −∞ equals −∞
    scale = float(scored.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).abs().max())
    place, t = divmod(int(off.nan_to_num(nan=math.inf).argmax()), len(found))
    return WorstCase(
        worst=float(off[place, t]),
        bound=SLACK * rounding(bound, max(map(len, rows)), max(scale, 1.0)),
        example=f"token {t + 1} after a prompt of {len(prompts[place])}",
    )


def two_of(prompts: Sequence[Sequence[int]]) -> list[int]:
    """Places of the shortest and the longest: together they have the most padding."""
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    return sorted({order[0], order[-1]})


def left_padded(
    rows: Sequence[Sequence[int] | Tensor], pad: int
) -> tuple[Int[Tensor, "N L"], Int[Tensor, "N L"]]:
    """(ids, mask) with every row ending in the last column."""
    to_the_left = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = to_the_left(list(map(torch.as_tensor, rows)), padding_value=pad)
    mask = to_the_left([torch.ones(len(row), dtype=torch.long) for row in rows])
    return ids, mask
