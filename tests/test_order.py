"""Without names in the file: every order that a trainer writes loads as the live optimizer held it, or is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft.optimizers import create_loraplus_optimizer

import models
from entropy_probe import load_checkpoint
from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from entropy_probe.model.checkpoint.moments import content, groupings, order
from entropy_probe.model.registry import checksum
from test_optimizer_state import assert_held

Named = list[tuple[str, Any]]
Groups = list[dict[str, Any]]


def units(named: Named) -> list[Named]:
    """What stands before the layers, every layer, what stands behind them."""
    labels, seen = [], False
    for name, _ in named:
        number = next((part for part in name.split(".") if part.isdigit()), None)
        seen = seen or number is not None
        labels.append(number or ("behind" if seen else "before"))
    return [[pair for pair, own in zip(named, labels, strict=True) if own == label] for label in dict.fromkeys(labels)]


def of(parts: list[Named], **settings: Any) -> Groups:
    return [{"params": [p for _, p in part], "lr": 1e-3 * 0.9**k, **settings} for k, part in enumerate(parts)]


def halves(part: Named) -> list[Named]:
    return [[(n, p) for n, p in part if p.ndim > 1], [(n, p) for n, p in part if p.ndim <= 1]]


def flat(parts: list[list[Named]]) -> list[Named]:
    return [half for part in parts for half in part if half]


# How the groups are written: BERT's layer-wise decay goes from the top with two groups a layer, timm's upwards.
WRITTEN: dict[str, Callable[[Named], Groups]] = {
    "one group": lambda named: of([named]),
    "reversed": lambda named: of([named[::-1]]),
    "each its own": lambda named: of([[pair] for pair in named]),
    "each its own, reversed": lambda named: of([[pair] for pair in named[::-1]]),
    "cut in the middle": lambda named: of([named[:5], named[5:]]),
    "matrices, then vectors": lambda named: of(halves(named)),
    "vectors, then matrices": lambda named: of(halves(named)[::-1]),
    "by layer": lambda named: of(units(named)),
    "by layer from the top": lambda named: of(units(named)[::-1]),
    "by layer, decay apart": lambda named: of(flat([halves(unit) for unit in units(named)])),
    "by layer from the top, decay apart": lambda named: of(flat([halves(unit) for unit in units(named)[::-1]])),
    "by layer from the top, no decay first": lambda named: of(flat([halves(u)[::-1] for u in units(named)[::-1]])),
    "rest first": lambda named: of([units(named)[0] + units(named)[-1], *units(named)[1:-1]]),
    "rest last, from the top": lambda named: of([*units(named)[-2:0:-1], units(named)[0] + units(named)[-1]]),
}


# Shapes do not say where the layers begin, or from which end they are counted.
BY_CONTENT = {"rest first", "rest last, from the top"}


def trained(tmp_path: Path, architecture: str, written: Callable[[Named], Groups], steps: int = 20) -> Any:
    model = models.tiny_model(architecture)
    optimizer = torch.optim.AdamW(written(list(model.named_parameters())))
    models.train_steps(model, optimizer, steps)
    return models.save_checkpoint(tmp_path / "ckpt", model, optimizer), model, optimizer


@pytest.mark.parametrize(("architecture", "written"), [*(("llama", w) for w in WRITTEN), ("gpt2", "rest first")])
def test_orders_without_names(tmp_path: Path, written: str, architecture: str) -> None:
    folder, model, optimizer = trained(tmp_path, architecture, WRITTEN[written])
    assert_held(folder, model, optimizer)
    said = load_checkpoint(folder).info.warnings
    assert len(said) == (written in BY_CONTENT)
    for note in said:
        direction = "layer by layer from the top" if "from the top" in written else "layer by layer"
        assert note.startswith(f"order of parameters decided by content: trainable ones {direction}, the rest")
    warned = "groups without names: their order is decided when the model is loaded"
    many = len(optimizer.param_groups) > 2
    assert any(warned in warning for warning in inspect_checkpoint(folder).warnings) == many


LORA: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "by layer": lambda model: torch.optim.AdamW(of(units(trainable(model)))),
    "by layer from the top": lambda model: torch.optim.AdamW(of(units(trainable(model))[::-1])),
    "LoRA+": lambda model: create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=4.0),
}


def trainable(model: Any) -> Named:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("written", list(LORA))
def test_adapters_without_names(tmp_path: Path, written: str, kind: str) -> None:
    """Every layer has the same shapes: only content tells the first from the last."""
    models.tiny_model("llama").save_pretrained(tmp_path / "base")
    model = models.add_adapter(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "llama", use_dora=kind == "dora"
    )
    model.peft_config["default"].base_model_name_or_path = "base"
    optimizer = LORA[written](model)
    models.train_steps(model, optimizer, steps=40)
    folder = models.save_checkpoint(tmp_path / "ckpt", model, optimizer)
    checkpoint = load_checkpoint(folder)
    of_live = {name: optimizer.state[p] for name, p in trainable(model)}
    assert set(checkpoint.adam) == set(of_live)
    for name, state in checkpoint.adam.items():
        assert torch.equal(state.exp_avg_sq, of_live[name]["exp_avg_sq"]), name
    assert len(checkpoint.info.warnings) == (written != "LoRA+")
    assert all(p.grad is None for p in checkpoint.model.parameters())


def test_orders_that_exchange_small_vectors_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 entries of two norms say too little: the message names them."""
    folder, _, _ = trained(tmp_path, "llama", WRITTEN["one group"])
    known = order.known_groupings

    def one_more(model: Any) -> Any:
        yield from known(model)
        names = [name for name, _ in model.named_parameters()]
        i, j = (names.index(f"model.layers.0.{norm}_layernorm.weight") for norm in ("input", "post_attention"))
        names[i], names[j] = names[j], names[i]
        yield groupings.Grouping("norms exchanged", [names])

    monkeypatch.setattr(order, "known_groupings", one_more)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    assert caught.value.remedy == "save the optimizer with names: AdamW(model.named_parameters())"
    tensors = "model.layers.0.input_layernorm.weight, model.layers.0.post_attention_layernorm.weight ("
    assert f"norms exchanged: all fit), and its moments cannot tell apart {tensors}" in caught.value.problem


def test_content_decides_clearly_or_not_at_all(tmp_path: Path) -> None:
    """The true order wins, whichever stands first; without it among them, or without moments, nothing is decided."""
    folder, model, _ = trained(tmp_path, "llama", WRITTEN["one group"])
    checkpoint = load_checkpoint(folder)
    names, loaded = [name for name, _ in model.named_parameters()], checkpoint.model
    before = checksum(loaded)
    moments: list[torch.Tensor | None] = [checkpoint.adam[name].exp_avg_sq for name in names]

    def exchanged(*kinds: str) -> list[str]:
        there = {"layers.0": "layers.1", "layers.1": "layers.0"}
        return [
            name.replace(own, there[own]) if own in there and any(kind in name for kind in kinds) else name
            for name in names
            for own in [".".join(name.split(".")[1:3])]
        ]

    attention, mlp, both = exchanged("self_attn"), exchanged("mlp"), exchanged("self_attn", "mlp")
    for orders in ([names, both], [both, names], [both, attention, names, mlp]):
        found = content.choose(loaded, orders, moments)
        assert orders[found.best] == names
        assert found.clear
        assert found.correlation > 0.5 > found.of_rival
        assert found == content.choose(loaded, orders, moments)
    twin = {"q_proj": "o_proj", "k_proj": "v_proj", "gate_proj": "up_proj"}
    twin |= {other: own for own, other in twin.items()}
    within = [re.sub(r"\w+_proj", lambda found: twin.get(found[0], found[0]), name) for name in names]
    found = content.choose(loaded, [within, both], moments)  # right in down_proj and the norms only
    assert not found.clear
    assert found.correlation - found.of_rival > 0.1
    assert not content.choose(loaded, [names, both], [None] * len(names)).clear
    assert not content.choose(loaded, [names, both], [torch.ones_like(p) for p in model.parameters()]).clear
    assert checksum(loaded) == before


def test_parameters_frozen_in_training_stand_in_the_optimizer(tmp_path: Path) -> None:
    """AdamW(model.parameters()) with a frozen half: loaded as trained, and what was frozen is named."""
    model = models.tiny_model("llama")
    frozen = [name for name, _ in model.named_parameters() if "layers.0" in name or "embed" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    models.train_steps(model, optimizer, steps=20)
    folder = models.save_checkpoint(tmp_path / "ckpt", model, optimizer)
    assert_held(folder, model, optimizer)
    info = load_checkpoint(folder).info
    assert info.taken_as_frozen == tuple(frozen)
    named = f"{', '.join(frozen[:4])} and {len(frozen) - 4} more"
    assert info.warnings == (f"taken as frozen, without state in the optimizer: {named}",)
    warned = inspect_checkpoint(folder).warnings
    assert f"{len(frozen)} frozen tensors are in the optimizer, without moments" in warned
    assert load_checkpoint(folder, missing_state="identity").info.taken_as_frozen == ()
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    saved["state"][99] = saved["state"].pop(20)
    torch.save(saved, folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match="has no state"):  # the state of a tensor, under another key
        load_checkpoint(folder)
