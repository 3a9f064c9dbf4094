"""Layer, module and factor of the parameter names of real architectures, and of what peft makes of them.

`post_attention_layernorm` (Llama, Qwen, Gemma-2, GPT-NeoX, Bloom), `self_attn_layer_norm` (OPT), `ln_attn` and `ln_mlp`
(Falcon) were counted as attention and MLP while the kind was searched for in the whole name before a norm was.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import models
from entropy_probe.model.parts import Part, part_of

_IDS: dict[str, Any] = {
    "vocab_size": models.VOCABULARY,
    "eos_token_id": models.EOS,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
_SMALL: dict[str, Any] = {**_IDS, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
_ROPE: dict[str, Any] = {**_SMALL, "intermediate_size": 40, "num_key_value_heads": 2}
_EXPERTS: dict[str, Any] = {"num_experts": 3, "moe_intermediate_size": 16}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_ROPE, attention_bias=True, mlp_bias=True),
    "qwen3": lambda: transformers.Qwen3Config(**_ROPE),
    "gpt2": lambda: transformers.GPT2Config(**_IDS, n_embd=24, n_layer=2, n_head=4),
    "gemma2": lambda: transformers.Gemma2Config(**_ROPE),
    "opt": lambda: transformers.OPTConfig(**_SMALL, ffn_dim=40, word_embed_proj_dim=24),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SMALL, intermediate_size=40),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        **_IDS, hidden_size=24, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "mixtral": lambda: transformers.MixtralConfig(**_ROPE, num_local_experts=3),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**_ROPE, **_EXPERTS, shared_expert_intermediate_size=16),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**_ROPE, **_EXPERTS),
    "phi3": lambda: transformers.Phi3Config(**_ROPE),
    "falcon": lambda: transformers.FalconConfig(**_SMALL, bias=True),
    "falcon, new": lambda: transformers.FalconConfig(**_SMALL, new_decoder_architecture=True),
    "bloom": lambda: transformers.BloomConfig(**_IDS, hidden_size=24, n_layer=2, n_head=4),
}


def build(architecture: str) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]())


def parts(model: Any) -> dict[str, Part]:
    return {name: part_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad}


def expected_module(model: Any, name: str) -> str:
    """From the class of the module that owns the parameter, and of those around it up to the layer."""
    path = name.split(".")[:-1]
    classes = [type(model.get_submodule(".".join(path[:k]))).__name__ for k in range(1, len(path) + 1)]
    if re.search(r"Norm$", classes[-1]):
        return "norm"
    if classes[-1].endswith("Embedding") or "Embedding" in classes[-1]:
        return "embedding"
    if path == ["lm_head"]:
        return "output"
    return "attention" if any("Attention" in c for c in classes) else "mlp"


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_parameter(architecture: str) -> None:
    """The module by the class of what owns the parameter, the layer by its place in the list of layers."""
    model = build(architecture)
    layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    layer_of = {p: f"layer {i}" for i, layer in enumerate(layers) for p in layer.parameters()}
    found = parts(model)
    for name, parameter in model.named_parameters():
        module = expected_module(model, name)
        factor = "bias" if name.split(".")[-1] == "bias" else "weight"
        assert found[name] == Part(layer_of.get(parameter, module), module, factor), name
    assert {part.layer for part in found.values()} >= {"layer 0", "layer 1"}
    assert {part.module for part in found.values()} >= {"attention", "mlp", "norm", "embedding"}


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe"])
def test_norms_of_queries_and_keys_are_norms(architecture: str) -> None:
    """A gain vector without weight decay, like every other norm, and not a projection of the attention."""
    names = [name for name in parts(build(architecture)) if re.search("[qk]_norm", name)]
    assert len(names) == 4
    assert {part_of(name).module for name in names} == {"norm"}


def test_projections_around_the_layers_are_other() -> None:
    """OPT-350m's projections between embedding and layers are of no known kind, and in no layer."""
    config = transformers.OPTConfig(**_SMALL, ffn_dim=40, word_embed_proj_dim=16)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    others = {name: part for name, part in parts(model).items() if part.module == "other"}
    assert set(others) == {"model.decoder.project_in.weight", "model.decoder.project_out.weight"}
    assert set(others.values()) == {Part("other", "other", "weight")}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_adapters(architecture: str, dora: bool) -> None:
    """An adapter's tensors stand in the layer and the module of what they adapt; the factor says which they are.

    Every linear layer is adapted (GPT-2's are Conv1D), and the head is saved whole.
    """
    model = build(architecture)
    owners = {name: expected_module(model, f"{name}.weight") for name, m in model.named_modules() if _adapted(name, m)}
    lora = LoraConfig(
        r=2,
        target_modules=list(owners),
        use_dora=dora,
        modules_to_save=["lm_head"],
        fan_in_fan_out=architecture == "gpt2",
    )
    with torch.device("meta"):
        adapted = get_peft_model(model, lora)
    found = parts(adapted)
    saved = {n: part for n, part in found.items() if "lm_head" in n}
    assert set(saved.values()) == {Part("output", "output", "modules_to_save")}
    factors = {".lora_A.": "lora_A", ".lora_B.": "lora_B"} | ({".lora_magnitude_vector.": "magnitude"} if dora else {})
    seen = set()
    for name, part in found.items():
        if name in saved:
            continue
        marker = next(m for m in factors if m in name)
        owner = name.removeprefix("base_model.model.").split(marker)[0]
        number = re.search(r"\.(\d)\.", owner)
        assert number is not None
        assert part == Part(f"layer {number[1]}", owners[owner], factors[marker]), name
        seen.add((owner, part.factor))
    assert seen == {(owner, factor) for owner in owners for factor in factors.values()}


def _adapted(name: str, module: Any) -> bool:
    linear = isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))
    return linear and name != "lm_head" and name.split(".")[-1] not in ("gate", "shared_expert_gate")


def test_adapters_outside_the_layers() -> None:
    """LoRA on embeddings has its own names; a norm and an embedding may be saved whole."""
    lora = LoraConfig(
        r=2, target_modules=["wte", "c_attn"], modules_to_save=["ln_2", "ln_f", "wpe"], fan_in_fan_out=True
    )
    found = parts(get_peft_model(models.tiny_model("gpt2"), lora))
    of = {name.removeprefix("base_model.model.transformer."): part for name, part in found.items()}
    assert of["wte.lora_embedding_A.default"] == Part("embedding", "embedding", "lora_A")
    assert of["wte.lora_embedding_B.default"] == Part("embedding", "embedding", "lora_B")
    assert of["wpe.modules_to_save.default.weight"] == Part("embedding", "embedding", "modules_to_save")
    assert of["ln_f.modules_to_save.default.bias"] == Part("norm", "norm", "modules_to_save")
    assert of["h.1.ln_2.modules_to_save.default.weight"] == Part("layer 1", "norm", "modules_to_save")
    assert of["h.0.attn.c_attn.lora_B.default.weight"] == Part("layer 0", "attention", "lora_B")
    assert len(of) == 2 + 1 + 2 + 2 * 2 + 2 * 2


def test_adapters_of_fused_experts() -> None:
    """peft adapts a bare parameter (`experts.down_proj`) through `target_parameters`."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    with torch.device("meta"):
        found = parts(get_peft_model(build("mixtral"), lora))
    experts = {part for name, part in found.items() if "experts" in name}
    assert experts == {Part(f"layer {i}", "mlp", f"lora_{f}") for i in (0, 1) for f in "AB"}
