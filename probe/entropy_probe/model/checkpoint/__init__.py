"""A folder that a trainer wrote → `Checkpoint`. It loads exactly, or fails with one line; nothing in it is executed.

files       JSON, safetensors, tensors-only pickles
pretrained  full models;   adapter  PEFT adapters over a base model on disk;   tokenizer
optimizer   Adam's state;   other_optimizers  not Adam's
order       which parameter each of its tensors belongs to: by name, by known `groupings`, or by `content` where
            several of these fit
sharded     formats whose weights and moments lie in pieces, a file each:
  dcp         folders of torch.distributed.checkpoint (dcp_metadata: their .metadata);   fsdp  accelerate's
  torchtitan  step-N/;   verl  a file for each rank;   deepspeed, deepspeed_universal  ZeRO's
inspect     what a folder holds, without loading it
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropy_probe.base_model import find_base_model
from entropy_probe.digests import fingerprint
from entropy_probe.errors import CheckpointError, ConfigError
from entropy_probe.layout import DCP, FSDP, TORCHTITAN, UNIVERSAL, VERL, ZERO, configured, find_layout
from entropy_probe.memory import Held, Peak
from entropy_probe.model.checkpoint.files import (
    global_step,
    read_tensors,
    reason,
    stored_dtype,
    weight_files,
)
from entropy_probe.model.checkpoint.formats import dcp, deepspeed, deepspeed_universal, fsdp, torchtitan, verl
from entropy_probe.model.checkpoint.moments import adam as optimizer
from entropy_probe.model.checkpoint.moments import others as other_optimizers
from entropy_probe.model.checkpoint.moments.adam import AdamState
from entropy_probe.model.checkpoint.moments.order import some_names
from entropy_probe.model.checkpoint.moments.others import OtherOptimizer
from entropy_probe.model.checkpoint.sharded import HEADERS, READERS
from entropy_probe.model.checkpoint.weights import adapter, pretrained
from entropy_probe.model.checkpoint.weights.tokenizer import load_tokenizer
from entropy_probe.model.disk import is_on_disk
from entropy_probe.model.placement import place
from entropy_probe.text import read_json

_BY_PIECES = {FSDP: fsdp.read, DCP: dcp.read, TORCHTITAN: torchtitan.read}
READERS.update({**_BY_PIECES, VERL: verl.read, ZERO: deepspeed.read, UNIVERSAL: deepspeed_universal.read})
HEADERS.update({name: partial(read, values=False) for name, read in _BY_PIECES.items()})

__all__ = ["AdamState", "Checkpoint", "CheckpointInfo", "OtherOptimizer", "load_checkpoint"]


@dataclass(frozen=True)
class CheckpointInfo:
    """What the folder is: its kind, files and fingerprint (SHA-256 over weights, configuration and optimizer).

    `saved_states`: how many tensors the optimizer's file holds moments of, by their hyper-parameters. `warnings`: what
    was found out rather than read, or is hardly meant. `taken_as_frozen`: trainable as far as the files tell, but
    without optimizer state. `device_map`: where its modules are, if they are not all on one device.
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
    warnings: tuple[str, ...] = ()
    taken_as_frozen: tuple[str, ...] = ()
    device_map: dict[str, str] | None = None


@dataclass(frozen=True)
class Checkpoint:
    """{θ, Adam state}: the model in float32 and eval mode, its tokenizer, Adam's state by parameter name.

    `other`: the optimizer, where it is not Adam; `adam` is empty then. `held`: the memory that loading took.
    """

    model: nn.Module
    tokenizer: Any | None
    adam: dict[str, AdamState]
    info: CheckpointInfo
    other: OtherOptimizer | None = None
    held: Held | None = None


def load_checkpoint(
    path: str | Path,
    base_model: str | Path | None = None,
    device: str = "cpu",
    *,
    missing_state: optimizer.MissingState = "raise",
    device_map: str | Mapping[str, str] | None = None,
    max_memory: Mapping[str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> Checkpoint:
    """Load a Transformers/TRL trainer folder, or `save_pretrained` + an optimizer file, or the newest one of a run.

    Also what accelerate leaves under FSDP, folders of torch.distributed.checkpoint, and torchtitan's: where these have
    no config.json, configuration and tokenizer are those of `base_model`.

    Full models and PEFT adapters (LoRA, DoRA, `modules_to_save`). Weights and moments are float32 or wider whatever
    the file holds. Only safetensors and `torch.load(weights_only=True)` are used (of `.metadata`, a pickle, a few known
    names are let in, and none is called); nothing is downloaded or written.
    A parameter without moments is an error, or with `missing_state="identity"` has those of a fresh optimizer; one of a
    full model that the optimizer holds no state of at all is taken as frozen. Of an optimizer that is not Adam, its
    name and what it trains are taken. With a `device_map` the parts of the model are put where it says, or where
    accelerate finds room for them (`placement.place`), and `device` is where it runs if no accelerator is named.
    Raises `CheckpointError`: one line naming the file, what is wrong and what to do.
    """
    usable = _usable_device(device)
    if device_map is None and (max_memory is not None or offload_folder is not None):
        key = "max_memory" if max_memory is not None else "offload_folder"
        raise ConfigError(key, "is given without a device_map", "set device_map: auto, or leave it out")
    put = partial(_put, device=usable, device_map=device_map, max_memory=max_memory, offload_folder=offload_folder)
    peak = Peak(usable)
    try:
        loaded = _load(path, base_model, put, missing_state)
        return replace(loaded, held=peak.held())
    except OSError as error:
        raise CheckpointError(
            error.filename or path, f"cannot be read ({error.strerror})", "make it readable"
        ) from error
    except MemoryError as error:
        raise CheckpointError(path, "does not fit into memory", "load it on a larger machine") from error


def _load(
    path: str | Path,
    base_model: str | Path | None,
    put: Callable[[nn.Module], dict[str, str] | None],
    missing_state: optimizer.MissingState,
) -> Checkpoint:
    base = Path(base_model).expanduser() if base_model is not None else None
    layout = configured(find_layout(path), base)
    folder = layout.weights
    whole = READERS[layout.format](layout) if layout.format in READERS else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading notes of transformers and peft; what matters is checked and raised
        if layout.is_adapter:
            base = find_base_model(folder, base)
            model = adapter.load_adapter(folder, base, whole, layout.folder)
            config = settings = folder / "adapter_config.json"
            kind = adapter.check_config(folder)
        elif whole is not None and whole.lora is not None:
            model = adapter.wrap(folder, whole.weights, whole.lora, layout.folder, base)
            config, settings, kind = folder / "config.json", whole.lora, adapter.kind_of(model)
        elif (folder / "config.json").is_file():
            config = settings = folder / "config.json"
            kind, base = None, None
            model = pretrained.load_full_model(folder, whole and whole.weights, layout.folder)
        else:
            raise CheckpointError(
                folder, "has neither config.json nor adapter_config.json", "give the folder that the trainer wrote"
            )
        embeddings: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        tokenizer = load_tokenizer(folder, base, embeddings.weight.shape[0])
    files = [] if whole else weight_files(folder, "adapter_model" if kind else "model")
    of_base = weight_files(base, "model") if base is not None else []
    state_dict = optimizer.read_state(layout.optimizer) if whole is None else whole.optimizer
    notes: list[str] = []
    if kind:
        notes += adapter.without_effect(read_json(settings), whole.weights if whole else read_tensors(files[0]))
    adam: dict[str, AdamState] = {}
    other, kind_of_optimizer = None, other_optimizers.recognise(state_dict, layout.optimizer)
    if kind_of_optimizer is None:
        adam = optimizer.map_adam_state(state_dict, model, layout.optimizer, missing_state, notes)
    else:
        other = other_optimizers.map_other(kind_of_optimizer, state_dict, model, layout.optimizer)
    trained = set(adam if other is None else other.trained)
    frozen = tuple(name for name, p in model.named_parameters() if p.requires_grad and name not in trained)
    if frozen:
        notes.append(f"taken as frozen, without state in the optimizer: {some_names(frozen)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of accelerate, about what the map says
        device_map = put(model)
    parameters = list(model.parameters())
    info = CheckpointInfo(
        path=layout.folder,
        base_model=base,
        adapter=kind,
        model_type=str(model.config.model_type),  # pyright: ignore[reportAttributeAccessIssue]
        num_parameters=sum(p.numel() for p in parameters),
        num_trainable=sum(p.numel() for p in parameters if p.requires_grad),
        weights_dtype=stored_dtype(files[:1]) if whole is None else whole.dtype,
        optimizer_file=layout.optimizer,
        global_step=global_step(layout.folder) if whole is None or whole.global_step is None else whole.global_step,
        fingerprint=fingerprint(
            [*files, config, *(whole.files if whole else optimizer.state_files(layout.optimizer)), *of_base]
        ),
        saved_states=optimizer.inventory(state_dict) if other is None else {},
        warnings=tuple(notes),
        taken_as_frozen=frozen,
        device_map=device_map,
    )
    return Checkpoint(model, tokenizer, adam, info, other)


def _put(
    model: nn.Module,
    device: torch.device,
    device_map: Any,
    max_memory: Mapping[str, int | str] | None,
    offload_folder: str | Path | None,
) -> dict[str, str] | None:
    """Move the model to the device, or its parts to where the map says: the map by module name."""
    if device_map is None:
        model.to(device)
    else:
        device_map = place(model, device_map, device, max_memory, offload_folder).device_map
    for parameter in model.parameters():
        # What a file is mapped to stands at any address, and a product of one row goes another way there than beside
        # θ + 0·v, which torch put at a multiple of 64: ΔH was 3e-8 at η = 0.
        if parameter.device.type == "cpu" and not is_on_disk(parameter) and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    return device_map


def _usable_device(device: str) -> torch.device:
    try:
        chosen = torch.device(device)
        if chosen.type == "meta":
            raise RuntimeError("it holds no data")
        chosen = torch.empty(0, device=chosen).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device {device!r}", f"cannot be used ({reason(error)})", "choose another --probe-device"
        ) from error
    return chosen
