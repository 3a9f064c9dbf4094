"""The inputs of a batch, looked up again: a rollouts file line by line; or prompts and gold in the dataset, by the
tokens that its texts have, and rewards from decoded text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

Question = tuple[str, str | None]
"""Text and gold."""
_FEW, _MOST = 8, 50_000
"""Prompts whose rewards are computed again; questions whose tokens are made again."""


def of_file(
    path: Path, prompts: Sequence[list[int]], responses: Sequence[Sequence[list[int]]]
) -> dict[str, Any]:
    """`wrong`: the numbers of the prompts that are not those of their line, by the ids where it has ids; `rewards` and
    `advantages` as the lines have them."""
    lines = _lines(path)
    found: dict[str, Any] = {"rewards": [line["rewards"] for line in lines]}
    if all("prompt_ids" in line for line in lines):
        found["wrong"] = _wrong(lines, prompts, responses)
    for key in ("advantages", "weights"):
        if all(line.get(key) is not None for line in lines):
            found["advantages"] = [
                [_own(*one) for one in zip(line[key], _masks(line), strict=True)] for line in lines
            ]
    return found


def _tokens(line: Any) -> list[Any]:
    """The prompt and the responses of a line, without padding."""
    responses = line.get("response_ids", line.get("completion_ids"))
    own = [_own(*one) for one in zip(responses, _masks(line), strict=True)]
    return [_own(line["prompt_ids"], line.get("prompt_mask")), own]


def _masks(line: Any) -> list[Any]:
    masks = line.get("response_mask", line.get("completion_mask"))
    return [None] * len(line["rewards"]) if masks is None else masks


def _own(values: Any, mask: list[int] | None) -> Any:
    """Those of a list at which its mask has 1; one number, and a list without padding, as it is."""
    if mask is None or not isinstance(values, list) or len(values) != len(mask):
        return values
    return [value for value, is_own in zip(values, mask, strict=True) if is_own]


def _wrong(
    lines: Sequence[Any], prompts: Sequence[list[int]], responses: Sequence[Sequence[list[int]]]
) -> list[int]:
    wrong = [n for n in range(max(len(lines), len(prompts))) if n >= min(len(lines), len(prompts))]
    for n, (line, prompt, own) in enumerate(zip(lines, prompts, responses, strict=False)):
        if _tokens(line) != [prompt, list(own)]:
            wrong.append(n)
    return wrong


@dataclass(frozen=True)
class Questions:
    """The questions of a split by the tokens that their texts have; `None` where the same text has several answers.
    `distinct`: no text comes twice."""

    tokenizer: Any
    by_tokens: dict[tuple[int, ...], Question | None]
    distinct: bool

    @classmethod
    def of(cls, name: str, split: str, prompts_file: Path | None, tokenizer: Any) -> Questions:
        """Raises `LookupError` for a dataset that is not read a second time."""
        found = pool(name, split, prompts_file)
        if found is None:
            raise LookupError(f"the dataset {name} is not read a second time")
        if len(found) > _MOST:
            raise LookupError(f"{len(found)} questions are too many to read a second time")
        by_tokens: dict[tuple[int, ...], Question | None] = {}
        texts = [text for text, _ in found]
        encoded = tokenizer(texts).input_ids if texts else []
        for question, tokens in zip(found, map(tuple, encoded), strict=True):
            same = by_tokens.get(tokens, question) == question
            by_tokens[tokens] = question if same else None
        return cls(tokenizer, by_tokens, len(by_tokens) == len(found))


def of_dataset(
    questions: Questions,
    reward: str,
    prompts: Sequence[list[int]],
    responses: Sequence[Sequence[list[int]]],
) -> dict[str, Any]:
    """`wrong`: the numbers of the prompts whose tokens no question of the split has; `rewards` of the first prompts
    that are there, by their numbers, unless the reward is an entry point of a package."""
    tokenizer, by_tokens = questions.tokenizer, questions.by_tokens
    known = [by_tokens.get(tuple(prompt)) for prompt in prompts]
    found: dict[str, Any] = {
        "wrong": [n for n, prompt in enumerate(prompts) if tuple(prompt) not in by_tokens],
        "distinct": questions.distinct,
    }
    rewards = {}
    try:
        judge = tag_pref if reward == "tag_pref" else _function(reward)
        for n, question in enumerate(known):
            if judge is not None and question is not None and len(rewards) < _FEW:
                texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses[n]]
                rewards[str(n)] = [float(judge(text, question[1])) for text in texts]
    except Exception:  # of the user's function, which was asked before and gave numbers
        return found
    return found | ({} if judge is None else {"rewards": rewards})


def pool(name: str, split: str, prompts_file: Path | None) -> list[Question] | None:
    """All questions; `None` for a dataset of the package `datasets` or behind an entry point."""
    head, _, path = name.partition(":")
    if prompts_file is not None or (head == "jsonl" and path):
        file = prompts_file or Path(path).expanduser()
        return [(row["prompt"], _text(row.get("gold"))) for row in _lines(file)]
    if name == "arithmetic":
        return _arithmetic(split)
    if head != "gsm8k_r1_template" and path:
        function = _function(name)
        if function is None:
            return None
        one, other = ([_question(row) for row in islice(function(split), _MOST + 1)] for _ in "12")
        if one != other:
            raise LookupError(f"the dataset {name} has other questions each time")
        return one
    return None


def _lines(path: Path) -> list[Any]:
    """A value of JSON on each line; a text may hold other separators of lines."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _arithmetic(split: str) -> list[Question]:
    """a+b and a−b for a and b below 50, shuffled by `random.Random(0)`; the last fifth is `test`."""
    of_all = []
    for number in range(2500):
        a, b = divmod(number, 50)
        of_all += [(f"What is {a}+{b}?\n", str(a + b)), (f"What is {a}-{b}?\n", str(a - b))]
    random.Random(0).shuffle(of_all)
    return of_all[4000:] if split == "test" else of_all[:4000]


def tag_pref(response: str, gold: str | None) -> float:
    """1 where the only <answer>…</answer> holds the gold answer: the same number, or the same words."""
    if gold is None:
        return 0.0
    pieces = re.split(r"(</?answer>)", response)
    if pieces[1::2] != ["<answer>", "</answer>"]:
        return 0.0
    one, other = _number(pieces[2]), _number(gold)
    if one is not None and other is not None:
        return float(one == other)
    return float(pieces[2].casefold().split() == gold.casefold().split())


def _number(text: str) -> Fraction | None:
    """A plain number, with a dollar sign and commas between groups of three."""
    text = text.strip()
    if not re.fullmatch(
        r"(\$?[+-]?|[+-]\$)(\d[\d,]*\.?\d*|\.\d+)([eE][+-]?\d{1,3})?\$?", text, re.A
    ):
        return None
    whole = re.split(r"[.eE]", text.strip("$+-"))[0]
    if "," in whole and not re.fullmatch(r"\d{1,3}(,\d{3})+", whole, re.A):
        return None
    return Fraction(text.replace("$", "").replace(",", ""))


def _function(name: str) -> Any | None:
    """`module:function`; an entry point is left alone."""
    module, _, path = name.partition(":")
    if not path:
        return None
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _question(row: Any) -> Question:
    if isinstance(row, dict):
        return row["prompt"], _text(row.get("gold"))
    text, gold = row if isinstance(row, tuple | list) else (row.text, row.gold)
    return text, _text(gold)


def _text(gold: Any) -> str | None:
    return None if gold is None else str(gold)
