"""A prompt, and the JSON-lines file that holds prompts."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from entropy_probe.errors import RolloutsError, shown
from entropy_probe.text import has_lone_surrogate, json_lines

_FORM = 'write {"prompt": "…", "gold": "…"}'


@dataclass(frozen=True)
class Prompt:
    """A prompt and, where known, the answer that earns the reward."""

    text: str
    gold: str | None = None


def checked_prompt(text: object, gold: object) -> Prompt:
    """The prompt; a number as gold becomes its text.

    Raises `ValueError` that says which of the two is unfit.
    """
    if not isinstance(text, str) or not text:
        raise ValueError("has no text under `prompt`")
    if has_lone_surrogate(text):
        raise ValueError("has a lone surrogate in `prompt`, which no tokenizer can read")
    if isinstance(gold, str | None):
        return Prompt(text, gold)
    if isinstance(gold, int | float) and not isinstance(gold, bool) and abs(gold) < math.inf:
        with suppress(ValueError):  # an integer of more digits than Python writes
            return Prompt(text, str(gold))
    raise ValueError(f"`gold` is {shown(gold)}, expected a text or a finite number, or nothing")


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read one `{"prompt": str, "gold": str?}` per line.

    Raises `RolloutsError` naming the line that is not of this form.
    """
    prompts = []
    for where, row in json_lines(Path(path), _FORM):
        try:
            prompts.append(checked_prompt(row.get("prompt"), row.get("gold")))
        except ValueError as error:
            raise RolloutsError(where, str(error), _FORM) from error
    if not prompts:
        raise RolloutsError(path, "holds no prompt", 'write one {"prompt": "…"} per line')
    return prompts
