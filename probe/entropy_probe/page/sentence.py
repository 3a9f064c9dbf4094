"""The verdict on a checkpoint in a few sentences: what the next step does, and whether the numbers can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

from entropy_probe.answer import Checked, answer
from entropy_probe.page.contents import Checkpoint

_NAMED = 3
_TONES = {"good": "good", "unknown": "open", "bad": "bad"}


def verdict(checkpoint: Checkpoint) -> tuple[str, str]:
    """(`good`, `open` or `bad`; the sentences): the answer that the terminal gives."""
    checked = [Checked(one.name, one.status, one.family == "gate") for one in checkpoint.judged]
    found = answer(checkpoint.report, checked, checkpoint.trouble)
    return _TONES[found.kind], str(found)


def verdict_of_all(checkpoints: Sequence[Checkpoint]) -> tuple[str, str]:
    """The same of several checkpoints: how many are well, and which are not."""
    by_tone: dict[str, list[str]] = {"bad": [], "open": [], "good": []}
    for checkpoint in checkpoints:
        by_tone[verdict(checkpoint)[0]].append(checkpoint.name)
    told = {
        "bad": "did not pass or could not be measured",
        "open": "stayed open",
        "good": "passed",
    }
    said = [
        f"{len(names)} {told[tone]}" + ("" if tone == "good" else f" ({_some(names)})")
        for tone, names in by_tone.items()
        if names
    ]
    tone = next((tone for tone, names in by_tone.items() if names), "open")
    return tone, f"Of {len(checkpoints)} checkpoints {', '.join(said)}."


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
