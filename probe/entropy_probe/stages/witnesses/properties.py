"""The same properties on cases that are drawn: rows, padding, neighbours, pieces, directions v on few tensors.

The rows of a batch resemble one another, and the update moves every tensor at once. A fault that needs a response of
one token, a rare token or many neighbours, or that sits in one tensor among hundreds, shows on drawn cases only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.report import InvarianceOfCases, InvarianceSection, WorstCase
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.witnesses.continuity import compared, smooth_step
from entropy_probe.stages.witnesses.invariance import (
    every_token,
    generated,
    nearest,
    padded_to,
    rounding,
    scored_whole,
    worst_difference,
)

if TYPE_CHECKING:
    from jaxtyping import Int

_TOKENS = 24  # of a prompt, and of a response
_ROWS = _PADDING = _PIECE = 8
_TENSORS = 4
_TRIES = 9  # for each case that is asked for: a small model has few
_BITS = (
    320  # of a case: 8 rows of up to 19, 4 names of up to 22 (in a million), and 60 for the rest
)
_KINDS = ("any", "any", "one", "edge")
_SCALES = (1.0, 1e-2, 1e2)
_STEPS = (1e-5, 1e-6)  # ‖ηv‖/‖θ‖ of a tensor
_SMALLER = 1e-3  # below float32's eps of a tensor's entries, above float64's by 1e6
# Second order at a step of 1e-5; 2e-4 was the most that was seen in 820 cases, of six architectures and the demo.
_CURVED = 0.1
_HIDDEN = 0.4  # with a floor that is more of it, the bound would be half of the largest value, and bound nothing


@dataclass(frozen=True)
class Space:
    """What a model takes: token ids, columns of a row, trainable tensors, and the tokens that end a response."""

    vocabulary: int
    columns: int
    names: tuple[str, ...]
    eos: tuple[int, ...]

    @classmethod
    def of(cls, model: BoundModel, eos: Sequence[int]) -> Space:
        columns = 2 * _TOKENS + _PADDING
        known = model.logits(torch.zeros(1, 1, dtype=torch.long, device=model.device)).shape[-1]
        vocabulary = min(known, model.vocabulary)
        ends = tuple(token for token in eos if token < vocabulary)
        columns = min(columns, model.longest_row or columns)
        return cls(vocabulary, columns, tuple(model.registry.trainable), ends)


@dataclass(frozen=True)
class Row:
    """Lengths of prompt and response, and whether an EOS ends the response."""

    prompt: int
    response: int
    ended: bool


@dataclass(frozen=True)
class Case:
    """Rows of which one is also scored alone, columns of padding beyond the longest, a size of pieces, and a direction.

    `kind` of the ids: `any` token, `one` token all along a row, `edge`, the first and the last of the vocabulary. They
    and v come from `seed`. v has `scale` times the norm of θ in each of its tensors, and η = step/scale.
    """

    rows: tuple[Row, ...]
    chosen: int
    padding: int
    piece: int
    kind: str
    seed: int
    names: tuple[str, ...]
    scale: float
    step: float

    @property
    def lengths(self) -> list[int]:
        return [row.prompt + row.response for row in self.rows]

    def ids(self, space: Space) -> Int[Tensor, "R L"]:
        """The rows, padded right to the longest."""
        shape, generator = (
            (len(self.rows), max(self.lengths)),
            torch.Generator().manual_seed(self.seed),
        )
        drawn = torch.randint(space.vocabulary, shape, generator=generator)
        if self.kind == "one":
            drawn = drawn[:, :1].repeat(1, shape[1])
        if self.kind == "edge":
            drawn = (drawn % 2) * (space.vocabulary - 1)
        for i, row in enumerate(self.rows):
            if row.ended and space.eos:
                drawn[i, self.lengths[i] - 1] = space.eos[0]
            drawn[i, self.lengths[i] :] = 0
        return drawn

    def direction(self, model: BoundModel) -> dict[str, Tensor]:
        """v: normal numbers, ‖v‖ = scale·‖θ‖ tensor by tensor; scale where θ is zero.

        A row of zeros in a tensor that has others is the embedding of a padding token, which no optimizer moves. It
        stays: every norm that follows multiplies what is added to nothing by 1/√eps, and no step is small.
        """
        generator, v = torch.Generator().manual_seed(self.seed), {}
        for name in self.names:
            parameter = model.registry.parameters[name].detach()
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1 and bool(parameter.count_nonzero()):
                padding = (parameter == 0).flatten(1).all(1).cpu()
                drawn[padding] = 0.0
            v[name] = drawn * (
                self.scale * (float(parameter.norm()) or 1.0) / max(float(drawn.norm()), 1e-30)
            )
        return v

    @property
    def shape(self) -> str:
        """All rows, as lengths of prompt and response."""
        lengths = [f"{row.prompt}+{row.response}{' EOS' if row.ended else ''}" for row in self.rows]
        return f"{', '.join(lengths)} ({self.kind} ids of seed {self.seed})"

    def __str__(self) -> str:
        return f"row {self.chosen} of {self.shape}"

    @property
    def along(self) -> str:
        """Where v goes."""
        return f"v of seed {self.seed}, scale {self.scale:g}, on {', '.join(self.names)}"


@torch.no_grad()
def drawn_properties(
    bound: BoundModel, float64: BoundModel, config: ProbeConfig, eos: Sequence[int] = ()
) -> InvarianceOfCases | None:
    """`invariance.max_examples` cases, drawn from `batch.seed`; `None` where that is 0."""
    if config.invariance.max_examples == 0:
        return None
    space = Space.of(bound, eos)
    cases = draw(space, config.invariance.max_examples, config.batch.seed)
    models = [float64] if bound.dtype is float64.dtype else [float64, bound]
    found: dict[str, list[WorstCase]] = {
        name: [] for name in ("padding", "batch", "chunk", "zero", "scaling")
    }
    for number, case in enumerate(cases):
        ids, where = case.ids(space), f"drawn case {number}"
        v = case.direction(bound)
        for model in models:
            alone = ids[case.chosen, None, : case.lengths[case.chosen]].to(model.device)
            logits = model.logits(alone)
            found["padding"].append(_padding(model, case, ids, alone, logits, space, where))
            of_batch, of_chunk = _batch_and_chunk(model, case, ids, alone, logits, config, where)
            found["batch"].append(of_batch)
            found["chunk"].append(of_chunk)
            if model is float64:
                found["scaling"] += _scaling(float64, case, alone, logits, v, where)
        found["zero"].append(_zero_step(bound, case, ids, v, where))
    return InvarianceOfCases(
        padding=nearest(*found["padding"]),
        batch=nearest(*found["batch"]),
        chunk=nearest(*found["chunk"]),
        zero_step=nearest(*found["zero"]),
        scaling=nearest(*found["scaling"]) if found["scaling"] else None,
        num_examples=len(cases),
    )


def with_drawn(rows: InvarianceSection, drawn: InvarianceOfCases | None) -> InvarianceSection:
    """The rows of the batch and the drawn cases together: of each property the difference nearest to its bound."""
    if drawn is None:
        return rows
    both = {
        name: nearest(getattr(rows, name), getattr(drawn, name))
        for name in ("padding", "batch", "chunk")
    }
    alone = {name: getattr(drawn, name) for name in ("zero_step", "scaling", "num_examples")}
    return rows.model_copy(update=both | alone)


def _padding(
    model: BoundModel,
    case: Case,
    ids: Tensor,
    alone: Tensor,
    logits: Tensor,
    space: Space,
    where: str,
) -> WorstCase:
    """The chosen row alone against all rows padded right; every row padded right against padded left."""
    rows = [row[:length].tolist() for row, length in zip(ids, case.lengths, strict=True)]
    width = min(ids.shape[1] + case.padding, space.columns)
    right, left, mask = padded_to(rows, width)
    of_right, of_left = every_token(model, right, None), every_token(model, left, mask)
    whole = scored_whole(logits[:, :-1], alone[:, 1:], 1.0)[0]
    differences = [
        (f"{where}, {case}, padded right to {width}", whole, of_right[case.chosen, : len(whole)])
    ]
    differences += [
        (
            f"{where}, row {i} of {case.shape}, padded left to {width}",
            of_right[i, : n - 1],
            of_left[i, width - n :],
        )
        for i, n in enumerate(case.lengths)
    ]
    return worst_difference(model, width, differences)


def _batch_and_chunk(
    model: BoundModel,
    case: Case,
    ids: Tensor,
    alone: Tensor,
    logits: Tensor,
    config: ProbeConfig,
    where: str,
) -> tuple[WorstCase, WorstCase]:
    """The generated tokens of the chosen row from whole logits, against `score_rows` among the others and in pieces."""
    row, chosen = case.rows[case.chosen], torch.tensor([case.chosen])
    rollouts = Rollouts(
        ids=ids,
        prompt_lens=torch.tensor([r.prompt for r in case.rows]),
        gen_lens=torch.tensor([r.response for r in case.rows]),
        rewards=torch.zeros(len(case.rows), 1),
        advantages=None,
        logprobs=None,
        source="drawn",
        missing_gold=0,
    )
    temperature = config.generation.temperature
    whole = scored_whole(logits[:, row.prompt - 1 : -1], alone[:, row.prompt :], temperature)[0]
    among = generated(model, rollouts, torch.arange(len(ids)), config)[case.chosen, : row.response]
    pieces = generated(model, rollouts, chosen, config, rows_at_once=case.piece)[0]
    where = f"{where}, {case}"
    return (
        worst_difference(model, ids.shape[1], [(where, whole, among)]),
        worst_difference(
            model, ids.shape[1], [(f"{where}, in pieces of {case.piece}", whole, pieces)]
        ),
    )


def _zero_step(
    bound: BoundModel, case: Case, ids: Tensor, v: dict[str, Tensor], where: str
) -> WorstCase:
    """All rows through the module itself, and through `functional_call` at θ + 0·v."""
    ids = ids.to(bound.device)
    keep = bound.spread_over(*ids.shape)
    functional = bound.logits(
        ids, keep=keep, override=theta_plus_eta_v(bound.registry, v, 0.0, bound.dtype)
    )
    found = compared(bound.direct_logits(ids, keep=keep), functional)
    worst = math.nan if found.max_abs == 0 and not found.bitwise else found.max_abs
    return WorstCase(
        worst=worst, bound=0.0, example="none" if worst == 0 else f"{where}, {case}; {case.along}"
    )


def _scaling(
    float64: BoundModel, case: Case, alone: Tensor, logits: Tensor, v: dict[str, Tensor], where: str
) -> list[WorstCase]:
    """One number, or none where rounding hides what v does to the logits (an unused embedding, lora_A before B moves).

    The bound is second order's share at the larger η, and the rounding of ‖Δlogits‖ at the smaller one. Where the
    logits are not linear up to η (a norm of an embedding that is zero, a router's choice) it is a shorter one.
    """

    def moved(eta: float) -> Tensor:
        override = theta_plus_eta_v(float64.registry, v, eta, torch.float64)
        return float64.logits(alone, override=override) - logits

    eta, large = smooth_step(moved, case.step / case.scale)
    small = float(moved(_SMALLER * eta).norm())
    floor = rounding(float64, alone.shape[1], float(logits.abs().max())) * math.sqrt(logits.numel())
    expected = _SMALLER * large
    if floor >= _HIDDEN * max(expected, small):
        return []
    worst = 1 - min(expected, small) / max(expected, small)
    limit = _CURVED + floor / max(expected, small)
    return [
        WorstCase(worst=worst, bound=limit, example=f"{where}, {case}; {case.along}, η {eta:g}")
    ]


def draw(space: Space, count: int, seed: int) -> list[Case]:
    """`count` different cases (fewer where a model has few), the same ones for a seed wherever they are drawn.

    The first is the smallest. Fewer are the first of more.
    """
    cases: dict[Case, None] = {}
    for turn in range(_TRIES * count):
        if len(cases) == count:
            break
        cases[_case(iter(_bits(seed, turn)).__next__, space)] = None
    return list(cases)


def _bits(seed: int, turn: int) -> list[bool]:
    """Those of a case: all 0 in the first turn. numpy promises the same words of a bit generator for ever."""
    if turn == 0:
        return [False] * _BITS
    words = np.random.PCG64([seed, turn]).random_raw(_BITS // 64)
    return [bool(word >> place & 1) for word in words.tolist() for place in range(64)]


def _case(bit: Callable[[], bool], space: Space) -> Case:
    rows = tuple(_row(bit, space) for _ in range(_whole(bit, 1, _ROWS)))
    last = len(space.names) - 1
    names = [space.names[_whole(bit, 0, last)]]
    if bit():
        names += [space.names[_whole(bit, 0, last)] for _ in range(_whole(bit, 1, _TENSORS - 1))]
    return Case(
        rows=rows,
        chosen=_whole(bit, 0, len(rows) - 1),
        padding=_whole(bit, 0, _PADDING),
        piece=_whole(bit, 1, _PIECE),
        kind=_KINDS[_whole(bit, 0, len(_KINDS) - 1)],
        seed=_whole(bit, 0, 2**16 - 1),
        names=tuple(dict.fromkeys(names)),
        scale=_SCALES[_whole(bit, 0, len(_SCALES) - 1)],
        step=_STEPS[_whole(bit, 0, len(_STEPS) - 1)],
    )


def _row(bit: Callable[[], bool], space: Space) -> Row:
    prompt = _length(bit, min(_TOKENS, space.columns // 2))
    return Row(prompt, _length(bit, min(_TOKENS, space.columns - prompt)), bit())


def _length(bit: Callable[[], bool], most: int) -> int:
    """Half of them at either end."""
    number = _whole(bit, 1, most)
    return number if not bit() else most if bit() else 1


def _whole(bit: Callable[[], bool], low: int, high: int) -> int:
    count = (high - low).bit_length() + 2  # two more for a nearly even spread
    return low + sum(bit() << i for i in range(count)) % (high - low + 1)
