"""Random models of the sizes at which things were measured, and batches of random tokens for them.

s32k    Qwen2, hidden size 256, 6 layers, vocabulary 32 000
s152k   the same, vocabulary 151 936, tied
deep    hidden size 512, 12 layers, vocabulary 8192: the only one whose output layer has a realistic share
"""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers

from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.stages.responses.rollouts import Rollouts

TINY = False  # set by `--tiny`: the same work on next to nothing
_VOCABULARY = {"s32k": 32_000, "s152k": 151_936, "deep": 8192}


def vocabulary(name: str) -> int:
    return 512 if TINY else _VOCABULARY[name]


def small(**sizes: int) -> dict[str, int]:
    """The sizes of a network as they are asked for, or tiny ones."""
    tiny = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 512,
    }
    return {name: tiny[name] if TINY else size for name, size in sizes.items()}


def random_model(
    name: str, *, lora: bool = False, device: torch.device | str = "cpu"
) -> BoundModel:
    """In float32; with `lora` (r = 8, lora_B not zero) on all linear layers of the blocks."""
    torch.manual_seed(0)
    deep = name == "deep"
    config = transformers.Qwen2Config(
        **small(
            vocab_size=_VOCABULARY[name],
            hidden_size=512 if deep else 256,
            intermediate_size=1536 if deep else 768,
            num_hidden_layers=12 if deep else 6,
            num_attention_heads=8 if deep else 4,
            num_key_value_heads=2,
        ),
        tie_word_embeddings=name == "s152k",
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.02)
    return bind(model.eval().to(device))


def random_rollouts(
    vocabulary: int,
    prompt_lengths: torch.Tensor,
    lengths: torch.Tensor,
    group: int,
    device: torch.device | str = "cpu",
) -> Rollouts:
    """Rows of random tokens, right-padded with 0; rewards from a normal distribution. One length for each row."""
    random = torch.Generator().manual_seed(0)
    width = int((prompt_lengths + lengths).max())
    ids = torch.randint(vocabulary, (len(lengths), width), generator=random)
    ids[torch.arange(width) >= (prompt_lengths + lengths)[:, None]] = 0
    rewards = torch.randn(len(lengths) // group, group, generator=random, dtype=torch.float64)
    return Rollouts(ids.to(device), prompt_lengths, lengths, rewards, None, None, "benchmark", 0)


def relative_error(some: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    off = sum(
        float((a.double() - b.double()).square().sum()) for a, b in zip(some, expected, strict=True)
    )
    return (off / sum(float(b.double().square().sum()) for b in expected)) ** 0.5
