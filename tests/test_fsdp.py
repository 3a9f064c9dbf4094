"""What accelerate leaves under FSDP1 and FSDP2 loads bit for bit as two live ranks held it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig

import forked
import models
from entropy_probe import load_checkpoint
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import CheckpointError
from entropy_probe.inputs import digest
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from fsdp_writer import CASES


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case of `fsdp_writer`, with the models' own folders and an adapter_config.json beside them."""
    folder = tmp_path_factory.mktemp("fsdp")
    ended = forked.ranks(2, Path(__file__).with_name("fsdp_writer.py"), folder, timeout=300)
    assert [done.returncode for done in ended] == [0, 0], "\n".join(done.stderr for done in ended)
    for architecture in ("llama", "qwen2"):
        models.tiny_model(architecture).save_pretrained(folder / architecture)
    adapted = models.add_adapter(models.tiny_model("llama"), "llama")
    adapted.peft_config["default"].base_model_name_or_path = None
    adapted.peft_config["default"].save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def case(written: Path, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path, dict[str, Any]]:
    """A copy of a case, the folder of its base model, and what was held."""
    folder = Path(shutil.copytree(written / request.param, tmp_path / request.param))
    _, _, architecture, lora, _ = CASES[request.param]
    if lora:
        shutil.copy(written / "adapter" / "adapter_config.json", folder)
    return folder, written / architecture, torch.load(written / f"{request.param}.pt", weights_only=True)


# peft 0.21 finds no adapter below FSDP1's wrappers: what the Trainer saves there is empty.
EMPTY = "fsdp1-lora-trainer"


@pytest.mark.parametrize("case", [name for name in CASES if name != EMPTY], indirect=True)
def test_it_loads_what_the_ranks_held(case: tuple[Path, Path, dict[str, Any]]) -> None:
    folder, base, held = case
    loaded = load_checkpoint(folder, base)
    parameters = dict(loaded.model.named_parameters())
    assert set(parameters) == set(held)
    assert all(torch.equal(parameters[name], live["parameter"]) for name, live in held.items())
    trained = {name: live for name, live in held.items() if "step" in live}
    assert set(loaded.adam) == set(trained)
    for name, live in trained.items():
        state = loaded.adam[name]
        assert torch.equal(state.exp_avg, live["exp_avg"]), name
        assert torch.equal(state.exp_avg_sq, live["exp_avg_sq"]), name
        assert bool(state.exp_avg_sq.any())
        assert (state.step, state.betas) == (live["step"], tuple(live["betas"])) == (3, (0.8, 0.95))
        for key in ("lr", "initial_lr", "eps", "weight_decay"):
            assert getattr(state, key) == live[key], key
        assert parameters[name].requires_grad
    assert loaded.info.num_trainable == sum(live["parameter"].numel() for live in trained.values())
    assert loaded.info.weights_dtype == "float32"
    assert loaded.info.global_step == (3 if CASES[folder.name][-1] else None)


@pytest.mark.parametrize(
    "case", ["fsdp2-sharded", "fsdp1-full", "fsdp2-tied", "fsdp1-lora", "fsdp2-lora-trainer"], indirect=True
)
def test_inspect_says_the_same(case: tuple[Path, Path, dict[str, Any]]) -> None:
    folder, base, held = case
    found, loaded = inspect_checkpoint(folder, base), load_checkpoint(folder, base)
    assert (found.problems, found.format) == ([], "accelerate")
    assert found.weights is not None
    assert found.optimizer is not None
    assert found.weights.num_parameters == loaded.info.num_parameters
    assert (found.weights.model_type, found.weights.dtype) == (loaded.info.model_type, "float32")
    assert found.optimizer.num_trainable == loaded.info.num_trainable
    assert found.optimizer.covered == found.optimizer.total == len(loaded.adam)
    assert (found.optimizer.type, found.optimizer.step) == ("AdamW", [3])
    assert found.optimizer.lr == sorted({live["lr"] for live in held.values() if "lr" in live}, reverse=True)
    assert found.global_step == loaded.info.global_step
    assert found.optimizer.file in ("optimizer_0", "optimizer.bin")
    assert set(found.files) == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("case", ["fsdp2-sharded"], indirect=True)
def test_only_the_metadata_of_weights_is_read(case: tuple[Path, Path, dict[str, Any]]) -> None:
    folder, base, _ = case
    for file in (folder / "pytorch_model_fsdp_0").glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    assert inspect_checkpoint(folder, base).problems == []
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: "):
        load_checkpoint(folder, base)


@pytest.mark.parametrize("case", ["fsdp2-sharded"], indirect=True)
def test_a_run_stands_for_its_newest_and_a_digest_covers_folders(case: tuple[Path, Path, dict[str, Any]]) -> None:
    folder, base, _ = case
    run = folder.parent / "run"
    for n in (1, 2):
        shutil.copytree(folder, run / "checkpoints" / f"checkpoint_{n}")
    newest = run / "checkpoints" / "checkpoint_2"
    assert load_checkpoint(run, base).info.path == newest
    before = digest(run, ProbeConfig(), base_model=base)
    assert before == digest(newest, ProbeConfig(), base_model=base)
    file = newest / "optimizer_0" / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    after = digest(run, ProbeConfig(), base_model=base)
    assert after != before
    models.tiny_model("llama").generation_config.save_pretrained(newest)  # any file counts
    assert digest(run, ProbeConfig(), base_model=base) != after


def test_without_fsdp_it_leaves_no_configuration_either(tmp_path: Path) -> None:
    """`save_state` of an ordinary model: model.safetensors, an optimizer.bin by position, no config.json."""
    model = models.tiny_model("qwen2")
    model.save_pretrained(tmp_path / "base")
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    models.train_steps(prepared, optimizer)
    accelerator.save_state(str(tmp_path / "state"))
    loaded = load_checkpoint(tmp_path / "state", tmp_path / "base")
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter)
        assert torch.equal(loaded.adam[name].exp_avg, optimizer.state[parameter]["exp_avg"])
    assert inspect_checkpoint(tmp_path / "state", tmp_path / "base").problems == []


DAMAGE: dict[str, tuple[str, Any, str]] = {
    "no configuration": ("fsdp2-sharded", None, r"fsdp2-sharded: has no config.json; .*--probe-base-model"),
    "no adapter_config": (
        "fsdp2-lora-trainer",
        lambda f: (f / "adapter_config.json").unlink(),
        r"fsdp2-lora-trainer: holds a LoRA adapter and no adapter_config.json",
    ),
    "another adapter": (
        "fsdp1-lora",
        lambda f: LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(f),
        r"has no place in the model",
    ),
    "empty": (EMPTY, lambda _: None, "pytorch_model_fsdp_0: holds no weights"),
    "no weights": ("fsdp2-sharded", lambda f: shutil.rmtree(f / "pytorch_model_fsdp_0"), "no weights"),
    "no optimizer": ("fsdp2-sharded", lambda f: shutil.rmtree(f / "optimizer_0"), "has no optimizer state"),
    "no metadata": (
        "fsdp2-sharded",
        lambda f: (f / "pytorch_model_fsdp_0" / ".metadata").unlink(),
        r"pytorch_model_fsdp_0/.metadata: is missing",
    ),
}


@pytest.mark.parametrize(("case", "name"), [(DAMAGE[name][0], name) for name in DAMAGE], indirect=["case"])
def test_damage_ends_in_one_line(case: tuple[Path, Path, dict[str, Any]], name: str) -> None:
    folder, base, _ = case
    _, change, message = DAMAGE[name]
    if change is not None:
        change(folder)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_checkpoint(folder, base if change is not None else None)
    assert "\n" not in str(raised.value)
    found = inspect_checkpoint(folder, base if change is not None else None)
    assert found.problems == [str(raised.value)]
    if name == "no configuration":
        assert found.optimizer is not None
        assert found.optimizer.step == [3]
