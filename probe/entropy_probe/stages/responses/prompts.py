"""A prompt, as a text or a list of messages, with what its row says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from entropy_probe.errors import shown
from entropy_probe.text import has_lone_surrogate

Message = Mapping[str, Any]

GOLD = ("gold", "answer", "solution", "ground_truth")
"""Columns that are taken for the gold answer, in this order; then verl's `reward_model.ground_truth`."""


@dataclass(frozen=True)
class Prompt:
    """A text, or `messages` that the tokenizer's chat template renders; where known, the answer that earns the reward.

    `columns` are those of its row, which a reward function is given. The text of messages is that of the last one.
    """

    text: str
    gold: str | None = None
    messages: tuple[Message, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def given(self) -> str | list[dict[str, Any]]:
        """The text, or the messages, as a reward function of a trainer is given it."""
        return self.text if self.messages is None else [dict(m) for m in self.messages]


def checked_prompt(prompt: object, gold: object) -> Prompt:
    """The prompt; a number as gold becomes its text.

    Raises `ValueError` that says which of the two is unfit.
    """
    messages = None
    if isinstance(prompt, Sequence) and not isinstance(prompt, str | bytes):
        messages = _messages(prompt)
        text = _text_of(messages[-1])
    elif isinstance(prompt, str) and prompt:
        text = prompt
    else:
        raise ValueError("has neither a text nor messages under `prompt`")
    if has_lone_surrogate(text):
        raise ValueError("has a lone surrogate in `prompt`, which no tokenizer can read")
    known = _gold_text(gold)
    if gold is not None and known is None:
        raise ValueError(f"`gold` is {shown(gold)}, expected a text or a finite number, or nothing")
    return Prompt(text, known, messages)


def prompt_of_row(row: Mapping[str, Any]) -> tuple[Prompt, str | None]:
    """The prompt of a row of a file, with all other columns; and the column that its gold answer is from.

    Raises `ValueError` that says what is unfit.
    """
    name, gold = _gold(row)
    prompt = checked_prompt(row.get("prompt"), gold)
    columns = {key: value for key, value in row.items() if key != "prompt"}
    return Prompt(prompt.text, prompt.gold, prompt.messages, columns), name


def _gold(row: Mapping[str, Any]) -> tuple[str | None, Any]:
    if row.get("gold") is not None:
        return "gold", row["gold"]
    of_verl = row.get("reward_model")
    for name in GOLD[1:]:
        if _gold_text(row.get(name)) is not None:
            return name, row[name]
    if isinstance(of_verl, Mapping) and _gold_text(of_verl.get("ground_truth")) is not None:
        return "reward_model.ground_truth", of_verl["ground_truth"]
    return None, None


def _gold_text(gold: object) -> str | None:
    """A text as it is, a finite number as its text; `None` for anything else."""
    if isinstance(gold, str):
        return gold
    if isinstance(gold, int | float) and not isinstance(gold, bool) and abs(gold) < math.inf:
        with suppress(ValueError):  # an integer of more digits than Python writes
            return str(gold)
    return None


def _messages(prompt: Sequence[Any]) -> tuple[Message, ...]:
    if not prompt:
        raise ValueError("has an empty list under `prompt`")
    for message in prompt:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            problem = f"has {shown(message)} among its messages"
            raise ValueError(f'{problem}, expected {{"role": "…", "content": "…"}}')
        if has_lone_surrogate(_text_of(message)):
            raise ValueError("has a lone surrogate in `prompt`, which no tokenizer can read")
    return tuple(dict(message) for message in prompt)


def _text_of(message: Message) -> str:
    """The content of a message: a text, or parts with texts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    if content is None:  # a call of a tool
        return ""
    parts = content if isinstance(content, Sequence) else [content]
    given = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    texts = [text for text in given if isinstance(text, str)]
    if len(texts) < len(given):
        raise ValueError(f"has a message whose content is {shown(content)}, expected text")
    return "".join(texts)
