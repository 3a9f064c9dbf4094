"""Orders in which trainers are known to hand parameters to Adam: `order` tries each against sizes and shapes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

_NORM_OR_BIAS = [
    re.compile(p)
    for p in (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
]
_DEEPSPEED_CHAT = ("bias", "layer_norm.weight", "layernorm.weight", "norm.weight", "ln_f.weight")
_LAYER = re.compile(r".*?\.\d+(?=\.)")
Groups = list[list[str]]


@dataclass(frozen=True)
class Grouping:
    """Names group by group, in the optimizer's order. `cut_anywhere`: the same order, in whatever groups."""

    label: str
    groups: Groups
    cut_anywhere: bool = False

    @property
    def names(self) -> list[str]:
        return [name for group in self.groups for name in group]

    @property
    def sizes(self) -> list[int]:
        return [len(group) for group in self.groups if group]


def known_groupings(model: nn.Module) -> Iterator[Grouping]:
    """Every known grouping of the trainable parameters, and of all parameters where some are frozen.

    * the decay splits of transformers (4.44 and 5, the scripts without a trainer), DeepSpeed-Chat and nanoGPT, decay
      first, or last as timm has it; LoRA+ of peft
    * `parameters()` as they are or from the last to the first, in one group or cut into groups anywhere
    * a group for each layer or two (decay and no decay), upwards or from the top, as layer-wise learning rates need
      them (timm, BEiT, the scripts for BERT)
    """
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    everything = [name for name, _ in model.named_parameters()]
    decays = _decay_rules(model)
    for label, rule in decays.items():
        halves = _halves(trainable, rule)
        yield Grouping(f"{label} decay split", halves)
        yield Grouping(f"{label} decay split, no decay first", halves[::-1])
    yield Grouping("LoRA+ of peft", _lora_plus(trainable, model))
    for of, names in {"trainable ones": trainable, "all": everything}.items():
        yield Grouping(f"{of} in the model's order", [names], cut_anywhere=True)
        yield Grouping(f"{of} reversed", [names[::-1]], cut_anywhere=True)
        for units_label, units in _layer_by_layer(names).items():
            yield Grouping(f"{of} {units_label}", units)
            for label, rule in decays.items():
                pairs = [_halves(unit, rule) for unit in units]
                by_decay = {
                    "decay first": pairs,
                    "no decay first": [pair[::-1] for pair in pairs],
                    "as they come": [
                        p if u[0] in p[0] else p[::-1] for u, p in zip(units, pairs, strict=True)
                    ],
                }
                for which, split in by_decay.items():
                    groups = [half for pair in split for half in pair]
                    yield Grouping(f"{of} {units_label}, {label} decay split, {which}", groups)


def _decay_rules(model: nn.Module) -> dict[str, Callable[[str], bool]]:
    shape_of = {name: p.shape for name, p in model.named_parameters()}
    in_layer_norm = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    norm_or_bias = in_layer_norm | {
        n for n in shape_of if any(p.search(n.lower()) for p in _NORM_OR_BIAS)
    }
    return {
        "transformers 5": lambda n: n not in norm_or_bias,
        "transformers 4.44": lambda n: n not in in_layer_norm and "bias" not in n,
        "transformers' scripts": lambda n: "bias" not in n,
        "DeepSpeed-Chat": lambda n: not any(part in n.lower() for part in _DEEPSPEED_CHAT),
        "matrices and vectors": lambda n: len(shape_of[n]) > 1,
    }


def _halves(names: list[str], decays: Callable[[str], bool]) -> Groups:
    return [[n for n in names if decays(n)], [n for n in names if not decays(n)]]


def _lora_plus(names: list[str], model: nn.Module) -> Groups:
    """The first factors, those of embeddings, then the second factors and vectors: without, and with, bias or norm."""
    decays, shape_of = (
        _decay_rules(model)["transformers 4.44"],
        {n: p.shape for n, p in model.named_parameters()},
    )
    groups: Groups = [[], [], [], []]
    for name in names:
        second = "lora_B" in name or len(shape_of[name]) == 1
        groups[
            1 if "lora_embedding" in name else (2 if decays(name) else 3) if second else 0
        ].append(name)
    return groups


def _layer_by_layer(names: list[str]) -> dict[str, Groups]:
    """One unit a layer, upwards and from the top. What is in no layer: before and behind, apart, or in one unit."""
    layers: dict[str, list[str]] = {}
    before: list[str] = []
    behind: list[str] = []
    for name in names:
        layer = _LAYER.match(name)
        if layer is not None:
            layers.setdefault(layer[0], []).append(name)
        else:
            (behind if layers else before).append(name)
    inner = list(layers.values())
    if not inner:
        return {}
    up, down = "layer by layer", "layer by layer from the top"
    apart = [[n] for n in before], [[n] for n in behind]
    units = {
        up: [before, *inner, behind],
        down: [behind, *inner[::-1], before],
        f"{up}, each of the rest apart": [*apart[0], *inner, *apart[1]],
        f"{down}, each of the rest apart": [*apart[1][::-1], *inner[::-1], *apart[0][::-1]],
        f"{up}, the rest first": [before + behind, *inner],
        f"{down}, the rest first": [before + behind, *inner[::-1]],
        f"{up}, the rest last": [*inner, before + behind],
        f"{down}, the rest last": [*inner[::-1], before + behind],
    }
    return {label: [unit for unit in listed if unit] for label, listed in units.items()}
