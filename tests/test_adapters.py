"""Adapters and models at the edges of what is read: each is measured as peft's own forward has it, or refused in one
line, and `inspect` says of each what loading says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import models
import typecheck
from entropy_probe import ProbeConfig, load_checkpoint, run_probe
from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from entropy_probe_checks.criteria import CRITERIA
from test_checkpoint import edit_weights, json_edit

TARGETS = ["q_proj", "v_proj"]
IDS = torch.arange(3, 20)[None]
LARGER = models.VOCABULARY + 3


def adapter(
    folder: Path, config: peft.PeftConfig, *, name: str = "default", tokens: int | None = None, named: bool = False
) -> Any:
    """Train an adapter of this configuration on a tiny Llama, save it, and return the live model; the optimizer knows
    names where the moments of tensors of one shape could not tell their order."""
    base = folder.parent / f"{folder.name}-base"
    models.tiny_model("llama").save_pretrained(base)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    if tokens is not None:
        model.resize_token_embeddings(tokens)
    torch.manual_seed(1)
    config.task_type = peft.TaskType.CAUSAL_LM
    model = peft.get_peft_model(model, config, adapter_name=name)
    model.peft_config[name].base_model_name_or_path = str(base)
    if getattr(config, "init_lora_weights", None) == "eva":
        peft.initialize_lora_eva_weights(model, [{"input_ids": IDS}] * 2, show_progress_bar=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    trained: Any = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained if named else [p for _, p in trained], lr=1e-3)
    model.eval()
    models.train_steps(model, optimizer)
    models.save_checkpoint(folder, model, optimizer)
    return model


lora = partial(peft.LoraConfig, r=3, lora_alpha=6, target_modules=TARGETS)
READ: dict[str, tuple[Callable[[], peft.PeftConfig], dict[str, Any]]] = {
    "rsLoRA": (lambda: lora(use_rslora=True), {}),
    "PiSSA": (lambda: lora(init_lora_weights="pissa"), {}),
    "OLoRA": (lambda: lora(init_lora_weights="olora"), {}),
    "EVA": (lambda: lora(init_lora_weights="eva", eva_config=peft.EvaConfig()), {}),
    "VeRA": (lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]), {}),
    "IA3": (lambda: peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]), {}),
    "LoHa": (lambda: peft.LoHaConfig(r=3, target_modules=TARGETS), {}),
    "LoKr": (lambda: peft.LoKrConfig(r=3, target_modules=TARGETS), {}),
    "OFT": (lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS), {"named": True}),
    "HRA": (lambda: peft.HRAConfig(r=4, target_modules=["q_proj"]), {"named": True}),
    "a name of its own": (lora, {"name": "policy"}),
    "a name of its own, in the optimizer too": (lora, {"name": "policy", "named": True}),
    "larger vocabulary": (lora, {"tokens": LARGER}),
    "larger vocabulary, trained whole": (lambda: lora(modules_to_save=["embed_tokens", "lm_head"]), {"tokens": LARGER}),
    "larger vocabulary, adapted": (
        lambda: lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
        {"tokens": LARGER},
    ),
    "larger vocabulary, some tokens": (
        lambda: lora(trainable_token_indices=[models.VOCABULARY, models.VOCABULARY + 1]),
        {"tokens": LARGER},
    ),
}


@pytest.mark.parametrize("name", list(READ))
def test_it_is_what_peft_trained(tmp_path: Path, name: str) -> None:
    """Logits of the loaded model are those of the live one, bit for bit; inspect has no problem with it."""
    config, options = READ[name]
    live = adapter(tmp_path / "ckpt", config(), **options)
    loaded = load_checkpoint(tmp_path / "ckpt")
    with torch.no_grad():
        assert torch.equal(loaded.model(IDS).logits, live(IDS).logits)
    trained = {key: p for key, p in live.named_parameters() if p.requires_grad}
    assert {key for key, p in loaded.model.named_parameters() if p.requires_grad} == set(trained) == set(loaded.adam)
    found = inspect_checkpoint(tmp_path / "ckpt")
    assert found.problems == []
    assert found.weights is not None
    assert found.weights.num_parameters == loaded.info.num_parameters
    assert found.optimizer is not None
    assert found.optimizer.num_trainable == loaded.info.num_trainable
    assert found.weights.kind == f"{loaded.info.adapter} adapter"


@pytest.mark.parametrize(
    "name", ["PiSSA", "VeRA", "IA3", "LoHa", "OFT", "HRA", "a name of its own", "larger vocabulary"]
)
def test_it_is_measured(tmp_path: Path, name: str) -> None:
    """No criterion is red, and those of a second, plain reader of the folder are asked."""
    made, options = READ[name]
    adapter(tmp_path / "ckpt", made(), **options)
    checkpoint = load_checkpoint(tmp_path / "ckpt")
    for batch, seed in (("e", 1), ("u", 2)):
        models.sampled_rollouts(tmp_path / f"{batch}.jsonl", checkpoint.model, prompts=5, responses=3, seed=seed)
    config = ProbeConfig.from_mapping({"budget": "smoke"})
    with typecheck.unchecked():
        report = run_probe(checkpoint, config, tmp_path / "e.jsonl", tmp_path / "u.jsonl")
    verdicts = {name: criterion(report) for name, criterion in CRITERIA.items()}
    assert [v.criterion for v in verdicts.values() if v.status in ("fail", "inconclusive")] == []
    asked = {"plain_forward", "gradient_witness", *(() if name == "PiSSA" else ("as_stored",))}
    assert {name for name in asked if verdicts[name].status != "pass"} == set()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter, a full model, adapters on a larger vocabulary, and other models for a base."""
    folder = tmp_path_factory.mktemp("healthy")
    adapter(folder / "lora", lora())
    adapter(folder / "larger", lora(), tokens=LARGER)
    adapter(folder / "embedding", lora(target_modules=["q_proj", "embed_tokens"]), tokens=LARGER)
    models.full_checkpoint(folder / "full", "llama")
    models.tiny_model("gpt2").save_pretrained(folder / "gpt2")
    for name, sizes in {"wide": {"hidden_size": 32, "head_dim": 8}, "short": {"num_hidden_layers": 1},
                        "deep": {"num_hidden_layers": 3}}.items():  # fmt: skip
        config = transformers.LlamaConfig(**{**models.ROPE, **sizes})
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    return folder


def settings(**values: Any) -> Callable[[Path], object]:
    return lambda folder: json_edit(folder / "adapter_config.json", **values)


def config_of(**values: Any) -> Callable[[Path], object]:
    return lambda folder: json_edit(folder / "config.json", **values)


def without(*parts: str) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = {k: t for k, t in load_file(path).items() if not any(part in k for part in parts)}
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def on(base: str) -> Callable[[Path], object]:
    return lambda folder: json_edit(folder / "adapter_config.json", base_model_name_or_path=base)


def two_names(folder: Path) -> None:
    for name in ("policy", "value"):
        (folder / name).mkdir()
        shutil.copy(folder / "adapter_model.safetensors", folder / name)
        shutil.copy(folder / "adapter_config.json", folder / name)
    (folder / "adapter_config.json").unlink()


def another_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()


WEIGHTS = "adapter_model.safetensors"
ROWS = (
    r"{}: was trained with 70 tokens, the base model has 67, and the rows are not in the file; give a copy of the base"
)
REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a base of another kind": ("lora", on("gpt2"), rf"{WEIGHTS}: does not fit the base model .*gpt2 \(Target modules"),
    "a wider base": (
        "lora", on("wide"), rf"{WEIGHTS}: .*q_proj.lora_A.* has shape \(3, 24\) in the file and \(3, 32\) in the model",
    ),
    "a shorter base": ("lora", on("short"), rf"{WEIGHTS}: .*layers.1.* has no place in the model; name the base"),
    "a deeper base": ("lora", on("deep"), rf"{WEIGHTS}: .*layers.2.* is not in the file; name the base"),
    "another rank": ("lora", settings(r=2), rf"{WEIGHTS}: .*\(3, 24\) in the file and \(2, 24\) in the model"),
    "rows of a head missing": ("larger", without("lm_head"), ROWS.format(WEIGHTS)),
    "rows of an untied head never saved": ("embedding", lambda _: None, ROWS.format(WEIGHTS)),
    "a start that is drawn": ("lora", settings(init_lora_weights="pissa_niter_4"), r"init_lora_weights is 'pissa_n"),
    "a start out of data": ("lora", settings(init_lora_weights="corda"), r"json: init_lora_weights is 'corda'"),
    "a kind that adds to the loss": ("lora", settings(peft_type="ADALORA"), r"peft_type is 'ADALORA'.*; use DoRA, "),
    "a kind of prompts": ("lora", settings(peft_type="PROMPT_TUNING"), r"json: peft_type is 'PROMPT_TUNING'"),
    "a kind that the file is not": ("lora", settings(peft_type="IA3"), r"peft_type is 'IA3', and .* holds no tensor"),
    "adapters of two names": ("lora", two_names, r"holds several adapters \(policy, value\); leave only the adapter"),
    "quantised": ("full", config_of(quantization_config={"quant_method": "x"}), r"config.json: is quantised"),
    "an image model": ("full", config_of(model_type="llava"), r"'llava' is multimodal; give only its language model"),
    "an encoder with a decoder": ("full", config_of(model_type="t5"), r"'t5' is an encoder with a decoder; give"),
    "no model of text": ("full", config_of(model_type="vit"), r"'vit' does not continue text; give a causal language"),
    "a wider configuration": ("full", config_of(hidden_size=48), r"\(67, 24\), config.json asks for \(67, 48\)"),
    "a deeper configuration": ("full", config_of(num_hidden_layers=3), r"layers.2.* is not in the file"),
    "a shorter configuration": ("full", config_of(num_hidden_layers=1), r"layers.1.* has no place in the model"),
    "another head": (
        "full", lambda f: edit_weights(f / "model.safetensors", another_head), r"lm_head.weight has shape \(66, 24\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_refused_is_a_problem_of_inspect(healthy: Path, tmp_path: Path, case: str) -> None:
    """Word for word."""
    kind, change, message = REFUSED[case]
    shutil.copytree(healthy, tmp_path / "all")
    folder = tmp_path / "all" / kind
    change(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(caught.value) in inspect_checkpoint(folder).problems


def test_null_is_not_quantised(healthy: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(healthy / "full", tmp_path / "full"))
    expected = load_checkpoint(folder).model
    json_edit(folder / "config.json", quantization_config=None)
    assert json.loads((folder / "config.json").read_text())["quantization_config"] is None
    with torch.no_grad():
        assert torch.equal(load_checkpoint(folder).model(IDS).logits, expected(IDS).logits)
    assert inspect_checkpoint(folder).problems == []


def test_a_wrapper_whose_text_part_is_known(tmp_path: Path) -> None:
    """Mllama's AutoModelForCausalLM is its language model, which has no place for the rest of the file."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1,
              "attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_output_dim": 32,
              "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]]}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = {**models.ROPE, "cross_attention_layers": [1], "rope_parameters": rope}
    model = transformers.MllamaForConditionalGeneration(
        transformers.MllamaConfig(vision_config=vision, text_config=text)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    folder = models.save_checkpoint(tmp_path / "ckpt", model, optimizer)
    with pytest.raises(CheckpointError, match="has no place in the model; give only its language model") as caught:
        load_checkpoint(folder)
    assert str(caught.value) in inspect_checkpoint(folder).problems
