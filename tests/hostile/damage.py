"""What is done to a good checkpoint: files cut, changed, replaced by pipes, pickles with payloads, modules planted."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from entropy_probe.demo import checkpoint_path

MARKER = "executed"
HUGE = 10**12


class Payload:
    """Unpickling this makes a folder: `os.mkdir` is called on the marker's path."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def write_good(place: Path, *, full: bool) -> Path:
    """A whole checkpoint below `place`, with its base."""
    base = Path(shutil.copytree(checkpoint_path().parent / "base", place / "base"))
    if not full:
        return Path(shutil.copytree(checkpoint_path(), place / "checkpoint-100"))
    folder = Path(shutil.copytree(base, place / "checkpoint-100"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    adamw.step()
    torch.save(adamw.state_dict(), folder / "optimizer.pt")
    return folder


def optimizer(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Change what optimizer.pt holds."""

    def do(folder: Path) -> None:
        content = torch.load(folder / "optimizer.pt", weights_only=True)
        changed = change(content)
        torch.save(changed if isinstance(changed, list | dict) else content, folder / "optimizer.pt")

    return do


def state(key: int = 0, /, **changes: Any) -> Callable[[Path], None]:
    """Change the entry of one tensor in optimizer.pt; `None` removes."""

    def change(content: Any) -> None:
        content["state"][key].update(changes)
        content["state"][key] = {k: v for k, v in content["state"][key].items() if v is not None}

    return optimizer(change)


def group(**changes: Any) -> Callable[[Path], None]:
    return optimizer(lambda content: content["param_groups"][0].update(changes))


def tensors(change: Callable[[dict[str, torch.Tensor]], None], of_base: bool = False) -> Callable[[Path], None]:
    """Change the tensors of the adapter, or of the full model, or of the base."""

    def do(folder: Path) -> None:
        path = next((folder.parent / "base" if of_base else folder).glob("*model.safetensors"))
        content = load_file(path)
        change(content)
        save_file(content, path, metadata={"format": "pt"})

    return do


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change keys of a JSON file; it is made where there is none."""

    def do(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **changes}))

    return do


def written(name: str, content: bytes | str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / name
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return do


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def pipe(name: str) -> Callable[[Path], None]:
    """A named pipe: opening it waits for a writer that never comes."""

    def do(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return do


def link(name: str, target: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return do


def folder_for_file(name: str) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return do


def payload(name: str, how: str = "torch") -> Callable[[Path], None]:
    """A pickle with a payload, as torch writes it (`torch`, `legacy`) or a bare one (`plain`)."""

    def do(folder: Path) -> None:
        content = {"state": {}, "param_groups": [], "more": Payload(folder / MARKER)}
        if how == "plain":
            (folder / name).write_bytes(pickle.dumps(content))
        else:
            torch.save(content, folder / name, _use_new_zipfile_serialization=how == "torch")

    return do


def dcp_metadata(folder: Path) -> None:
    """A folder of torch.distributed.checkpoint, whose `.metadata` is a bare pickle with a payload."""
    (folder / "optimizer.pt").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps({"optimizer": Payload(folder / MARKER)}))


def both(*steps: Callable[[Path], object]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        for step in steps:
            step(folder)

    return do


def lying_header(folder: Path) -> None:
    """A header that says it is 2^62 bytes long."""
    path = next(folder.glob("*model.safetensors"))
    path.write_bytes(struct.pack("<Q", 1 << 62) + path.read_bytes()[8:])


def lying_offsets(folder: Path) -> None:
    """A tensor of 10^12 values in 4 bytes."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [HUGE], "data_offsets": [0, 4]}}).encode()
    next(folder.glob("*model.safetensors")).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def deflated_optimizer(folder: Path) -> None:
    """The archive is packed: 256 MiB of zeros in a fraction of it."""
    path = folder / "optimizer.pt"
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in entries.items():
            packed.writestr(name, bytes(1 << 28) if name.endswith("data/0") else content)


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


def laughs(depth: int = 40) -> list[Any]:
    """A list that is small in a pickle, where the same list can stand twice, and 2^depth long written out."""
    content: list[Any] = ["ha"]
    for _ in range(depth):
        content = [content, content]
    return content


def differing_head(content: dict[str, torch.Tensor]) -> None:
    content["lm_head.weight"] = content["model.embed_tokens.weight"] + 1.0


def one_more(content: dict[str, torch.Tensor]) -> None:
    content["model.layers.0.self_attn.extra.weight"] = torch.ones(3)


def first_value(value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(content: dict[str, torch.Tensor]) -> None:
        next(iter(content.values())).view(-1)[0] = value

    return change


def without_first(content: dict[str, torch.Tensor]) -> None:
    del content[next(iter(content))]


def misshapen(content: dict[str, torch.Tensor]) -> None:
    name = next(name for name in content if "q_proj" in name and "weight" in name)
    content[name] = content[name][:-1].clone()


def zero_b(content: dict[str, torch.Tensor]) -> None:
    for name in content:
        if "lora_B" in name:
            content[name].zero_()


def shards(folder: Path, lost: bool) -> None:
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(whole)}
    for shard in set(names.values()):
        if not (lost and shard.startswith("model-00002")):
            part = {name: tensor for name, tensor in whole.items() if names[name] == shard}
            save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def as_bin(folder: Path, change: Callable[[Any], Any] = lambda content: content) -> None:
    """pytorch_model.bin in place of safetensors."""
    content = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(change(content), folder / "pytorch_model.bin")


def another_optimizer(folder: Path) -> None:
    module = torch.nn.Linear(3, 3)
    adamw = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    adamw.step()
    torch.save(adamw.state_dict(), folder / "optimizer.pt")


def another_base(folder: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(folder.parent / "base")
    config.intermediate_size = 48
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder.parent / "base")


def big_tokenizer(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    taken = len(content["model"]["vocab"])
    content["model"]["vocab"].update({f"<more{i}>": taken + 100 + i for i in range(500)})
    (folder / "tokenizer.json").write_text(json.dumps(content))


def planted_module(folder: Path) -> None:
    """A module that leaves the marker where it is imported, beside the checkpoint and in it."""
    code = f"import os\nos.mkdir({str(folder / MARKER)!r})\nclass Planted: pass\n"
    for place in (folder, folder.parent / "base", folder / "custom_generate"):
        place.mkdir(exist_ok=True)
        for name in ("planted.py", "generate.py", "__init__.py"):
            (place / name).write_text(code)
