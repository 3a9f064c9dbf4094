"""torchtitan's `step-N/`: a folder of `torch.distributed.checkpoint` by torchtitan's own names, of Llama and Qwen3.

Its Llama rotates the rows 2i and 2i + 1 of a head of q and k together, that of transformers the
rows i and i + d/2: the rows of the weights are in another order, and so are those of their
moments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from entropy_probe.errors import CheckpointError
from entropy_probe.layout import Layout
from entropy_probe.model.checkpoint.files import header
from entropy_probe.model.checkpoint.formats import dcp
from entropy_probe.model.checkpoint.formats.dcp_metadata import Item, read_items
from entropy_probe.model.checkpoint.stored import Gathered, Stored
from entropy_probe.model.checkpoint.weights import pretrained
from entropy_probe.text import read_json

_NAME = re.compile(r"(?:layers\.(\d+)\.)?(.+)\.(weight|bias)", re.ASCII)
_OUTSIDE = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head", "lm_head": "lm_head"}
_IN_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_NO_WEIGHTS = {"optimizer", "lr_scheduler", "dataloader", "train_state"}
_CONVERT = "convert the checkpoint to safetensors with torchtitan"


def read(layout: Layout) -> Stored:
    """Weights and moments by transformers' names, in its order of rows; of tensors `.metadata` alone is opened.

    Raises `CheckpointError` for a tensor that has no known place, and for any `model_type` but
    llama and qwen3.
    """
    folder = layout.folder
    items = [item.below("model") for item in read_items(folder)]
    places = _Places(folder, _heads(layout.weights))
    counted = [dcp.load(item) for item in items if item.path == ("train_state", "step")]
    return Stored(
        folder=folder,
        weights=_weights(places, items),
        optimizer=partial(_optimizer, places, dcp.of_optimizer(folder, items)),
        optimizer_files=list,
        counted=next((int(step) for step in counted if isinstance(step, int | Tensor)), None),
    )


def _weights(places: _Places, items: list[Item]) -> Gathered:
    of_model = [item for item in items if item.path[0] not in _NO_WEIGHTS and item.dtype is not None]
    outlines = [places.of(item.name, dcp.outline(item)) for item in of_model]

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        wanted, found = set(names), {}
        for item, parts in zip(of_model, outlines, strict=True):
            if wanted & parts.keys():
                found |= places.of(item.name, dcp.load(item))
        return {name: part for name, part in found.items() if name in wanted}

    headers = {name: header(part) for parts in outlines for name, part in parts.items()}
    return Gathered(headers, read, places.folder, dcp.files(places.folder, items))


def _optimizer(places: _Places, items: list[Item]) -> dict[str, Any]:
    stored = dcp.optimizer(places.folder, items)
    state: dict[str, dict[str, Any]] = {}
    for name, entry in stored["state"].items():
        for key, value in entry.items():
            for place, part in places.of(name, value).items():
                state.setdefault(place, {})[key] = part
    groups = [
        {**group, "params": [place for name in group["params"] for place in places.of(name)]}
        for group in stored["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


@dataclass(frozen=True)
class _Heads:
    """How many a layer has of queries, and of keys and values; `neighbours` where rows 2i and 2i + 1 are rotated."""

    queries: int
    keys: int
    neighbours: bool

    @property
    def reordered(self) -> dict[str, int]:
        return {"attention.wq": self.queries, "attention.wk": self.keys} if self.neighbours else {}

    def __str__(self) -> str:
        return f"{self.queries} heads of queries, {self.keys} of keys"


def _heads(folder: Path) -> _Heads:
    path = folder / "config.json"
    kind, config = pretrained.check_config(folder), read_json(path)
    if kind not in ("llama", "qwen3"):
        raise CheckpointError(path, f"model_type is {kind}, torchtitan's names are known of llama and qwen3", _CONVERT)
    queries = config.get("num_attention_heads")
    keys = config.get("num_key_value_heads", queries)
    if type(queries) is not int or type(keys) is not int or min(queries, keys) < 1 or queries % keys:
        raise CheckpointError(path, f"has {queries!r} heads of queries, {keys!r} of keys", "restore the file")
    return _Heads(queries, keys, kind == "llama")


@dataclass(frozen=True)
class _Places:
    """Where torchtitan's tensors are in transformers' model."""

    folder: Path
    heads: _Heads

    def of(self, name: str, value: Any = None) -> dict[str, Any]:
        """`value` by its names there: three of a fused `wqkv`, else one. What is no tensor with rows stays as it is."""
        match = _NAME.fullmatch(name.replace(".qkv_linear.", "."))
        layer, inner, last = match.groups() if match else (None, name, "")
        rows = isinstance(value, Tensor) and value.ndim > 0
        if layer is None and inner in _OUTSIDE:
            return {f"{_OUTSIDE[inner]}.{last}": value}
        try:
            if layer is not None and inner == "attention.wqkv":  # so in the optimizer, in the model's state_dict apart
                parts = _unfused(value, self.heads) if rows else (value, value, value)
                apart = zip(("wq", "wk", "wv"), parts, strict=True)
                return {place: v for w, part in apart for place, v in self.of(name.replace("wqkv", w), part).items()}
            if layer is not None and inner in _IN_LAYER:
                reordered = self.heads.reordered.get(inner)
                value = _halves(value, reordered) if rows and reordered else value
                return {f"model.layers.{layer}.{_IN_LAYER[inner]}.{last}": value}
        except RuntimeError as error:
            problem = f"{name} of shape {tuple(value.shape)} has no rows for {self.heads}"
            raise CheckpointError(self.folder, problem, "give the config.json that belongs to it") from error
        raise CheckpointError(self.folder, f"{name} has no known place in the model", _CONVERT)


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows (0, 1, 2, 3, ..) of each head in the order (0, 2, .., 1, 3, ..)."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _unfused(rows: Tensor, heads: _Heads) -> tuple[Tensor, ...]:
    """Queries, keys and values of `wqkv`, which has for each head of keys its queries, itself, and its values."""
    queries = heads.queries // heads.keys
    groups = rows.unflatten(0, (heads.keys, queries + 2, -1))
    return tuple(part.flatten(0, 2) for part in groups.split([queries, 1, 1], dim=1))
