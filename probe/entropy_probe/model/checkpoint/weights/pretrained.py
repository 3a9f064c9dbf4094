"""A full model as `save_pretrained` writes it: config.json, and safetensors or pytorch_model.bin."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from entropy_probe.errors import CheckpointError, shown
from entropy_probe.model.checkpoint.files import Headers, reason
from entropy_probe.model.checkpoint.stored import Saved, Weights
from entropy_probe.model.quiet import quiet_transformers
from entropy_probe.model.switches import without_switches
from entropy_probe.text import read_json

OFFLINE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_OWN = r"eager|sdpa|flex_attention|flash_attention_\d|paged\|\w+|grouped_mm|batched_mm"
"""Kernels that training may have been run with: known by name, and none is loaded."""
_ELSEWHERE = re.compile(r"_?(attn|experts)_implementation(_internal)?")
_LAYERS = re.compile(r"((num|n)_(\w+_)?layers?|(en|de)coder_layers)")
_RESTORE = "restore the weights that belong to config.json"
_RESTORE_BOTH = "restore config.json and weights"
_TEXT_ALONE = "give only its language model, saved by itself with save_pretrained"
_DECODER_ALONE = "give a model that has only a decoder"
_MULTIMODAL = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
)
_SLACK = 1 << 26
"""Values that a model may have beyond twice those in its files: buffers, such as a mask of all positions."""


def check_config(folder: Path) -> str:
    """The `model_type` of config.json. Remote code, other files, quantised weights and unknown types raise."""
    config = read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        read_json(
            folder / "generation_config.json"
        )  # transformers would pass over a broken one, and its EOS
    for key, value in _entries(config):
        if key == "auto_map":
            raise CheckpointError(
                folder / "config.json",
                "asks for remote code (`auto_map`), which is never run",
                "use a model type of transformers",
            )
        if key == "transformers_weights" or (
            _ELSEWHERE.fullmatch(key) and value is not None and not re.fullmatch(_OWN, str(value))
        ):
            raise CheckpointError(
                folder / "config.json",
                f"asks for `{key}`: {shown(value)}, which is never loaded",
                "remove the key",
            )
    if any(key == "quantization_config" and value is not None for key, value in _entries(config)):
        raise CheckpointError(
            folder / "config.json", "is quantised", "give the weights in floating point"
        )
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if not isinstance(config.get("model_type"), str) or config["model_type"] not in known:
        raise CheckpointError(
            folder / "config.json",
            f"model_type is {shown(config.get('model_type'))}, unknown to transformers {transformers.__version__}",
            "install a version that knows it",
        )
    _require_causal(folder / "config.json", config["model_type"])
    return config["model_type"]


def _require_causal(path: Path, model_type: str) -> None:
    """Raises for a model that transformers knows, and not as one that continues a text."""
    mappings = transformers.models.auto.modeling_auto
    if model_type in mappings.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if any(model_type in getattr(mappings, name, ()) for name in _MULTIMODAL):
        problem, remedy = "is multimodal", _TEXT_ALONE
    elif model_type in mappings.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        problem, remedy = "is an encoder with a decoder", _DECODER_ALONE
    else:
        problem, remedy = "does not continue text", "give a causal language model"
    known = "transformers cannot load it as a causal language model"
    raise CheckpointError(path, f"{known}: model_type {model_type!r} {problem}", remedy)


def _remedy(config: Any) -> str | None:
    """What helps where weights do not fit a wrapper's text part, or a decoder: it has not all that its file holds."""
    if any(re.search("vision|audio|image|speech", name) for name in config.sub_configs):
        return _TEXT_ALONE
    return _DECODER_ALONE if getattr(config, "is_encoder_decoder", False) else None


def check_layers(folder: Path, most: int) -> None:
    """Raises for more layers than `most`, such as the files have tensors: transformers would list and build them."""
    path = folder / "config.json"
    for key, value in _entries(read_json(path)):
        if _LAYERS.fullmatch(key) and isinstance(value, int) and value > most:
            raise CheckpointError(
                path, f"{key} is {shown(value)}, expected {most} at most", _RESTORE_BOTH
            )


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key and its value, at any depth."""
    rest = [config]
    while rest:
        inner = rest.pop()
        if isinstance(inner, dict):
            yield from inner.items()
            rest.extend(inner.values())
        elif isinstance(inner, list):
            rest.extend(inner)


def read_config(folder: Path) -> Any:
    """transformers' configuration of the model in `folder`, without the switches of training."""
    values = without_switches(read_json(folder / "config.json"))
    if (
        values.get("quantization_config", ...) is None
    ):  # whose presence would make it a quantised model
        del values["quantization_config"]
    with tempfile.TemporaryDirectory() as place:  # only from a file does it recognise every type
        Path(place, "config.json").write_text(json.dumps(values))
        return transformers.AutoConfig.from_pretrained(place, **OFFLINE)


def require_config(folder: Path) -> Path:
    """The config.json of a full model, as the last thing that a checkpoint may have."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            folder,
            "has neither config.json nor adapter_config.json",
            "give the folder that the trainer wrote",
        )
    return path


def load_full_model(folder: Path, weights: Weights, *, values: bool = True) -> nn.Module:
    """The causal language model of `folder`, in float32 or wider, in eval mode; nothing initialised at random.

    Without `values` the same of the headers alone, on the meta device: what it raises, loading raises too.
    """
    check_config(folder)
    options: dict[str, Any] = {"output_loading_info": True}
    opens_files = values and isinstance(weights, Saved)
    if not values:
        options |= {"state_dict": of_headers(weights), "device_map": "meta"}
    elif isinstance(weights, Saved):  # transformers opens the files itself
        weights.require_finite()
        options["use_safetensors"] = weights.files[0].suffix == ".safetensors"
    else:
        options["state_dict"] = weights.tensors()
    headers = weights.headers
    check_layers(folder, len(headers))
    in_float64 = any(header.dtype == "float64" for header in headers.values())
    options["dtype"] = torch.float64 if in_float64 else torch.float32
    empty, remedy = None, None
    try:
        with quiet_transformers():
            auto: Any = transformers.AutoModelForCausalLM
            config = read_config(folder)
            remedy = _remedy(config)
            with torch.device("meta"):
                empty = auto.from_config(config)
            _require_enough(empty, headers, folder)
            if not values:
                _require_equal(empty, weights)
            if opens_files:
                model, info = auto.from_pretrained(folder, config=config, **OFFLINE, **options)
            else:
                model, info = type(empty).from_pretrained(None, config=config, **options)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged configuration makes transformers raise
        _refuse_other_shapes(empty, weights, error)
        raise CheckpointError(
            folder, f"transformers cannot load it ({reason(error)})", remedy or _RESTORE_BOTH
        ) from error
    _refuse_gaps(info, weights, remedy or _RESTORE)
    _require_tied(empty, model, weights.source)
    return model.eval()


def _require_equal(empty: Any, weights: Weights) -> None:
    """Raises for tied tensors that are both stored and differ: the only values that decide what the model is."""
    for name, to in getattr(empty, "all_tied_weights_keys", {}).items():
        if name in weights.headers and to in weights.headers:
            values = weights.tensors((name, to))
            if not torch.equal(values[name], values[to]):
                raise _untied(name, to, weights.source)


def of_headers(weights: Weights) -> dict[str, torch.Tensor]:
    """Tensors without values."""
    return {
        name: torch.empty(header.shape, dtype=_dtype(header.dtype), device="meta")
        for name, header in weights.headers.items()
    }


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, torch.float32)  # an integer's name in safetensors, such as I64
    return found if isinstance(found, torch.dtype) else torch.float32


def _require_enough(empty: nn.Module, headers: Headers, folder: Path) -> None:
    """Raises for a model without values that is far larger than its files: the rest would be made up, in memory."""
    values = sum(tensor.numel() for tensor in (*empty.parameters(), *empty.buffers()))
    held = sum(math.prod(header.shape) for header in headers.values())
    if values > 2 * held + _SLACK:
        raise CheckpointError(
            folder / "config.json",
            f"asks for {values} values, and the files hold {held}",
            _RESTORE_BOTH,
        )


def _refuse_other_shapes(empty: nn.Module | None, weights: Weights, error: Exception) -> None:
    """Raises for the first tensor of another shape than the model's, which explains the error."""
    for name, parameter in () if empty is None else empty.named_parameters():
        found = weights.headers.get(name)
        if found is not None and parameter.shape != found.shape:
            raise CheckpointError(
                weights.file_of(name),
                f"{name} has shape {found.shape}, config.json asks for {tuple(parameter.shape)}",
                _RESTORE,
            ) from error


def _refuse_gaps(info: dict[str, Any], weights: Weights, remedy: str) -> None:
    """transformers initialises what it misses at random, passes over what it cannot place, and goes on: refuse."""
    for kind, problem in (
        ("missing_keys", "is not in the file"),
        ("mismatched_keys", "has another shape in the file"),
        ("unexpected_keys", "has no place in the model"),
    ):
        for key in sorted(info.get(kind) or [], key=str):
            name = key[0] if isinstance(key, tuple) else key
            found = weights.headers.get(name)
            if kind == "unexpected_keys" and found is not None and found.shape == ():
                continue  # a buffer of old versions, such as GPT-2's
            raise CheckpointError(weights.file_of(name), f"{name} {problem}", remedy)
    if info.get("error_msgs"):
        raise CheckpointError(weights.source, str(info["error_msgs"][0])[:160], _RESTORE)


def _require_tied(empty: nn.Module, model: nn.Module, where: Path) -> None:
    """transformers unties what differs in the file, whatever config.json says."""
    for name, to in getattr(empty, "all_tied_weights_keys", {}).items():
        if name not in model.all_tied_weights_keys:  # pyright: ignore[reportOperatorIssue]
            raise _untied(name, to, where)


def _untied(name: str, to: str, where: Path) -> CheckpointError:
    return CheckpointError(
        where,
        f"config.json ties {name} to {to}, and the file holds different values of both",
        "set `tie_word_embeddings` as it was in training",
    )
