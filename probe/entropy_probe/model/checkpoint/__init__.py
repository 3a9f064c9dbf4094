"""A folder that a trainer wrote → `Checkpoint`. It loads exactly, or fails with one line; nothing in it is executed.

files       JSON, safetensors, tensors-only pickles
pretrained  full models;   adapter  PEFT adapters over a base model on disk
optimizer   Adam's state, mapped to parameters by name
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from entropy_probe.errors import CheckpointError, ConfigError, printable
from entropy_probe.model.checkpoint import adapter, optimizer, pretrained
from entropy_probe.model.checkpoint.files import fingerprint, load_pickle, read_json, reason, weight_files
from entropy_probe.model.checkpoint.optimizer import AdamState

__all__ = ["AdamState", "Checkpoint", "CheckpointInfo", "load_checkpoint"]

_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "training_state.pt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class CheckpointInfo:
    """What the folder is: its kind, files and fingerprint (SHA-256 over weights, configuration and optimizer).

    `saved_states`: how many tensors the optimizer's file holds moments of, by their hyper-parameters.
    """

    path: Path
    base_model: Path | None
    adapter: str | None
    model_type: str
    num_parameters: int
    num_trainable: int
    weights_dtype: str
    optimizer_file: Path
    global_step: int | None
    fingerprint: str
    saved_states: dict[str, int]


@dataclass(frozen=True)
class Checkpoint:
    """{θ, Adam state}: the model in float32 and eval mode, its tokenizer, Adam's state by parameter name."""

    model: nn.Module
    tokenizer: Any | None
    adam: dict[str, AdamState]
    info: CheckpointInfo


def load_checkpoint(
    path: str | Path,
    base_model: str | Path | None = None,
    device: str = "cpu",
    *,
    missing_state: optimizer.MissingState = "raise",
) -> Checkpoint:
    """Load a Transformers/TRL trainer folder, or `save_pretrained` + an optimizer file.

    Full models and PEFT adapters (LoRA, DoRA, `modules_to_save`). Weights and moments are float32 or wider whatever
    the file holds. Only safetensors and `torch.load(weights_only=True)` are used; nothing is downloaded or written.
    A parameter without moments is an error, or with `missing_state="identity"` has those of a fresh optimizer. Raises
    `CheckpointError`: one line naming the file, what is wrong and what to do.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        got = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(folder, f"{got}, expected a checkpoint folder", "give the folder that the trainer wrote")
    if printable(folder) != str(folder):
        raise CheckpointError(folder, "its name is not UTF-8, which safetensors cannot open", "rename the folder")
    base = Path(base_model).expanduser() if base_model is not None else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading notes of transformers and peft; what matters is checked and raised
        if (folder / "adapter_config.json").is_file():
            weights_folder, stem = folder, "adapter_model"
            base = adapter.find_base_model(folder, base)
            model = adapter.load_adapter(folder, base)
            config = read_json(folder / "adapter_config.json")
            kind = "DoRA" if config.get("use_dora") else "LoRA"
        elif (folder / "config.json").is_file():
            weights_folder, stem, base, kind = folder, "model", None, None
            model = pretrained.load_full_model(folder)
        else:
            raise CheckpointError(
                folder, "has neither config.json nor adapter_config.json", "give the folder that the trainer wrote"
            )
        tokenizer = _load_tokenizer(folder if base is None or _has_tokenizer(folder) else base)
    files = [*weight_files(weights_folder, stem), folder / f"{'adapter_' if kind else ''}config.json"]
    optimizer_file = _find_optimizer(folder)
    state_dict = optimizer.find_state(load_pickle(optimizer_file), optimizer_file)
    adam = optimizer.map_adam_state(state_dict, model, optimizer_file, missing_state)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in adam)
    model.to(_usable_device(device))
    parameters = list(model.parameters())
    info = CheckpointInfo(
        path=folder,
        base_model=base,
        adapter=kind,
        model_type=str(model.config.model_type),  # pyright: ignore[reportAttributeAccessIssue]
        num_parameters=sum(p.numel() for p in parameters),
        num_trainable=sum(p.numel() for p in parameters if p.requires_grad),
        weights_dtype=_stored_dtype(files[0]),
        optimizer_file=optimizer_file,
        global_step=_global_step(folder),
        fingerprint=fingerprint([*files, optimizer_file, *(weight_files(base, "model") if base is not None else [])]),
        saved_states=optimizer.inventory(state_dict),
    )
    return Checkpoint(model, tokenizer, adam, info)


def _find_optimizer(folder: Path) -> Path:
    for name in _OPTIMIZER_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        folder, f"has no optimizer state ({', '.join(_OPTIMIZER_FILES)})", "save optimizer.state_dict() as optimizer.pt"
    )


def _usable_device(device: str) -> torch.device:
    try:
        chosen = torch.device(device)
        if chosen.type == "meta":
            raise RuntimeError("it holds no data")
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device {device!r}", f"cannot be used ({reason(error)})", "choose another --probe-device"
        ) from error
    return chosen


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer, or `None` where the folder has none. One that came back empty (it encodes to nothing) raises."""
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


def _stored_dtype(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as handle:
        dtypes = {str(handle.get_slice(name).get_dtype()) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return "/".join(sorted(names.get(d, d) for d in dtypes))


def _global_step(folder: Path) -> int | None:
    path = folder / "trainer_state.json"
    step = read_json(path).get("global_step") if path.is_file() else None
    return step if isinstance(step, int) else None
