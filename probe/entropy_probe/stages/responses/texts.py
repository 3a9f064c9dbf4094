"""The texts of a batch, for the eye: nothing is computed from them."""

from __future__ import annotations

from typing import Any

from entropy_probe.stages.responses.rollouts import Rollouts

HEAD, TAIL = 800, 300
"""Characters that are kept of a text from its beginning and from its end."""


def texts_of(tokenizer: Any | None, rollouts: Rollouts) -> dict[str, Any] | None:
    """`prompts` [B] and `responses` [B][G] as the tokenizer writes them, special tokens too; `None` without one
    that knows the ids.

    A longer text loses its middle, and says so.
    """
    if tokenizer is None:
        return None
    group = rollouts.num_responses
    starts = rollouts.prompt_lens[::group].tolist()
    rows = rollouts.ids[::group].tolist()
    prompts = [row[:start] for row, start in zip(rows, starts, strict=True)]
    try:
        asked = [_short(tokenizer.decode(prompt)) for prompt in prompts]
        own = [_short(tokenizer.decode(response)) for response in rollouts.responses]
    except Exception:  # whatever a tokenizer raises on ids that are not its own
        return None
    return {
        "prompts": asked,
        "responses": [own[first : first + group] for first in range(0, len(own), group)],
    }


def _short(text: str) -> str:
    left_out = len(text) - HEAD - TAIL
    return text if left_out <= 0 else f"{text[:HEAD]} […{left_out} characters…] {text[-TAIL:]}"
