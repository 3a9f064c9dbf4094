"""The tokenizer of a checkpoint's or a base model's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint.files import reason

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def load_tokenizer(folder: Path, base: Path | None) -> Any | None:
    """The tokenizer of `folder`, else of the `base` model, or `None` where neither has one.

    One that came back empty (it encodes to nothing) raises, as does one that cannot be loaded.
    """
    folder = next((place for place in (folder, base) if place is not None and _has_tokenizer(place)), folder)
    if not _has_tokenizer(folder):
        return None
    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare `Exception`
        raise CheckpointError(
            folder, f"its tokenizer cannot be loaded ({reason(error)})", "restore tokenizer.json"
        ) from error
    if len(tokenizer) < 2 or not tokenizer("a 1", add_special_tokens=False).input_ids:
        raise CheckpointError(folder, f"its tokenizer is empty ({len(tokenizer)} tokens)", "restore tokenizer.json")
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILES)
