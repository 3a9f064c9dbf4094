"""Prompts, tokenizer and sampling, as a trainer of transformers or TRL has them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_probe.config import ProbeConfig
from entropy_probe.config.sources import merged
from entropy_probe.errors import ConfigError, shown
from entropy_probe.model.sharded import is_sharded

Prompts = Any
"""A file, or rows that can be counted and looked up: a list, a `datasets.Dataset`."""


def config_of(trainer: Any, budget: str, given: Mapping[str, Any] | None) -> ProbeConfig:
    """The temperature, the length and the chat template's arguments of the trainer, the values of the budget, and over
    both what was `given`. Raises `ConfigError`."""
    arguments, found = trainer.args, {"budget": budget, "generation": {}, "batch": {}}
    for key, name in (("temperature", "temperature"), ("max_new_tokens", "max_completion_length")):
        value = getattr(arguments, name, None)
        if value is not None:
            found["generation"][key] = value
    template = getattr(arguments, "chat_template_kwargs", None)
    if template:
        found["batch"]["chat_template_kwargs"] = dict(template)
    return ProbeConfig.from_mapping(merged(found, dict(given or {})), where="config")


def prompts_of(trainer: Any, given: Prompts) -> tuple[Prompts, str]:
    """The prompts to draw from, and what they are called: those `given`, or those of the training set."""
    if given is not None:
        is_file = isinstance(given, str | Path)
        if is_file and not Path(given).exists():
            raise ConfigError("prompts", f"there is no file {shown(str(given))}", "give a file")
        return given, str(given) if is_file else "given"
    rows: Any = trainer.train_dataset
    columns = getattr(rows, "column_names", None)
    if not (hasattr(rows, "__len__") and hasattr(rows, "__getitem__")):
        problem = f"the training set is a {type(rows).__name__}, in which no row can be looked up"
        raise ConfigError("prompts", problem, "give prompts=, a file or a list")
    if columns is not None and "prompt" not in columns:
        problem = f"the training set has the columns {shown(columns)}"
        raise ConfigError("prompts", problem, "give prompts=, a file or a list")
    return rows, "the training set"


def tokenizer_of(trainer: Any) -> Any:
    """A copy of the trainer's tokenizer, whose padding and truncation are then its own; that of a processor."""
    processing = trainer.processing_class
    tokenizer = getattr(processing, "tokenizer", processing)
    if tokenizer is None:
        raise ConfigError(
            "processing_class", "the trainer has none", "give the trainer a tokenizer"
        )
    return copy.deepcopy(tokenizer)


def require_whole(trainer: Any) -> None:
    """Raise where processes have parts of the model and its gradient that cannot be brought together by name."""
    kind = str(getattr(trainer.accelerator.distributed_type, "value", ""))
    if getattr(trainer.accelerator, "is_fsdp2", False):
        return
    if kind == "NO" or kind.startswith("MULTI_"):
        if not is_sharded(trainer.model):
            return
        kind = "tensor parallelism"
    kind = "FSDP1" if kind == "FSDP" else kind
    problem = f"the training is spread by {kind}, and no process has the whole gradient"
    remedy = "train with FSDP2 (`fsdp_version: 2`) or DDP, or probe the checkpoints"
    raise ConfigError("the trainer", problem, remedy)


def gradient_scale(trainer: Any, optimizer: Any) -> float:
    """What the gradients are multiplied by: the scale of a GradScaler that has not unscaled them, as clipping does."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    if scaler is None or not scaler.is_enabled():
        return 1.0
    stage = scaler._per_optimizer_states[id(optimizer)]["stage"]
    return 1.0 if stage.name != "READY" else float(scaler.get_scale())
