"""One η of the sweep: the mapping θ + ηv and scoring through `functional_call`, against the module's own forward.

16 responses of 64 tokens after prompts of 64, the model `deep`; with LoRA and with all parameters trainable.

    direct       `module(ids)`, and the logits of the last 64 positions
    clone all    θ + ηv written into a copy of every parameter, and the copies given to `functional_call`
    ours         `theta_plus_eta_v`, then the same logits through `BoundModel.logits(ids, override=...)`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import random_model, vocabulary
from torch import Tensor
from torch.func import functional_call

from entropy_probe.model.overrides import theta_plus_eta_v

ROWS, LENGTH, KEPT, ETA = 16, 128, slice(63, 127), 1e-6


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
@torch.no_grad()
def test_sweep(race: Callable[..., dict[str, float]], device: torch.device, lora: bool) -> None:
    bound = random_model("deep", lora=lora, device=device)
    model: Any = bound.module
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary("deep"), (ROWS, LENGTH), generator=random).to(device)
    v = {
        name: torch.randn(p.shape, generator=random).to(p)
        for name, p in bound.registry.trainable.items()
    }

    def mapped(eta: float) -> Tensor:
        return bound.logits(
            ids, keep=KEPT, override=theta_plus_eta_v(bound.registry, v, eta, bound.dtype)
        )

    def cloned(eta: float) -> Tensor:
        copies = {name: p.clone() for name, p in model.named_parameters()}
        for name, direction in v.items():
            copies[name] += eta * direction
        return functional_call(model, copies, (ids,), {"use_cache": False}).logits[:, KEPT]

    assert torch.equal(bound.direct_logits(ids, keep=KEPT), mapped(0.0))
    race(
        lambda: mapped(ETA),
        {"direct": lambda: bound.direct_logits(ids, keep=KEPT), "clone all": lambda: cloned(ETA)},
        rounds=9,
        quality={
            "largest difference from clone all": float((mapped(ETA) - cloned(ETA)).abs().max())
        },
        targets={"direct": 1 / 1.05},
    )
