"""Checkpoints of the real libraries load exactly; damaged ones end in one line. Nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import models
from entropy_probe import load_checkpoint
from entropy_probe.demo import checkpoint_path
from entropy_probe.errors import CheckpointError, ConfigError
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from entropy_probe.model.checkpoint.moments import groupings, order

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 8}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


class Tokens(torch.utils.data.Dataset):
    """Random text."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, models.VOCABULARY, (7,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def trained(folder: Path, model: Any, **arguments: Any) -> tuple[Path, dict[str, dict[str, Any]], dict[str, Any]]:
    """Train with the real Trainer; return its checkpoint folder and what the live optimizer held, by name."""
    settings = {"learning_rate": 1e-3, "weight_decay": 0.1, "max_steps": 3, "save_steps": 3, **arguments}
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(folder), use_cpu=True, report_to="none", per_device_train_batch_size=4, disable_tqdm=True, **settings
        ),
        train_dataset=Tokens(),
    )
    trainer.train()
    live = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    held = {}
    for group in live.param_groups:
        hyper = {k: group[k] for k in ("lr", "betas", "eps", "weight_decay")}
        for name, parameter in model.named_parameters():
            if any(parameter is p for p in group["params"]):
                held[name] = {**live.state[parameter], **hyper}
    return folder / f"checkpoint-{settings['max_steps']}", held, dict(model.named_parameters())


def assert_same(
    folder: Path, held: dict[str, dict[str, Any]], parameters: dict[str, Any], global_step: int | None = 3
) -> None:
    checkpoint = load_checkpoint(folder)
    assert set(checkpoint.adam) == set(held)
    for name, state in checkpoint.adam.items():
        live = held[name]
        assert torch.equal(state.exp_avg, live["exp_avg"].float())
        assert torch.equal(state.exp_avg_sq, live["exp_avg_sq"].float())
        assert state.step == float(live["step"])
        assert (state.lr, state.betas, state.eps, state.weight_decay) == (
            live["lr"], tuple(live["betas"]), live["eps"], live["weight_decay"],
        )  # fmt: skip
    loaded = dict(checkpoint.model.named_parameters())
    assert set(loaded) == set(parameters)
    for name, parameter in parameters.items():
        assert torch.equal(loaded[name], parameter.float()), name
        assert loaded[name].requires_grad == (name in held)
        assert loaded[name].dtype is torch.float32
    assert not any(module.training for module in checkpoint.model.modules())
    assert checkpoint.info.global_step == global_step


@pytest.mark.parametrize("architecture", list(models.CONFIGS))
def test_full_model_from_the_trainer(tmp_path: Path, architecture: str) -> None:
    assert_same(*trained(tmp_path, models.tiny_model(architecture)))


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_adapter_from_the_trainer(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models.tiny_model("llama").save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained("base")
    settings = {"target_modules": ["q_proj", "v_proj"], **ADAPTERS[kind]}
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, task_type="CAUSAL_LM", **settings))
    folder, held, parameters = trained(tmp_path / "run", model)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)  # the relative base is found in a parent of the checkpoint
    assert_same(folder, held, parameters)


def test_bf16_weights_and_moments_load_as_float32(tmp_path: Path) -> None:
    model = models.tiny_model("qwen2").to(torch.bfloat16)
    folder, held, parameters = trained(tmp_path, model)
    assert_same(folder, held, parameters)
    assert load_checkpoint(folder).info.weights_dtype == "bfloat16"


def test_sharded_weights(tmp_path: Path) -> None:
    folder = models.full_checkpoint(tmp_path / "ckpt", "llama")
    whole = load_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    whole.model.save_pretrained(folder, max_shard_size="10KB")
    assert (folder / "model.safetensors.index.json").is_file()
    sharded = load_checkpoint(folder)
    for (name, a), b in zip(whole.model.named_parameters(), sharded.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: is missing"):
        load_checkpoint(folder)


def pickled(folder: Path, shards: int = 0) -> None:
    """The weights of the folder as pickles, under the names that transformers and peft give them."""
    source = next(folder.glob("*model.safetensors"))
    name, tensors = source.name.replace("safetensors", "bin"), load_file(source)
    name = name.replace("model", "pytorch_model") if name == "model.bin" else name
    source.unlink()
    if not shards:
        return torch.save(tensors, folder / name)
    weight_map = {n: name.replace(".bin", f"-{i % shards + 1:05}-of-{shards:05}.bin") for i, n in enumerate(tensors)}
    for shard in set(weight_map.values()):
        torch.save({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return None


@pytest.mark.parametrize("kind", ["llama", "gpt2", "llama sharded", "lora", "dora", "modules_to_save"])
def test_pickled_weights_are_those_of_safetensors(tmp_path: Path, kind: str) -> None:
    if kind in ADAPTERS:
        folder = models.adapter_checkpoint(tmp_path / "ckpt", "llama", **ADAPTERS[kind])
    else:
        folder = models.full_checkpoint(tmp_path / "ckpt", kind.split()[0])
    expected = load_checkpoint(folder)
    pickled(folder, shards=3 if "sharded" in kind else 0)
    if kind in ADAPTERS:
        pickled(tmp_path / "ckpt-base")
    got = load_checkpoint(folder)
    for (name, a), b in zip(expected.model.named_parameters(), got.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.requires_grad == b.requires_grad
    assert all(torch.equal(got.adam[n].exp_avg_sq, state.exp_avg_sq) for n, state in expected.adam.items())
    assert got.info.weights_dtype == expected.info.weights_dtype
    assert got.info.num_parameters == expected.info.num_parameters
    found = inspect_checkpoint(folder)
    assert (found.problems, found.weights and found.weights.num_parameters) == ([], got.info.num_parameters)


@pytest.mark.parametrize("kind", ["pytorch_model.bin", "adapter_model.bin", "shard"])
@pytest.mark.parametrize("protocol", ["torch", "plain pickle"])
def test_pickled_weights_with_a_payload_are_refused(tmp_path: Path, kind: str, protocol: str) -> None:
    if kind == "adapter_model.bin":
        folder = models.adapter_checkpoint(tmp_path / "ckpt", "llama")
    else:
        folder = models.full_checkpoint(tmp_path / "ckpt", "llama")
    pickled(folder, shards=2 if kind == "shard" else 0)
    victim = sorted(folder.glob("*model*.bin"))[-1]
    content = {"weight": torch.ones(1), "more": Payload(tmp_path / "executed")}
    if protocol == "torch":
        torch.save(content, victim)
    else:
        victim.write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=victim.name) as caught:
        load_checkpoint(folder)
    assert str(caught.value) in inspect_checkpoint(folder).problems
    assert not (tmp_path / "executed").exists()


def test_pickled_weights_that_are_no_tensors(tmp_path: Path) -> None:
    folder = models.full_checkpoint(tmp_path / "ckpt", "llama")
    pickled(folder)
    torch.save({"weight": [1, 2]}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: is not a dict of tensors by name"):
        load_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: cannot be read"):
        load_checkpoint(folder)


def test_scheduler_that_ended(tmp_path: Path) -> None:
    folder, _, _ = trained(tmp_path, models.tiny_model("llama"), lr_scheduler_type="linear")
    state = next(iter(load_checkpoint(folder).adam.values()))
    assert (state.lr, state.initial_lr) == (0.0, 1e-3)


@pytest.mark.parametrize("wrap", ["bare", "optimizer", "optimizer_state_dict"])
@pytest.mark.parametrize("file", ["optimizer.pt", "optimizer.bin", "training_state.pt"])
def test_optimizer_files_beside_save_pretrained(tmp_path: Path, wrap: str, file: str) -> None:
    folder = models.full_checkpoint(tmp_path / "ckpt", "llama")
    expected = load_checkpoint(folder).adam
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    (folder / "optimizer.pt").unlink()
    torch.save(state if wrap == "bare" else {wrap: state, "epoch": 1}, folder / file)
    got = load_checkpoint(folder).adam
    assert all(torch.equal(got[n].exp_avg_sq, expected[n].exp_avg_sq) for n in expected)


def test_names_in_the_file_win_over_positions(tmp_path: Path) -> None:
    """The order is reversed and the shapes repeat: only the names can tell."""
    model = models.tiny_model("llama")
    named = list(model.named_parameters())[::-1]
    stepped = torch.optim.AdamW([(f"module.{n}", p) for n, p in named], lr=1e-3)
    models.train_steps(model, stepped)
    folder = models.save_checkpoint(tmp_path / "ckpt", model, stepped)
    adam = load_checkpoint(folder).adam
    for name, parameter in named:
        assert torch.equal(adam[name].exp_avg_sq, stepped.state[parameter]["exp_avg_sq"])


def test_an_order_that_cannot_be_proved_is_an_error(tmp_path: Path) -> None:
    model = models.tiny_model("llama")
    parameters = list(model.parameters())
    stepped = torch.optim.AdamW(parameters[1::2] + parameters[::2], lr=1e-3)
    models.train_steps(model, stepped)
    folder = models.save_checkpoint(tmp_path / "ckpt", model, stepped)
    with pytest.raises(CheckpointError, match="fit no known order"):
        load_checkpoint(folder)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A copy of the demo checkpoint with its base, to be damaged."""
    demo = checkpoint_path()
    shutil.copytree(demo.parent / "base", tmp_path / "base")
    return Path(shutil.copytree(demo, tmp_path / demo.name))


def edit_optimizer(folder: Path, change: Any) -> None:
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    change(content)
    torch.save(content, folder / "optimizer.pt")


def edit_weights(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def one_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def drop_first(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(iter(tensors))]


class Payload:
    """Unpickling this creates the file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def json_edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGE: dict[str, tuple[Any, str]] = {
    "nan in the adapter": (
        lambda f: edit_weights(f / "adapter_model.safetensors", one_nan),
        r"adapter_model.safetensors: .* non-finite .*; use an earlier checkpoint",
    ),
    "nan in the base": (
        lambda f: edit_weights(f.parent / "base/model.safetensors", one_nan),
        r"base/model.safetensors: .* non-finite",
    ),
    "adapter tensor gone": (
        lambda f: edit_weights(f / "adapter_model.safetensors", drop_first),
        r"adapter_model.safetensors: .* is not in the file",
    ),
    "base tensor gone": (
        lambda f: edit_weights(f.parent / "base/model.safetensors", drop_first),
        r"base/model.safetensors: .* is not in the file",
    ),
    "weights truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(
            (f / "adapter_model.safetensors").read_bytes()[:-1000]
        ),
        r"adapter_model.safetensors: is not a readable safetensors file",
    ),
    "weights empty": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b""),
        r"adapter_model.safetensors: is not a readable safetensors file",
    ),
    "one moment gone": (
        lambda f: edit_optimizer(f, lambda c: c["state"][3].pop("exp_avg_sq")),
        r"optimizer.pt: .*lora.* has no `exp_avg_sq`.*missing_state: identity",
    ),
    "one state gone": (
        lambda f: edit_optimizer(f, lambda c: c["state"].pop(3)),
        r"optimizer.pt: .*lora.* has no state",
    ),
    "state is a tensor": (
        lambda f: edit_optimizer(f, lambda c: c["state"].update({3: torch.ones(2)})),
        r"optimizer.pt: .*lora.* has no state",
    ),
    "moment not finite": (
        lambda f: edit_optimizer(f, lambda c: c["state"][0]["exp_avg"].fill_(float("inf"))),
        r"optimizer.pt: .*`exp_avg` is not finite",
    ),
    "moment negative": (
        lambda f: edit_optimizer(f, lambda c: c["state"][0]["exp_avg_sq"].sub_(1.0)),
        r"optimizer.pt: .*`exp_avg_sq` is negative",
    ),
    "never stepped": (
        lambda f: edit_optimizer(f, lambda c: c["state"].clear()),
        r"optimizer.pt: was never stepped",
    ),
    "step zero": (
        lambda f: edit_optimizer(f, lambda c: c["state"][0].update(step=0)),
        r"optimizer.pt: .*`step` is 0",
    ),
    "optimizer of another model": (
        lambda f: torch.save(another_optimizer().state_dict(), f / "optimizer.pt"),
        r"optimizer.pt: its 2 tensors in groups of \[2\] fit no known order.*use the optimizer saved with this model",
    ),
    "SGD": (
        lambda f: edit_optimizer(f, lambda c: c.update(state={i: {"momentum_buffer": None} for i in c["state"]})),
        r"optimizer.pt: .*has no `exp_avg`",
    ),
    "betas of one": (
        lambda f: edit_optimizer(f, lambda c: c["param_groups"][0].update(betas=(1, 1))),
        r"optimizer.pt: `betas` is \(1.0, 1.0\)",
    ),
    "negative eps": (
        lambda f: edit_optimizer(f, lambda c: c["param_groups"][0].update(eps=-1)),
        r"optimizer.pt: `eps` is -1",
    ),
    "enormous step": (
        lambda f: edit_optimizer(f, lambda c: c["state"][0].update(step=10**400)),
        r"optimizer.pt: .*`step` is 1000",
    ),
    "integer moments": (
        lambda f: edit_optimizer(f, lambda c: c["state"][0].update(exp_avg=c["state"][0]["exp_avg"].long())),
        r"optimizer.pt: .*`exp_avg` is a tensor of torch.int64",
    ),
    "sparse moments": (
        lambda f: edit_optimizer(f, lambda c: c["state"][0].update(exp_avg=c["state"][0]["exp_avg"].to_sparse())),
        r"optimizer.pt: .*`exp_avg` is a torch.sparse_coo tensor",
    ),
    "nested params": (
        lambda f: edit_optimizer(f, lambda c: c["param_groups"][0].update(params=[[0]])),
        r"optimizer.pt: has a param_group without a list of `params`",
    ),
    "RAdam": (
        lambda f: edit_optimizer(f, lambda c: c["param_groups"][0].pop("amsgrad")),
        r"optimizer.pt: its groups lack `amsgrad`",
    ),
    "model type is a list": (
        lambda f: json_edit(f.parent / "base/config.json", model_type=[]),
        r"base/config.json: model_type is \[\]",
    ),
    "sizes are text": (
        lambda f: json_edit(f.parent / "base/config.json", hidden_size="abc"),
        r"base: transformers cannot load it",
    ),
    "no heads": (
        lambda f: json_edit(f.parent / "base/config.json", num_attention_heads=0),
        r"base: transformers cannot load it",
    ),
    "quantised": (
        lambda f: json_edit(f.parent / "base/config.json", quantization_config={"quant_method": "x"}),
        r"base/config.json: is quantised",
    ),
    "targets are no pattern": (
        lambda f: json_edit(f / "adapter_config.json", target_modules="*["),
        r"adapter_model.safetensors: does not fit",
    ),
    "base path of 5000 characters": (
        lambda f: json_edit(f / "adapter_config.json", base_model_name_or_path="x" * 5000),
        r"adapter_config.json: the base model 'xxx",
    ),
    "optimizer truncated": (
        lambda f: (f / "optimizer.pt").write_bytes((f / "optimizer.pt").read_bytes()[:5000]),
        r"optimizer.pt: cannot be read",
    ),
    "optimizer empty": (lambda f: (f / "optimizer.pt").write_bytes(b""), r"optimizer.pt: cannot be read"),
    "optimizer is a list": (lambda f: torch.save([1, 2], f / "optimizer.pt"), r"optimizer.pt: holds no optimizer"),
    "optimizer missing": (lambda f: (f / "optimizer.pt").unlink(), r"has no optimizer state"),
    "payload": (
        lambda f: torch.save({"state": Payload(f / "executed")}, f / "optimizer.pt"),
        r"optimizer.pt: holds more than tensors and plain values, and was not executed",
    ),
    "payload in a plain pickle": (
        lambda f: (f / "optimizer.pt").write_bytes(pickle.dumps(Payload(f / "executed"))),
        r"optimizer.pt: ",
    ),
    "base is a hub name": (
        lambda f: json_edit(f / "adapter_config.json", base_model_name_or_path="Qwen/Qwen2.5-0.5B"),
        r"adapter_config.json: the base model 'Qwen/Qwen2.5-0.5B' is not on disk.*--probe-base-model",
    ),
    "base is null": (
        lambda f: json_edit(f / "adapter_config.json", base_model_name_or_path=None),
        r"adapter_config.json: base_model_name_or_path is None.*--probe-base-model",
    ),
    "another rank": (
        lambda f: json_edit(f / "adapter_config.json", r=3),
        r"adapter_model.safetensors: does not fit the base model",
    ),
    "not LoRA": (
        lambda f: json_edit(f / "adapter_config.json", peft_type="IA3"),
        r"adapter_config.json: peft_type is 'IA3'",
    ),
    "config is garbage": (
        lambda f: (f.parent / "base/config.json").write_text("{"),
        r"base/config.json: is not readable JSON",
    ),
    "unknown model": (
        lambda f: json_edit(f.parent / "base/config.json", model_type="martian"),
        r"base/config.json: model_type is 'martian'",
    ),
    "remote code": (
        lambda f: json_edit(f.parent / "base/config.json", auto_map={"AutoModel": "x.y"}),
        r"base/config.json: asks for remote code",
    ),
    "tokenizer garbage": (lambda f: (f / "tokenizer.json").write_text("{}"), r"its tokenizer"),
    "no configuration": (
        lambda f: (f / "adapter_config.json").unlink(),
        r"has neither config.json nor adapter_config.json",
    ),
}  # fmt: skip


def another_optimizer() -> torch.optim.Optimizer:
    module = torch.nn.Linear(3, 3)
    stepped = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    stepped.step()
    return stepped


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_ends_in_one_line(adapter: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    change(adapter)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(adapter)
    assert "\n" not in str(caught.value)
    assert not (adapter / "executed").exists()


def test_two_orders_that_both_fit_are_an_error(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments that say nothing, and an order that exchanges two tensors of one shape: orders and tensors are named."""
    original = order.known_groupings

    def one_more(model: Any) -> Any:
        yield from original(model)
        swapped = [name for name, p in model.named_parameters() if p.requires_grad]
        i, j = (swapped.index(n) for n in swapped if re.search(r"layers.[01].self_attn.q_proj.lora_A", n))
        swapped[i], swapped[j] = swapped[j], swapped[i]
        yield groupings.Grouping("another", [swapped])

    monkeypatch.setattr(order, "known_groupings", one_more)
    edit_optimizer(adapter, lambda c: [entry["exp_avg_sq"].fill_(1e-4) for entry in c["state"].values()])
    tensors = r"\S*layers.0.self_attn.q_proj.lora_A\S*, \S*layers.1.self_attn.q_proj.lora_A\S* \(0.00 against 0.00\)"
    message = r"the order of its parameters is ambiguous \(.*; another: all fit\), .* cannot tell apart " + tensors
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(adapter)


def test_frozen_parameters_in_the_optimizer_are_passed_over(tmp_path: Path) -> None:
    """AdamW(peft_model.parameters()): the base has no gradient, so it never gets state, and stays frozen."""
    models.tiny_model("llama").save_pretrained(tmp_path / "base")
    model = models.add_adapter(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), "llama")
    model.peft_config["default"].base_model_name_or_path = "base"
    stepped = torch.optim.AdamW(model.parameters(), lr=1e-3)
    models.train_steps(model, stepped)
    folder = models.save_checkpoint(tmp_path / "ckpt", model, stepped)
    for missing in ("raise", "identity"):
        checkpoint = load_checkpoint(folder, missing_state=missing)
        assert all("lora_" in name for name in checkpoint.adam)
        assert not any(p.requires_grad for n, p in checkpoint.model.named_parameters() if "lora_" not in n)


def test_float64_weights_stay_float64(tmp_path: Path) -> None:
    folder = models.full_checkpoint(tmp_path / "ckpt", "llama")
    wide = load_checkpoint(folder).model.double()
    with torch.no_grad():
        next(wide.parameters()).add_(1e-12)
    wide.save_pretrained(folder)
    loaded = load_checkpoint(folder)
    assert loaded.info.weights_dtype == "float64"
    assert torch.equal(next(loaded.model.parameters()), next(wide.parameters()))


def test_missing_state_can_be_taken_as_identity(adapter: Path) -> None:
    edit_optimizer(adapter, lambda c: c["state"][3].pop("exp_avg_sq"))
    adam = load_checkpoint(adapter, missing_state="identity").adam
    assert sorted(state.step for state in adam.values())[:2] == [0.0, 100.0]


def test_base_model_can_be_named(adapter: Path, tmp_path: Path) -> None:
    moved = tmp_path / "away" / "model"
    moved.parent.mkdir()
    (tmp_path / "base").rename(moved)
    with pytest.raises(CheckpointError, match="--probe-base-model"):
        load_checkpoint(adapter)
    assert load_checkpoint(adapter, base_model=moved).info.base_model == moved
    with pytest.raises(CheckpointError, match="is not a model folder"):
        load_checkpoint(adapter, base_model=tmp_path)


def test_no_network_no_writes(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    before = {p: p.stat().st_mtime_ns for p in adapter.parent.rglob("*")}
    (adapter / "training_args.bin").write_bytes(pickle.dumps(Payload(adapter / "executed")))
    load_checkpoint(adapter)
    (adapter / "training_args.bin").unlink()
    assert {p: p.stat().st_mtime_ns for p in adapter.parent.rglob("*") if p != adapter} == {
        p: t for p, t in before.items() if p != adapter
    }


def test_not_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in ((tmp_path / "file", "is a file"), (tmp_path / "none", "does not exist")):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)
    with pytest.raises(ConfigError, match="choose another --probe-device"):
        load_checkpoint(checkpoint_path(), device="nonsense")


def test_loading_leaves_transformers_verbosity_alone() -> None:
    before = transformers.utils.logging.get_verbosity()
    load_checkpoint(checkpoint_path())
    assert transformers.utils.logging.get_verbosity() == before
