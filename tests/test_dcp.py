"""Folders that `torch.distributed.checkpoint` wrote load exactly; damaged ones end in one line, and execute nothing."""

from __future__ import annotations

import io
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

import models
from entropy_probe import load_checkpoint
from entropy_probe.__main__ import main
from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from test_checkpoint import Payload

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class App:
    """A state that gives both, as torch's example does."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(self.model),
            "optim": get_optimizer_state_dict(self.model, self.optimizer),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


def by_names(model: Any, optimizer: Any, **options: Any) -> dict[str, Any]:
    options = {"options": StateDictOptions(**options)}
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, **options),
        "scheduler": {"last_epoch": 3},
    }


class PrimeApp(App):
    """As prime-rl has it: several optimizers may be in `optimizers`, and its own counts beside them."""

    def state_dict(self) -> dict[str, Any]:
        both = super().state_dict()
        progress = {"step": 3, "total_tokens": 99}
        return {
            "model": both["model"],
            "optimizers": both["optim"],
            "scheduler": {"last_epoch": 3},
            "progress": progress,
        }


def flat(model: Any, optimizer: Any) -> dict[str, Any]:
    return get_optimizer_state_dict(model, optimizer, options=FLAT)


def in_one_level(model: Any, optimizer: Any) -> dict[str, Any]:
    own = {f"model.{name}": tensor for name, tensor in get_model_state_dict(model).items()}
    return own | {f"optimizer.{key}": value for key, value in flat(model, optimizer).items()}


FORMS: dict[str, Callable[[Any, Any], dict[str, Any]]] = {
    "nested": by_names,
    "flat": lambda m, o: by_names(m, o, flatten_optimizer_state_dict=True),
    "application": lambda m, o: {"app": App(m, o)},
    "prime-rl": lambda m, o: {"app": PrimeApp(m, o)},
    "bare names, flat at the top": lambda m, o: {**get_model_state_dict(m), **flat(m, o), "epoch": 3},
    "bare names, nested at the top": lambda m, o: get_model_state_dict(m) | get_optimizer_state_dict(m, o),
    "bare names, flat below": lambda m, o: {**get_model_state_dict(m), "optimizer": flat(m, o)},
    "in one level": in_one_level,
    "whole": by_names,
    "by position": lambda m, o: {"model": m.state_dict(), "optimizer": o.state_dict()},
    "compiled": lambda m, o: {
        "model": {f"_orig_mod.{name}": tensor for name, tensor in m.state_dict().items()},
        "optimizer": o.state_dict(),
    },
    "bfloat16": by_names,
    "lora": by_names,
}


def stepped(form: str = "nested") -> tuple[Any, torch.optim.Optimizer]:
    model = models.tiny_model("llama").to(torch.bfloat16 if form == "bfloat16" else torch.float32)
    model = models.add_adapter(model, "llama", modules_to_save=["lm_head"]) if form == "lora" else model
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "betas": (0.7, 0.9)},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-3)
    models.train_steps(model, optimizer)
    return model, optimizer


def save(folder: Path, form: str, model: Any, optimizer: Any) -> Path:
    if form == "lora":
        model.peft_config["default"].base_model_name_or_path = "base"
        model.peft_config["default"].save_pretrained(folder)
        models.tiny_model("llama").save_pretrained(folder.parent / "base")
    else:
        model.config.save_pretrained(folder)
    planner = DefaultSavePlanner(flatten_state_dict=form != "whole")
    dcp.save(FORMS[form](model, optimizer), checkpoint_id=folder, planner=planner, no_dist=True)
    return folder


@pytest.mark.parametrize("form", list(FORMS))
def test_every_form_loads_exactly(tmp_path: Path, form: str) -> None:
    model, optimizer = stepped(form)
    folder = save(tmp_path / "ckpt", form, model, optimizer)
    loaded, found = load_checkpoint(folder), inspect_checkpoint(folder)
    named = dict(loaded.model.named_parameters())
    assert set(named) == {name for name, _ in model.named_parameters()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(loaded.adam) == set(trained)
    for name, parameter in model.named_parameters():
        assert torch.equal(named[name], parameter.float())
        assert named[name].dtype is torch.float32
    for group in optimizer.param_groups:
        for name, parameter in trained.items():
            if any(parameter is p for p in group["params"]):
                state, held = loaded.adam[name], optimizer.state[parameter]
                assert torch.equal(state.exp_avg, held["exp_avg"].float())
                assert torch.equal(state.exp_avg_sq, held["exp_avg_sq"].float())
                assert state.step == held["step"] == 3
                assert (state.lr, state.betas, state.eps) == (group["lr"], group["betas"], group["eps"])
                assert state.weight_decay == group["weight_decay"]
    assert found.problems == []
    assert found.format == "torch.distributed.checkpoint"
    assert found.weights is not None
    assert found.optimizer is not None
    assert found.weights.num_parameters == loaded.info.num_parameters == sum(p.numel() for p in model.parameters())
    assert found.weights.dtype == loaded.info.weights_dtype == ("bfloat16" if form == "bfloat16" else "float32")
    assert found.optimizer.num_trainable == loaded.info.num_trainable
    assert (found.optimizer.covered, found.optimizer.groups) == (len(trained), len(optimizer.param_groups))
    assert (found.optimizer.step, found.optimizer.lr, found.optimizer.type) == ([3], [1e-3], "AdamW")


def test_a_run_of_prime_rl(tmp_path: Path) -> None:
    for step in (2, 10):
        (tmp_path / f"run/checkpoints/step_{step}").mkdir(parents=True)
        save(tmp_path / f"run/checkpoints/step_{step}/trainer", "prime-rl", *stepped())
    assert load_checkpoint(tmp_path / "run").info.path == tmp_path / "run/checkpoints/step_10/trainer"
    assert inspect_checkpoint(tmp_path / "run").problems == []


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("dcp") / "ckpt", "nested", *stepped())


@pytest.fixture
def folder(intact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(intact, tmp_path / "ckpt"))


LAYER = "model.model.layers.0.self_attn.k_proj.weight"


def edited(change: Callable[[Metadata], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 (made here)
        change(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return apply


def place(metadata: Metadata, name: str) -> Any:
    return next(place for index, place in metadata.storage_data.items() if index.fqn == name)


def huge(metadata: Metadata, chunk: bool) -> None:
    """A tensor of 8 TiB, with a piece of that size or with its own."""
    entry = metadata.state_dict_metadata[LAYER]
    entry.size = torch.Size([2**21, 2**20])
    if chunk:
        entry.chunks[0].sizes = entry.size


def shared(metadata: Metadata) -> None:
    """Every tensor's bytes are those of the largest."""
    largest = max(metadata.storage_data.values(), key=lambda place: place.length)
    for place in metadata.storage_data.values():
        place.offset, place.length = largest.offset, largest.length


def overlapping(metadata: Metadata) -> None:
    """Two halves of a matrix, the second where the first is but for a row."""
    entry = metadata.state_dict_metadata[LAYER]
    index, place = next((index, place) for index, place in metadata.storage_data.items() if index.fqn == LAYER)
    half = torch.Size([6, 24])
    entry.chunks = [replace(entry.chunks[0], offsets=torch.Size([n, 0]), sizes=half) for n in (0, 1)]
    for n in (0, 1):
        metadata.storage_data[replace_index(index, n)] = replace(place, length=place.length // 2)


def replace_index(index: Any, row: int) -> Any:
    return type(index)(index.fqn, torch.Size([row, 0]), row)


def planted(name: str) -> Callable[[Path], None]:
    """A pickle that makes a file, in the place of an item."""

    def apply(folder: Path) -> None:
        metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 (made here)
        where, stream = place(metadata, name), io.BytesIO()
        torch.save(Payload(folder / "executed"), stream)
        file = folder / where.relative_path
        where.offset, where.length = file.stat().st_size, stream.tell()
        file.write_bytes(file.read_bytes() + stream.getvalue())
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))

    return apply


def cut(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def moved(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        shutil.copy(folder / "__0_0.distcp", folder.parent)
        edited(lambda m: setattr(place(m, LAYER), "relative_path", name.format(folder.parent)))(folder)

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "payload in .metadata": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps(Payload(f / "executed"))),
        r"\.metadata: asks for .*, and was not executed; do not trust this file",
    ),
    "payload inside .metadata": (
        edited(lambda m: setattr(m, "planner_data", Payload(Path("executed")))),
        r"\.metadata: asks for .*, and was not executed",
    ),
    "payload in a value": (
        planted("optimizer.param_groups.0.lr"),
        r"__0_0\.distcp: holds more than tensors and plain values, and was not executed",
    ),
    "payload in a tensor": (planted(LAYER), r"__0_0\.distcp: holds more than tensors .* was not executed"),
    "empty .metadata": (lambda f: (f / ".metadata").write_bytes(b""), r"\.metadata: is not metadata of .*; copy"),
    "truncated .metadata": (
        lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:-50]),
        r"\.metadata: is not metadata of .*\(pickle data was truncated\)",
    ),
    "another pickle": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps([1, 2])),
        r"\.metadata: is not metadata of",
    ),
    "no file of pieces": (
        lambda f: (f / "__0_0.distcp").unlink(),
        r"__0_0\.distcp: is missing, \.metadata names it; copy the whole",
    ),
    "truncated pieces": (cut, r"__0_0\.distcp: has \d+ bytes, .* would end at \d+; copy"),
    "zeros": (
        lambda f: (f / "__0_0.distcp").write_bytes(bytes((f / "__0_0.distcp").stat().st_size)),
        r"__0_0\.distcp: ",
    ),
    "huge tensor": (edited(lambda m: huge(m, False)), r"k_proj\.weight do not make up its shape \(2097152, 1048576\)"),
    "huge piece": (edited(lambda m: huge(m, True)), r"does not fit into its \d+ bytes"),
    "many tensors of the same bytes": (edited(shared), r"\.metadata: names \d+ bytes, its files have \d+"),
    "another shape": (
        edited(lambda m: setattr(m.state_dict_metadata[LAYER], "size", torch.Size([24, 12]))),
        r"k_proj.weight has shape \(24, 12\), and a piece of shape \(12, 24\) at \(0, 0\)",
    ),
    "another dtype": (
        edited(lambda m: setattr(m.state_dict_metadata[LAYER].properties, "dtype", torch.bfloat16)),
        r"k_proj\.weight is float32 of shape \(12, 24\), expected a bfloat16 tensor of shape \(12, 24\)",
    ),
    "overlapping pieces": (edited(overlapping), r"\.distcp: |overlap and leave gaps"),
    "a file above": (moved("../__0_0.distcp"), r"names a file outside its folder: '\.\./__0_0\.distcp'"),
    "an absolute file": (moved("{}/__0_0.distcp"), r"names a file outside its folder"),
    "the folder above": (moved(".."), r"names a file outside its folder"),
    "a transformed piece": (
        edited(lambda m: setattr(place(m, LAYER), "transform_descriptors", ["stream.zstd"])),
        r"k_proj.weight is compressed or otherwise transformed",
    ),
    "a weight gone": (
        edited(lambda m: m.state_dict_metadata.pop(LAYER)),
        r"ckpt: .*k_proj.weight is not in the file; restore the weights",
    ),
    "a moment gone": (
        edited(lambda m: m.state_dict_metadata.pop(f"optimizer.state.{LAYER.removeprefix('model.')}.exp_avg")),
        r"exp_avg",
    ),
    "no optimizer": (
        edited(lambda m: [m.state_dict_metadata.pop(n) for n in list(m.state_dict_metadata) if "optimizer" in n]),
        r"ckpt: holds only the model, and no optimizer; take an earlier step",
    ),
    "no model": (
        edited(lambda m: [m.state_dict_metadata.pop(n) for n in list(m.state_dict_metadata) if n[:6] == "model."]),
        r"ckpt: holds no weights under `model`",
    ),
}
UNSEEN = {"payload in a tensor", "another dtype", "overlapping pieces"}  # values of weights


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_damage_ends_in_one_line_soon(folder: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, message = DAMAGE[damage]
    change(folder)
    monkeypatch.chdir(folder)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as raised:
        load_checkpoint(folder)
    assert time.monotonic() - start < 10
    assert "\n" not in str(raised.value)
    assert main(["inspect", str(folder)]) == (damage not in UNSEEN)
    assert not (folder / "executed").exists()


def test_the_payload_is_one_that_torch_executes(folder: Path) -> None:
    DAMAGE["payload in .metadata"][0](folder)
    with pytest.raises(BaseException, match="metadata"):  # its CheckpointException is no Exception
        dcp.load({"model": {}}, checkpoint_id=folder, no_dist=True)
    assert (folder / "executed").exists()


def test_overlapping_pieces_leave_gaps(folder: Path) -> None:
    """With parts of the right shape in the file."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())  # noqa: S301 (made here)
    overlapping(metadata)
    stream = io.BytesIO()
    torch.save(torch.zeros(6, 24), stream)
    file = folder / "__0_0.distcp"
    for index, where in metadata.storage_data.items():
        if index.fqn == LAYER:
            where.offset, where.length = file.stat().st_size, stream.tell()
    file.write_bytes(file.read_bytes() + stream.getvalue() * 2)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"the pieces of .*k_proj\.weight overlap and leave gaps"):
        load_checkpoint(folder)
