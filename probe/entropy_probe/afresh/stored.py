"""What the files hold, by `torch.load(weights_only=True)` and safetensors: no name is mapped, no value changed."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay", "adam_w_mode")
_CORRECTED = ("bias_correction", "correct_bias")
_OF_THE_BASE = ("pissa", "olora")
"""`init_lora_weights` for which peft subtracts the adapter's start from the base, whenever it loads them."""
_NUMBERS = ("lr", "initial_lr", "betas", "eps", "weight_decay")


def read_again(
    folder: Path, optimizer_file: Path, base: Path | None, *, is_adam: bool = True
) -> dict[str, Any] | str:
    """`states`: of each tensor of the optimizer its shape, step, hyper-parameters, and Σ and Σ² of both moments, none
    where it is not Adam; `weights`: of each tensor of the model, and of the adapter's base, its shape, dtype, Σ and Σ².

    Where the format has no such files, the reason.
    """
    if not optimizer_file.is_file() or optimizer_file.suffix not in (".pt", ".bin"):
        return f"{optimizer_file.name} is not the file of one optimizer"
    states = _states(optimizer_file) if is_adam else []
    if isinstance(states, str):
        return states
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


def _states(optimizer_file: Path) -> list[dict[str, Any]] | str:
    try:
        content = torch.load(optimizer_file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return f"{optimizer_file.name} holds objects of a library's own classes"
    for key in ("optimizer", "optimizer_state_dict"):
        content = content.get(key, content) if isinstance(content, dict) else content
    if not isinstance(content, dict) or not {"state", "param_groups"} <= set(content):
        return f"{optimizer_file.name} is not a state_dict of torch"
    return [
        _state(moments, group)
        for group in content["param_groups"]
        for key in group["params"]
        if "exp_avg" in (moments := _moments(content["state"].get(key, {})))
    ]


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
    hyper = {k: group[k] for k in (*_NUMBERS, *_FLAGS, *_CORRECTED) if group.get(k) is not None}
    step = state["step"] if "step" in state else group["step"]
    return {
        "shape": list(state["exp_avg"].shape),
        "step": float(step),
        "hyper": {key: _plain(value) for key, value in hyper.items()},
        "sums": [
            *sums(state["exp_avg"]),
            *sums(state["exp_avg_sq"]),
            *(sums(state["max_exp_avg_sq"]) if "max_exp_avg_sq" in state else (0.0, 0.0)),
        ],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.tolist() if isinstance(value, Tensor) else value


def _moments(state: dict[str, Any]) -> dict[str, Any]:
    """In numbers, under Adam's names: torchao says them itself, bitsandbytes writes 8 bits block after block."""
    state = {**state, **state.get("__bnb_optimizer_quant_state__", {})}
    state |= {key: of.dequantize() for key, of in state.items() if hasattr(of, "codes")}
    for k, moment in ((1, "exp_avg"), (2, "exp_avg_sq")):
        if (codes := state.get(f"state{k}")) is None:
            continue
        if codes.dtype is torch.uint8:
            scales = state[f"absmax{k}"]
            size = next(n for n in (256, 2048) if math.ceil(codes.numel() / n) == len(scales))
            of_values = scales.repeat_interleave(size)[: codes.numel()].view(codes.shape)
            codes = state[f"qmap{k}"][codes.long()] * of_values
        state[moment] = codes
    return state


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
