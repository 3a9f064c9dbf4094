"""Prompts to sample from, and the reward of a response.

A dataset is a list of `Prompt(text, gold)`. `arithmetic` is generated here, from a seed; a JSON-lines file
(`prompt`, optional `gold`) is read by `read_prompts`. The reward is `tag_pref`: the response carries exactly one
`<answer>…</answer>` pair whose content equals the gold answer.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from entropy_probe.errors import ConfigError, RolloutsError

ARITHMETIC_TEMPLATE = "What is {a}{op}{b}?\n"
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LARGEST_OPERAND = 49


@dataclass(frozen=True)
class Prompt:
    """A prompt and, where known, the answer that earns the reward."""

    text: str
    gold: str | None = None


def arithmetic(split: str) -> list[Prompt]:
    """Every sum a+b and difference a-b with 0 <= a, b <= 49, in one fixed random order; the last fifth is `test`.

    The two splits are disjoint and their union is the whole set of 5000 questions.
    """
    prompts = [
        Prompt(ARITHMETIC_TEMPLATE.format(a=a, op=op, b=b), str(answer))
        for a in range(_LARGEST_OPERAND + 1)
        for b in range(_LARGEST_OPERAND + 1)
        for op, answer in (("+", a + b), ("-", a - b))
    ]
    random.Random(0).shuffle(prompts)
    first_held_out = len(prompts) * 4 // 5
    return prompts[first_held_out:] if split == "test" else prompts[:first_held_out]


DATASETS: dict[str, Callable[[str], list[Prompt]]] = {"arithmetic": arithmetic}


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read one `{"prompt": str, "gold": str?}` per line.

    Raises `RolloutsError` naming the line that is not of this form.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise RolloutsError(path, f"cannot be read ({error})", "give a JSON-lines file") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RolloutsError(where, f"is not JSON ({error})", 'write {"prompt": "…", "gold": "…"}') from error
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"]:
            raise RolloutsError(where, "has no text under `prompt`", 'write {"prompt": "…", "gold": "…"}')
        gold = row.get("gold")
        if isinstance(gold, bool) or not (gold is None or isinstance(gold, str | int | float)):
            raise RolloutsError(where, f"`gold` is {gold!r}", "give a text or a number, or leave it out")
        prompts.append(Prompt(row["prompt"], None if gold is None else str(gold)))
    if not prompts:
        raise RolloutsError(path, "holds no prompt", 'write one {"prompt": "…"} per line')
    return prompts


def draw_prompts(pool: list[Prompt], count: int, *, seed: int, with_replacement: bool) -> list[Prompt]:
    """Draw `count` prompts from the pool, the same for the same seed.

    Raises `ConfigError` where the pool is smaller than `count` and `with_replacement` is false.
    """
    rng = random.Random(seed)
    if with_replacement:
        return rng.choices(pool, k=count)
    if count > len(pool):
        raise ConfigError(
            "batch.num_prompts",
            f"{count} prompts asked for (E and U together), {len(pool)} in the dataset",
            "give more prompts, ask for fewer, or set batch.with_replacement: true",
        )
    return rng.sample(pool, count)


def _as_number(text: str) -> Decimal | None:
    try:
        number = Decimal(text.replace(",", "").replace("$", "").strip())
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def same_answer(answer: str, gold: str) -> bool:
    """Numbers are equal as numbers (`1,000` = `1000.0` = `$1000`), texts after folding case and white space."""
    answer_number, gold_number = _as_number(answer), _as_number(gold)
    if answer_number is not None and gold_number is not None:
        return answer_number == gold_number
    return " ".join(answer.casefold().split()) == " ".join(gold.casefold().split())


def tag_pref(response: str, gold: str | None) -> float:
    """1.0 if the response has exactly one `<answer>…</answer>` pair and its content equals `gold`, else 0.0.

    Without a gold answer the reward is 0.0 (docs/derivations.md, departure 12).
    """
    if gold is None or response.count("<answer>") != 1 or response.count("</answer>") != 1:
        return 0.0
    match = _ANSWER.search(response)
    return float(match is not None and same_answer(match.group(1), gold))
