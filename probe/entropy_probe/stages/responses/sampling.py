"""Responses drawn from the policy, the same in any batches.

A prompt is read once, and the model's cache of it serves its G responses (`steps`). The noise of a
token belongs to (seed, prompt, response, step) and to nothing else. A row that has ended leaves the
batch, so nothing is drawn after its end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from entropy_probe.errors import ConfigError, MeasurementError
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.responses.drawing import draw, masses, noise_of
from entropy_probe.stages.responses.steps import Steps, Way, way_of

# Characters at either end of a decoded window that may differ from the whole text: a UTF-8
# character has at most four bytes, so three of them can be cut off, and a tokenizer may drop a
# leading space.
_WINDOW_EDGE = 8


@dataclass(frozen=True)
class StopStrings:
    """Texts that end a response: it ends with the token that completes one.

    What that token holds beyond the text stays.
    """

    decode: Callable[[list[int]], str]
    strings: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.strings or not all(self.strings):
            remedy = "give texts of at least one character"
            raise ConfigError("stop strings", f"are {self.strings!r}", remedy)

    def completed(self, tokens: list[int]) -> bool:
        """`any(s in decode(tokens) for s in strings)`, given that it was false one token earlier.

        Only the end of the response is decoded: the last token, and enough before it to hold the
        longest string.
        """
        needed = max(map(len, self.strings)) + _WINDOW_EDGE
        size = 8
        while size < len(tokens) and len(self.decode(tokens[-size:-1])) < needed:
            size *= 2
        return self._in(tokens[-size:]) and (size >= len(tokens) or self._in(tokens))

    def _in(self, tokens: list[int]) -> bool:
        text = self.decode(tokens)
        return any(string in text for string in self.strings)


class Stream(NamedTuple):
    """Whose noise a prompt's responses are drawn with: that of a seed, and of a prompt's number in the batch."""

    seed: int
    prompt: int

    @classmethod
    def of(cls, seed: int, count: int, first: int = 0) -> list[Stream]:
        """Those of so many prompts that follow one another."""
        return [cls(seed, first + n) for n in range(count)]


@dataclass(frozen=True)
class _Row:
    """One response on its way; `index` is n·G + g."""

    index: int
    noise: np.random.Generator
    tokens: list[int] = field(default_factory=list)


def sample(
    bound: BoundModel,
    prompts: Sequence[Sequence[int]],
    *,
    num_return_sequences: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int,
    eos_ids: Collection[int],
    noise: Sequence[Stream],
    gen_batch_size: int,
    stop: StopStrings | None = None,
    override: Mapping[str, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """G responses of every prompt; entry n·G + g is response g of prompt n.

        token ~ q = softmax(logits/temperature), cut to the nucleus of `top_p` and renormalised

    A response ends with its first EOS (kept), with the token that completes a stop string, or at
    `max_new_tokens`. At most `gen_batch_size` rows run at once. The responses do not depend on it,
    nor on the other prompts: in float64 they are the same, in float32 they are but where a number
    falls within rounding of the boundary between two sets of tokens (`draw`). `noise` has the seed
    and the number of every prompt: a process that samples some of the prompts gets what one process
    would have got for them. `override` replaces parameters. Where the model's cache does not give
    what whole rows give, every token is drawn from whole rows, as they are scored (`way_of`).
    `progress(done, all)` counts tokens, those that a response ended without included.

    No global generator is used. Raises `MeasurementError`: a prompt without tokens, logits that are
    not finite.
    """
    _require_tokens(prompts, noise)
    if not prompts:
        return []
    way, group = way_of(bound, prompts, max_new_tokens), num_return_sequences
    ended_by = _Ends(frozenset(eos_ids), max_new_tokens, stop)
    responses: list[list[int]] = [[] for _ in range(len(prompts) * group)]
    finished = 0

    def report(tokens: int) -> None:
        if progress is not None:
            progress(finished * max_new_tokens + tokens, len(responses) * max_new_tokens)

    for chosen in _together(prompts, max(1, gen_batch_size // group), way):
        prompt_steps = way.steps(bound, [prompts[n] for n in chosen], override)
        for first in range(0, group, gen_batch_size):
            members = range(first, min(first + gen_batch_size, group))
            each = [(n, g) for n in chosen for g in members]
            rows = [_Row(n * group + g, noise_of(*noise[n], g)) for n, g in each]
            of_prompt = torch.arange(len(chosen)).repeat_interleave(len(members))
            steps = prompt_steps.branch(of_prompt, last=members.stop == group)
            _run(bound, rows, steps, temperature, top_p, ended_by, report)
            finished += len(rows)
            for row in rows:
                responses[row.index] = row.tokens
    return responses


def _together(prompts: Sequence[Sequence[int]], at_once: int, way: Way) -> Iterator[list[int]]:
    """Places of prompts, the shortest first, so many at once; of one length where they must have one."""
    by_length = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    for _, of_length in groupby(
        by_length, key=lambda n: 0 if way.steps.takes_lengths else len(prompts[n])
    ):
        places = list(of_length)
        for start in range(0, len(places), at_once):
            yield places[start : start + at_once]


def _require_tokens(prompts: Sequence[Sequence[int]], noise: Sequence[Stream]) -> None:
    empty = next((n for n, prompt in enumerate(prompts) if not prompt), None)
    if empty is not None:
        where = f"prompt {noise[empty].prompt + 1}"
        raise MeasurementError(where, "has no token", "leave it out")


@dataclass(frozen=True)
class _Ends:
    eos_ids: frozenset[int]
    max_new_tokens: int
    stop: StopStrings | None

    def __call__(self, tokens: list[int]) -> bool:
        if tokens[-1] in self.eos_ids or len(tokens) >= self.max_new_tokens:
            return True
        return self.stop is not None and self.stop.completed(tokens)


def _run(
    bound: BoundModel,
    rows: list[_Row],
    steps: Steps,
    temperature: float,
    top_p: float,
    ended: _Ends,
    report: Callable[[int], None],
) -> None:
    """Draw tokens until every row has ended."""
    levels = (steps.logits.shape[-1] - 1).bit_length()
    settled = 0  # tokens of the rows that left
    while True:
        numbers = np.stack([row.noise.random(levels) for row in rows])
        uniforms = torch.from_numpy(numbers).to(bound.device)
        tokens = draw(masses(steps.logits, temperature, top_p), uniforms)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.tokens.append(token)
        running = [i for i, row in enumerate(rows) if not ended(row.tokens)]
        settled += (len(rows) - len(running)) * ended.max_new_tokens
        report(settled + len(running) * len(rows[0].tokens))
        if not running:
            return
        if len(running) < len(rows):
            kept = torch.tensor(running)
            rows, tokens = [rows[i] for i in running], tokens[kept.to(tokens.device)]
            steps.keep(kept)
        steps.read(tokens)
