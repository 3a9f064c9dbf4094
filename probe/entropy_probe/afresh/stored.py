"""What the files hold, by `torch.load(weights_only=True)` and safetensors: no name is mapped, no value changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")
_OF_THE_BASE = ("pissa", "olora")
"""`init_lora_weights` for which peft subtracts the adapter's start from the base, whenever it loads them."""
_NUMBERS = ("lr", "initial_lr", "betas", "eps", "weight_decay")


def read_again(folder: Path, optimizer_file: Path, base: Path | None) -> dict[str, Any] | str:
    """`states`: of each tensor of the optimizer its shape, step, hyper-parameters, and Σ and Σ² of both moments;
    `weights`: of each tensor of the model, and of the adapter's base, its shape, dtype, Σ and Σ².

    Where the format has no such files, the reason.
    """
    if not optimizer_file.is_file() or optimizer_file.suffix not in (".pt", ".bin"):
        return f"{optimizer_file.name} is no file of one optimizer"
    content = torch.load(optimizer_file, map_location="cpu", weights_only=True, mmap=True)
    for key in ("optimizer", "optimizer_state_dict"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not {"state", "param_groups"} <= set(content):
        return f"{optimizer_file.name} is no state_dict of torch's"
    states = [
        _state(content["state"][key], group)
        for group in content["param_groups"]
        for key in group["params"]
        if "exp_avg" in content["state"].get(key, ())
    ]
    folders = [
        folder,
        folder / "model",
        *of_named_adapter(folder),
        *([] if base is None else [base]),
    ]
    weights = [_weight(tensor) for place in folders for _, tensor in tensors_of(place)]
    if not weights:
        return "its weights are in no file of transformers or peft"
    return {"states": states, "weights": weights}


def base_is_changed(folder: Path) -> str:
    """Why the base model is not what its file holds; empty where it is."""
    for place in (folder, folder / "model", *of_named_adapter(folder)):
        path = place / "adapter_config.json"
        start = json.loads(path.read_text()).get("init_lora_weights") if path.is_file() else None
        if start in _OF_THE_BASE:
            return f"peft takes the adapter's start ({start}) out of the base when it loads them"
    return ""


def of_named_adapter(folder: Path) -> list[Path]:
    """The folder in which peft saves an adapter that has a name, where there is no other configuration."""
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return []
    return [path.parent for path in folder.glob("*/adapter_config.json")]


def _state(state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    hyper = {key: group[key] for key in (*_NUMBERS, *_FLAGS) if key in group}
    return {
        "shape": list(state["exp_avg"].shape),
        "step": float(state["step"]),
        "hyper": {k: list(v) if isinstance(v, tuple) else _plain(v) for k, v in hyper.items()},
        "sums": [
            *sums(state["exp_avg"]),
            *sums(state["exp_avg_sq"]),
            *(sums(state["max_exp_avg_sq"]) if "max_exp_avg_sq" in state else (0.0, 0.0)),
        ],
    }


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _weight(tensor: Tensor) -> dict[str, Any]:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"shape": list(tensor.shape), "dtype": dtype, "sums": sums(tensor)}


def sums(tensor: Tensor) -> list[float]:
    """[Σ, Σ²] in float64."""
    square = torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64).square()
    return [float(tensor.detach().sum(dtype=torch.float64)), float(square)]


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Of the weights' files in a folder: safetensors, or where there are none torch's own."""
    names = ("model*.safetensors", "adapter_model.safetensors")
    files = [file for name in names for file in sorted(folder.glob(name))]
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)
    if files:
        return
    for name in ("pytorch_model*.bin", "adapter_model.bin"):
        for file in sorted(folder.glob(name)):
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
