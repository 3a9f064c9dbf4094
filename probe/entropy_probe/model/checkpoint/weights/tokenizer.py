"""The tokenizer of a checkpoint's or a base model's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint.files import reason
from entropy_probe.model.checkpoint.weights.pretrained import check_layers, read_config
from entropy_probe.model.quiet import quiet_transformers
from entropy_probe.text import read_json

_MOST_LAYERS = 10_000
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "spiece.model",
)


def load_tokenizer(places: Sequence[Path | None], num_embeddings: int | None = None) -> Any | None:
    """The tokenizer of the first of the folders that has one, or `None`.

    One that cannot be loaded raises, as does one that is code, that came back empty (it encodes to
    nothing), or that has tokens beyond the `num_embeddings` of the model.
    """
    having = (place for place in places if place is not None and _has_tokenizer(place))
    folder = next(having, None)
    if folder is None:
        return None
    reads_config = (folder / "config.json").is_file()
    if reads_config:
        check_layers(folder, _MOST_LAYERS)
    settings = folder / "tokenizer_config.json"
    if settings.is_file() and "auto_map" in read_json(settings):
        raise CheckpointError(
            settings,
            "asks for remote code (`auto_map`), which is never run",
            "save a tokenizer of transformers",
        )
    try:
        with quiet_transformers():
            options = {"config": read_config(folder)} if reads_config else {}
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **options
            )
            tokens = tokenizer("a 1", add_special_tokens=False).input_ids
        size, largest = len(tokenizer), max(tokenizer.get_vocab().values(), default=0)
    except Exception as error:  # the tokenizers library raises bare `Exception`
        raise CheckpointError(
            folder, f"its tokenizer cannot be loaded ({reason(error)})", "restore tokenizer.json"
        ) from error
    if size < 2 or not tokens:
        raise CheckpointError(
            folder, f"its tokenizer is empty ({size} tokens)", "restore tokenizer.json"
        )
    if num_embeddings is not None and largest >= num_embeddings:
        raise CheckpointError(
            folder,
            f"its tokenizer has a token {largest}, the embedding {num_embeddings} rows",
            "restore the tokenizer that belongs to the model; if tokens were added in training, give a copy of "
            f"the base after resize_token_embeddings({largest + 1}) as --probe-base-model",
        )
    return tokenizer


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _FILES)
