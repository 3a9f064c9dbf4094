"""The one list of parameters: every buffer, dot product, preconditioner and override goes through it, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from entropy_probe.errors import OverrideError
from entropy_probe.model.disk import give_back


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel and torch.compile wrappers; PEFT stays as it is."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            return model


@dataclass(frozen=True)
class Registry:
    """Names of an unwrapped module's parameters. A tied weight has one name, that of `named_parameters()`."""

    module: nn.Module

    @classmethod
    def of(cls, model: nn.Module) -> Registry:
        return cls(unwrap(model))

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    @cached_property
    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

    @cached_property
    def has_frozen(self) -> bool:
        return len(self.trainable) < len(self.parameters)

    @cached_property
    def device(self) -> torch.device:
        """That of the first parameter, where token ids go."""
        return next(iter(self.parameters.values())).device

    @cached_property
    def buffer_names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.module.named_buffers(remove_duplicate=False))

    def require_trainable(self, names: Iterable[str]) -> None:
        """Raise `OverrideError` on the first name that is unknown or frozen."""
        for name in names:
            if name not in self.parameters:
                raise OverrideError(
                    f"direction v[{name!r}]",
                    "the unwrapped model has no such parameter",
                    "key v by the names of its named_parameters()",
                )
            if name not in self.trainable:
                raise OverrideError(
                    f"direction v[{name!r}]",
                    "the parameter is frozen",
                    "leave it out of v or set requires_grad",
                )


def spread_over(size: int, most: int) -> Tensor:
    """Up to `most` of the entries 0 … size − 1 of a tensor, first and last among them. In whole numbers: `linspace` in
    float32 gives an entry too many from 2²⁴ on."""
    count = min(size, most)
    return torch.arange(count) * (size - 1) // max(count - 1, 1)


def checksum(module: nn.Module) -> str:
    """SHA-256 over names, bytes, requires_grad, the presence of gradients, and training mode of a module."""
    digest = hashlib.sha256()
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        digest.update(
            f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad} {tensor.grad is None}".encode()
        )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
        del flat
        give_back(tensor)
    digest.update(bytes(submodule.training for submodule in module.modules()))
    return digest.hexdigest()
