"""What is fuzzed: each target is a strategy and a reader. A reader may raise `ProbeError` and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

from entropy_probe import ProbeConfig, load_checkpoint
from entropy_probe.demo import checkpoint_path
from entropy_probe.errors import ProbeError
from entropy_probe.model.checkpoint.files import read_tensors
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from entropy_probe.model.checkpoint.moments.adam import inventory, map_adam_state, read_state
from entropy_probe.model.checkpoint.moments.blocks import with_moments
from entropy_probe.model.checkpoint.moments.others import map_other, recognise
from entropy_probe.model.checkpoint.weights.tokenizer import load_tokenizer
from entropy_probe.model.forward import bind
from entropy_probe.stages.responses.prompt_files import read_prompts
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from fuzz.mutations import JSON_VALUES, TENSORS, VALUES, YAML_TEXTS, as_json, cut_up, trees


@dataclass(frozen=True)
class Target:
    """`share` of all inputs go to it."""

    inputs: st.SearchStrategy[Any]
    read: Callable[[Any], object]
    share: float


def refused(read: Callable[[], object]) -> str | None:
    """The message of a `ProbeError`, or `None` for success."""
    try:
        read()
    except ProbeError as error:
        message = str(error)
        assert "\n" not in message
        assert message.count(": ") >= 1
        assert "; " in message
        return message
    return None


def targets(place: Path) -> dict[str, Target]:
    """All of them; their files are in `place`."""
    shutil.copytree(checkpoint_path().parent / "base", place / "base")
    folder = Path(shutil.copytree(checkpoint_path(), place / "checkpoint-100"))
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {
        "optimizer": _optimizer(place),
        "checkpoint bytes": _files(folder, good, 0.05),
        "checkpoint JSON": _json(folder, place / "base", good, 0.05),
        "load": _load(folder, place / "base", good, 0.01),
        "tokenizer": _tokenizer(place, good["tokenizer.json"], 0.07),
        **_rollouts(place),
        **_configuration(place),
    }


def _optimizer(place: Path) -> Target:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2), torch.nn.Linear(3, 2))
    adamw = torch.optim.AdamW(model.parameters(), amsgrad=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    adamw.step()
    state_dict, path = adamw.state_dict(), place / "optimizer.pt"
    named = {**state_dict, "param_groups": [{**g, "param_names": list("abcdef")} for g in state_dict["param_groups"]]}
    by_name = {n: s for n, s in zip(dict(model.named_parameters()), state_dict["state"].values(), strict=True)}
    by_name = {"state": by_name, "param_groups": [{**state_dict["param_groups"][0], "params": list(by_name)}]}

    def read(tree: Any) -> None:
        direct = isinstance(tree, dict) and isinstance(tree.get("state"), dict)
        torch.save(tree, path)

        def mapped() -> None:
            content = read_state(path)
            map_adam_state(content, model, path)
            inventory(content)

        def recognised() -> None:
            content = with_moments(read_state(path))
            kind = recognise(content, path)
            _ = map_adam_state(content, model, path) if kind is None else map_other(kind, content, model, path)

        refused(mapped)
        refused(recognised)
        refused(lambda: map_adam_state(read_state(path), model, path, "identity"))
        assert direct or refused(lambda: read_state(path))

    codes = {"state1": torch.ones(2, 3, dtype=torch.uint8), "state2": torch.ones(2, 3, dtype=torch.uint8)}
    rest = {f"{part}{k}": torch.arange(n) / n for part, n in (("qmap", 256), ("absmax", 1)) for k in (1, 2)}
    packed = {0: {"step": 3, "__bnb_optimizer_quant_state__": codes | rest}}
    in_8_bits = {"state": state_dict["state"] | packed, "param_groups": state_dict["param_groups"]}
    starts = (state_dict, named, by_name, in_8_bits)
    return Target(st.one_of(trees(start, VALUES, TENSORS) for start in starts), read, 0.2)


def _with(folder: Path, name: str, content: bytes, good: bytes, read: Callable[[], object]) -> None:
    (folder / name).write_bytes(content)
    try:
        read()
    finally:
        (folder / name).write_bytes(good)


def _inspected(folder: Path) -> None:
    found = inspect_checkpoint(folder)
    assert all("\n" not in line and "; " in line for line in found.problems)
    found.text()


def _files(folder: Path, good: dict[str, bytes], share: float) -> Target:
    def read(given: tuple[str, bytes]) -> None:
        name, content = given

        def everything() -> None:
            if name.endswith("safetensors"):
                refused(lambda: read_tensors(folder / name))
            elif name == "optimizer.pt":
                refused(lambda: read_state(folder / name))
            _inspected(folder)

        _with(folder, name, content, good[name], everything)

    names = ("adapter_model.safetensors", "optimizer.pt", "adapter_config.json", "trainer_state.json")
    heads = {name: 3000 if name.endswith(("safetensors", "pt")) else len(good[name]) for name in names}
    return Target(
        st.sampled_from(names).flatmap(
            lambda name: cut_up(good[name][: heads[name]]).map(lambda head: (name, head + good[name][heads[name] :]))
        ),
        read,
        share,
    )


def _json(folder: Path, base: Path, good: dict[str, bytes], share: float) -> Target:
    places = {name: folder for name in ("adapter_config.json", "trainer_state.json", "tokenizer_config.json")}
    content = {
        **{n: json.loads(good[n]) for n in places},
        "config.json": json.loads((base / "config.json").read_bytes()),
    }
    places["config.json"] = base

    def read(given: tuple[str, Any]) -> None:
        name, tree = given
        _with(places[name], name, as_json(tree), as_json(content[name]), lambda: _inspected(folder))

    return Target(
        st.sampled_from(list(content)).flatmap(lambda n: trees(content[n], JSON_VALUES).map(lambda t: (n, t))),
        read,
        share,
    )


def _load(folder: Path, base: Path, good: dict[str, bytes], share: float) -> Target:
    of_adapter, of_base = json.loads(good["adapter_config.json"]), json.loads((base / "config.json").read_bytes())
    places = {"adapter_config.json": (folder, of_adapter), "config.json": (base, of_base)}

    def read(given: tuple[str, Any]) -> None:
        name, tree = given
        place, whole = places[name]
        _with(place, name, as_json(tree), as_json(whole), lambda: refused(lambda: load_checkpoint(folder)))

    return Target(
        st.sampled_from(list(places)).flatmap(lambda n: trees(places[n][1], JSON_VALUES).map(lambda t: (n, t))),
        read,
        share,
    )


def _tokenizer(place: Path, good: bytes, share: float) -> Target:
    folder = place / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    tree = json.loads(good)

    def read(content: bytes) -> None:
        (folder / "tokenizer.json").write_bytes(content)
        refused(lambda: load_tokenizer([folder], None))

    return Target(st.one_of(cut_up(good), trees(tree, JSON_VALUES).map(as_json)), read, share)


def _rollouts(place: Path) -> dict[str, Target]:
    loaded = load_checkpoint(checkpoint_path())
    bound, file = bind(loaded.model), place / "rollouts.jsonl"
    line = {"prompt_ids": [5, 6], "response_ids": [[7, 2], [8]], "rewards": [1.0, 0.0], "advantages": [1.0, -1.0]}
    line |= {"logprobs": [[-1.0, -2.0], [-0.5]]}
    text = {"prompt": "1+1=", "responses": ["2", "3"], "rewards": [1, 0], "truncated": [False, True], "gold": "2"}
    good = b"\n".join(map(as_json, [line, line]))

    def read(content: bytes) -> None:
        file.write_bytes(content)
        refused(lambda: read_rollouts(file, bound, loaded.tokenizer))
        refused(lambda: read_prompts(file))

    structured = st.one_of(
        trees([start, start], JSON_VALUES).map(lambda rows: b"\n".join(map(as_json, rows))) for start in (line, text)
    )
    return {
        "rollouts": Target(structured, read, 0.25),
        "rollouts bytes": Target(st.one_of(cut_up(good), st.binary(max_size=200)), read, 0.14),
    }


def _configuration(place: Path) -> dict[str, Target]:
    file = place / "probe.yaml"
    good = ProbeConfig().model_dump(mode="json")
    small = b"batch: {num_prompts: 4, seed: 1}\ngeneration:\n  stop: [a, b]\nlimits: {entropy: {min: 0.1}}\n"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        refused(lambda: ProbeConfig.load(file))

    def dumped(tree: Any) -> bytes:
        return yaml.safe_dump(tree).encode("utf-8", "surrogatepass")

    return {
        "configuration": Target(trees(good, [*JSON_VALUES, {1: 2}, {None: 1}, b"a"]).map(dumped), read, 0.08),
        "configuration bytes": Target(
            st.one_of(cut_up(small), YAML_TEXTS.map(lambda t: t.encode("utf-8", "surrogatepass"))), read, 0.12
        ),
    }
