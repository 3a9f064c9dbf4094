"""DeepSpeed's checkpoints against what its live engine held, bit for bit; and what is not one, refused in one line.

The stored checkpoints were made by the real DeepSpeed (tests/data/deepspeed); where it is installed, it makes new ones.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from entropy_probe import load_checkpoint
from entropy_probe.__main__ import main
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import CheckpointError
from entropy_probe.inputs import digest
from entropy_probe.layout import find_layout
from entropy_probe.model.checkpoint.formats.deepspeed import DAMAGED, load
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from test_checkpoint import Payload

DATA = Path(__file__).parent / "data" / "deepspeed"
CASES = {
    "1-bf16-2": "DeepSpeed ZeRO",
    "2-fp16-2": "DeepSpeed ZeRO",
    "2-bf16-frozen-2": "DeepSpeed ZeRO",
    "3-bf16-frozen-2": "DeepSpeed ZeRO",
    "3-bf16-lora-2": "DeepSpeed ZeRO",
    "2-fp32-1": "DeepSpeed ZeRO",
    "1-bf16-2-universal/global_step3_universal": "DeepSpeed universal",
    "3-bf16-frozen-2-universal/global_step3_universal": "DeepSpeed universal",
}


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    with tarfile.open(DATA / "checkpoints.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def assert_held(folder: Path) -> None:
    """Every master weight, moment, step and hyper-parameter is that of the live engine."""
    loaded = load_checkpoint(folder)
    beside = folder if (folder / "held.json").is_file() else folder.parent
    held, hyper = load_file(beside / "held.safetensors"), json.loads((beside / "held.json").read_text())
    parameters = dict(loaded.model.named_parameters())
    assert set(loaded.adam) == set(hyper) == {name for name, p in parameters.items() if p.requires_grad}
    assert {key.split("|")[0] for key in held} >= set(hyper)
    for key, tensor in held.items():
        name, what = key.split("|")
        got = parameters[name].detach() if what in ("master", "frozen") else getattr(loaded.adam[name], what)
        assert torch.equal(got, tensor.to(got.dtype)), key
    for name, group in hyper.items():
        state = loaded.adam[name]
        assert (state.lr, list(state.betas), state.eps, state.weight_decay, state.step) == (
            group["lr"], group["betas"], group["eps"], group["weight_decay"], group["step"],
        )  # fmt: skip
        assert state.decoupled
    assert loaded.info.global_step == 3

    found = inspect_checkpoint(folder)
    assert (found.problems, found.global_step) == ([], 3)
    assert found.weights is not None
    assert found.optimizer is not None
    assert found.weights.kind == ("LoRA adapter" if loaded.info.adapter else "full model")
    assert found.weights.num_parameters == loaded.info.num_parameters
    assert (found.optimizer.num_trainable, found.optimizer.type) == (loaded.info.num_trainable, "AdamW")
    assert found.optimizer.covered == found.optimizer.total == len(hyper)
    assert found.optimizer.step == [3.0]
    assert found.optimizer.lr == sorted({group["lr"] for group in hyper.values()}, reverse=True)


@pytest.mark.parametrize("case", list(CASES))
def test_a_stored_checkpoint_is_what_the_engine_held(stored: Path, case: str) -> None:
    assert_held(stored / case)
    assert inspect_checkpoint(stored / case).format == CASES[case]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_new_checkpoint_is_what_the_engine_held(tmp_path: Path, ranks: int) -> None:
    cases = ["1-bf16", "2-fp32-frozen", "3-bf16", "3-fp16-lora"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(DATA / "make.py"), str(tmp_path), *cases], check=True, env=environment, timeout=500)
    for case in cases:
        assert_held(tmp_path / f"{case}-{ranks}")


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored / "1-bf16-2", tmp_path / "run" / "checkpoint-3"))


def test_where_it_is_found(folder: Path, stored: Path) -> None:
    tag = folder / "global_step3"
    assert find_layout(folder).optimizer.parent == find_layout(tag).optimizer.parent == tag
    assert find_layout(folder.parent).folder == folder
    before = digest(folder, ProbeConfig())
    (tag / "extra").write_text("one more file of the ranks")
    assert digest(folder, ProbeConfig()) != before
    assert load_checkpoint(tag).info.fingerprint == load_checkpoint(folder).info.fingerprint
    openrlhf = folder.parent.parent / "openrlhf"
    openrlhf.mkdir()
    shutil.copy(folder / "config.json", openrlhf)
    (folder / "config.json").unlink()
    shutil.copytree(folder, openrlhf / "_actor")
    assert find_layout(openrlhf).folder == openrlhf / "_actor"
    assert_held(openrlhf / "_actor")
    newer = shutil.copytree(tag, openrlhf / "_actor" / "global_step4")
    (openrlhf / "_actor" / "latest").unlink()
    assert find_layout(openrlhf / "_actor").folder == newer


def optim(folder: Path, rank: int = 0) -> Path:
    return folder / "global_step3" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def model_states(folder: Path) -> Path:
    return folder / "global_step3" / "mp_rank_00_model_states.pt"


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = load(path)
    content["optimizer_state_dict"] = content.get("optimizer_state_dict") and {
        key: value for key, value in content["optimizer_state_dict"].items() if type(value).__name__ != "_Nothing"
    }
    if content["optimizer_state_dict"]:
        content["optimizer_state_dict"].pop("param_slice_mappings", None)
    change(content)
    torch.save(content, path)


def of_zero(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite(optim(folder), lambda content: change(content["optimizer_state_dict"]))


def of_model(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite(model_states(folder), change)


def say(text: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "latest").write_text(text)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-900])


def planted(path: Path, folder: Path) -> None:
    rewrite(path, lambda content: content.update(more=Payload(folder / "executed")))


def own_weights(folder: Path, change: float) -> None:
    module = load(model_states(folder))["module"]
    tensors = {name: tensor.clone() for name, tensor in module.items() if name != "lm_head.weight"}
    tensors["model.norm.weight"][0] *= change
    save_file(tensors, folder / "model.safetensors")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "rank 0 gone": (lambda f: optim(f).unlink(), "the optimizer's file of rank 0 is missing"),
    "rank 1 gone": (lambda f: optim(f, 1).unlink(), "has 1 ranks' files, 2 ranks wrote it"),
    "model's file gone": (lambda f: model_states(f).unlink(), "model_states.pt: is missing"),
    "one rank more": (lambda f: shutil.copy(optim(f), optim(f, 2)), "has 3 ranks' files, 2 ranks wrote it"),
    "model-parallel": (
        lambda f: shutil.copy(optim(f), str(optim(f)).replace("mp_rank_00", "mp_rank_01")), "ds_to_universal.py",
    ),
    "a rank twice": (
        lambda f: shutil.copy(optim(f), str(optim(f)).replace("bf16_", "")),
        "not from ZeRO with data-parallel ranks only",
    ),
    "truncated": (lambda f: cut(optim(f, 1)), "cannot be read"),
    "no torch file": (lambda f: optim(f).write_bytes(b"x" * 50), "was not executed"),
    "planted among the ranks": (lambda f: planted(optim(f), f), "and was not executed"),
    "planted in the model's": (lambda f: planted(model_states(f), f), "and was not executed"),
    "latest to nowhere": (say("global_step9"), "names 'global_step9'"),
    "latest upwards": (say("../.."), r"names '\.\./\.\.'"),
    "latest up one": (
        lambda f: [say("..")(f), *(shutil.copy(p, f.parent) for p in (f / "global_step3").iterdir())],
        r"names '\.\.'",
    ),
    "latest elsewhere": (say("/etc"), "names '/etc'"),
    "latest with a null": (say("a\0b"), "which holds no"),
    "a short part": (
        of_zero(lambda z: z["single_partition_of_fp32_groups"].__setitem__(0, torch.zeros(3))), "not laid out",
    ),
    "a long moment": (
        of_zero(lambda z: z["base_optimizer_state"]["state"][0].update(exp_avg=torch.zeros(999))), "not laid out",
    ),
    "another step": (
        of_zero(lambda z: z["base_optimizer_state"]["state"][0].update(step=torch.tensor(2.0))), "ranks differ",
    ),
    "no shapes": (of_model(lambda m: m.update(param_shapes=None)), "not laid out"),
    "a giant shape": (
        of_model(lambda m: m["param_shapes"][0].update({"x": torch.Size([10**9, 10**6])})), "not laid out",
    ),
    "no module": (of_model(lambda m: m.update(module=None)), "not laid out"),
    "other weights": (
        of_model(lambda m: m["module"]["model.norm.weight"].mul_(1.02)), "differs from the optimizer's master weights",
    ),
    "another model beside it": (
        lambda f: own_weights(f, 1.02), "model.norm.weight differs from the optimizer's master weights",
    ),
    "another optimizer": (
        of_model(lambda m: m["ds_config"].update(optimizer={"type": "Lamb"})), "its optimizer is 'Lamb'",
    ),
    "no config.json": (lambda f: (f / "config.json").unlink(), "has neither config.json nor"),
}  # fmt: skip


def test_bias_correction_is_obeyed(folder: Path) -> None:
    of_zero(lambda z: [g.update(bias_correction=False) for g in z["base_optimizer_state"]["param_groups"]])(folder)
    assert {state.bias_correction for state in load_checkpoint(folder).adam.values()} == {False}


def test_a_third_moment_of_another_optimizer_is_named(folder: Path, stored: Path, tmp_path: Path) -> None:
    """The ranks' flat vectors, and the converted form's folders."""
    for rank in (0, 1):
        entries = load(optim(folder, rank))["optimizer_state_dict"]["base_optimizer_state"]["state"]
        change = {key: {**entry, "exp_avg_slow": entry["exp_avg"]} for key, entry in entries.items()}
        rewrite(
            optim(folder, rank),
            lambda content, change=change: content["optimizer_state_dict"]["base_optimizer_state"].update(state=change),
        )
    universal = Path(shutil.copytree(stored / "1-bf16-2-universal", tmp_path / "new")) / "global_step3_universal"
    for second in universal.rglob("exp_avg_sq.pt"):
        shutil.copy(second, second.with_name("exp_avg_slow.pt"))
    for place in (folder, universal):
        other = load_checkpoint(place).other
        assert other is not None
        assert other.reason == "the optimizer is unknown: Adam's states have no `exp_avg_slow`"
        assert inspect_checkpoint(place).problems == []


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_is_one_line(folder: Path, damage: str) -> None:
    change, problem = DAMAGE[damage]
    change(folder)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=problem) as raised:
        load_checkpoint(folder)
    assert "\n" not in str(raised.value)
    assert inspect_checkpoint(folder).problems[0] == str(raised.value)
    assert time.monotonic() - began < 10
    assert not (folder / "executed").exists()


def test_weights_that_are_the_masters_rounded_may_lie_beside_them(folder: Path) -> None:
    own_weights(folder, 1.0)
    assert_held(folder)
    assert load_checkpoint(folder).info.weights_dtype == "float32"


def test_a_coupled_decay_is_said_by_the_configuration_alone(folder: Path) -> None:
    def as_of_deepspeed(content: dict[str, Any]) -> None:
        for group in content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
            del group["decoupled_weight_decay"]

    for rank in (0, 1):
        rewrite(optim(folder, rank), as_of_deepspeed)
    for options, decoupled in (({}, True), ({"adam_w_mode": False}, False)):
        given = {"type": "Adam", "params": options}
        rewrite(model_states(folder), lambda content, given=given: content["ds_config"].update(optimizer=given))
        assert {state.decoupled for state in load_checkpoint(folder).adam.values()} == {decoupled}


@pytest.mark.parametrize("gone", ["exp_avg.pt", "fp32.pt"])
def test_a_universal_checkpoint_lacks_a_file(stored: Path, tmp_path: Path, gone: str) -> None:
    folder = Path(shutil.copytree(stored / "1-bf16-2-universal", tmp_path / "ckpt")) / "global_step3_universal"
    (folder / "zero" / "model.norm.weight" / gone).unlink()
    with pytest.raises(CheckpointError, match=f"{gone}: is missing"):
        load_checkpoint(folder)
    assert main(["inspect", str(folder)]) == 1


def test_only_known_errors_are_called_damage() -> None:
    assert CheckpointError not in DAMAGED
