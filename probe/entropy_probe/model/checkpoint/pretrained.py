"""A full model as `save_pretrained` writes it: config.json, and safetensors or pytorch_model.bin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint.files import read_json, read_tensors, reason, require_finite, weight_files
from entropy_probe.model.quiet import quiet_transformers


def check_config(folder: Path) -> str:
    """The `model_type` of config.json. Remote code, quantised weights and unknown types raise."""
    config = read_json(folder / "config.json")
    if "auto_map" in config:
        raise CheckpointError(
            folder / "config.json",
            "asks for remote code (`auto_map`), which is never run",
            "use a model type of transformers",
        )
    if "quantization_config" in config:
        raise CheckpointError(folder / "config.json", "is quantised", "give the weights in floating point")
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if not isinstance(config.get("model_type"), str) or config["model_type"] not in known:
        raise CheckpointError(
            folder / "config.json",
            f"model_type is {config.get('model_type')!r}, unknown to transformers {transformers.__version__}",
            "install a version that knows it",
        )
    return config["model_type"]


def load_full_model(folder: Path, weights: dict[str, Tensor] | None = None, source: Path | None = None) -> nn.Module:
    """The causal language model of `folder`, in float32 or wider, in eval mode; nothing initialised at random.

    `weights` were read from `source` already; else they are those in the folder's own files.
    """
    check_config(folder)
    files = [] if weights is not None else weight_files(folder, "model")
    stored: dict[str, Path] = {}
    dtypes: set[torch.dtype] = {torch.float32}
    for path in files:
        tensors = read_tensors(path)
        stored |= dict.fromkeys(tensors, path)
        dtypes |= {tensor.dtype for tensor in tensors.values()}
    if weights is not None:
        require_finite(weights, source or folder)
        dtypes |= {tensor.dtype for tensor in weights.values()}
    options: dict[str, Any] = {"output_loading_info": True}
    options["dtype"] = torch.float64 if torch.float64 in dtypes else torch.float32
    try:
        with quiet_transformers():
            auto, offline = transformers.AutoModelForCausalLM, {"local_files_only": True, "trust_remote_code": False}
            if weights is None:
                safe = files[0].suffix == ".safetensors"
                loaded: Any = auto.from_pretrained(folder, use_safetensors=safe, **offline, **options)
            else:
                config = transformers.AutoConfig.from_pretrained(folder, **offline)
                architecture: Any = auto._model_mapping[type(config)]
                loaded = architecture.from_pretrained(None, config=config, state_dict=weights, **options)
    except Exception as error:  # whatever a damaged configuration makes transformers raise
        raise CheckpointError(
            folder, f"transformers cannot load it ({reason(error)})", "restore config.json and weights"
        ) from error
    model, info = loaded
    _refuse_gaps(info, files[0] if len(files) == 1 else source or folder, stored)
    return model.eval()


def _refuse_gaps(info: dict[str, Any], where: Path, stored: dict[str, Path]) -> None:
    """transformers initialises what it misses at random and goes on: refuse instead."""
    for kind, problem in (("missing_keys", "is not in the file"), ("mismatched_keys", "has another shape in the file")):
        for key in sorted(info.get(kind) or [], key=str):
            name = key[0] if isinstance(key, tuple) else key
            raise CheckpointError(
                stored.get(name, where), f"{name} {problem}", "restore the weights that belong to config.json"
            )
    if info.get("error_msgs"):
        raise CheckpointError(where, str(info["error_msgs"][0])[:160], "restore the weights that belong to config.json")
