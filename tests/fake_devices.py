"""What `test_placement.py::test_devices_line_up` runs, in a process of its own: it registers a device that is none.

Under `FakeTensorMode` tensors have a shape, a dtype and a device, and operations complain of tensors on two of these.
The engine of backward passes knows one such accelerator, so gradients are taken with homes there and in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers  # noqa: F401 (before there is a device that it does not know)
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import models
from entropy_probe.model.capture import Capture
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.lending import Lending
from entropy_probe.model.placement import Placement
from entropy_probe.model.registry import Registry

CASES: list[tuple[str, dict[str, Any] | None, dict[str, str]]] = [
    ("llama", None, {"model.layers.1": "1", "model.norm": "1", "lm_head": "1", "": "0"}),
    ("llama", {}, {"model.embed_tokens": "cpu", "model.layers.0": "1", "lm_head": "cpu", "": "0"}),
    ("llama", {"use_dora": True}, {"model.layers.0": "1", "model.layers.1": "cpu", "": "cpu", "model.norm": "0"}),
    ("qwen2", {}, {"model.layers.0": "cpu", "lm_head": "1", "": "0"}),
    ("gpt2", None, {"transformer.wpe": "1", "transformer.h.0": "cpu", "": "0"}),
    ("gpt2", {}, {"transformer.h.1": "1", "": "cpu"}),
]


def of_no_values(model: nn.Module, placement: Placement) -> None:
    """Every parameter and buffer anew, where the placement says; tied ones stay one."""
    made: dict[int, nn.Parameter] = {}
    for name, part in model.named_modules():
        for key, p in part._parameters.items():
            if p is not None and id(p) not in made:
                home = placement.home(f"{name}.{key}")
                made[id(p)] = nn.Parameter(torch.empty(p.shape, device=home), requires_grad=p.requires_grad)
            part._parameters[key] = None if p is None else made[id(p)]
        for key, buffer in part._buffers.items():
            if buffer is not None:
                home = placement.home(name)
                device = placement.main if home == "cpu" else home
                part._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def try_one(architecture: str, adapter: dict[str, Any] | None, homes: dict[str, str], *, gradients: bool) -> None:
    model: Any = models.tiny_model(architecture)
    prefix = ""
    if adapter is not None:
        model, prefix = models.add_adapter(model, architecture, **adapter).eval(), "base_model.model."
    device_map = {
        (prefix + name if name else ""): home if home == "cpu" else f"fake:{0 if gradients else home}"
        for name, home in homes.items()
    }
    main = torch.device("fake:0")
    with FakeTensorMode(allow_non_fake_inputs=True):
        of_no_values(model, Placement(device_map, main))
        for dtype in (torch.float64,) if gradients else (torch.float32, torch.float64):
            bound = BoundModel(Registry(model), dtype, lending=Lending.of(model, dtype, main))
            ids = torch.empty(2, 6, dtype=torch.long, device=main)
            logits = bound.logits(ids)
            assert (logits.device, logits.dtype) == (main, dtype)
            if gradients:
                take_gradients(bound, ids)
                continue
            with torch.no_grad():
                assert bound.logits(ids, override=dict(bound.registry.trainable)).device == main
            mask = torch.ones(2, 7, dtype=torch.long, device=main)
            first, cache = bound.next_logits(ids, mask[:, :6])
            cache.batch_select_indices(torch.zeros(2, dtype=torch.long))
            second, _ = bound.next_logits(ids[:, :1], mask, cache)
            assert first.device == second.device == main


def take_gradients(bound: BoundModel, ids: torch.Tensor) -> None:
    """By autograd and by the capture, each beside its parameter."""
    trainable = bound.registry.trainable
    of_plain = torch.autograd.grad(bound.logits(ids).sum(), list(trainable.values()), allow_unused=True)
    capture = Capture(trainable, torch.empty(1, 2, dtype=torch.float64, device=bound.device), 2)
    capture.shape = (2, 6)
    capture.mark(ids)
    with capture:
        logits = bound.logits(ids)
    captured = capture.sums(logits.sum((1, 2)))
    for (name, p), plain in zip(trainable.items(), of_plain, strict=True):
        of_prompt = captured[name][0][0]
        assert of_prompt.device == p.device
        assert plain is None or plain.device == p.device


def main() -> None:
    _setup_privateuseone_for_python_backend("fake")
    original = torch.tensor

    def tensor(data: Any, **options: Any) -> torch.Tensor:  # of an empty cache, which no fake mode sees being made
        return torch.empty(0, **options) if data == [] else original(data, **options)

    torch.tensor = tensor
    # which positions are a prompt's is read from values, and there are none
    Capture._prompts = lambda self, rows: iter([(0, slice(0, 6)), (1, slice(6, 12))])
    for architecture, adapter, homes in CASES:
        for gradients in (False, True):
            try_one(architecture, adapter, homes, gradients=gradients)
        print("lined up")


if __name__ == "__main__":
    main()
