"""Prompts that 8 responses share: read once, and with every response. LoRA of s32k, vocabulary 32 000.

    ours         `score` with `share_prompts: auto`, at θ + ηv, as the sweep calls it
    whole rows   the same with `never`
    at θ         both as they are scored at first, with the mass before each token

`P256 R64` are 4 prompts of 256 tokens with responses of 64; `P100 R200` of 100 and 200; `demo` the E batch of the
bundled checkpoint, whose prompts have 10 tokens and responses 31.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from subjects import random_model, random_rollouts, vocabulary

from entropy_probe import load_checkpoint
from entropy_probe.config import ProbeConfig
from entropy_probe.demo import checkpoint_path
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.scores import score, sharing

LENGTHS = {"P256 R64": (256, 64), "P100 R200": (100, 200)}
GROUP, PROMPTS = 8, 4
E = Path(__file__).parents[1] / "golden" / "demo" / "e.jsonl"
TOLERANCE = 1e-4  # nats, of sums over a vocabulary in float32
ONCE, WHOLE = (ProbeConfig.from_mapping({"share_prompts": share}) for share in ("auto", "never"))


def subject(name: str, device: torch.device) -> tuple[BoundModel, Rollouts]:
    if name == "demo":
        bound = bind(load_checkpoint(checkpoint_path()).model.to(device))
        return bound, read_rollouts(E, bound, None)
    prompt, response = LENGTHS[name]
    rows = torch.ones(PROMPTS * GROUP, dtype=torch.long)
    rollouts = random_rollouts(vocabulary("s32k"), prompt * rows, response * rows, GROUP)
    for first in range(0, len(rows), GROUP):
        rollouts.ids[first : first + GROUP, :prompt] = rollouts.ids[first, :prompt]
    return random_model("s32k", lora=True, device=device), rollouts


@pytest.mark.parametrize("name", [*LENGTHS, "demo"])
def test_shared_prompts(
    race: Callable[..., dict[str, float]], device: torch.device, name: str
) -> None:
    bound, rollouts = subject(name, device)
    assert sharing(bound, rollouts, ONCE).shared
    v = {name: p.detach() for name, p in bound.registry.trainable.items()}

    def at(config: ProbeConfig, eta: float | None = None) -> torch.Tensor:
        override = None if eta is None else theta_plus_eta_v(bound.registry, v, eta, bound.dtype)
        return score(bound, rollouts, config, override).token_logp

    off = float((at(ONCE) - at(WHOLE)).abs().max())
    assert off < TOLERANCE
    race(
        lambda: at(ONCE, 1e-6),
        {
            "whole rows": lambda: at(WHOLE, 1e-6),
            "ours at θ": lambda: at(ONCE),
            "whole rows at θ": lambda: at(WHOLE),
        },
        rounds=3,
        warm=True,
        quality={"largest difference, nats": off},
        memory=True,
    )
