"""The steps from a folder to a `Checkpoint`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from entropy_probe.digests import fingerprint
from entropy_probe.errors import CheckpointError, ConfigError
from entropy_probe.layout import Layout, configured, find_layout
from entropy_probe.memory import Peak
from entropy_probe.model.checkpoint import readers
from entropy_probe.model.checkpoint.files import dtypes_of
from entropy_probe.model.checkpoint.loaded import Checkpoint, CheckpointInfo
from entropy_probe.model.checkpoint.moments import adam, others
from entropy_probe.model.checkpoint.moments.adam import AdamState, MissingState
from entropy_probe.model.checkpoint.moments.blocks import with_moments
from entropy_probe.model.checkpoint.moments.order import some_names
from entropy_probe.model.checkpoint.moments.others import OtherOptimizer
from entropy_probe.model.checkpoint.stored import Saved, Stored
from entropy_probe.model.checkpoint.weights import adapter
from entropy_probe.model.checkpoint.weights.build import Built, build
from entropy_probe.model.checkpoint.weights.tokenizer import load_tokenizer
from entropy_probe.model.device import usable_device
from entropy_probe.model.disk import is_on_disk
from entropy_probe.model.placement import place


def load_checkpoint(
    path: str | Path,
    base_model: str | Path | None = None,
    device: str = "cpu",
    *,
    missing_state: MissingState = "raise",
    device_map: str | Mapping[str, str] | None = None,
    max_memory: Mapping[str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> Checkpoint:
    """Load a Transformers/TRL trainer folder, or `save_pretrained` + an optimizer file.

    A run stands for the newest of its checkpoints.

    Also what accelerate leaves under FSDP, folders of torch.distributed.checkpoint, and
    torchtitan's: where these have no config.json, configuration and tokenizer are those of
    `base_model`.

    Full models and PEFT adapters (LoRA, DoRA, `modules_to_save`). Weights and moments are float32
    or wider whatever the file holds. Only safetensors and `torch.load(weights_only=True)` are used
    (of `.metadata`, a pickle, a few known names are let in, and none is called); nothing is
    downloaded or written. A parameter without moments is an error, or with
    `missing_state="identity"` has those of a fresh optimizer; one of a full model that the
    optimizer holds no state of at all is taken as frozen. Of an optimizer that is not Adam, its
    name and what it trains are taken. With a `device_map` the parts of the model are put where it
    says, or where accelerate finds room for them (`placement.place`), and `device` is where it
    runs if no accelerator is named. Raises `CheckpointError`: one line naming the file, what is
    wrong and what to do.
    """
    usable = usable_device(device)
    if device_map is None and (max_memory is not None or offload_folder is not None):
        key = "max_memory" if max_memory is not None else "offload_folder"
        remedy = "set device_map: auto, or leave it out"
        raise ConfigError(key, "is given without a device_map", remedy)
    put = partial(
        _put,
        device=usable,
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder,
    )
    peak = Peak(usable)
    try:
        loaded = _load(path, base_model, put, missing_state)
        return replace(loaded, held=peak.held())
    except OSError as error:
        raise CheckpointError(
            error.filename or path, f"cannot be read ({error.strerror})", "make it readable"
        ) from error
    except MemoryError as error:
        remedy = "load it on a larger machine"
        raise CheckpointError(path, "does not fit into memory", remedy) from error


def _load(
    path: str | Path,
    base_model: str | Path | None,
    put: Callable[[nn.Module], dict[str, str] | None],
    missing_state: MissingState,
) -> Checkpoint:
    base = None if base_model is None else Path(base_model).expanduser()
    layout = configured(find_layout(path), base)
    stored = readers.read(layout)
    with _notes_of_libraries_are_silent():
        built = build(layout, stored, base)
        embeddings: Any = built.model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
        places = [layout.weights, layout.folder, built.base]
        tokenizer = load_tokenizer(places, embeddings.weight.shape[0])
    state = _optimizer_state(layout, stored, built, missing_state)
    for name, parameter in built.model.named_parameters():
        parameter.requires_grad_(name in state.trained)
    with _notes_of_libraries_are_silent():
        device_map = put(built.model)
    info = _info(layout, stored, built, state, device_map)
    return Checkpoint(built.model, tokenizer, state.adam, info, state.other)


@contextmanager
def _notes_of_libraries_are_silent() -> Iterator[None]:
    """transformers, peft and accelerate warn of much; what matters is checked here, and raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class _State:
    """The optimizer's state by parameter name; `frozen` parameters have none."""

    adam: dict[str, AdamState]
    other: OtherOptimizer | None
    trained: frozenset[str]
    frozen: tuple[str, ...]
    saved: dict[str, int]
    notes: list[str]


def _optimizer_state(
    layout: Layout,
    stored: Stored,
    built: Built,
    missing_state: MissingState,
) -> _State:
    state_dict, path = with_moments(stored.optimizer()), layout.optimizer
    of_adam: dict[str, AdamState] = {}
    other: OtherOptimizer | None = None
    notes: list[str] = []
    kind = others.recognise(state_dict, path)
    if kind is None:
        of_adam = adam.map_adam_state(state_dict, built.model, path, missing_state, notes)
    else:
        other = others.map_other(kind, state_dict, built.model, path)
    trained = frozenset(of_adam if other is None else other.trained)
    trainable = [name for name, p in built.model.named_parameters() if p.requires_grad]
    frozen = tuple(name for name in trainable if name not in trained)
    if frozen:
        notes.append(f"taken as frozen, without state in the optimizer: {some_names(frozen)}")
    saved = adam.inventory(state_dict) if other is None else {}
    return _State(of_adam, other, trained, frozen, saved, notes)


def _info(
    layout: Layout, stored: Stored, built: Built, state: _State, device_map: dict[str, str] | None
) -> CheckpointInfo:
    of_base = [] if built.base is None else Saved(built.base, "model").files
    of_adapter: list[str] = []
    if built.settings is not None:
        of_adapter = adapter.without_effect(built.settings, stored.weights)
    parameters, config = list(built.model.parameters()), cast("Any", built.model).config
    return CheckpointInfo(
        path=layout.folder,
        base_model=built.base,
        adapter=built.adapter,
        model_type=str(config.model_type),
        num_parameters=sum(p.numel() for p in parameters),
        num_trainable=sum(p.numel() for p in parameters if p.requires_grad),
        weights_dtype=dtypes_of(stored.weights.headers),
        optimizer_file=layout.optimizer,
        global_step=stored.global_step,
        fingerprint=fingerprint([*stored.files, built.config, *of_base]),
        saved_states=state.saved,
        warnings=(*of_adapter, *state.notes),
        taken_as_frozen=state.frozen,
        device_map=device_map,
    )


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
        # What a file is mapped to stands at any address, and a product of one row goes another way
        # there than beside θ + 0·v, which torch put at a multiple of 64: ΔH was 3e-8 at η = 0.
        in_memory = parameter.device.type == "cpu" and not is_on_disk(parameter)
        if in_memory and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()
    return device_map
