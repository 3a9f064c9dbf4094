"""The bundled demo checkpoint: complete, small, clean of machine paths, and the policy that its record describes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import entropy_probe.demo
from entropy_probe.demo import checkpoint_path
from entropy_probe.errors import CheckpointError

DEMO = Path(entropy_probe.demo.__file__).resolve().parent
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json"}


def bundled_files() -> list[Path]:
    folders = (DEMO / "base", checkpoint_path())
    return [DEMO / "training.json", *(path for folder in folders for path in folder.rglob("*") if path.is_file())]


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def optimizer() -> dict[str, Any]:
    return torch.load(checkpoint_path() / "optimizer.pt", weights_only=True)


def test_holds_what_the_libraries_wrote_and_no_pickle_that_needs_trust():
    assert {path.name for path in (DEMO / "base").iterdir()} == TOKENIZER_FILES | {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert {path.name for path in checkpoint_path().iterdir()} == TOKENIZER_FILES | {
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
    }


def test_is_at_most_two_megabytes():
    assert sum(path.stat().st_size for path in bundled_files()) <= 2_000_000


@pytest.mark.parametrize("place", [b"/root", b"/tmp", b"/home", b"/work", b"/Users", b"C:\\\\"])
def test_names_no_place_on_the_machine_that_trained_it(place):
    assert [path.name for path in bundled_files() if place in path.read_bytes()] == []


def test_adapter_names_its_base_by_a_relative_path():
    assert read_json(checkpoint_path() / "adapter_config.json")["base_model_name_or_path"] == "base"


@pytest.mark.parametrize("split", ["test", "train"])
def test_record_shows_a_policy_that_grpo_improved_and_did_not_saturate(split):
    record = read_json(DEMO / "training.json")
    base, grpo = record["policies"]["base"][split], record["policies"]["grpo"][split]
    assert 0.2 < base["reward"] < 0.45
    assert base["reward"] + 0.2 < grpo["reward"] < 0.85
    assert grpo["zero_advantage_fraction"] < 0.45
    assert grpo["ended_fraction"] > 0.97
    assert record["parameters"] <= 300_000
    assert math.isclose(record["log_vocabulary"], math.log(record["vocabulary"]))


@pytest.mark.parametrize("policy", ["base", "grpo"])
def test_record_shows_a_held_out_split_as_hard_as_the_questions_trained_on(policy):
    splits = read_json(DEMO / "training.json")["policies"][policy]
    assert abs(splits["test"]["reward"] - splits["train"]["reward"]) < 0.1


@pytest.mark.parametrize("split", ["test", "train"])
def test_record_shows_entropy_far_from_zero_and_from_uniform(split):
    record = read_json(DEMO / "training.json")
    base, grpo = record["policies"]["base"][split], record["policies"]["grpo"][split]
    for policy in (base, grpo):
        # A worked answer is mostly forced: a few of its 25 or so tokens carry the choice of style and the mistakes.
        assert 0.01 * record["log_vocabulary"] < policy["entropy_per_token"] < 0.1 * record["log_vocabulary"]
        assert policy["entropy_per_sequence"] > 2.0
    assert grpo["entropy_per_sequence"] < base["entropy_per_sequence"]


def test_record_agrees_with_the_files():
    record = read_json(DEMO / "training.json")
    state = read_json(checkpoint_path() / "trainer_state.json")
    assert checkpoint_path().name == f"checkpoint-{state['global_step']}"
    assert state["global_step"] == record["steps"]["grpo"]
    with safe_open(DEMO / "base" / "model.safetensors", framework="pt") as weights:
        assert sum(weights.get_tensor(name).numel() for name in weights.keys()) == record["parameters"]  # noqa: SIM118
    with safe_open(checkpoint_path() / "adapter_model.safetensors", framework="pt") as weights:
        assert sum(weights.get_tensor(name).numel() for name in weights.keys()) == record["lora_parameters"]  # noqa: SIM118


def test_adam_state_is_full_and_its_learning_rate_positive(optimizer):
    groups, slots = optimizer["param_groups"], optimizer["state"]
    assert all(group["lr"] > 0 for group in groups)
    assert sorted(slots) == [index for group in groups for index in group["params"]]
    for slot in slots.values():
        assert slot["step"] >= 100
        assert slot["exp_avg_sq"].min() >= 0
        assert slot["exp_avg"].abs().max() > 0


@pytest.mark.parametrize("folder", [DEMO / "base", checkpoint_path()], ids=["base", "checkpoint"])
@pytest.mark.parametrize("reader", ["AutoTokenizer", "PreTrainedTokenizerFast"])
def test_tokenizer_reads_the_same_by_either_class_and_keeps_the_tags(folder, reader):
    import transformers

    tokenizer = getattr(transformers, reader).from_pretrained(folder)
    assert len(tokenizer) == read_json(DEMO / "base" / "config.json")["vocab_size"]
    text = "What is 17+25?\n<think>17+25=42</think><answer>42</answer>"
    ids = tokenizer(text + "<|end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.convert_ids_to_tokens(ids)[-15:-1] == [
        *("<think>", "1", "7", "+", "2", "5", "=", "4", "2", "</think>"),
        *("<answer>", "4", "2", "</answer>"),
    ]


def test_checkpoint_path_refuses_two_checkpoints(tmp_path, monkeypatch):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
    monkeypatch.setattr(entropy_probe.demo, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(CheckpointError, match="2 checkpoint folders, expected 1"):
        checkpoint_path()
