"""Which layer, which kind of module and which part of it a parameter belongs to, read from its name."""

from __future__ import annotations

import re
from typing import NamedTuple

# the first that matches: post_attention_layernorm and ln_mlp are norms, attention.dense is attention
_KINDS = {
    "norm": r"(norm|\bln|_ln)[^.]*\.(modules_to_save\.\w+\.)?\w+$",
    "attention": r"attn|attention",
    "mlp": r"mlp|ffn|feed_forward|moe|expert|fc\d|dense",
    "embedding": r"embed|wte|wpe",
    "output": r"lm_head|embed_out|output",
}
_FACTORS = {
    "lora_A": r"lora(_embedding)?_A",
    "lora_B": r"lora(_embedding)?_B",
    "magnitude": r"magnitude",
    "modules_to_save": r"modules_to_save",
}


class Part(NamedTuple):
    """ "layer 3", "attention", "lora_A"; a parameter outside the layers has its kind for a layer."""

    layer: str
    module: str
    factor: str


def part_of(name: str) -> Part:
    """The first number in the name is the layer. "norm" is what a normalisation owns itself, wherever it stands: q_norm
    of an attention too. A module that is of no known kind is "other"; a parameter that is trained itself is "weight" or
    "bias"."""
    module = next(
        (kind for kind, pattern in _KINDS.items() if re.search(pattern, name.lower())), "other"
    )
    number = re.search(r"\.(\d+)\.", name)
    own = "bias" if name.endswith("bias") else "weight"
    factor = next((factor for factor, pattern in _FACTORS.items() if re.search(pattern, name)), own)
    return Part(f"layer {int(number[1])}" if number else module, module, factor)
