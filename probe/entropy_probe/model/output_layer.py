"""A causal language model in two parts: the backbone, and the output layer behind it, which works row by row.

    logits = output_layer(backbone(ids))

The output layer is everything that the model's own `forward` does with the backbone's result: the head, adapters on it,
scaling, soft-capping. So scores can be read from a few rows of logits at a time; [N, L, V] never exists.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass
class Captured:
    """What the backbone returned, with its hidden states [N, L, D]."""

    output: Any = None
    states: Float[Tensor, "N L D"] | None = None

    def take(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Forward hook of the backbone."""
        self.output, self.states = output, output[0]
        return _with_states(output, output[0][:, :0])


class _Given(nn.Module):
    """Stands where the backbone stood, and returns what it was given."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


@dataclass(frozen=True)
class OutputLayer:
    """The output layer of `model`, whose backbone is its submodule `backbone`."""

    model: nn.Module
    backbone: str

    @classmethod
    def of(cls, model: nn.Module) -> OutputLayer | None:
        """`None` where the parts cannot be told apart: not a transformers model, or a `forward` put on the instance."""
        name = getattr(model, "base_model_prefix", None)
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if not isinstance(name, str) or not isinstance(head, nn.Module) or "forward" in vars(model):
            return None
        backbone = model._modules.get(name)
        if backbone is None or any(part is head for part in backbone.modules()):
            return None
        return cls(model, name)

    @contextmanager
    def skipped(self) -> Iterator[Captured]:
        """Within the block a forward of the model gives no rows to the output layer, and leaves its hidden states."""
        captured = Captured()
        handle = self.model.get_submodule(self.backbone).register_forward_hook(captured.take)
        try:
            yield captured
        finally:
            handle.remove()

    def __call__(
        self, captured: Captured, rows: Float[Tensor, "R D"], mapping: Mapping[str, Tensor]
    ) -> Float[Tensor, "R V"]:
        """Logits of some rows of the hidden states; `mapping` replaces parameters by the names of `names_in`."""
        shell = self._shell(_Given(_with_states(captured.output, rows[None])))
        dummy = torch.zeros(1, len(rows), dtype=torch.long, device=rows.device)
        if mapping:
            output = torch.func.functional_call(
                shell, dict(mapping), (dummy,), {"use_cache": False}
            )
        else:
            output = shell(dummy, use_cache=False)
        return (output.logits if hasattr(output, "logits") else output[0])[0]

    def names_in(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """The names of those `tensors` that the output layer uses too (tied ones included) → its own names for them."""
        shell = self._shell(_Given(None))
        own = {
            id(tensor): name for name, tensor in (*shell.named_parameters(), *shell.named_buffers())
        }
        return {name: own[id(tensor)] for name, tensor in tensors.items() if id(tensor) in own}

    def _shell(self, backbone: nn.Module) -> nn.Module:
        """The model with another backbone: the same parameters and configuration, tables of its own."""
        shell = copy.copy(self.model)
        for table in ("_parameters", "_buffers", "_modules"):
            setattr(shell, table, dict(getattr(self.model, table)))
        shell._modules[self.backbone] = backbone
        return shell


def _with_states(output: Any, states: Tensor) -> Any:
    if isinstance(output, tuple):
        return (states, *output[1:])
    return replace(output, last_hidden_state=states)
