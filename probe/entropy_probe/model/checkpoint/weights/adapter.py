"""A PEFT adapter (LoRA and others on linear layers, `modules_to_save`) over its base model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropy_probe.base_model import HOW_TO_NAME_A_BASE
from entropy_probe.errors import CheckpointError, reason, shown
from entropy_probe.model.checkpoint.stored import Gathered, Saved, Stored, Weights, require_rounded
from entropy_probe.model.checkpoint.weights.pretrained import load_full_model, of_headers
from entropy_probe.text import read_json

_PARTS = ("lora_", ".modules_to_save.", "trainable_tokens")
_PEFT = "base_model.model."
_SAVED_TOGETHER = "use files that were saved together"
_SECONDS = 4
# As peft matches: target_modules in full, the keys of rank_pattern after a point, layers_pattern between two.
_MATCH = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for form in ("{}", r"(.*\.)?({})$", r".*\.{}\.(\d+)\."):
        try:
            form = re.compile(form.replace("{}", pattern))
        except Exception:
            continue
        for name in names:
            form.fullmatch(name), form.match(name)
"""


KINDS = {
    "LORA": "LoRA",
    "VERA": "VeRA",
    "IA3": "IA3",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "OFT": "OFT",
    "HRA": "HRA",
}
"""peft_type → name: adapters whose forward is a smooth function of `named_parameters()`, and whose training adds no
term of its own to the update (as AdaLoRA's does). docs/formats.md"""
_MARKS = {
    "LORA": "lora_|trainable_tokens|modules_to_save|embed|head|wte",
    "VERA": "vera_",
    "IA3": "ia3_",
    "LOHA": "hada_",
    "LOKR": "lokr_",
    "OFT": "oft_",
    "HRA": "hra_",
}
_RANKED = ("LORA", "VERA", "LOHA", "HRA")
"""Kinds whose `r` is a side of their tensors; LoKr takes a whole matrix where it is larger, OFT's are blocks."""
_INITIALISED = ("gaussian", "eva", "orthogonal", "pissa", "olora")
"""`init_lora_weights` that leave the base as it is, or change it by what its own weights alone decide."""


def check_config(folder: Path) -> str:
    """`LoRA`, `DoRA` or another of `KINDS`; others raise, and what makes peft import a module, or go on for hours."""
    config_path = folder / "adapter_config.json"
    config = read_json(config_path)
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(
            config_path,
            f"peft_type is {shown(kind)}, which is not measured",
            f"use {', '.join(('DoRA', *KINDS.values()))}",
        )
    for key in ("megatron_config", "layer_replication"):
        if config.get(key):
            raise CheckpointError(
                config_path, f"asks for `{key}`, which is never loaded", "use an adapter without it"
            )
    of_loftq = config.get("loftq_config")
    iterations = re.search(r"_niter_(\d+)", str(config.get("init_lora_weights"))[:1000])
    rounds = of_loftq.get("loftq_iter", 1) if isinstance(of_loftq, dict) else 1
    if (iterations and len(iterations[1]) > 3) or not isinstance(rounds, int) or rounds > 999:
        raise CheckpointError(
            config_path,
            "init_lora_weights or loftq_config ask for 1000 iterations or more",
            "set fewer",
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _INITIALISED:
        raise CheckpointError(
            config_path,
            f"init_lora_weights is {shown(start)}: it changed the base model, and no file says how",
            "save the adapter with path_initial_model_for_weight_conversion, as LoRA",
        )
    return "DoRA" if config.get("use_dora") else KINDS[kind]


def require_marks(folder: Path, names: Iterable[str], where: Path) -> None:
    """Raises where no tensor of the file is one of the kind that adapter_config.json names."""
    path = folder / "adapter_config.json"
    kind = read_json(path)["peft_type"]
    if not any(re.search(_MARKS[kind], name) for name in names):
        problem = f"peft_type is {kind!r}, and {where.name} holds no tensor of such an adapter"
        raise CheckpointError(path, problem, _SAVED_TOGETHER)


def load_adapter(
    folder: Path, base: Path, stored: Stored, *, name: str = "default", values: bool = True
) -> nn.Module:
    """The base model with its adapter, never merged; adapter and `modules_to_save` trainable, in eval mode.

    peft loads the adapter's own file where there is one, and its values are compared with the
    file's. Weights out of pieces are by the names of that file or of the model, whose other
    tensors may be among them. `name`: of the adapter, in the names of its parameters. Without
    `values` the same of the headers alone, on the meta device: what it raises, loading raises too.
    """
    import peft

    check_config(folder)
    given = stored.rounded or stored.weights
    where, tensors = given.source, given.tensors() if values else of_headers(given)
    require_marks(folder, tensors, where)
    base_model: Any = load_full_model(base, Saved(base, "model"), values=values)
    _require_small(folder / "adapter_config.json", tensors, base_model)
    _resize(base_model, tensors, folder / "adapter_config.json", where)
    try:
        config: Any = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        if not values and hasattr(config, "init_lora_weights"):
            config.init_lora_weights = False
        with nullcontext() if values else torch.device("meta"):
            if isinstance(given, Saved):
                options: dict[str, Any] = {"adapter_name": name, "config": config}
                model: Any = peft.PeftModel.from_pretrained(
                    base_model, folder, is_trainable=True, local_files_only=True, **options
                )
            else:
                model = peft.get_peft_model(base_model, config)
    except Exception as error:  # whatever a damaged configuration makes peft raise
        problem = f"does not fit the base model {base} ({_misfit(error)})"
        raise CheckpointError(where, problem, HOW_TO_NAME_A_BASE) from error
    # modules_to_save stay in the dtype of the base's file otherwise
    model.to(max((p.dtype for p in base_model.parameters()), key=lambda dtype: dtype.itemsize))
    put = _require_same if isinstance(given, Saved) else _fill
    whole = model.state_dict()
    own = f".modules_to_save.{name}."  # peft leaves the adapter's name out where it saves whole embeddings
    whole |= {key.replace(own, ".modules_to_save."): tensor for key, tensor in whole.items()}
    put(tensors, _state_of(model), whole, where)
    if stored.rounded is not None and values:
        _take(stored.weights.tensors(), model, where)
        require_rounded(tensors, _state_of(model), where)
    return model.eval()


def _state_of(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors by the names of its file."""
    import peft

    name = model.active_adapter
    return peft.get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)


def _misfit(error: Exception) -> str:
    """Both shapes of the first tensor that does not fit; or what the error says."""
    form = r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\) from checkpoint, .*?Size\(\[(.*?)\]\)"
    found = re.search(form, str(error))
    if found is None:
        return reason(error)
    return f"{found[1]} has shape ({found[2]}) in the file and ({found[3]}) in the model"


def _resize(model: Any, tensors: Mapping[str, torch.Tensor], settings: Path, where: Path) -> None:
    """Give a base the vocabulary that its adapter was trained with, where the adapter's file holds all of its rows.

    Raises where it does not: the rows that were added are in no file then.
    """
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    untied = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    size = embedding.weight.shape[0]
    sizes = {n for module in untied for n in _tokens(tensors, names[id(module)])} - {size}
    if not sizes:
        return
    wanted, copied = max(sizes), read_json(settings).get("modules_to_save") or ()
    if any(_rows(tensors, names[id(module)], copied) != wanted for module in untied):
        raise CheckpointError(
            where,
            f"was trained with {wanted} tokens, the base model has {size}, and the rows are not in the file",
            f"give a copy of the base after resize_token_embeddings({wanted}) as --probe-base-model",
        )
    with torch.random.fork_rng(devices=[]):  # what is drawn for the new rows is written over
        model.resize_token_embeddings(wanted, mean_resizing=False)


_OF_BASE = ("", "base_layer.", "token_adapter.base_layer.")
"""Where peft puts a module of the base that it wraps."""


def _tokens(tensors: Mapping[str, torch.Tensor], module: str) -> Iterator[int]:
    """The vocabularies that the file's tensors of a module speak of."""
    first = [*_OF_BASE, "modules_to_save.", "original_module.", "lora_B."]
    sides = {f"{form}weight": 0 for form in first} | {"lora_embedding_A": 1}
    for form, side in sides.items():
        if (tensor := tensors.get(f"{_PEFT}{module}.{form}")) is not None:
            yield tensor.shape[side]


def _rows(tensors: Mapping[str, torch.Tensor], module: str, copied: Collection[str]) -> int | None:
    """How many rows the file has of a base model's module; of one that was copied for training, of the original."""
    of_copy = module.rpartition(".")[2] in copied
    forms = ("original_module.",) if of_copy else _OF_BASE
    found = (tensors.get(f"{_PEFT}{module}.{form}weight") for form in forms)
    return next((tensor.shape[0] for tensor in found if tensor is not None), None)


def wrap(
    folder: Path, stored: Stored, settings: Path, base: Path | None, *, values: bool = True
) -> nn.Module:
    """A model of `folder`'s config.json and its adapter, both stored by their names in peft's model.

    Rank and targets are read from the tensors, the scaling from the JSON file `settings`. Where
    the adapter's tensors alone are stored, the rest is the `base` model's. Everything but the
    adapter is frozen, and the model in eval mode. `values` as in `load_adapter`.
    """
    weights = stored.weights.tensors() if values else of_headers(stored.weights)
    source = stored.weights.source
    stated = read_json(settings)
    alpha, lora = (
        stated.get("lora_alpha"),
        {name: t for name, t in weights.items() if ".lora_" in name},
    )
    if not isinstance(alpha, int) or isinstance(alpha, bool):
        raise CheckpointError(settings, f"`lora_alpha` is {alpha!r}", "restore the file")
    rest = {
        n.removeprefix(_PEFT).replace(".base_layer.", "."): t
        for n, t in weights.items()
        if n not in lora
    }
    if not rest and base is None:
        raise CheckpointError(source, "holds only the adapter", HOW_TO_NAME_A_BASE)
    if rest:
        gathered = Gathered.of(rest, source, stored.weights.files)
        model: Any = load_full_model(folder, gathered, values=values)
    else:
        place = base or folder
        model = load_full_model(place, Saved(place, "model"), values=values)
    with nullcontext() if values else torch.device("meta"):
        model = _with_new_adapter(model, lora, alpha, stated, source)
    missing = {name for name in model.state_dict() if ".lora_" in name} ^ lora.keys()
    if missing:
        raise CheckpointError(
            source, f"{min(missing)} is only in the file, or only in the model", _SAVED_TOGETHER
        )
    _take(weights, model, source)
    return model.eval()


def _with_new_adapter(
    model: Any, lora: dict[str, torch.Tensor], alpha: int, stated: dict[str, Any], source: Path
) -> Any:
    """The model with an adapter of the ranks and on the modules that the tensors tell, before it has their values."""
    import peft

    of_a = {
        n.removeprefix(_PEFT).split(".lora_A.")[0]: t for n, t in lora.items() if ".lora_A." in n
    }
    ranks = {name: tensor.shape[0] for name, tensor in of_a.items()}
    chosen: dict[str, Any] = {key: bool(stated.get(key)) for key in ("use_rslora", "use_dora")}
    try:
        config = peft.LoraConfig(
            r=max(ranks.values()), lora_alpha=alpha, target_modules=list(ranks), rank_pattern=dict(ranks),
            task_type="CAUSAL_LM", **chosen,
        )  # fmt: skip
        return peft.get_peft_model(model, config)
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        problem = f"peft cannot make its adapter ({reason(error)})"
        raise CheckpointError(source, problem, "install the peft that wrote it") from error


def kind_of(model: nn.Module) -> str:
    return (
        "DoRA"
        if any("lora_magnitude_vector" in name for name, _ in model.named_parameters())
        else "LoRA"
    )


def _take(weights: dict[str, torch.Tensor], model: nn.Module, path: Path) -> None:
    try:
        unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:
        problem = f"differs from the optimizer's weights ({reason(error)})"
        raise CheckpointError(path, problem, _SAVED_TOGETHER) from error
    if unexpected:
        raise CheckpointError(
            path, f"the optimizer's {unexpected[0]} has no place in the model", _SAVED_TOGETHER
        )


def _fill(
    stored: dict[str, torch.Tensor],
    adapter: dict[str, torch.Tensor],
    model: dict[str, torch.Tensor],
    where: Path,
) -> None:
    """Write each stored tensor into the model's tensor of that name; all of the adapter's must be among them."""
    filled: set[int] = set()
    for name, tensor in stored.items():
        place = adapter.get(name, model.get(name))
        if place is None or place.shape != tensor.shape:
            problem = f"of shape {tuple(tensor.shape)} has no place in the model"
            raise CheckpointError(
                where, f"{name} {problem}", "name the base model it was trained on"
            )
        place.copy_(tensor)
        filled.add(place.data_ptr())
    for name, place in adapter.items():
        if place.data_ptr() not in filled:
            raise CheckpointError(
                where, f"{name} is not in it", "restore the adapter_config.json that belongs to it"
            )


def is_trained(name: str) -> bool:
    """Whether a tensor of an adapter's file is one of the adapter's own, and trained; VeRA's projections are not."""
    return (
        re.search(r"lora_|trainable_tokens|vera_lambda|ia3_|hada_|lokr_|oft_|hra_", name)
        is not None
    )


def names_of_adapter(weights: Weights) -> list[str]:
    """All that its own file holds; of gathered weights, where the rest of the model may be too, what peft names so."""
    if isinstance(weights, Saved):
        return list(weights.headers)
    return [name for name in weights.headers if any(part in name for part in _PARTS)]


def without_effect(settings: Path, weights: Weights) -> list[str]:
    """Why the adapter changes nothing of its base model, if it does not: a line for each reason."""
    reasons = []
    if read_json(settings).get("lora_alpha") == 0:
        reasons.append("lora_alpha is 0: the adapter does nothing")
    of_b = [name for name in weights.headers if "lora_B" in name or "lora_embedding_B" in name]
    if of_b and not any(bool(tensor.any()) for tensor in weights.tensors(of_b).values()):
        reasons.append("every lora_B is zero: the adapter does nothing")
    return reasons


def _require_small(path: Path, stored: dict[str, torch.Tensor], base: nn.Module) -> None:
    """Raises for ranks beyond the file's tensors, which peft would allocate, and for patterns that match for hours."""
    config = read_json(path)
    largest = max((max(tensor.shape, default=1) for tensor in stored.values()), default=1)
    patterns = config.get("rank_pattern") or {}
    ranks = [*(patterns.values() if isinstance(patterns, dict) else [patterns])]
    if config["peft_type"] in _RANKED:
        ranks.append(config.get("r", 8))
    for rank in ranks:
        if not isinstance(rank, int) or not 0 < rank <= largest:
            raise CheckpointError(
                path,
                f"has a rank of {shown(rank)}, the largest side in the file is {largest}",
                "restore the file",
            )
    names = [name for name, _ in base.named_modules()]
    for key in (
        "target_modules",
        "feedforward_modules",
        "exclude_modules",
        "layers_pattern",
        "rank_pattern",
        "alpha_pattern",
    ):
        value = config.get(key) or []
        given = value if isinstance(value, list | dict) else [value]
        # peft takes names in a list as they are, and everything else for regular expressions
        plain = r"[\w.-]*" if isinstance(value, str) or "pattern" in key else r"[\s\S]*"
        doubtful = [
            text for text in given if isinstance(text, str) and not re.fullmatch(plain, text)
        ]
        if doubtful and not _ends(doubtful, names):
            raise CheckpointError(
                path,
                f"`{key}` takes more than {_SECONDS} s to match",
                "name the modules that it stands for",
            )


def _ends(patterns: list[str], names: list[str]) -> bool:
    """Whether matching ends in a few seconds; tried in another process, since nothing can interrupt it in this one."""
    try:
        subprocess.run(  # noqa: S603 (this Python, and data on its standard input)
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([patterns, names]).encode(),
            timeout=_SECONDS,
            capture_output=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return True


def _require_same(
    stored: dict[str, torch.Tensor],
    adapter: dict[str, torch.Tensor],
    model: dict[str, torch.Tensor],
    path: Path,
) -> None:
    """peft only warns about keys it misses: every adapter tensor must be in the file, and hold the file's values.

    A file may also hold embeddings of the base model (peft saves them where the adapter targets
    them).
    """
    for name in adapter:
        if name not in stored:
            raise CheckpointError(
                path,
                f"{name} is not in the file",
                f"{HOW_TO_NAME_A_BASE}, or save the adapter again with this peft version",
            )
    for name, tensor in stored.items():
        loaded = adapter.get(name, model.get(name))
        if loaded is None:
            raise CheckpointError(
                path, f"{name} has no place in the model", "name the base model it was trained on"
            )
        if loaded.shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in the file and {tuple(loaded.shape)} in the model"
            raise CheckpointError(path, f"{name} has shape {shapes}", HOW_TO_NAME_A_BASE)
        if loaded.is_meta:
            continue
        if not torch.equal(loaded.detach().cpu(), tensor.to(loaded.dtype)):
            raise CheckpointError(
                path, f"{name} was not loaded from the file", "install the peft that wrote it"
            )
