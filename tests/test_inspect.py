"""`entropy-probe inspect` says of a folder what loading it finds, and names what would keep it from loading."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import models
from entropy_probe import load_checkpoint
from entropy_probe.__main__ import main
from entropy_probe.demo import checkpoint_path
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from test_checkpoint import ADAPTERS, DAMAGE, Payload, edit_optimizer, json_edit


def sharded(folder: Path) -> Path:
    model = load_checkpoint(models.full_checkpoint(folder, "llama")).model
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="10KB")
    return folder


LORA = {kind: {k: v for k, v in settings.items() if k != "target_modules"} for kind, settings in ADAPTERS.items()}
FORMATS: dict[str, Callable[[Path], Path]] = {
    **{name: lambda folder, name=name: models.full_checkpoint(folder, name) for name in models.CONFIGS},
    **{kind: lambda folder, kind=kind: models.adapter_checkpoint(folder, "llama", **LORA[kind]) for kind in ADAPTERS},
    "sharded": sharded,
    "AMSGrad": lambda folder: models.full_checkpoint(folder, "llama", torch.optim.Adam, amsgrad=True),
    "demo": lambda _: checkpoint_path(),
}


_register = torch.nn.Module.register_parameter


def without_values(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
    assert parameter is None or parameter.is_meta
    _register(module, name, parameter)


@pytest.mark.parametrize("name", list(FORMATS))
def test_it_says_what_loading_finds(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = FORMATS[name](tmp_path / "ckpt")
    with monkeypatch.context() as patch:  # no model is loaded: no parameter has values
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
        patch.setattr(torch.nn.Module, "register_parameter", without_values)
        found = inspect_checkpoint(folder)
    loaded = load_checkpoint(folder)
    assert found.problems == []
    assert found.path == str(loaded.info.path)
    assert found.weights is not None
    assert found.weights.kind == (f"{loaded.info.adapter} adapter" if loaded.info.adapter else "full model")
    assert found.weights.num_parameters == loaded.info.num_parameters
    assert (found.weights.model_type, found.weights.dtype) == (loaded.info.model_type, loaded.info.weights_dtype)
    assert found.weights.base_model == (str(loaded.info.base_model) if loaded.info.base_model else None)
    first, states = next(iter(loaded.adam.values())), loaded.adam.values()
    assert found.optimizer is not None
    assert found.optimizer.num_trainable == loaded.info.num_trainable
    assert found.optimizer.type == first.kind
    assert found.optimizer.covered == found.optimizer.total == len(loaded.adam)
    assert (found.optimizer.lr, found.optimizer.betas) == ([first.lr], [first.betas])
    assert found.optimizer.step == sorted({state.step for state in states})
    assert found.global_step == loaded.info.global_step
    assert found.tokenizer == (None if loaded.tokenizer is None else len(loaded.tokenizer))
    assert set(found.files) == {path.name for path in folder.iterdir()}
    assert all(len(line) <= 80 or str(tmp_path) in line or str(folder) in line for line in found.text().splitlines())


UNSEEN = {"nan in the base"}  # the values of a full model's weights are not read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo checkpoint with its base."""
    shutil.copytree(checkpoint_path().parent / "base", tmp_path / "base")
    return Path(shutil.copytree(checkpoint_path(), tmp_path / "checkpoint-100"))


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_is_a_problem_on_one_line(
    tmp_path: Path, folder: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[damage][0](folder)
    assert main(["inspect", str(folder)]) == (damage not in UNSEEN)
    lines = capsys.readouterr().out.splitlines()
    problems = [line for line in lines if line.startswith("problem: ")]
    assert all(len(line) <= 80 or line.startswith("problem: ") or str(tmp_path) in line for line in lines)
    assert bool(problems) == (damage not in UNSEEN)
    assert all("; " in problem for problem in problems)
    assert not (folder / "executed").exists()
    assert not (tmp_path / "executed").exists()


def zero_b(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({n: t * ("lora_B" not in n) for n, t in tensors.items()}, folder / "adapter_model.safetensors")


WARNINGS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "alpha": (
        lambda f: json_edit(f / "adapter_config.json", lora_alpha=0),
        "lora_alpha is 0: the adapter does nothing",
    ),
    "lora_B": (zero_b, "every lora_B is zero: the adapter does nothing"),
    "step": (
        lambda f: json_edit(f / "trainer_state.json", global_step=120),
        "the optimizer's step is 100, but the trainer's global step is 120",
    ),
    "steps": (
        lambda f: edit_optimizer(f, lambda c: c["state"][0].update(step=99.0)),
        "steps differ: 99 to 100",
    ),
    "never opened": (
        lambda f: (f / "rng_state.pth").write_bytes(pickle.dumps(Payload(f / "executed"))),
        "never opened: rng_state.pth, scheduler.pt",
    ),
    "tied": (lambda _: None, "tied head: lm_head is the embedding, and has no moments of its own"),
}


@pytest.mark.parametrize("name", list(WARNINGS))
def test_what_is_odd_is_a_warning(folder: Path, name: str) -> None:
    change, warning = WARNINGS[name]
    change(folder)
    found = inspect_checkpoint(folder)
    assert warning in found.warnings
    assert found.problems == []
    load_checkpoint(folder)
    assert not (folder / "executed").exists()


def test_what_is_broken_leaves_the_rest_to_be_seen(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "base").rename(tmp_path / "moved")
    (folder / "adapter_model.safetensors").write_bytes(b"")
    (folder / "loop").symlink_to("loop")
    (folder / "optimizer.pt").write_bytes(b"")
    (folder / "trainer_state.json").write_text("{")
    found = inspect_checkpoint(folder)
    assert (found.weights, found.optimizer, found.global_step, found.tokenizer) == (None, None, None, 304)
    assert (found.files["optimizer.pt"], found.files["loop"]) == (0, None)
    assert [Path(problem.split(": ")[0]).name for problem in found.problems] == [
        "adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "trainer_state.json",
    ]  # fmt: skip
    assert inspect_checkpoint(folder, tmp_path / "moved").problems == found.problems[1:]


def test_for_machines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["problems"]) == (str(folder), [])
    assert found["optimizer"]["covered"] == 56
    assert found["weights"]["kind"] == "LoRA adapter"
    assert found["files"]["optimizer.pt"] == (folder / "optimizer.pt").stat().st_size
    (folder / "optimizer.pt").unlink()
    assert main(["inspect", str(folder), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 1


def test_usage(tmp_path: Path, folder: Path) -> None:
    assert main(["inspect", str(tmp_path / "nowhere")]) == 4
    assert main(["inspect"]) == 4
    assert main(["inspect", str(folder), "--base-model", str(tmp_path)]) == 1
    assert main(["inspect", "demo"]) == 0
