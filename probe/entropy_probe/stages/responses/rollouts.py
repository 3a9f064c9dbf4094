"""The responses on which everything is measured: read from a JSON-lines file, or sampled from the policy.

One prompt a line, the same number G of responses on every line:

    {"prompt_ids": [..], "response_ids": [[..], ..], "rewards": [..]}
    {"prompt": "..", "responses": ["..", ..], "rewards": [..]}      # tokenised here; an EOS is added unless truncated
    optional: "advantages": [..], "truncated": [bool, ..], "logprobs": [[..], ..], "gold": ".."
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from entropy_probe.config import GenerationConfig
from entropy_probe.errors import MeasurementError, RolloutsError, shown
from entropy_probe.model.forward import BoundModel
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.rewards import LARGEST_REWARD, Reward, tag_pref
from entropy_probe.stages.responses.sampling import StopStrings, sample
from entropy_probe.text import read_text

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Rollouts:
    """B prompts with G responses each; row n·G + g is response g of prompt n.

    `ids` [N, L] are right-padded: prompt, then response, then padding. The generated region of row i is
    `prompt_lens[i] … prompt_lens[i] + gen_lens[i] − 1`; it ends with the first EOS (scored) or at the length limit.
    `logprobs` are those that the sampler reported, where a file holds them. Where these are a process's share of a
    batch, `first_prompt` of it stand before them.
    """

    ids: Int[Tensor, "N L"]
    prompt_lens: Int[Tensor, " N"]
    gen_lens: Int[Tensor, " N"]
    rewards: Float[Tensor, "B G"]
    advantages: Float[Tensor, "B G"] | None
    logprobs: Float[Tensor, "N T"] | None
    source: str
    missing_gold: int
    first_prompt: int = 0

    @property
    def num_prompts(self) -> int:
        return self.rewards.shape[0]

    @property
    def num_responses(self) -> int:
        return self.rewards.shape[1]

    @property
    def max_gen_len(self) -> int:
        return int(self.gen_lens.max()) if len(self.gen_lens) else 0

    @cached_property
    def gen_mask(self) -> Bool[Tensor, "N T"]:
        return torch.arange(self.max_gen_len)[None, :] < self.gen_lens[:, None]

    @cached_property
    def responses(self) -> list[list[int]]:
        """The tokens of every response."""
        ends = (self.prompt_lens + self.gen_lens).tolist()
        return [row[p:end] for row, p, end in zip(self.ids.tolist(), self.prompt_lens.tolist(), ends, strict=True)]

    @cached_property
    def tokens(self) -> Int[Tensor, " K"]:
        """Every token of every row, without padding."""
        positions = torch.arange(self.ids.shape[1])[None, :]
        return self.ids[positions < (self.prompt_lens + self.gen_lens)[:, None]]

    def of_prompts(self, prompts: Int[Tensor, " b"], *, first_prompt: int = 0) -> Rollouts:
        """The same for some prompts only."""
        rows = (prompts[:, None] * self.num_responses + torch.arange(self.num_responses)).reshape(-1)
        return replace(
            self,
            ids=self.ids[rows],
            prompt_lens=self.prompt_lens[rows],
            gen_lens=self.gen_lens[rows],
            rewards=self.rewards[prompts],
            advantages=None if self.advantages is None else self.advantages[prompts],
            logprobs=None if self.logprobs is None else self.logprobs[rows],
            first_prompt=first_prompt,
        )

    def per_prompt(self, values: Tensor) -> Tensor:
        """[N, …] → [B, G, …]."""
        return values.reshape(self.num_prompts, self.num_responses, *values.shape[1:])


@dataclass(frozen=True)
class _Line:
    prompt: list[int]
    responses: list[list[int]]
    rewards: list[float]
    advantages: list[float] | None
    logprobs: list[list[float]] | None = None


def _padded(entries: list[list[float]], count: int) -> Tensor | None:
    """[N, T] with zeros past the end of an entry, or `None` where there is not one for every row."""
    if len(entries) != count:
        return None
    return pad_sequence([torch.tensor(entry, dtype=torch.float64) for entry in entries], batch_first=True)


def _assemble(lines: Sequence[_Line], source: str, missing_gold: int) -> Rollouts:
    rows = [line.prompt + response for line in lines for response in line.responses]
    group = len(lines[0].responses)
    advantages = None
    if all(line.advantages is not None for line in lines):
        advantages = torch.tensor([line.advantages for line in lines], dtype=torch.float64)
    return Rollouts(
        ids=pad_sequence(list(map(torch.tensor, rows)), batch_first=True),
        prompt_lens=torch.tensor([len(line.prompt) for line in lines]).repeat_interleave(group),
        gen_lens=torch.tensor([len(response) for line in lines for response in line.responses]),
        rewards=torch.tensor([line.rewards for line in lines], dtype=torch.float64),
        advantages=advantages,
        logprobs=_padded([entry for line in lines for entry in line.logprobs or ()], len(rows)),
        source=source,
        missing_gold=missing_gold,
    )


def eos_ids(model: Any, tokenizer: Any | None) -> list[int]:
    """EOS ids of generation_config, else of the model's config, else of the tokenizer."""
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        eos = getattr(holder, "eos_token_id", None)
        if eos is None:
            continue
        ids = list(eos) if isinstance(eos, list | tuple) else [eos]
        if not ids or any(type(e) is not int or e < 0 for e in ids):
            raise MeasurementError("eos_token_id", f"is {shown(eos)}", "give token ids in generation_config.json")
        return ids
    return []


def early_eos(response: Sequence[int], eos: Collection[int]) -> int | None:
    """Where a response has an EOS before its last token."""
    return next((i for i, token in enumerate(response[:-1]) if token in eos), None)


def read_rollouts(path: str | Path, bound: BoundModel, tokenizer: Any | None) -> Rollouts:
    """Read a rollouts file. Raises `RolloutsError` naming the line: unequal G, an empty response, a token outside the
    vocabulary, lists of different length, a reward that is not finite, G < 2."""
    path = Path(path)
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:  # not UTF-8, or a NUL in the path
        raise RolloutsError(path, f"cannot be read ({error})", "give a JSON-lines file") from error
    reader = _LineReader(bound.vocabulary, eos_ids(bound.language_model, tokenizer), tokenizer)
    lines: list[_Line] = []
    for number, content in enumerate(text.split("\n"), start=1):  # JSON may hold other line separators
        if not content.strip():
            continue
        where = f"{path}:{number}"
        line = reader.read(content, where)
        if lines and len(line.responses) != len(lines[0].responses):
            raise RolloutsError(
                where,
                f"has {len(line.responses)} responses, the first line {len(lines[0].responses)}",
                "give the same number on every line",
            )
        for key in ("advantages", "logprobs"):
            if lines and (getattr(line, key) is None) != (getattr(lines[0], key) is None):
                raise RolloutsError(where, f"`{key}` stand on some lines only", "give them on every line or on none")
        lines.append(line)
    if len(lines) < 2:
        raise RolloutsError(path, f"has {len(lines)} prompts, expected at least 2", "add lines")
    return _assemble(lines, str(path), 0)


@dataclass(frozen=True)
class _LineReader:
    vocabulary: int
    eos: list[int]
    tokenizer: Any | None

    def read(self, content: str, where: str) -> _Line:
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise RolloutsError(where, f"is not JSON ({error})", "write one object per line") from error
        if not isinstance(row, dict):
            raise RolloutsError(where, f"is a {type(row).__name__}", "write one object per line")
        if "prompt_ids" in row:
            prompt = self._ids(row["prompt_ids"], "prompt_ids", where)
            responses = [self._ids(r, "response_ids", where) for r in self._list(row, "response_ids", where)]
        else:
            prompt, responses = self._tokenise(row, where)
        if len(responses) < 2:
            raise RolloutsError(where, f"has {len(responses)} responses, expected at least 2", "give 2 or more")
        return _Line(
            prompt,
            responses,
            self._numbers(row, "rewards", len(responses), where),
            self._numbers(row, "advantages", len(responses), where) if row.get("advantages") is not None else None,
            self._logprobs(row, responses, where),
        )

    def _tokenise(self, row: dict[str, Any], where: str) -> tuple[list[int], list[list[int]]]:
        if not isinstance(row.get("prompt"), str) or not _encodable(row["prompt"]):
            raise RolloutsError(where, "has neither `prompt_ids` nor a text under `prompt`", "give one of them")
        if self.tokenizer is None:
            raise RolloutsError(
                where, "is text, and the checkpoint has no tokenizer", "give prompt_ids and response_ids"
            )
        texts = self._list(row, "responses", where)
        truncated = row.get("truncated", [False] * len(texts))
        if not isinstance(truncated, list) or len(truncated) != len(texts) or {type(t) for t in truncated} - {bool}:
            raise RolloutsError(where, f"`truncated` is {shown(truncated)}", "give one true or false per response")
        responses = []
        for text, is_truncated in zip(texts, truncated, strict=True):
            if not isinstance(text, str) or not _encodable(text):
                raise RolloutsError(where, f"a response is {text!a}"[:120], "give texts")
            ids = list(self.tokenizer(text, add_special_tokens=False).input_ids)
            if not is_truncated and self.eos and (not ids or ids[-1] not in self.eos):
                own = self.tokenizer.eos_token_id
                ids.append(own if own in self.eos else self.eos[0])
            responses.append(self._ids(ids, "responses", where))
        return self._ids(list(self.tokenizer(row["prompt"]).input_ids), "prompt", where), responses

    def _ids(self, value: Any, key: str, where: str) -> list[int]:
        if not isinstance(value, list) or not value:
            raise RolloutsError(where, f"`{key}` has an empty entry or is not a list", "give at least one token")
        for token in value:
            if type(token) is not int or not 0 <= token < self.vocabulary:
                raise RolloutsError(
                    where, f"`{key}` holds {shown(token)}", f"give token ids from 0 to {self.vocabulary - 1}"
                )
        if key in ("response_ids", "responses"):
            early = early_eos(value, self.eos)
            if early is not None:
                raise RolloutsError(where, f"`{key}` goes on after the EOS at {early}", "end each response at its EOS")
        return value

    def _list(self, row: dict[str, Any], key: str, where: str) -> list[Any]:
        if not isinstance(row.get(key), list):
            raise RolloutsError(where, f"has no list under `{key}`", "give one entry per response")
        return row[key]

    def _numbers(self, row: dict[str, Any], key: str, count: int, where: str) -> list[float]:
        values = self._list(row, key, where)
        if len(values) != count:
            raise RolloutsError(where, f"`{key}` has {len(values)} entries for {count} responses", "give one for each")
        for value in values:
            if type(value) not in (int, float) or not abs(value) <= LARGEST_REWARD:
                raise RolloutsError(where, f"`{key}` holds {shown(value)}", "give finite numbers")
        return [float(value) for value in values]

    def _logprobs(self, row: dict[str, Any], responses: list[list[int]], where: str) -> list[list[float]] | None:
        """`logprobs`, where given: one number per token of every response."""
        if row.get("logprobs") is None:
            return None
        lists = self._list(row, "logprobs", where)
        lengths = [len(entry) if isinstance(entry, list) else None for entry in lists]
        if lengths != [len(response) for response in responses]:
            raise RolloutsError(where, f"`logprobs` has {lengths} numbers"[:120], "give one per token of each response")
        return [self._numbers({"logprobs": entry}, "logprobs", len(entry), where) for entry in lists]


def _encodable(text: str) -> bool:
    """False for a lone surrogate, which JSON can hold and UTF-8 cannot."""
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


def sample_rollouts(
    bound: BoundModel,
    tokenizer: Any | None,
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    *,
    seed: int,
    reward: Reward = tag_pref,
    stage: str = "sampling",
    progress: Progress | None = None,
    world: World = ALONE,
) -> Rollouts:
    """Sample G responses of every prompt from q: temperature and top_p as given, nothing else.

    A response ends with its first EOS, with the token that completes a stop string, or at the length limit. The same
    seed gives the same responses whatever `gen_batch_size` is, and however many processes share the prompts; no global
    generator is used.
    """
    if tokenizer is None:
        raise MeasurementError(
            "tokenizer", "the checkpoint has none, so nothing can be sampled", "give --probe-rollouts"
        )
    group = generation.num_return_sequences
    encoded = [list(tokenizer(prompt.text).input_ids) for prompt in prompts]
    empty = next((i for i, ids in enumerate(encoded) if not ids), None)
    if empty is not None:
        raise MeasurementError(f"prompt {prompts[empty].text!r}", "encodes to no token", "leave it out")
    counted = None if progress is None else partial(progress, stage)
    share = world.share(len(prompts))
    options = {"seed": seed, "first_prompt": share.start, "progress": counted}
    responses = _sampled(bound, tokenizer, encoded[share], group, generation, **options)
    rewards = []
    for n, prompt in enumerate(prompts[share]):
        texts = [tokenizer.decode(response, skip_special_tokens=True) for response in responses[n * group :][:group]]
        rewards.append([reward(text, prompt.gold) for text in texts])
    responses, rewards = _of_all(responses, rewards, share, len(prompts), group, world)
    lines = [
        _Line(ids, responses[n * group : (n + 1) * group], own, None)
        for n, (ids, own) in enumerate(zip(encoded, rewards, strict=True))
    ]
    return _assemble(lines, "sampled", sum(prompt.gold is None for prompt in prompts))


def _of_all(
    responses: list[list[int]], rewards: list[list[float]], share: slice, count: int, group: int, world: World
) -> tuple[list[list[int]], list[list[float]]]:
    """The responses and rewards of all prompts, from everybody's own."""
    if world.size == 1:
        return responses, rewards
    own = share.stop - share.start
    lengths = torch.tensor(list(map(len, responses)), dtype=torch.int32).reshape(own, group)
    lengths = world.placed(lengths, share, count).flatten().tolist()
    ids = torch.zeros(own * group, max(lengths), dtype=torch.int32)
    for row, response in zip(ids, responses, strict=True):
        row[: len(response)] = torch.tensor(response)
    rows = world.placed(ids.reshape(own, group, -1), share, count).flatten(0, 1).tolist()
    of_all = world.placed(torch.tensor(rewards, dtype=torch.float64).reshape(own, group), share, count)
    return [row[:length] for row, length in zip(rows, lengths, strict=True)], of_all.tolist()


def redrawn(
    bound: BoundModel,
    rollouts: Rollouts,
    tokenizer: Any | None,
    generation: GenerationConfig,
    *,
    seed: int,
    override: Mapping[str, Tensor],
) -> Rollouts:
    """As many fresh responses of the same prompts, from q at the parameters in `override`. Rewards are NaN."""
    size_b, group = rollouts.num_prompts, rollouts.num_responses
    prompts = [rollouts.ids[n * group, : int(rollouts.prompt_lens[n * group])].tolist() for n in range(size_b)]
    if not prompts:
        return rollouts
    options = {"seed": seed, "override": override, "first_prompt": rollouts.first_prompt}
    responses = _sampled(bound, tokenizer, prompts, group, generation, **options)
    nothing = [math.nan] * group
    lines = [_Line(own, responses[n * group : (n + 1) * group], nothing, None) for n, own in enumerate(prompts)]
    return replace(_assemble(lines, "resampled", 0), first_prompt=rollouts.first_prompt)


def _sampled(
    bound: BoundModel,
    tokenizer: Any | None,
    prompts: Sequence[Sequence[int]],
    group: int,
    generation: GenerationConfig,
    **options: Any,
) -> list[list[int]]:
    """`sample` under the policy of `generation`, `group` responses of each prompt; a tokenizer finds stop strings."""
    if generation.stop and tokenizer is None:
        raise MeasurementError("generation.stop", "needs a tokenizer, the checkpoint has none", "leave it out")
    stop = StopStrings(tokenizer.decode, tuple(generation.stop)) if tokenizer is not None and generation.stop else None
    return sample(
        bound,
        prompts,
        num_return_sequences=group,
        temperature=generation.temperature,
        top_p=generation.top_p,
        max_new_tokens=generation.max_new_tokens,
        eos_ids=eos_ids(bound.language_model, tokenizer),
        gen_batch_size=generation.gen_batch_size,
        stop=stop,
        **options,
    )
