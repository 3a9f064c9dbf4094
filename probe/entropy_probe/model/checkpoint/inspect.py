"""What a checkpoint's folder holds, found without building the model: `entropy-probe inspect`.

Sizes and dtypes come from what is stored of the weights without values, everything about the optimizer from its state.
What is seen only in the loaded model (values of a full model's weights, the mapping of moments to names) is not looked
at; of an adapter the values are.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from entropy_probe.base_model import find_base_model
from entropy_probe.errors import CheckpointError, printable
from entropy_probe.layout import TORCHTITAN, Layout, configured, file_sizes, find_layout
from entropy_probe.model.checkpoint import readers
from entropy_probe.model.checkpoint.files import dtypes_of, global_step, reason
from entropy_probe.model.checkpoint.inspection import FoundOptimizer, FoundWeights, Inspection, Shapes
from entropy_probe.model.checkpoint.moments import adam, others
from entropy_probe.model.checkpoint.moments.order import names_in_file
from entropy_probe.model.checkpoint.stored import Saved, Stored, Weights
from entropy_probe.model.checkpoint.weights import adapter, pretrained
from entropy_probe.model.checkpoint.weights.tokenizer import load_tokenizer
from entropy_probe.model.quiet import quiet_transformers
from entropy_probe.text import read_json

_NEVER_OPENED = ("training_args.bin", "rng_state*.pth", "random_states_*.pkl", "scheduler.pt", "extra_state_*.pt")
_MOST_PROBLEMS = 5


def inspect_checkpoint(path: str | Path, base_model: str | Path | None = None) -> Inspection:
    """Look at a checkpoint, or a run's newest one, as far as it can be read; nothing of it is executed or written."""
    found = _Notes()
    try:
        layout = find_layout(path)
    except CheckpointError as error:
        return Inspection(printable(path), problems=[str(error)])
    base = None if base_model is None else Path(base_model).expanduser()
    stored, weights, of_optimizer, step, tokenizer = None, None, None, None, None
    is_configured = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading notes of transformers
        with found.trying():
            layout, is_configured = configured(layout, base), True
        with found.trying():
            base = find_base_model(layout.weights, base) if layout.is_adapter else None
        if is_configured or layout.format != TORCHTITAN:  # whose names need the configuration
            with found.trying():
                stored = readers.read(layout)
        if stored is not None and is_configured:
            with found.trying():
                weights = _weights(layout, stored, base, found)
        if stored is not None:
            with found.trying():
                of_optimizer = _optimizer(layout, stored, weights, found)
        with found.trying():
            step = global_step(layout.folder) if stored is None else stored.global_step
        with found.trying():
            loaded = load_tokenizer(layout.weights, base)
            tokenizer = None if loaded is None else len(loaded)
    if of_optimizer is not None and step is not None and of_optimizer.step and of_optimizer.step[-1] != step:
        found.warnings.append(f"the optimizer's step is {of_optimizer.step[-1]:g}, the trainer's global step {step}")
    files = file_sizes(layout)
    skipped = [name for name in files if any(Path(name).match(pattern) for pattern in _NEVER_OPENED)]
    if skipped:
        found.warnings.append(f"never opened: {', '.join(skipped)}")
    return Inspection(
        path=printable(layout.folder),
        note=layout.note,
        format=layout.format,
        weights=weights,
        optimizer=of_optimizer,
        global_step=step,
        tokenizer=tokenizer,
        files=files,
        warnings=found.warnings,
        problems=found.problems,
    )


class _Notes:
    """Warnings and problems, in the order in which they are found."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.problems: list[str] = []

    @contextmanager
    def trying(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            self.problems.append(str(error))
        except OSError as error:
            self.problems.append(f"{error.filename}: cannot be read ({error.strerror}); make it readable")


def _weights(layout: Layout, stored: Stored, base: Path | None, found: _Notes) -> FoundWeights:
    if layout.is_adapter:
        return _adapter(layout.weights, base, stored.weights, found)
    pretrained.require_config(layout.weights)
    model_type, shapes = _stored_model(layout.weights, stored.weights, found)
    values, dtype = _values(shapes), dtypes_of(stored.weights.headers)
    if stored.lora is None:
        return FoundWeights("full model", model_type, None, values, dtype, shapes)
    found.warnings += adapter.without_effect(stored.lora, stored.weights)
    lora = {name: shape for name, shape in shapes.items() if ".lora_" in name}
    kind = "DoRA adapter" if any("lora_magnitude_vector" in name for name in lora) else "LoRA adapter"
    return FoundWeights(kind, model_type, None, values, dtype, lora)


def _adapter(folder: Path, base: Path | None, weights: Weights, found: _Notes) -> FoundWeights:
    kind, path = adapter.check_config(folder), folder / "adapter_config.json"
    names = adapter.names_of_adapter(weights)
    weights.tensors(names)  # raises for what is not finite
    found.warnings += adapter.without_effect(path, weights)
    model_type, of_base = "unknown", None
    if base is not None:
        with found.trying():
            model_type, of_base = _stored_model(base, Saved(base, "model"), found)
    # peft also keeps the base model's own embeddings, where the adapter is on them
    config = read_json(path)
    only_lora = not config.get("modules_to_save") and config.get("bias", "none") == "none"
    trained = {
        name: weights.headers[name].shape
        for name in names
        if not only_lora or "lora_" in name or "trainable_tokens" in name
    }
    return FoundWeights(
        kind=f"{kind} adapter",
        model_type=model_type,
        base_model=None if base is None else printable(base),
        num_parameters=None if of_base is None else _values(of_base) + _values(trained),
        dtype=dtypes_of(weights.headers),
        shapes=trained,
    )


def _stored_model(folder: Path, weights: Weights, found: _Notes) -> tuple[str, Shapes]:
    """The model's type, and the shapes of its parameters in the files. A tied head is not among them."""
    model_type, headers = pretrained.check_config(folder), weights.headers
    pretrained.check_layers(folder, len(headers))
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged configuration makes transformers raise
        raise CheckpointError(
            folder, f"transformers cannot load it ({reason(error)})", "restore config.json"
        ) from error
    tied = bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    if tied:
        found.warnings.append("tied head: lm_head is the embedding, and has no moments of its own")
    floats = {name: header.shape for name, header in headers.items() if "float" in header.dtype}
    return model_type, {name: shape for name, shape in floats.items() if not (tied and "lm_head" in name)}


def _optimizer(layout: Layout, stored: Stored, weights: FoundWeights | None, found: _Notes) -> FoundOptimizer:
    state_dict, path = stored.optimizer(), layout.optimizer
    kind = others.recognise(state_dict, path)
    if kind is not None:
        return _other_optimizer(kind, state_dict, path, found)
    state, groups = state_dict["state"], state_dict["param_groups"]
    keys = adam.adam_keys(state_dict, path)
    states: list[adam.AdamState] = []
    broken: list[str] = []
    for group, of_group in zip(groups, keys, strict=True):
        for key in of_group:
            entry = state.get(key)
            if entry in (None, {}):
                continue
            shape = getattr(entry.get("exp_avg"), "shape", torch.Size()) if isinstance(entry, dict) else torch.Size()
            try:
                states.append(adam.adam_state(f"tensor {key}", entry, group, shape, path))
            except CheckpointError as error:
                broken.append(str(error))
    found.problems += broken[:_MOST_PROBLEMS]
    if len(broken) > _MOST_PROBLEMS:
        found.problems.append(f"{path}: {len(broken) - _MOST_PROBLEMS} more tensors cannot be used; see those above")
    if not states:
        raise CheckpointError(path, "has moments of no tensor", "use a checkpoint of Adam or AdamW")
    total = sum(len(of_group) for of_group in keys)
    parts = sum(map(bool, keys))
    if parts > 2 and names_in_file(keys, groups) is None:
        found.warnings.append(f"{parts} groups without names: their order is decided when the model is loaded")
    with found.trying():
        _compare(states, total - len(broken), weights, path, found)
    steps = [state.step for state in states]
    return FoundOptimizer(
        file=path.name,
        type=states[0].kind,
        groups=len(groups),
        step=sorted({min(steps), max(steps)}),
        lr=sorted({state.lr for state in states}, reverse=True),
        betas=sorted({state.betas for state in states}),
        covered=len(states),
        total=total,
        num_trainable=sum(state.exp_avg.numel() for state in states),
    )


def _other_optimizer(kind: others.Kind, state_dict: dict[str, Any], path: Path, found: _Notes) -> FoundOptimizer:
    of = others.described(kind, state_dict, path)
    found.warnings.append(f"{of.reason}; criteria that need one are not applicable")
    return FoundOptimizer(
        file=path.name,
        type=of.kind,
        groups=len(state_dict["param_groups"]),
        step=[] if of.step is None else [of.step],
        lr=[] if of.lr is None else [of.lr],
        betas=[],
        covered=0,
        total=sum(len(keys) for keys in others.keys_of(kind, state_dict, path)),
        num_trainable=None,
    )


def _compare(states: list[adam.AdamState], total: int, weights: FoundWeights | None, path: Path, found: _Notes) -> None:
    """The moments beside the weights' headers: as many tensors as are trained, and of the same shapes.

    Experts that a file keeps apart and the model together have other shapes and as many values.
    """
    if len({state.step for state in states}) > 1:
        found.warnings.append(f"steps differ: {min(s.step for s in states):g} to {max(s.step for s in states):g}")
    if weights is None:
        return
    missing = min(total, len(weights.shapes)) - len(states)
    if "adapter" in weights.kind and missing > 0:
        raise CheckpointError(path, f"{missing} tensors have no moments", "save it after a step of every parameter")
    if total > len(states):
        found.warnings.append(f"{total - len(states)} frozen tensors stand in the optimizer, without moments")
    moments = Counter(tuple(state.exp_avg.shape) for state in states)
    rest = moments - Counter(weights.shapes.values())
    if rest and sum(math.prod(shape) * n for shape, n in moments.items()) != _values(weights.shapes):
        raise CheckpointError(
            path,
            f"{rest.total()} of its {len(states)} tensors have shapes that the weights lack: {next(iter(rest))}",
            "use the optimizer saved with this model",
        )
    if len(states) < len(weights.shapes):
        found.warnings.append(f"moments of {len(states)} tensors, the weights have {len(weights.shapes)}")


def _values(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
