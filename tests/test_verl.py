"""verl's FSDP checkpoints, written by torch's FSDP with one and two processes, against the tensors that those held."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import forked
import models
import verl_writer
from entropy_probe import load_checkpoint
from entropy_probe.__main__ import main
from entropy_probe.errors import CheckpointError
from entropy_probe.layout import find_layout
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from test_checkpoint import Payload, json_edit

CASES = ["full-1", "full-2", "hybrid-2", "lora-1", "lora-2"]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verl")
    jobs = {1: ["full", "lora"], 2: ["full", "hybrid", "lora", "fsdp1"]}
    commands = [(str(rank), str(ranks), folder, *cases) for ranks, cases in jobs.items() for rank in range(ranks)]
    with ThreadPoolExecutor(3) as threads:
        ended = list(threads.map(lambda command: forked.python(verl_writer.__file__, *command, timeout=200), commands))
    assert [done.returncode for done in ended] == [0, 0, 0], ended
    return folder


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_the_processes_held(written: Path, case: str) -> None:
    loaded = load_checkpoint(written / case)
    held = load_file(written / case / "held.safetensors")
    parameters = dict(loaded.model.named_parameters())
    assert {f"{name}|weight" for name in parameters} | {
        f"{name}|{moment}" for name in loaded.adam for moment in ("exp_avg", "exp_avg_sq")
    } == set(held)
    for key, tensor in held.items():
        name, what = key.split("|")
        got = parameters[name].detach() if what == "weight" else getattr(loaded.adam[name], what)
        assert torch.equal(got, tensor), key
    for state in loaded.adam.values():
        assert (state.step, state.lr, state.betas, state.weight_decay) == (3, 1e-3, (0.9, 0.95), 0.1)
    assert {name for name, p in parameters.items() if p.requires_grad} == set(loaded.adam)
    assert (loaded.info.global_step, loaded.info.warnings) == (3, ())
    assert loaded.info.adapter == ("LoRA" if "lora" in case else None)
    if loaded.info.adapter:
        assert loaded.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").scaling == {"default": 3}

    found = inspect_checkpoint(written / case)
    assert (found.problems, found.format, found.global_step) == ([], "verl FSDP", 3)
    assert found.weights is not None
    assert found.optimizer is not None
    assert found.weights.kind == ("LoRA adapter" if loaded.info.adapter else "full model")
    assert found.weights.num_parameters == loaded.info.num_parameters
    assert (found.optimizer.num_trainable, found.optimizer.type) == (loaded.info.num_trainable, "AdamW")
    assert (found.optimizer.covered, found.optimizer.total) == (len(loaded.adam), len(parameters))
    assert (found.optimizer.step, found.optimizer.lr) == ([3.0], [1e-3])
    assert any(w.startswith("never opened: extra_state_world_size_") for w in found.warnings)


@pytest.fixture
def actor(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written / "full-2" / "global_step_3", tmp_path / "global_step_3")) / "actor"


@pytest.fixture
def lora(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written / "lora-2" / "global_step_3", tmp_path / "global_step_3")) / "actor"


def test_where_it_is_found(actor: Path) -> None:
    (actor.parents[1] / "global_step_4" / "critic").mkdir(parents=True)
    for path in (actor, actor.parent, actor.parents[1]):
        assert find_layout(path).folder == actor
    assert find_layout(actor.parents[1]).note.endswith("; 1 newer without optimizer state")


def test_moments_by_name(actor: Path) -> None:
    """torch's own distributed state_dict has names in place of numbers."""
    expected = load_checkpoint(actor)
    names = list(dict(expected.model.named_parameters()))

    def named(content: dict[str, Any]) -> None:
        content["state"] = {names[key]: entry for key, entry in content["state"].items()}
        content["param_groups"][0]["params"] = names

    for rank in (0, 1):
        rewrite(actor / f"optim_world_size_2_rank_{rank}.pt", named)
    got = load_checkpoint(actor).adam
    assert all(torch.equal(got[name].exp_avg, state.exp_avg) for name, state in expected.adam.items())


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-900])


MODEL, OPTIM = "model_world_size_2_rank_{}.pt", "optim_world_size_2_rank_{}.pt"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights of rank 1 gone": (lambda f: (f / MODEL.format(1)).unlink(), "rank_1.pt: is missing"),
    "moments of rank 1 gone": (lambda f: (f / OPTIM.format(1)).unlink(), "rank_1.pt: is missing"),
    "another world": (lambda f: json_edit(f / "fsdp_config.json", world_size=4), "says 4"),
    "two worlds": (lambda f: shutil.copy(f / MODEL.format(0), f / "model_world_size_4_rank_0.pt"), "of [2, 4] ranks"),
    "a rank too many": (lambda f: shutil.copy(f / MODEL.format(0), f / MODEL.format(2)), "has 5 files of 2 ranks"),
    "truncated": (lambda f: cut(f / MODEL.format(1)), "cannot be read"),
    "planted": (
        lambda f: (f / OPTIM.format(1)).write_bytes(b"") or torch.save(Payload(f / "executed"), f / OPTIM.format(1)),
        "was not executed",
    ),
    "rank 0 twice": (
        lambda f: shutil.copy(f / MODEL.format(0), f / MODEL.format(1)), "its ranks do not fit together",
    ),
    "other names": (
        lambda f: rewrite(f / MODEL.format(1), lambda c: c.pop("lm_head.weight")), "ranks hold different names",
    ),
    "a plain part": (
        lambda f: rewrite(f / MODEL.format(1), lambda c: c.update({"lm_head.weight": torch.zeros(8, 5)})),
        "ranks differ in the shape",
    ),
    "another step": (
        lambda f: rewrite(f / OPTIM.format(1), lambda c: c["state"][0].update(step=torch.tensor(9.0))),
        "ranks differ in `step`",
    ),
    "no moment": (
        lambda f: [rewrite(f / OPTIM.format(r), lambda c: c["state"][0].pop("exp_avg_sq")) for r in (0, 1)],
        "has no `exp_avg_sq`",
    ),
    "no optimizer": (lambda f: [torch.save([], f / OPTIM.format(r)) for r in (0, 1)], "do not fit together"),
    "no huggingface": (lambda f: shutil.rmtree(f / "huggingface"), "has neither config.json"),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_is_one_line(actor: Path, damage: str) -> None:
    change, problem = DAMAGE[damage]
    change(actor)
    began = time.monotonic()
    with pytest.raises(CheckpointError) as raised:
        load_checkpoint(actor)
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(inspect_checkpoint(actor).problems) == 1
    assert time.monotonic() - began < 10
    assert not (actor / "executed").exists()


def test_flat_vectors_of_fsdp1_are_refused(written: Path) -> None:
    with pytest.raises(CheckpointError, match=r"FSDP1's flat vectors.*fsdp2"):
        load_checkpoint(written / "fsdp1-2")


@pytest.mark.parametrize("where", ["lora_train_meta.json", "lora_adapter/adapter_config.json"])
def test_an_adapter_that_does_nothing_says_so(lora: Path, where: str) -> None:
    (lora / where).parent.mkdir(exist_ok=True)
    (lora / where).write_text(json.dumps({"r": 2, "lora_alpha": 0}))
    warning = "lora_alpha is 0: the adapter does nothing"
    assert load_checkpoint(lora).info.warnings == (warning,)
    assert warning in inspect_checkpoint(lora).warnings


def test_a_run_says_that_an_adapter_does_nothing(lora: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json_edit(lora / "lora_train_meta.json", lora_alpha=0)
    warning = "lora_alpha is 0: the adapter does nothing"
    prompts = models.random_rollouts(lora.parent / "rollouts.jsonl", prompts=2, responses=2, seed=0)
    lines = [json.loads(line) for line in prompts.read_text().splitlines()]
    small = [{**line, "prompt_ids": [3, 4], "response_ids": [[5, 6], [7, 2]]} for line in lines]
    prompts.write_text("\n".join(map(json.dumps, small)))
    out = lora.parent / "report.json"
    assert main(["run", str(lora), "--rollouts", str(prompts), "--budget", "smoke", "--out", str(out)]) == 0
    assert f"entropy-probe: warning: {warning}" in capsys.readouterr().err
    assert json.loads(out.read_text())["checkpoint"]["warnings"] == [warning]


def test_a_zero_b_says_so(lora: Path) -> None:
    for rank in (0, 1):
        rewrite(lora / MODEL.format(rank), lambda c: [t.zero_() for name, t in c.items() if "lora_B" in name])
    assert load_checkpoint(lora).info.warnings == ("every lora_B is zero: the adapter does nothing",)
    assert "every lora_B is zero: the adapter does nothing" in inspect_checkpoint(lora).warnings


def test_an_adapter_without_its_scaling(lora: Path) -> None:
    (lora / "lora_train_meta.json").unlink()
    with pytest.raises(CheckpointError, match=r"lora_train_meta\.json: is missing, and the adapter's `lora_alpha`"):
        load_checkpoint(lora)
    (lora / "lora_train_meta.json").write_text('{"lora_alpha": "x"}')
    with pytest.raises(CheckpointError, match="`lora_alpha` is 'x'"):
        load_checkpoint(lora)
