"""A PEFT adapter (LoRA, DoRA, `modules_to_save`) over its base model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entropy_probe.base_model import HOW_TO_NAME_A_BASE
from entropy_probe.errors import CheckpointError, shown
from entropy_probe.model.checkpoint.files import reason
from entropy_probe.model.checkpoint.stored import Gathered, Saved, Stored, Weights, require_rounded
from entropy_probe.model.checkpoint.weights.pretrained import load_full_model
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


def check_config(folder: Path) -> str:
    """`LoRA` or `DoRA`; any other kind raises, and what makes peft import a module, or go on for hours."""
    config_path = folder / "adapter_config.json"
    config = read_json(config_path)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            config_path, f"peft_type is {shown(config.get('peft_type'))}", "use a LoRA or DoRA adapter"
        )
    for key in ("megatron_config", "layer_replication"):
        if config.get(key):
            raise CheckpointError(config_path, f"asks for `{key}`, which is never loaded", "use an adapter without it")
    of_loftq = config.get("loftq_config")
    iterations = re.search(r"_niter_(\d+)", str(config.get("init_lora_weights"))[:1000])
    rounds = of_loftq.get("loftq_iter", 1) if isinstance(of_loftq, dict) else 1
    if (iterations and len(iterations[1]) > 3) or not isinstance(rounds, int) or rounds > 999:
        raise CheckpointError(
            config_path, "init_lora_weights or loftq_config ask for 1000 iterations or more", "set fewer"
        )
    return "DoRA" if config.get("use_dora") else "LoRA"


def load_adapter(folder: Path, base: Path, stored: Stored) -> nn.Module:
    """The base model with its adapter, never merged; adapter and `modules_to_save` trainable, in eval mode.

    peft loads the adapter's own file where there is one, and its values are compared with the
    file's. Weights out of pieces are by the names of that file or of the model, whose other
    tensors may be among them.
    """
    import peft

    check_config(folder)
    given = stored.rounded or stored.weights
    where, tensors = given.source, given.tensors()
    base_model: Any = load_full_model(base, Saved(base, "model"))
    _require_small(folder / "adapter_config.json", tensors, base_model)
    try:
        if isinstance(given, Saved):
            model: Any = peft.PeftModel.from_pretrained(base_model, folder, is_trainable=True, local_files_only=True)
        else:
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.inference_mode = False
            model = peft.get_peft_model(base_model, config)
    except Exception as error:  # whatever a damaged configuration makes peft raise
        raise CheckpointError(
            where, f"does not fit the base model {base} ({reason(error)})", HOW_TO_NAME_A_BASE
        ) from error
    # modules_to_save stay in the dtype of the base's file otherwise
    model.to(max((p.dtype for p in base_model.parameters()), key=lambda dtype: dtype.itemsize))
    adapter = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    put = _require_same if isinstance(given, Saved) else _fill
    put(tensors, adapter, model.state_dict(), where)
    if stored.rounded is not None:
        _take(stored.weights.tensors(), model, where)
        require_rounded(tensors, peft.get_peft_model_state_dict(model, save_embedding_layers=False), where)
    return model.eval()


def wrap(folder: Path, stored: Stored, settings: Path, base: Path | None) -> nn.Module:
    """A model of `folder`'s config.json and its adapter, both stored by their names in peft's model.

    Rank and targets are read from the tensors, the scaling from the JSON file `settings`. Where
    the adapter's tensors alone are stored, the rest is the `base` model's. Everything but the
    adapter is frozen, and the model in eval mode.
    """
    weights, source = stored.weights.tensors(), stored.weights.source
    stated = read_json(settings)
    alpha, lora = stated.get("lora_alpha"), {name: t for name, t in weights.items() if ".lora_" in name}
    if not isinstance(alpha, int) or isinstance(alpha, bool):
        raise CheckpointError(settings, f"`lora_alpha` is {alpha!r}", "restore the file")
    rest = {n.removeprefix(_PEFT).replace(".base_layer.", "."): t for n, t in weights.items() if n not in lora}
    if not rest and base is None:
        raise CheckpointError(source, "holds the adapter alone", HOW_TO_NAME_A_BASE)
    if rest:
        model: Any = load_full_model(folder, Gathered.of(rest, source, stored.weights.files))
    else:
        place = base or folder
        model = load_full_model(place, Saved(place, "model"))
    model = _with_new_adapter(model, lora, alpha, stated, source)
    missing = {name for name in model.state_dict() if ".lora_" in name} ^ lora.keys()
    if missing:
        raise CheckpointError(source, f"{min(missing)} is in the file or in the model alone", _SAVED_TOGETHER)
    _take(weights, model, source)
    return model.eval()


def _with_new_adapter(
    model: Any, lora: dict[str, torch.Tensor], alpha: int, stated: dict[str, Any], source: Path
) -> Any:
    """The model with an adapter of the ranks and on the modules that the tensors tell, before it has their values."""
    import peft

    of_a = {n.removeprefix(_PEFT).split(".lora_A.")[0]: t for n, t in lora.items() if ".lora_A." in n}
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
    return "DoRA" if any("lora_magnitude_vector" in name for name, _ in model.named_parameters()) else "LoRA"


def _take(weights: dict[str, torch.Tensor], model: nn.Module, path: Path) -> None:
    try:
        unexpected = model.load_state_dict(weights, strict=False).unexpected_keys
    except RuntimeError as error:
        problem = f"differs from the optimizer's weights ({reason(error)})"
        raise CheckpointError(path, problem, _SAVED_TOGETHER) from error
    if unexpected:
        raise CheckpointError(path, f"the optimizer's {unexpected[0]} has no place in the model", _SAVED_TOGETHER)


def _fill(
    stored: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], model: dict[str, torch.Tensor], where: Path
) -> None:
    """Write each stored tensor into the model's tensor of that name; all of the adapter's must be among them."""
    filled: set[int] = set()
    for name, tensor in stored.items():
        place = adapter.get(name, model.get(name))
        if place is None or place.shape != tensor.shape:
            problem = f"of shape {tuple(tensor.shape)} has no place in the model"
            raise CheckpointError(where, f"{name} {problem}", "name the base model it was trained on")
        place.copy_(tensor)
        filled.add(place.data_ptr())
    for name, place in adapter.items():
        if place.data_ptr() not in filled:
            raise CheckpointError(where, f"{name} is not in it", "restore the adapter_config.json that belongs to it")


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
    ranks = [config.get("r", 8), *(patterns.values() if isinstance(patterns, dict) else [patterns])]
    for rank in ranks:
        if not isinstance(rank, int) or not 0 < rank <= largest:
            raise CheckpointError(
                path, f"has a rank of {shown(rank)}, the largest side in the file is {largest}", "restore the file"
            )
    names = [name for name, _ in base.named_modules()]
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = config.get(key) or []
        given = value if isinstance(value, list | dict) else [value]
        # peft takes names in a list as they are, and everything else for regular expressions
        plain = r"[\w.-]*" if isinstance(value, str) or "pattern" in key else r"[\s\S]*"
        doubtful = [text for text in given if isinstance(text, str) and not re.fullmatch(plain, text)]
        if doubtful and not _ends(doubtful, names):
            raise CheckpointError(
                path, f"`{key}` takes more than {_SECONDS} s to match", "name the modules that it stands for"
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
    stored: dict[str, torch.Tensor], adapter: dict[str, torch.Tensor], model: dict[str, torch.Tensor], path: Path
) -> None:
    """peft only warns about keys it misses: every adapter tensor must be in the file, and hold the file's values.

    A file may also hold embeddings of the base model (peft saves them where the adapter targets
    them).
    """
    for name in adapter:
        if name not in stored:
            raise CheckpointError(path, f"{name} is not in the file", "save the adapter again with this peft version")
    for name, tensor in stored.items():
        loaded = adapter.get(name, model.get(name))
        if loaded is None:
            raise CheckpointError(path, f"{name} has no place in the model", "name the base model it was trained on")
        if not torch.equal(loaded.detach().cpu(), tensor.to(loaded.dtype)):
            raise CheckpointError(path, f"{name} was not loaded from the file", "install the peft that wrote it")
