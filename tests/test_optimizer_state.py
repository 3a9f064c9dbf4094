"""Adam's state as every writer lays it out: what is loaded is what the live optimizer held, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
import trl
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import models
from entropy_probe import load_checkpoint
from entropy_probe.config import ProbeConfig
from entropy_probe.demo import checkpoint_path
from entropy_probe.errors import CheckpointError
from entropy_probe.inputs import digest
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from test_checkpoint import assert_same

NAMES = "optimizer_param_names.json"
Groups = list[dict[str, Any]]


def held(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """State and hyper-parameters of the live optimizer, by name; parameters that were never stepped are left out."""
    of = {p: {**optimizer.state[p], **group} for group in optimizer.param_groups for p in group["params"]}
    return {name: of[p] for name, p in model.named_parameters() if p in of and "exp_avg" in of[p]}


def assert_held(folder: Path, model: Any, optimizer: torch.optim.Optimizer, global_step: int | None = None) -> None:
    """Moments, steps and hyper-parameters are the live optimizer's, weights and what is trained the live model's."""
    live = held(model, optimizer)
    assert live
    assert_same(folder, live, dict(model.named_parameters()), global_step)
    for name, state in load_checkpoint(folder).adam.items():
        assert (state.amsgrad, state.maximize) == (live[name]["amsgrad"], live[name]["maximize"])
        assert state.decoupled == live[name]["decoupled_weight_decay"]
        assert state.initial_lr is None
        if state.amsgrad:
            assert state.max_exp_avg_sq is not None
            assert torch.equal(state.max_exp_avg_sq, live[name]["max_exp_avg_sq"])
    found = inspect_checkpoint(folder)
    assert found.problems == []
    assert found.optimizer is not None
    assert (found.optimizer.covered, found.optimizer.groups) == (len(live), len(optimizer.param_groups))


VARIANTS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {}),
    "Adam": (torch.optim.Adam, {"weight_decay": 0.1}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "foreach": (torch.optim.AdamW, {"foreach": True}),
    "AMSGrad": (torch.optim.AdamW, {"amsgrad": True}),
    "Adam fused AMSGrad": (torch.optim.Adam, {"amsgrad": True, "fused": True}),
    "maximize": (torch.optim.AdamW, {"maximize": True}),
    "hyper-parameters": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3}),
    "lr is a tensor": (torch.optim.AdamW, {"lr": torch.tensor(2e-3)}),
}


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_variants_of_adam(tmp_path: Path, variant: str) -> None:
    kind, settings = VARIANTS[variant]
    model = models.tiny_model("llama")
    optimizer = kind(model.parameters(), **{"lr": 1e-3, **settings})
    models.train_steps(model, optimizer)
    assert_held(models.save_checkpoint(tmp_path / "ckpt", model, optimizer), model, optimizer)


def layers(named: list[tuple[str, Any]]) -> Groups:
    """A group for each layer and one for the rest, each with its own lr, betas and decay."""
    labels = [name.split(".")[2] if "layers" in name else "rest" for name, _ in named]
    return [
        {
            "params": [pair for pair, label in zip(named, labels, strict=True) if label == wanted],
            "lr": 1e-3 / (k + 1),
            "betas": (0.9, 0.99 - 0.01 * k),
            "weight_decay": 0.1 * k,
        }
        for k, wanted in enumerate(dict.fromkeys(labels))
    ]


GROUPS: dict[str, Callable[[list[tuple[str, Any]]], Groups]] = {
    "one": lambda named: [{"params": named}],
    "reversed": lambda named: [{"params": named[::-1]}],
    "by layer": layers,
    "by layer from the top": lambda named: layers(named)[::-1],
    "each its own": lambda named: [{"params": [pair], "lr": 1e-3 * (k + 1)} for k, pair in enumerate(named)],
}


def decayed_by_444(model: Any) -> set[str]:
    """The Trainer of transformers 4.44: all but biases, and but what a `nn.LayerNorm` holds: RMSNorms decay."""
    owners = {
        f"{at}.{own}": module
        for at, module in model.named_modules()
        for own, _ in module.named_parameters(recurse=False)
    }
    return {n for n, _ in model.named_parameters() if "bias" not in n and not isinstance(owners[n], torch.nn.LayerNorm)}


def decayed_by_5(model: Any) -> set[str]:
    """Of 4.57 and 5: all but biases and norms of any kind."""
    return {n for n, _ in model.named_parameters() if "bias" not in n and "norm" not in n}


@pytest.mark.parametrize(
    ("architecture", "rule", "sizes"),
    [
        ("qwen2", decayed_by_444, [20, 6]),
        ("qwen2", decayed_by_5, [15, 11]),
        ("llama", decayed_by_444, [21, 0]),
        ("llama", decayed_by_5, [16, 5]),
    ],
)
def test_decay_groups_of_the_trainer(tmp_path: Path, architecture: str, rule: Any, sizes: list[int]) -> None:
    """By position, as the Trainer writes them; sizes as were seen of Qwen2 with 4.44 and 4.57."""
    model = models.tiny_model(architecture)
    decayed = rule(model)
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) == wanted], "weight_decay": decay}
        for wanted, decay in ((True, 0.1), (False, 0.0))
    ]
    assert [len(group["params"]) for group in groups] == sizes
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    models.train_steps(model, optimizer)
    assert_held(models.save_checkpoint(tmp_path / "ckpt", model, optimizer), model, optimizer)


SAVED = {
    "param_names": lambda folder, model, optimizer: optimizer.state_dict(),
    "by name": lambda folder, model, optimizer: get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    ),
    "compiled": lambda folder, model, optimizer: renamed(optimizer.state_dict(), "_orig_mod."),
    "DDP": lambda folder, model, optimizer: renamed(optimizer.state_dict(), "module."),
    "names file": lambda folder, model, optimizer: names_apart(optimizer.state_dict(), folder, flat=False),
    "flat names file": lambda folder, model, optimizer: names_apart(optimizer.state_dict(), folder, flat=True),
}


def renamed(state_dict: Any, prefix: str) -> Any:
    for group in state_dict["param_groups"]:
        group["param_names"] = [prefix + name for name in group["param_names"]]
    return state_dict


def names_apart(state_dict: Any, folder: Path, *, flat: bool) -> Any:
    names = [group.pop("param_names") for group in state_dict["param_groups"]]
    (folder / NAMES).write_text(json.dumps([name for group in names for name in group] if flat else names))
    return state_dict


@pytest.mark.parametrize("saved", list(SAVED))
@pytest.mark.parametrize("grouping", list(GROUPS))
def test_groups_with_names(tmp_path: Path, grouping: str, saved: str) -> None:
    model = models.tiny_model("llama")
    optimizer = torch.optim.AdamW(GROUPS[grouping](list(model.named_parameters())), lr=1e-3)
    models.train_steps(model, optimizer)
    folder = models.save_checkpoint(tmp_path / "ckpt", model, optimizer)
    torch.save(SAVED[saved](folder, model, optimizer), folder / "optimizer.pt")
    assert_held(folder, model, optimizer)


STEPS: dict[str, Callable[[torch.Tensor], Any]] = {
    "int": lambda step: int(step),
    "float": lambda step: float(step),
    "0-d": lambda step: step,
    "1-element": lambda step: step.reshape(1),
    "0-d integer": lambda step: step.long(),
    "float64": lambda step: step.double(),
}


@pytest.mark.parametrize("wrap", ["", "optimizer", "optimizer_state_dict"])
@pytest.mark.parametrize("form", list(STEPS))
def test_forms_of_step(tmp_path: Path, form: str, wrap: str) -> None:
    model = models.tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    models.train_steps(model, optimizer)
    folder = models.save_checkpoint(tmp_path / "ckpt", model, optimizer)
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    for entry in content["state"].values():
        entry["step"] = STEPS[form](entry["step"])
    torch.save({wrap: content, "epoch": 1} if wrap else content, folder / "optimizer.pt")
    assert_held(folder, model, optimizer)


def notes_layout(run: Path, step: int, *, frozen: bool = False) -> tuple[Path, Any, torch.optim.Optimizer]:
    """`training_state/step_N/`: the adapter in model/, optimizer, names and training_info.json beside it."""
    models.tiny_model("llama").save_pretrained(run / "base")
    model = models.add_adapter(transformers.AutoModelForCausalLM.from_pretrained(run / "base"), "llama")
    model.peft_config["default"].base_model_name_or_path = "base"
    taken = [(name, p) for name, p in model.named_parameters() if frozen or p.requires_grad]
    first = [(n, p) for n, p in taken if "lora_B" in n]
    rest = [(n, p) for n, p in taken if "lora_B" not in n][::-1]
    groups = [{"params": [p for _, p in first], "lr": 2e-3}, {"params": [p for _, p in rest], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    models.train_steps(model, optimizer)
    folder = run / "training_state" / f"step_{step}"
    model.save_pretrained(folder / "model")
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    (folder / NAMES).write_text(json.dumps([[n for n, _ in first], [n for n, _ in rest]]))
    (folder / "training_info.json").write_text(json.dumps({"step": step}))
    return folder, model, optimizer


@pytest.mark.parametrize("frozen", [False, True])
def test_names_file_of_a_training_state(tmp_path: Path, frozen: bool) -> None:
    """Equal shapes in an order that no trainer uses: only the names file can tell them apart."""
    notes_layout(tmp_path, 9)
    folder, model, optimizer = notes_layout(tmp_path, 10, frozen=frozen)
    for path in (folder, folder.parent, tmp_path):
        assert_held(path, model, optimizer, global_step=10)
        assert load_checkpoint(path).info.path == folder
    found = inspect_checkpoint(tmp_path)
    assert (found.format, found.global_step) == ("training_state/step_N", 10)
    assert {"optimizer.pt", NAMES, "model/adapter_model.safetensors"} <= set(found.files)


@pytest.mark.parametrize("name", [NAMES, "optimizer.pt", "training_info.json", "model/adapter_model.safetensors"])
def test_every_file_counts(tmp_path: Path, name: str) -> None:
    folder, _, _ = notes_layout(tmp_path, 10)
    before, fingerprint = digest(tmp_path, ProbeConfig()), load_checkpoint(folder).info.fingerprint
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content + b" ")
    assert digest(tmp_path, ProbeConfig()) != before
    if name == NAMES:
        assert load_checkpoint(folder).info.fingerprint != fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda names: names[:1], "is not a list of names for each group of"),
        (lambda names: [names[0][1:], names[1]], "is not a list of names for each group of"),
        (lambda names: {"names": names}, "is not a list of names for each group of"),
        (lambda names: None, "is not a list of names for each group of"),
        (lambda names: [names[0], ["x", *names[1][1:]]], "has state for x, which the model lacks"),
        (lambda names: [names[0], [names[0][0], *names[1][1:]]], "is in it twice"),
        (lambda names: [[3] * len(names[0]), names[1]], "has state for 3, which the model lacks"),
    ],
)
def test_a_names_file_that_does_not_fit_is_an_error(tmp_path: Path, change: Any, message: str) -> None:
    folder, _, _ = notes_layout(tmp_path, 10)
    names = json.loads((folder / NAMES).read_text())
    (folder / NAMES).write_text(json.dumps(change(names)))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_trl_with_names(tmp_path: Path) -> None:
    """GRPO's and SFT's trainers share the Trainer's loop; here with an adapter, its [n, 0] groups, and a names file."""
    demo = checkpoint_path().parent / "base"
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo)
    trainer = trl.SFTTrainer(
        str(demo),
        trl.SFTConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=3, save_steps=3, disable_tqdm=True,
            learning_rate=1e-3, lr_scheduler_type="constant", model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=datasets.Dataset.from_list([{"text": f"What is {n}+1? {n + 1}"} for n in range(24)]),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    model: Any = trainer.model
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    folder = tmp_path / "checkpoint-3"
    of = held(model, optimizer)
    for named in (False, True):
        if named:
            names = {p: name for name, p in model.named_parameters()}
            groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
            assert [len(group) for group in groups] == [len(of), 0]
            (folder / NAMES).write_text(json.dumps(groups))
        assert_same(folder, of, dict(model.named_parameters()))
        assert inspect_checkpoint(folder).problems == []


def test_names_that_disagree_are_an_error(tmp_path: Path) -> None:
    model = models.tiny_model("llama")
    optimizer = torch.optim.AdamW(list(model.named_parameters()), lr=1e-3)
    models.train_steps(model, optimizer)
    folder = models.save_checkpoint(tmp_path / "ckpt", model, optimizer)
    (folder / NAMES).write_text(json.dumps([[name for name, _ in model.named_parameters()][::-1]]))
    with pytest.raises(CheckpointError, match="differs from the optimizer's own `param_names`"):
        load_checkpoint(folder)
