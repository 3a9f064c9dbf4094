"""What training leaves in config.json, generation_config.json and adapter_config.json changes no measured number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from architectures import step, tiny_model
from entropy_probe import ProbeConfig, run_probe
from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint.weights.pretrained import check_config
from entropy_probe.model.forward import bind
from entropy_probe_checks.criteria import CRITERIA
from healthy import letters

CONFIG = {
    "output_router_logits": True,
    "use_cache": False,
    **dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "dropout"), 0.5),
    "router_jitter_noise": 0.5,
    "gradient_checkpointing": True,
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "use_return_dict": False,
    "torchscript": True,
    "attn_implementation": "flash_attention_2",
    "_attn_implementation": "eager",
    "_experts_implementation": "eager",
    "label_smoothing": 0.1,
    "dtype": "bfloat16",
}
GENERATION = {
    "use_cache": False,
    "output_attentions": True,
    "return_dict_in_generate": True,
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 5,
    "cache_implementation": "static",
}
ADAPTER = {"lora_dropout": 0.5, "inference_mode": True}
SMALL = ProbeConfig.from_mapping(
    {
        "batch": {"num_prompts": 2, "num_update_prompts": 2},
        "generation": {"num_return_sequences": 2, "max_new_tokens": 6},
        "budget": "smoke",
    }
)


def with_experts(folder: Path) -> Path:
    model = tiny_model("mixtral")
    optimizer = step(model)
    return models.save_checkpoint(folder, model, optimizer)


def edit(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kind", ["experts", "adapter"])
def test_no_number_depends_on_them(kind: str, tmp_path: Path) -> None:
    """Two runs, whole reports and evidence, bit for bit; nothing is said of them, and nothing fails."""
    folder = tmp_path / "ckpt"
    if kind == "experts":
        with_experts(folder)
        of_model = folder
    else:
        models.adapter_checkpoint(folder, "llama")
        of_model = tmp_path / "ckpt-base"
        edit(folder / "adapter_config.json", {"lora_dropout": 0.0, "inference_mode": False})
    letters(models.VOCABULARY).save_pretrained(folder)
    before = run_probe(folder, SMALL)
    edit(of_model / "config.json", CONFIG)
    if kind == "experts":
        edit(folder / "generation_config.json", GENERATION)
    else:
        edit(folder / "adapter_config.json", ADAPTER)
    after = run_probe(folder, SMALL)
    one, two = (report.model_dump(exclude={"timing", "memory"}) for report in (before, after))
    assert one["checkpoint"].pop("fingerprint") != two["checkpoint"].pop("fingerprint")
    assert one == two
    assert before.evidence is not None
    assert after.evidence is not None
    assert before.evidence.facts["plain"] == after.evidence.facts["plain"]
    assert isinstance(after.evidence.facts["plain"], dict)
    failed = {name for name, criterion in CRITERIA.items() if criterion(after).status == "fail"}
    assert not failed


def test_a_live_model_is_called_without_them_and_keeps_them() -> None:
    model = tiny_model("mixtral")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = bind(model).logits(ids)
    model.config.output_router_logits, model.config.return_dict = True, False
    for dtype in (torch.float32, torch.float64):  # itself, and a copy
        bound = bind(model, dtype)
        with torch.no_grad():
            after = bound.logits(ids)
            own, cache = bound.next_logits(ids, torch.ones_like(ids))
        assert torch.allclose(after, before.to(dtype), atol=1e-5)  # float32 against float64
        assert torch.allclose(own, after[:, -1], atol=1e-5)
        assert cache.get_seq_length() == 4
    assert torch.equal(bind(model).logits(ids), before)
    assert (model.config.output_router_logits, model.config.return_dict) == (True, False)


def test_kernels_from_elsewhere_are_refused_still(tmp_path: Path) -> None:
    with_experts(tmp_path)
    edit(tmp_path / "config.json", {"attn_implementation": "kernels-community/flash-attn"})
    with pytest.raises(CheckpointError, match="asks for `attn_implementation`"):
        check_config(tmp_path)
