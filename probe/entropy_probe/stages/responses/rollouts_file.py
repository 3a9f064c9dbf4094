"""Rollouts read from JSON lines, one prompt a line: in an E batch with the same number of responses on every line.

    {"prompt_ids": [..], "response_ids": [[..], ..], "rewards": [..]}
    {"prompt": "..", "responses": ["..", ..], "rewards": [..]}

Texts are tokenised here; an EOS is added unless `truncated` says that the response has none. Ids may be padded, where
"prompt_mask": [0|1, ..] and "response_mask": [[0|1, ..], ..] say which are not; TRL's "completion_ids" and
"completion_mask" are "response_ids" and "response_mask".
Optional: "advantages": [..] of responses, or [[..], ..] of their tokens; or "weights": [[..], ..], with which the
gradients of tokens are added up; "truncated": [bool, ..]; "gold": ".."; "logprobs": [[..], ..]; of the trainer's own
next step "after_step": int, "in_step": [bool, ..] and "micro_batches": [int, ..]. Any other key is an error: what it
holds would be ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entropy_probe.errors import RolloutsError, shown
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.responses.ids import Door, early_eos, eos_ids
from entropy_probe.stages.responses.prompts import checked_prompt
from entropy_probe.stages.responses.rewards import LARGEST_REWARD
from entropy_probe.stages.responses.rollouts import Group, Rollouts, assembled
from entropy_probe.stages.responses.trainers_rollouts import lines_of
from entropy_probe.text import has_lone_surrogate


def read_rollouts(
    path: str | Path,
    bound: BoundModel,
    tokenizer: Any | None,
    *,
    only_update: bool = False,
    template: Mapping[str, Any] | None = None,
) -> Rollouts:
    """Read a rollouts file. One of which only the update is made may have a single prompt, and groups of any size.
    `template` are more arguments of the chat template, for prompts that are messages.

    Raises `RolloutsError` naming the line: unequal G, an empty response, a token outside the
    vocabulary, lists of different length, a reward that is not finite, G < 2.
    """
    door = Door(tokenizer, eos_ids(bound.language_model, tokenizer), template=template or {})
    groups: list[Group] = []
    lines, of_trainer = lines_of(Path(path))
    for where, row in lines:
        door.at = where.rpartition("/")[2]
        group = _Line(row, where, bound.vocabulary, door).read()
        if not only_update:
            _require_alike_in_size(group, (groups or [group])[0], where)
        if groups:
            _require_alike(group, groups[0], where)
        groups.append(group)
    if groups and groups[0].in_step is not None and not any(any(g.in_step or ()) for g in groups):
        raise RolloutsError(path, "has no response with `in_step` true", "give those of the step")
    fewest = 1 if only_update else 2
    if len(groups) < fewest:
        problem = f"has {len(groups)} prompts, expected at least {fewest}"
        raise RolloutsError(path, problem, f"add lines{_ONLY_UPDATE if groups else ''}")
    return replace(assembled(groups, str(path), 0), found=(*of_trainer, *door.lines()))


_ONLY_UPDATE = ", or give it as the update rollouts"


def _require_alike_in_size(group: Group, first: Group, where: str) -> None:
    size, expected = len(group.responses), len(first.responses)
    if size < 2:
        problem = f"has {size} responses, expected at least 2"
        raise RolloutsError(where, problem, f"give 2 or more{_ONLY_UPDATE}")
    if size != expected:
        problem = f"has {size} responses, but the first line has {expected}"
        raise RolloutsError(where, problem, f"give the same number on every line{_ONLY_UPDATE}")


def _require_alike(group: Group, first: Group, where: str) -> None:
    if group.after_step != first.after_step:
        problem = (
            f"`after_step` is {group.after_step}, but on the first line it is {first.after_step}"
        )
        raise RolloutsError(where, problem, "give the batch of one step")
    for key in _BESIDE:
        if (getattr(group, key) is None) != (getattr(first, key) is None):
            problem = f"only some lines have `{key}`"
            raise RolloutsError(where, problem, "give them on every line or on none")
    if (group.weighed, _of_tokens(group)) != (first.weighed, _of_tokens(first)):
        problem = "advantages of responses, of tokens, and weights are mixed"
        raise RolloutsError(where, problem, "give the same on every line")


def _of_tokens(group: Group) -> bool:
    return group.advantages is not None and isinstance(group.advantages[0], list)


_BESIDE = ("advantages", "logprobs", "micro_batches", "in_step")
_KEYS = (
    "prompt_ids",
    "prompt_mask",
    "response_ids",
    "response_mask",
    "rewards",
    "prompt",
    "responses",
    "truncated",
    "gold",
    "after_step",
    "weights",
    *_BESIDE,
)
_OF_TRL = {"completion_ids": "response_ids", "completion_mask": "response_mask"}


def unpadded(row: Mapping[str, Any]) -> dict[str, Any] | str:
    """The line under our names, with the tokens alone where masks say what is padding; or what is wrong with it."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        name = _OF_TRL.get(key, key)
        if name in found or (name != key and name in row):
            return f"has `{name}` twice, once as `{key}`"
        found[name] = value
    masks = {"prompt_ids": found.pop("prompt_mask", None)}
    masks |= {"response_ids": found.pop("response_mask", None)}
    if masks["prompt_ids"] is not None:
        span = _span(masks["prompt_ids"], found.get("prompt_ids"))
        if span is None:
            return "`prompt_mask` is not 0s and one run of 1s, as long as the ids"
        found["prompt_ids"] = found["prompt_ids"][span]
    of_responses, ids = masks["response_ids"], found.get("response_ids")
    if of_responses is None:
        return found
    if not isinstance(of_responses, list) or not isinstance(ids, list):
        return "`response_mask` belongs to `response_ids`, and one of them is not a list"
    spans = [_span(mask, own) for mask, own in zip(of_responses, ids, strict=False)]
    if len(of_responses) != len(ids) or None in spans:
        return "`response_mask` is not 0s and one run of 1s for each response, as long as its ids"
    return _cut(found, [span for span in spans if span is not None])


def _cut(row: dict[str, Any], spans: list[slice]) -> dict[str, Any]:
    """The line with a part of every response, and of the numbers that stand beside all of its tokens."""
    lengths = [len(own) for own in row["response_ids"]]
    parts = {}
    for key in ("response_ids", "advantages", "weights", "logprobs"):
        of_tokens = row.get(key)
        if isinstance(of_tokens, list) and [_length(own) for own in of_tokens] == lengths:
            parts[key] = [own[span] for own, span in zip(of_tokens, spans, strict=True)]
    return row | parts


def _span(mask: Any, ids: Any) -> slice | None:
    """Where the 1s of a mask are, which stand side by side; `None` for anything else."""
    if not isinstance(mask, list) or _length(ids) != len(mask):
        return None
    if any(type(value) not in (int, bool) or value not in (0, 1) for value in mask):
        return None
    first, count = mask.index(1) if 1 in mask else 0, sum(mask)
    return slice(first, first + count) if all(mask[first : first + count]) else None


def _length(entry: Any) -> int | None:
    return len(entry) if isinstance(entry, list) else None


@dataclass(frozen=True)
class _Line:
    """One line of the file, and what its tokens are held against."""

    row: dict[str, Any]
    where: str
    vocabulary: int
    door: Door

    def read(self) -> Group:
        self._require_known()
        row = unpadded(self.row)
        if isinstance(row, str):
            raise self._wrong(row, "give 1 for the tokens of a response and 0 for padding")
        masked = {_OF_TRL.get(key, key) for key, value in self.row.items() if value is not None}
        return replace(self, row=row)._read(masked)

    def _read(self, masked: set[str]) -> Group:
        """`masked` are the keys that the line has: what a mask has named is not looked at again."""
        row = self.row
        if "prompt_ids" in row:
            prompt = self._ids(row["prompt_ids"], "prompt_ids")
            responses = [self._ids(ids, "response_ids") for ids in self._list("response_ids")]
            if "prompt_mask" not in masked:
                prompt = self._ids(prompt[self.door.inside_prompt(prompt)], "prompt_ids")
            row = self._without_padding(responses, look="response_mask" not in masked)
            responses = row["response_ids"]
        else:
            prompt, responses = self._tokenised()
        count = len(responses)
        if count < 1:
            raise self._wrong(f"has {count} responses, expected at least 1", "give 2 or more")
        return replace(self, row=row)._group(prompt, responses)

    def _group(self, prompt: list[int], responses: list[list[int]]) -> Group:
        row, count = self.row, len(responses)
        given = {key for key in _BESIDE if row.get(key) is not None}
        weighed = row.get("weights") is not None
        if weighed and "advantages" in given:
            problem = "has `advantages` and `weights`"
            raise self._wrong(problem, "give one of them: weights are all that a gradient is times")
        advantages = self._of_tokens("weights", responses) if weighed else None
        return Group(
            prompt,
            responses,
            rewards=self._numbers("rewards", count),
            advantages=self._advantages(responses) if "advantages" in given else advantages,
            weighed=weighed,
            logprobs=self._of_tokens("logprobs", responses) if "logprobs" in given else None,
            micro_batches=self._counts("micro_batches", count)
            if "micro_batches" in given
            else None,
            in_step=self._flags("in_step", count) if "in_step" in given else None,
            after_step=self._after_step(),
        )

    def _without_padding(self, responses: list[list[int]], *, look: bool) -> dict[str, Any]:
        """The line without padding, and numbers of tokens with it, where there is no mask and so it is looked for."""
        row = self.row | {"response_ids": responses}
        if look:
            row = _cut(row, [self.door.inside_response(ids) for ids in responses])
        for ids in row["response_ids"]:
            self._ids(ids, "response_ids")
            early = early_eos(ids, self.door.eos)
            if early is not None:
                problem = f"`response_ids` goes on after the EOS at {early}"
                raise self._wrong(problem, "end each response at its EOS")
        return row

    def _after_step(self) -> int | None:
        step = self.row.get("after_step")
        if step is not None and (type(step) is not int or not 0 <= step < 1 << 62):
            raise self._wrong(f"`after_step` is {shown(step)}", "give the step of the checkpoint")
        return step

    def _require_known(self) -> None:
        """Raise for a key that is none of ours: what it holds would be ignored."""
        for key in self.row:
            if key not in _KEYS and key not in _OF_TRL:
                near = difflib.get_close_matches(str(key), _KEYS, n=1)
                remedy = f"did you mean `{near[0]}`?" if near else f"keys are {', '.join(_KEYS)}"
                raise self._wrong(f"has an unknown key {shown(key)}", remedy)

    def _advantages(self, responses: list[list[int]]) -> list[float] | list[list[float]]:
        given = self.row["advantages"]
        if isinstance(given, list) and any(isinstance(entry, list) for entry in given):
            return self._of_tokens("advantages", responses)
        return self._numbers("advantages", len(responses))

    def _counts(self, key: str, count: int) -> list[int]:
        values = self._list(key)
        if len(values) != count or any(type(v) is not int or not 0 <= v < 1 << 20 for v in values):
            raise self._wrong(f"`{key}` is {shown(values)}", "give one number from 0 per response")
        return values

    def _flags(self, key: str, count: int) -> list[bool]:
        values = self.row[key]
        of_responses = isinstance(values, list) and len(values) == count
        if not of_responses or any(type(value) is not bool for value in values):
            raise self._wrong(f"`{key}` is {shown(values)}", "give one true or false per response")
        return values

    def _wrong(self, problem: str, remedy: str) -> RolloutsError:
        return RolloutsError(self.where, problem, remedy)

    def _tokenised(self) -> tuple[list[int], list[list[int]]]:
        try:
            prompt = checked_prompt(self.row.get("prompt"), None)
        except ValueError as error:
            problem = f"has no `prompt_ids`, and {error}"
            raise self._wrong(problem, "give one of them") from error
        if self.door.tokenizer is None:
            problem = "is text, and the checkpoint has no tokenizer"
            raise self._wrong(problem, "give prompt_ids and response_ids")
        texts = self._list("responses")
        cut = [False] * len(texts)
        if "truncated" in self.row:
            cut = self._flags("truncated", len(texts))
        ended = [not truncated for truncated in cut]
        responses = [self._encoded(*one) for one in zip(texts, ended, strict=True)]
        return self._ids(self.door.of_prompt(prompt), "prompt"), responses

    def _encoded(self, response: object, ended: bool) -> list[int]:
        """The tokens of a response, a text or a list of one message; an EOS is added to one that has ended."""
        text = response
        if isinstance(text, list) and len(text) == 1 and isinstance(text[0], dict):
            text = text[0].get("content")
        if not isinstance(text, str) or has_lone_surrogate(text):
            raise self._wrong(f"a response is {response!a}"[:120], "give texts")
        ids = self._ids(self.door.of_response(text, ended=ended), "responses")
        early = early_eos(ids, self.door.eos)
        if early is not None:
            problem = f"`responses` goes on after the EOS at {early}"
            raise self._wrong(problem, "end each response at its EOS")
        return ids

    def _ids(self, value: Any, key: str) -> list[int]:
        if not isinstance(value, list) or not value:
            problem = f"`{key}` has an empty entry or is not a list"
            raise self._wrong(problem, "give at least one token")
        for token in value:
            if type(token) is not int or not 0 <= token < self.vocabulary:
                remedy = f"give token ids from 0 to {self.vocabulary - 1}"
                raise self._wrong(f"`{key}` holds {shown(token)}", remedy)
        return value

    def _list(self, key: str) -> list[Any]:
        value = self.row.get(key)
        if not isinstance(value, list):
            raise self._wrong(f"has no list under `{key}`", "give one entry per response")
        return value

    def _numbers(self, key: str, count: int) -> list[float]:
        values = self._list(key)
        if len(values) != count:
            problem = f"`{key}` has {len(values)} entries for {count} responses"
            raise self._wrong(problem, "give one for each")
        return self._finite(key, values)

    def _finite(self, key: str, values: list[Any]) -> list[float]:
        for value in values:
            if type(value) not in (int, float) or not abs(value) <= LARGEST_REWARD:
                raise self._wrong(f"`{key}` holds {shown(value)}", "give finite numbers")
        return [float(value) for value in values]

    def _of_tokens(self, key: str, responses: list[list[int]]) -> list[list[float]]:
        """One number per token of every response."""
        lists = self._list(key)
        lengths = [_length(entry) for entry in lists]
        if lengths != [len(response) for response in responses]:
            problem = f"`{key}` has {lengths} numbers"[:120]
            raise self._wrong(problem, "give one per token of each response")
        return [self._finite(key, entry) for entry in lists]
