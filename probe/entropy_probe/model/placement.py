"""Where the parts of a model that outgrows one device are: accelerate decides, or the user.

A parameter's home is an accelerator, the CPU's memory or a file (`disk`); it is used on its accelerator, else on the
main device, to which it is lent (`lending`). A trainable parameter never goes to disk, because it is stepped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropy_probe.config import RULES
from entropy_probe.errors import ConfigError
from entropy_probe.memory import trim
from entropy_probe.model.disk import to_disk
from entropy_probe.model.lending import base_blocks

IN_MEMORY = {"": "cpu"}
"""The map of a model that is in memory, and lent to where it is used."""
_NAME = "_entropy_probe_placement"
_PEFT = "base_model.model."
_FREE = "free some of it, or give another --probe-offload-folder"


@dataclass(frozen=True)
class Placement:
    """Device by module name, as it was decided, and the device on which what is in memory or on disk is used: the first
    accelerator of the map, else the configured device."""

    device_map: dict[str, str]
    main: torch.device

    @classmethod
    def of(cls, module: nn.Module) -> Placement | None:
        """That of a model that `place` has placed."""
        return vars(module).get(_NAME)

    def home(self, name: str) -> str:
        """The device of the entry that names the parameter, or the nearest module around it."""
        while name and name not in self.device_map:
            name = name.rpartition(".")[0]
        return self.device_map[name]


def taken_home(module: nn.Module) -> nn.Module:
    """A copy of a placed model as if it had never been placed, its buffers in memory: before it is handed over."""
    for part in module.modules():
        for key, buffer in part._buffers.items():
            part._buffers[key] = None if buffer is None else buffer.cpu()
    vars(module).pop(_NAME, None)
    return module


def main_device(module: nn.Module) -> torch.device:
    """Where token ids go, and logits come from: of a placed model its main device, else that of the first parameter."""
    placement = Placement.of(module)
    return next(module.parameters()).device if placement is None else placement.main


def place(
    model: nn.Module,
    asked: str | Mapping[str, str],
    device: torch.device,
    max_memory: Mapping[str, int | str] | None = None,
    offload_folder: str | Path | None = None,
) -> Placement:
    """Move each parameter of the model to its home, one at a time, and its buffers to where they are used.

    `asked` is a map {module: device}, or by which rule accelerate makes one, under `max_memory` (bytes, or "20GiB") of
    each device. Raises `ConfigError` with one line.
    """
    decided = _decided(model, asked, max_memory) if isinstance(asked, str) else _named(model, asked)
    devices = {name: _usable(name, home) for name, home in decided.items()}
    accelerators = (
        found for found in devices.values() if found is not None and found.type != "cpu"
    )
    placement = Placement(decided, next(accelerators, device))
    folder = None if offload_folder is None else Path(offload_folder).expanduser()
    _require_writable(folder, needed="disk" in decided.values())
    for name, parameter in model.named_parameters():
        home = placement.home(name)
        if home != "disk":
            parameter.data = parameter.data.to(home)
        elif not parameter.requires_grad:
            try:
                to_disk(parameter, folder)
            except OSError as error:
                raise ConfigError(*_unwritable(folder, error)) from error
    for name, part in model.named_modules():
        for key, buffer in part._buffers.items():
            if buffer is not None:
                home = placement.home(name) if _covered(name, decided) else "cpu"
                part._buffers[key] = buffer.to(placement.main if home in ("cpu", "disk") else home)
    trim()
    setattr(model, _NAME, placement)
    return placement


def _decided(
    model: nn.Module, rule: str, max_memory: Mapping[str, int | str] | None
) -> dict[str, str]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    if rule not in RULES:
        raise ConfigError(
            "device_map",
            f"got {rule!r}",
            f"give {', '.join(RULES)}, or a map of modules to devices",
        )
    inner = getattr(model, "get_base_model", None)
    base: Any = inner() if callable(inner) else model
    whole = base_blocks(base)
    given: Any = (
        None
        if max_memory is None
        else {_of_accelerate(key): value for key, value in max_memory.items()}
    )
    try:
        if rule == "sequential":
            limits = get_max_memory(given)
        else:
            low_zero = rule == "balanced_low_0"
            limits = get_balanced_memory(
                model, given, no_split_module_classes=whole, low_zero=low_zero
            )
        found = infer_auto_device_map(model, limits, no_split_module_classes=whole)
    except (ValueError, RuntimeError, KeyError, AssertionError) as error:
        raise ConfigError(
            f"device_map {rule!r}",
            f"accelerate finds no place for the model ({error})",
            "give more max_memory",
        ) from error
    return {name: as_text(home) for name, home in found.items()}


def _of_accelerate(key: str) -> int | str:
    """accelerate numbers accelerators."""
    number = str(key).rpartition(":")[2]
    return int(number) if number.isdecimal() else key


def as_text(home: Any) -> str:
    """0, `torch.device("cuda", 0)` → "cuda:0": accelerate's names as torch's."""
    if isinstance(home, int):
        found = (
            torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        )
        return f"{found.type if found is not None else 'cuda'}:{home}"
    return str(home)


def _named(model: nn.Module, asked: Mapping[str, str]) -> dict[str, str]:
    """The map with the names of this model; an adapter's base model may be called by its own."""
    known = {
        name
        for name, _ in (*model.named_modules(), *model.named_parameters(remove_duplicate=False))
    }
    found = {}
    for name, home in asked.items():
        own = name if name in known else f"{_PEFT}{name}"
        if own not in known:
            some = ", ".join(name or '""' for name, _ in list(model.named_modules())[:6])
            raise ConfigError(
                f"device_map.{name}",
                f"the model has no such module (it has {some}, …)",
                "correct it",
            )
        found[own] = as_text(home)
    for name, _ in model.named_parameters():
        if not _covered(name, found):
            raise ConfigError(
                "device_map",
                f"no entry covers {name}",
                'add one, or "" for all modules without an entry',
            )
    return found


def _covered(name: str, device_map: Mapping[str, str]) -> bool:
    return any(not of or name == of or name.startswith(f"{of}.") for of in device_map)


def _usable(name: str, home: str) -> torch.device | None:
    """`None` for disk. Raises where there is no such device."""
    if home == "disk":
        return None
    try:
        return torch.empty(0, device=home).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device_map.{name}",
            f"{home!r} cannot be used ({reason})",
            "name a device that is there",
        ) from error


def _require_writable(folder: Path | None, *, needed: bool) -> None:
    if folder is not None and not folder.is_dir():
        raise ConfigError(
            f"offload_folder {folder}",
            "is not a folder",
            "make it, or give another --probe-offload-folder",
        )
    if needed:
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(*_unwritable(folder, error)) from error


def _unwritable(folder: Path | None, error: OSError) -> tuple[str, str, str]:
    where = folder or tempfile.gettempdir()
    return f"offload_folder {where}", f"cannot be written ({error.strerror or error})", _FREE
