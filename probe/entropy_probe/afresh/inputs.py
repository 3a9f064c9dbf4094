"""The inputs of a batch, looked up again: a rollouts file line by line; or prompts and gold in the dataset, by the
tokens that its texts have, and rewards from decoded text."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from hashlib import sha256
from importlib import import_module
from inspect import isawaitable, signature
from itertools import islice, pairwise
from math import fsum, isfinite
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Question:
    """A text or messages, the answer, and the row that they stand in."""

    prompt: Any
    gold: str | None
    row: dict[str, Any] = field(default_factory=dict)


_FEW, _MOST = 8, 50_000
"""Prompts whose rewards are computed again; questions whose tokens are made again."""


def of_file(
    path: Path,
    prompts: Sequence[list[int]],
    responses: Sequence[Sequence[list[int]]],
    pad: Callable[[], int | None] = lambda: None,
) -> dict[str, Any]:
    """`wrong`: the numbers of the prompts that are not those of their line, by the ids where it has ids; `rewards` and
    `advantages` as the lines have them. `pad` is asked where a line has more tokens than were taken."""
    lines = _lines(path)
    found: dict[str, Any] = {"rewards": [line["rewards"] for line in lines]}
    if all("prompt_ids" in line for line in lines):
        found["wrong"] = _wrong(lines, prompts, responses, pad)
    for key in ("advantages", "weights"):
        if all(line.get(key) is not None for line in lines):
            masked = [
                [_own(*one) for one in zip(line[key], _masks(line), strict=True)] for line in lines
            ]
            found["advantages"] = [
                [
                    a[: len(ids)] if isinstance(a, list) else a
                    for a, ids in zip(of_prompt, own, strict=True)
                ]
                for of_prompt, own in zip(masked, responses, strict=True)
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
    lines: Sequence[Any],
    prompts: Sequence[list[int]],
    responses: Sequence[Sequence[list[int]]],
    pad: Callable[[], int | None],
) -> list[int]:
    wrong = [n for n in range(max(len(lines), len(prompts))) if n >= min(len(lines), len(prompts))]
    for n, (line, prompt, own) in enumerate(zip(lines, prompts, responses, strict=False)):
        if _tokens(line) != [prompt, list(own)] and not _padded(_tokens(line), prompt, own, pad()):
            wrong.append(n)
    return wrong


def _padded(line: list[Any], prompt: list[int], own: Sequence[list[int]], pad: int | None) -> bool:
    """Whether the line has the same tokens, with padding before the prompt and padding or EOS after a response."""
    ids, responses = line
    start = len(ids) - len(prompt)
    if ids[start:] != prompt or any(token != pad for token in ids[: max(start, 0)]):
        return False
    return len(responses) == len(own) and all(
        given[: len(ids)] == ids and set(given[len(ids) :]) <= {pad, ids[-1]}
        for given, ids in zip(responses, own, strict=True)
    )


@dataclass(frozen=True)
class Questions:
    """The questions of a split by the tokens that they have; `None` where the same tokens have several answers.
    `distinct`: none comes twice."""

    tokenizer: Any
    by_tokens: dict[tuple[int, ...], Question | None]
    distinct: bool

    @classmethod
    def of(cls, batch: Any, prompts_file: Path | None, tokenizer: Any) -> Questions:
        """By the section `batch` of the configuration. Raises `LookupError` for what is not read a second time."""
        found = pool(batch.dataset, batch.split, prompts_file)
        if found is None:
            raise LookupError(f"the dataset {batch.dataset} is not read a second time")
        if len(found) > _MOST:
            raise LookupError(f"{_MOST} questions are the most that are read a second time")
        by_tokens: dict[tuple[int, ...], Question | None] = {}
        for question, ids in zip(found, _encoded(found, tokenizer, batch), strict=True):
            tokens = tuple(ids)
            known = by_tokens.get(tokens, question)
            by_tokens[tokens] = question if known == question else None
        return cls(tokenizer, by_tokens, len(by_tokens) == len(found))


def _encoded(questions: Sequence[Question], tokenizer: Any, batch: Any) -> list[list[int]]:
    """Texts all at once, since a call takes longer than a text."""
    prompts = [question.prompt for question in questions]
    if (
        batch.system_prompt is not None
        or not prompts
        or not all(isinstance(p, str) for p in prompts)
    ):
        return [_encoded_alone(question, tokenizer, batch) for question in questions]
    encoded = partial(
        tokenizer, prompts, return_attention_mask=False
    )  # which takes four fifths of the time
    usual = encoded().input_ids
    begins, ends = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    if not any(list(ids[:1]) == begins or list(ids[-1:]) == ends for ids in usual):
        return [list(ids) for ids in usual]
    plain = encoded(add_special_tokens=False).input_ids
    return [
        _without_marks(list(ids), list(own), begins, ends)
        for ids, own in zip(usual, plain, strict=True)
    ]


def _without_marks(
    ids: list[int], plain: list[int], begins: list[int | None], ends: list[int | None]
) -> list[int]:
    """Of a text neither a second BOS nor an EOS of the tokenizer's."""
    if plain[:1] == begins and ids[: 1 + len(plain)] == [*begins, *plain]:
        ids = ids[1:]
    return ids[:-1] if ids[-1:] == ends != plain[-1:] and len(ids) > 1 else ids


def _encoded_alone(question: Question, tokenizer: Any, batch: Any) -> list[int]:
    """Messages by the chat template in one go."""
    turns = question.prompt
    if isinstance(turns, str) and batch.system_prompt is None:
        return _encoded([question], tokenizer, batch)[0]
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    if batch.system_prompt is not None and turns[0]["role"] != "system":
        turns = [{"role": "system", "content": batch.system_prompt}, *turns]
    begun = turns[-1]["role"] == "assistant"
    own, tools = (
        json.loads(value) if isinstance(value, str) else value
        for value in (question.row.get("chat_template_kwargs"), question.row.get("tools"))
    )
    more = {**batch.chat_template_kwargs, **(own or {})}
    return tokenizer.apply_chat_template(
        turns,
        tools=tools or None,
        add_generation_prompt=not begun,
        continue_final_message=begun,
        tokenize=True,
        return_dict=False,
        **more,
    )


def of_dataset(
    questions: Questions,
    batch: Any,
    reward: str,
    prompts: Sequence[list[int]],
    responses: Sequence[Sequence[list[int]]],
    recorded: Sequence[list[float]],
    parts: Sequence[int] = (),
) -> dict[str, Any]:
    """`wrong`: the numbers of the prompts whose tokens no question of the split has; `rewards` of the first prompts
    that are there, by their numbers, unless a reward is an entry point of a package; of all where those are not as
    `recorded`, one after the other of the parts in which the prompts were drawn, which end at the numbers in `parts`.
    `reward` is `stand_in` where that took the place of what the configuration says."""
    by_tokens = questions.by_tokens
    known = [by_tokens.get(tuple(prompt)) for prompt in prompts]
    found: dict[str, Any] = {
        "wrong": [n for n, prompt in enumerate(prompts) if tuple(prompt) not in by_tokens],
        "distinct": questions.distinct,
    }
    names = [batch.reward] if isinstance(batch.reward, str) else batch.reward
    names = ["stand_in"] if reward == "stand_in" else names
    weights = batch.reward_weights or [1.0] * len(names)
    try:
        judges = [_judge(name) for name in names]
        if None in judges:
            return found
        places = [n for n, question in enumerate(known) if question is not None]
        some = _rewards(questions, known, responses, places[:_FEW], judges, weights)
        differs = any(recorded[int(n)] != own for n, own in some.items())
        if differs and len(places) == len(known):  # a reward may compare the responses of a batch
            for first, end in pairwise((0, *(parts or (len(known),)))):
                some |= _rewards(questions, known, responses, places[first:end], judges, weights)
    except Exception:  # of the user's function, which was asked before and gave numbers
        return found
    return found | {"rewards": some}


def _rewards(
    questions: Questions,
    known: Sequence[Question | None],
    responses: Sequence[Sequence[list[int]]],
    places: Sequence[int],
    judges: Sequence[Any],
    weights: Sequence[float],
) -> dict[str, list[float]]:
    """Of the prompts at some places, by their numbers."""
    decode = questions.tokenizer.decode
    asked = [
        _Asked(question, decode(ids, skip_special_tokens=True), ids)
        for n in places
        if (question := known[n]) is not None
        for ids in responses[n]
    ]
    given = iter(zip(*(judge(asked) for judge in judges), strict=True))
    return {
        str(n): [
            fsum(
                w * float(value)
                for w, value in zip(weights, next(given), strict=True)
                if value is not None
            )
            for _ in responses[n]
        ]
        for n in places
    }


@dataclass(frozen=True)
class _Asked:
    question: Question
    text: str
    ids: list[int]


def _judge(name: str) -> Callable[[list[_Asked]], list[Any]] | None:
    """Responses → their rewards, all at once as they were asked for; `None` for an entry point."""
    own = {"tag_pref": tag_pref, "stand_in": lambda text, _: _stand_in(text)}.get(name)
    function = own or _function(name)
    if function is None:
        return None
    takes: Any = {} if own else signature(function).parameters
    all_taken = any(p.kind is p.VAR_KEYWORD for p in takes.values())

    def fitting(given: dict[str, Any]) -> dict[str, Any]:
        return given if all_taken else {key: v for key, v in given.items() if key in takes}

    def pair(asked: list[_Asked]) -> list[Any]:
        return [function(one.text, one.question.gold) for one in asked]

    def trl(asked: list[_Asked]) -> list[Any]:
        keys = dict.fromkeys(key for one in asked for key in one.question.row if key != "prompt")
        given: dict[str, Any] = {
            key: [deepcopy(one.question.row.get(key)) for one in asked] for key in keys
        }
        given["prompts"] = [one.question.prompt for one in asked]
        given["completions"] = [
            one.text
            if isinstance(one.question.prompt, str)
            else [{"role": "assistant", "content": one.text}]
            for one in asked
        ]
        given["completion_ids"] = [list(one.ids) for one in asked]
        given |= {"trainer_state": None, "log_extra": _nothing, "log_metric": _nothing}
        values = function(**fitting(given))
        if isawaitable(values):
            with ThreadPoolExecutor(1) as thread:  # there may be a loop in this one
                values = thread.submit(asyncio.run, _awaited(values)).result()
        return list(values)

    def verl(asked: list[_Asked]) -> list[Any]:
        values = []
        for one in asked:
            row = one.question.row
            gold = (row.get("reward_model") or {}).get("ground_truth", one.question.gold)
            given = {"data_source": row.get("data_source"), "ground_truth": gold}
            given |= {"extra_info": row.get("extra_info"), "solution_str": one.text}
            value = function(**fitting(given))
            values.append(value["score"] if isinstance(value, dict) else value)
        return values

    return trl if "completions" in takes else verl if "solution_str" in takes else pair


async def _awaited(values: Any) -> Any:
    return await values


def _nothing(*_: Any) -> None:
    """What a function may log with."""


def _stand_in(text: str) -> float:
    """The first 48 bits of a digest, as a fraction of 2⁴⁸."""
    return (
        int(sha256(b"stand-in " + text.encode(errors="surrogatepass")).hexdigest()[:12], 16)
        / 16**12
    )


def pool(name: str, split: str, prompts_file: Path | None) -> list[Question] | None:
    """All questions; `None` for a dataset of the package `datasets`, behind an entry point, or in a table."""
    head, _, path = name.partition(":")
    if prompts_file is not None or (head == "jsonl" and path):
        file = prompts_file or Path(path).expanduser()
        if file.suffix.lower() not in (".jsonl", ".ndjson", ".txt", ""):
            raise LookupError(f"{file.suffix} is not read a second time")
        with file.open(encoding="utf-8-sig", newline="\n") as lines:
            rows = islice((json.loads(line) for line in lines if line.strip()), _MOST + 1)
            return [Question(row["prompt"], _gold(row), row) for row in rows]
    if name == "arithmetic":
        return [Question(text, gold) for text, gold in _arithmetic(split)]
    if head != "gsm8k_r1_template" and path:
        function = _function(name)
        if function is None:
            return None
        one, other = ([_question(row) for row in islice(function(split), _MOST + 1)] for _ in "12")
        if one != other:
            raise LookupError(f"the dataset {name} has other questions each time")
        return one
    return None


def _gold(row: dict[str, Any]) -> str | None:
    """The first of the columns that hold an answer, a text or a number."""
    model = row.get("reward_model")
    last = model.get("ground_truth") if isinstance(model, dict) else None
    columns = [row.get(key) for key in ("gold", "answer", "solution", "ground_truth")]
    for value in (*columns, last):
        if isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value):
            return str(value)
    return None


def _lines(path: Path) -> list[Any]:
    """A value of JSON on each line; a text may hold other separators of lines."""
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _arithmetic(split: str) -> list[tuple[str, str]]:
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
        return Question(row["prompt"], _gold(row), row)
    if isinstance(row, tuple | list):
        text, gold = row
        return Question(text, _text(gold))
    return Question(
        row.text if row.messages is None else list(row.messages), row.gold, dict(row.columns)
    )


def _text(gold: Any) -> str | None:
    return None if gold is None else str(gold)
