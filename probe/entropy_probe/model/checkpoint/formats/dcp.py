"""Folders of `torch.distributed.checkpoint` (DCP): model and optimizer, put together from their pieces.

torch's own reader unpickles `.metadata`, and every item that is no tensor, with all that they
call. Here items are opened by `weights_only`, and nothing is allocated before it is known that the
files are large enough to hold it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe.errors import CheckpointError
from entropy_probe.layout import Layout
from entropy_probe.model.checkpoint.files import header, load_pickle
from entropy_probe.model.checkpoint.formats.dcp_metadata import (
    COPY_AGAIN,
    Item,
    Piece,
    damaged,
    read_items,
)
from entropy_probe.model.checkpoint.moments.order import bare_name
from entropy_probe.model.checkpoint.stored import Gathered, Stored

_OPTIMIZERS = (
    "optimizer",
    "optim",
    "optimizers",
)  # accelerate, torchtitan; torch's own example; prime-rl
_PARTS = ("state", "param_groups")
_PREFIXED = ("model.model.", "model.transformer.", "model.base_model.")


def read(layout: Layout) -> Stored:
    """A model and an optimizer by their names in `transformers`; `.metadata` alone is opened.

    Raises `CheckpointError` where it is damaged, would execute anything, or holds no model or no
    optimizer.
    """
    folder = layout.folder
    items = _rooted(read_items(folder))
    of_model = [item for item in items if item.path[0] == "model"] or _bare(items)
    return Stored(
        folder=folder,
        weights=weights(layout, folder, of_model, files(folder, items)),
        optimizer=partial(optimizer, folder, of_optimizer(folder, items)),
        optimizer_files=list,
    )


def _rooted(items: list[Item]) -> list[Item]:
    """The optimizer's below `optimizer`, whether it stands below another key (`app`), whose names are then left out, or
    flattened at the top."""
    roots = {item.path[0] for item in items}
    known = {"model", *_OPTIMIZERS}
    if not roots & known:  # dcp.save({"app": state}), as in torch's own example
        apps = {item.path[0] for item in items if len(item.path) > 1 and item.path[1] in known}
        items = [item.below(item.path[0]) for item in items if item.path[0] in apps] or items
    if any(item.path[0] in _OPTIMIZERS for item in items):
        return items
    return [_optimizers(item) for item in items]


def _optimizers(item: Item) -> Item:
    """With `optimizer` before it, where the optimizer's state_dict stands at the top itself, or a key begins so."""
    first = str(item.path[0])
    if first in _PARTS or (len(item.path) == 1 and first.startswith(("state.", "param_groups."))):
        return replace(item, path=("optimizer", *item.path))
    root, _, rest = first.partition(".")
    if root in _OPTIMIZERS and rest.startswith(("state.", "param_groups.")):
        return replace(item, path=(root, rest, *item.path[1:]))
    return item


def _bare(items: list[Item]) -> list[Item]:
    """Tensors under their parameters' names at the top, or all of them after `model.`."""
    found = [
        item
        for item in items
        if len(item.path) == 1 and item.dtype is not None and "." in str(item.path[0])
    ]
    names = [str(item.path[0]) for item in found]
    prefixed = any(name.startswith(_PREFIXED) for name in names)
    if prefixed and all(name.startswith("model.") for name in names):
        return [replace(i, path=("model", name[6:])) for i, name in zip(found, names, strict=True)]
    return found


def weights(layout: Layout, folder: Path, items: list[Item], files: list[Path]) -> Gathered:
    """The tensors below `model`, by name, in that `folder` of the layout's."""
    if len(items) == 1 and items[0].dtype is None:  # saved as one value
        whole = load(items[0])
        named = whole.items() if isinstance(whole, dict) else ()
        tensors = {bare_name(str(n)): value for n, value in named if isinstance(value, Tensor)}
        found = Gathered.of(tensors, layout.folder, files)
    else:
        in_pieces = (item for item in items if item.dtype is not None)
        by_name = {bare_name(item.below("model").name): item for item in in_pieces}
        found = Gathered(
            headers={name: header(outline(item)) for name, item in by_name.items()},
            read=lambda names: {name: load(by_name[name]) for name in names},
            source=layout.folder,
            files=files,
        )
    if not found.headers:
        remedy = 'save {"model": .., "optimizer": ..} with it'
        raise CheckpointError(folder, "holds no weights under `model` or their own names", remedy)
    require_configuration(layout, found.headers)
    return found


def require_configuration(layout: Layout, names: Iterable[str]) -> None:
    """Raises for an adapter without adapter_config.json, which FSDP's writers leave out."""
    if not layout.is_adapter and any("lora_" in name for name in names):
        raise CheckpointError(
            layout.folder,
            "holds a LoRA adapter and no adapter_config.json",
            "put the adapter_config.json of the run's LoraConfig into it",
        )


def of_optimizer(folder: Path, items: Iterable[Item]) -> list[Item]:
    """The items below `optimizer` or `optim`."""
    found = [item for item in items if item.path[0] in _OPTIMIZERS]
    if not found:
        raise _no_optimizer(folder)
    return found


def optimizer(folder: Path, items: list[Item]) -> dict[str, Any]:
    """The optimizer's state_dict by names: nested as torch's is, or flat (`state.<name>.exp_avg`)."""
    found: dict[str | int, Any] = {}
    for item in items:
        *parents, last = ("", *item.path[1:])
        node, value = found, load(item)
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise damaged(folder, f"{'.'.join(map(str, item.path))} stands below a value")
        node[last] = value
    stored = found.get("", {})
    if not isinstance(stored, dict) or not stored:
        raise _no_optimizer(folder)
    if "param_groups" in stored:
        groups = stored["param_groups"]
        groups = [groups[key] for key in sorted(groups)] if isinstance(groups, dict) else groups
        stored = {"state": stored.get("state", {}), "param_groups": groups}
    else:
        stored = _nested(stored)
    groups = stored["param_groups"]
    if not (
        isinstance(groups, list)
        and all(
            isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups
        )
        and isinstance(stored["state"], dict)
    ):
        raise CheckpointError(
            folder, "its optimizer has no `state` and `param_groups`", "save optimizer.state_dict()"
        )
    if all(
        type(key) is int for group in groups for key in group["params"]
    ):  # DCP makes strings of keys
        stored["state"] = {
            int(key): entry for key, entry in stored["state"].items() if str(key).isdecimal()
        }
    return stored


def _no_optimizer(folder: Path) -> CheckpointError:
    return CheckpointError(
        folder,
        "holds only the model, and no optimizer",
        "take an earlier step, or save the optimizer with it",
    )


def _nested(flat: dict[str | int, Any]) -> dict[str, Any]:
    """`{"state.<name>.<moment>": .., "param_groups.<name>.<key>": ..}` → names in a group where all else is equal."""
    state: dict[str, dict[str, Any]] = {}
    of_name: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        kind, _, rest = str(key).partition(".")
        name, _, last = rest.rpartition(".")
        (state if kind == "state" else of_name).setdefault(name, {})[last] = value
    groups: dict[str, dict[str, Any]] = {}
    for name, settings in of_name.items():
        settings.pop("param_names", None)  # of the whole group: the keys have each name
        of_group = groups.setdefault(repr(sorted(settings.items())), {**settings, "params": []})
        of_group["params"].append(name)
    return {"state": state, "param_groups": list(groups.values())}


def files(folder: Path, items: Iterable[Item]) -> list[Path]:
    """The files that hold the items, `.metadata` among them."""
    return [folder / ".metadata", *sorted({piece.file for item in items for piece in item.pieces})]


def outline(item: Item) -> Tensor:
    """A tensor of its shape and dtype on the meta device; nothing is read."""
    return torch.empty(item.shape, dtype=item.dtype, device="meta")


def load(item: Item) -> Any:
    """The value, or the tensor put together. Raises where a piece is not what `.metadata` says it is."""
    if item.dtype is None:
        return _unpickled(item.pieces[0])
    parts = [(piece, _part(item, piece)) for piece in item.pieces if math.prod(piece.shape)]
    if len(parts) == 1:
        return parts[0][1]
    whole = torch.empty(item.shape, dtype=item.dtype)
    filled = torch.zeros(item.shape, dtype=torch.bool)
    for piece, part in parts:
        window = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
        whole[window], filled[window] = part, True
    if not bool(filled.all()):
        raise damaged(
            item.pieces[0].file.parent, f"the pieces of {item.name} overlap and leave gaps"
        )
    return whole


def _part(item: Item, piece: Piece) -> Tensor:
    part = _unpickled(piece)
    expected = f"expected a {str(item.dtype).removeprefix('torch.')} tensor of shape {piece.shape}"
    if (
        not isinstance(part, Tensor)
        or part.layout is not torch.strided
        or part.device.type != "cpu"
    ):
        raise CheckpointError(
            piece.file, f"{item.name} is a {type(part).__name__}, {expected}", COPY_AGAIN
        )
    if part.shape != piece.shape or part.dtype != item.dtype:
        got = f"{str(part.dtype).removeprefix('torch.')} of shape {tuple(part.shape)}"
        raise CheckpointError(piece.file, f"{item.name} is {got}, {expected}", COPY_AGAIN)
    return part.detach()


def _unpickled(piece: Piece) -> Any:
    try:
        with piece.file.open("rb") as stream:
            stream.seek(piece.start)
            part = stream.read(piece.length)
    except OSError as error:
        raise CheckpointError(
            piece.file, f"cannot be read ({error.strerror})", "make it readable"
        ) from error
    return load_pickle(piece.file, "do not trust this checkpoint", part)
