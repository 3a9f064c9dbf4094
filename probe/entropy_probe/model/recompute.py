"""Decoder layers that keep nothing but their inputs in a graph, and run again when a backward pass comes to them.

    layer(x)  ≡  torch.utils.checkpoint(layer, x)

`gradient_checkpointing_enable()` has no effect on a model in eval mode. Forced, its reentrant way hides a layer from
`Capture`, and X would be 0; its other way works with a capture whose taps save what they need as autograd does, and
that listens to the layer's second run as it did to the first. Both runs are the same operations, so that gradients are
the same, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from entropy_probe.model.lending import base_blocks

Again = Callable[[Sequence[Tensor]], AbstractContextManager[None]]
"""The context of a second run, given those of its inputs that the first one had as activations of the batch."""


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers, by the classes that transformers names as undivided; none where it names none."""
    blocks, found = set(base_blocks(model)), []

    def search(module: nn.Module) -> None:
        for child in module.children():
            if type(child).__name__ in blocks:
                found.append(child)
            else:
                search(child)

    search(model)
    return found


@contextmanager
def recomputed(
    layers: Sequence[nn.Module], again: Again, is_activation: Callable[[Tensor], bool]
) -> Iterator[None]:
    """Within it a forward that records a graph keeps the inputs of these layers alone.

    A second run goes through the layer's hooks, so that it is lent what the first one was, within `again`.
    """
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    try:
        for layer in layers:
            layer.forward = _Recomputed(layer, layer.forward, again, is_activation)
        yield
    finally:
        for layer, forward in before:
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


@dataclass(frozen=True)
class _Recomputed:
    """Stands for the `forward` of a layer."""

    layer: nn.Module
    forward: Callable[..., Any]
    again: Again
    is_activation: Callable[[Tensor], bool]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        marked = [isinstance(x, Tensor) and self.is_activation(x) for x in args]
        runs = 0

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal runs
            runs += 1
            if runs == 1:
                return self.forward(*args, **kwargs)
            of_batch = [x for x, known in zip(args, marked, strict=True) if known]
            with self.again(of_batch):
                return self.layer(*args, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
