"""What a checkpoint's folder holds, found without building the model: `entropy-probe inspect`.

Sizes and dtypes come from the headers of the weights' files, everything about the optimizer from its own file. What is
seen only in the loaded model (values of a full model's weights, the mapping of moments to names) is not looked at.
"""

from __future__ import annotations

import math
import os
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from entropy_probe.base_model import find_base_model
from entropy_probe.errors import CheckpointError, printable
from entropy_probe.layout import TORCHTITAN, Layout, configured, find_layout
from entropy_probe.model.checkpoint.files import (
    global_step,
    read_tensors,
    reason,
    stored_dtype,
    stored_shapes,
    weight_files,
)
from entropy_probe.model.checkpoint.moments import adam as optimizer
from entropy_probe.model.checkpoint.moments import others as other_optimizers
from entropy_probe.model.checkpoint.moments.order import names_in_file
from entropy_probe.model.checkpoint.sharded import HEADERS, READERS, Sharded
from entropy_probe.model.checkpoint.weights import adapter, pretrained
from entropy_probe.model.checkpoint.weights.tokenizer import load_tokenizer
from entropy_probe.model.quiet import quiet_transformers
from entropy_probe.text import read_json

_NEVER_OPENED = ("training_args.bin", "rng_state*.pth", "random_states_*.pkl", "scheduler.pt", "extra_state_*.pt")
_MOST_PROBLEMS = 5
_WIDTH = 80
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class FoundWeights:
    """`num_parameters`: those of the base model too, a tied head counted once. `shapes`: of the trained tensors."""

    kind: str
    model_type: str
    base_model: str | None
    num_parameters: int | None
    dtype: str
    shapes: Shapes


@dataclass(frozen=True)
class FoundOptimizer:
    """`covered` of the `total` tensors in the `groups` have moments, of `num_trainable` values together.

    Of an optimizer that is not Adam none has, and their values are not counted.
    """

    file: str
    type: str
    groups: int
    step: list[float]
    lr: list[float]
    betas: list[tuple[float, float]]
    covered: int
    total: int
    num_trainable: int | None


@dataclass(frozen=True)
class Inspection:
    """What was found; `None` where it could not be. `files` maps names to bytes; each problem keeps it from loading."""

    path: str
    note: str = ""
    format: str | None = None
    weights: FoundWeights | None = None
    optimizer: FoundOptimizer | None = None
    global_step: int | None = None
    tokenizer: int | None = None
    files: dict[str, int | None] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The same for the eye: 80 columns, but one line for each problem."""
        rows = [("checkpoint", self.path), ("", self.note), ("format", self.format or "unknown")]
        if self.weights is not None:
            rows += [
                ("kind", f"{self.weights.kind}, {self.weights.model_type}, {self.weights.dtype}"),
                ("base model", self.weights.base_model or ""),
                ("parameters", "" if self.weights.num_parameters is None else f"{self.weights.num_parameters:,}"),
            ]
        if self.optimizer is not None:
            found = self.optimizer
            rows += [
                ("trainable", "" if found.num_trainable is None else f"{found.num_trainable:,}"),
                ("optimizer", f"{found.type} in {found.file}, {found.groups} group{'s' * (found.groups != 1)}"),
                ("moments", f"of {found.covered} of its {found.total} tensors"),
                ("step", " to ".join(f"{step:g}" for step in found.step)),
                ("lr", ", ".join(f"{lr:g}" for lr in found.lr)),
                ("betas", ", ".join(f"{beta1:g} {beta2:g}" for beta1, beta2 in found.betas)),
            ]
        rows += [
            ("global step", "" if self.global_step is None else str(self.global_step)),
            ("tokenizer", f"{self.tokenizer:,} tokens" if self.tokenizer is not None else "none"),
            *(("" if k else "files", f"{_size(self.files[n]):>9}  {n}") for k, n in enumerate(self.files)),
        ]
        lines = [_wrapped(f"{label:<12}", value) for label, value in rows if value]
        lines += [_wrapped("warning: ", warning, "  ") for warning in self.warnings]
        return "\n".join([*lines, *(f"problem: {problem}" for problem in self.problems)])


def inspect_checkpoint(path: str | Path, base_model: str | Path | None = None) -> Inspection:
    """Look at a checkpoint, or a run's newest one, as far as it can be read; nothing of it is executed or written."""
    found = _Notes()
    try:
        layout = find_layout(path)
    except CheckpointError as error:
        return Inspection(printable(path), problems=[str(error)])
    base = Path(base_model).expanduser() if base_model is not None else None
    weights, of_optimizer, step, tokenizer, whole = None, None, None, None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # loading notes of transformers
        with found.trying():
            layout = configured(layout, base)
            if layout.is_adapter:
                base = find_base_model(layout.weights, base)
        whole, in_pieces = None, layout.format in READERS
        located = not found.problems
        if in_pieces and (located or layout.format != TORCHTITAN):  # torchtitan's names need the configuration
            with found.trying():
                whole = HEADERS.get(layout.format, READERS[layout.format])(layout)
        if whole is not None or not in_pieces:
            if located or not in_pieces:
                with found.trying():
                    weights = (
                        _adapter(layout.weights, base, found, whole)
                        if layout.is_adapter
                        else _full_model(layout.weights, found, whole)
                    )
            with found.trying():
                of_optimizer = _optimizer(layout.optimizer, weights, found, whole)
        with found.trying():
            step = global_step(layout.folder) if whole is None or whole.global_step is None else whole.global_step
        with found.trying():
            loaded = load_tokenizer(layout.weights, base if layout.is_adapter else None)
            tokenizer = None if loaded is None else len(loaded)
    if of_optimizer is not None and step is not None and of_optimizer.step and of_optimizer.step[-1] != step:
        found.warnings.append(f"the optimizer's step is {of_optimizer.step[-1]:g}, the trainer's global step {step}")
    files = _files(layout)
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


def _full_model(folder: Path, found: _Notes, whole: Sharded | None = None) -> FoundWeights:
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            folder, "has neither config.json nor adapter_config.json", "give the folder that the trainer wrote"
        )
    model_type, shapes, dtype = _stored_model(folder, found, whole)
    if whole is None or whole.lora is None:
        return FoundWeights("full model", model_type, None, _values(shapes), dtype, shapes)
    found.warnings += adapter.without_effect(read_json(whole.lora), whole.weights)
    lora = {name: shape for name, shape in shapes.items() if ".lora_" in name}
    kind = "DoRA adapter" if any("lora_magnitude_vector" in name for name in lora) else "LoRA adapter"
    return FoundWeights(kind, model_type, None, _values(shapes), dtype, lora)


def _adapter(folder: Path, base: Path | None, found: _Notes, whole: Sharded | None = None) -> FoundWeights:
    kind, files = adapter.check_config(folder), [] if whole else weight_files(folder, "adapter_model")
    tensors = {name: tensor for path in files for name, tensor in read_tensors(path).items()}
    if whole is not None:  # the rest of the model may be there too
        tensors = {n: t for n, t in whole.weights.items() if any(part in n for part in adapter.PARTS)}
    config = read_json(folder / "adapter_config.json")
    found.warnings += adapter.without_effect(config, tensors)
    model_type, of_base = "unknown", None
    if base is not None:
        with found.trying():
            model_type, of_base, _ = _stored_model(base, found)
    # peft also keeps the base model's own embeddings, where the adapter is on them
    only_lora = not config.get("modules_to_save") and config.get("bias", "none") == "none"
    trained = {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if not only_lora or "lora_" in name or "trainable_tokens" in name
    }
    return FoundWeights(
        kind=f"{kind} adapter",
        model_type=model_type,
        base_model=None if base is None else printable(base),
        num_parameters=None if of_base is None else _values(of_base) + _values(trained),
        dtype=stored_dtype(files[:1]) if whole is None else whole.dtype,
        shapes=trained,
    )


def _stored_model(folder: Path, found: _Notes, whole: Sharded | None = None) -> tuple[str, Shapes, str]:
    """The model's type, the shapes of its parameters in the files, their dtype. A tied head is not among them."""
    model_type, files = pretrained.check_config(folder), [] if whole else weight_files(folder, "model")
    stored = {name: entry for path in files for name, entry in stored_shapes(path).items()}
    if whole is not None:
        stored = {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in whole.weights.items()}
    pretrained.check_layers(folder, len(stored))
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
    shapes = {n: shape for n, (dtype, shape) in stored.items() if "float" in dtype and not (tied and "lm_head" in n)}
    return model_type, shapes, stored_dtype(files[:1]) if whole is None else whole.dtype


def _optimizer(path: Path, weights: FoundWeights | None, found: _Notes, whole: Sharded | None = None) -> FoundOptimizer:
    state_dict = optimizer.read_state(path) if whole is None else whole.optimizer
    kind = other_optimizers.recognise(state_dict, path)
    if kind is not None:
        return _other_optimizer(kind, state_dict, path, found)
    state, groups = state_dict["state"], state_dict["param_groups"]
    keys = optimizer.adam_keys(state_dict, path)
    states: list[optimizer.AdamState] = []
    broken: list[str] = []
    for group, of_group in zip(groups, keys, strict=True):
        for key in of_group:
            entry = state.get(key)
            if entry in (None, {}):
                continue
            shape = getattr(entry.get("exp_avg"), "shape", torch.Size()) if isinstance(entry, dict) else torch.Size()
            try:
                states.append(optimizer.adam_state(f"tensor {key}", entry, group, shape, path))
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


def _other_optimizer(
    kind: other_optimizers.Kind, state_dict: dict[str, Any], path: Path, found: _Notes
) -> FoundOptimizer:
    of = other_optimizers.described(kind, state_dict, path)
    found.warnings.append(f"{of.reason}; criteria that need one are not applicable")
    return FoundOptimizer(
        file=path.name,
        type=of.kind,
        groups=len(state_dict["param_groups"]),
        step=[] if of.step is None else [of.step],
        lr=[] if of.lr is None else [of.lr],
        betas=[],
        covered=0,
        total=sum(len(keys) for keys in other_optimizers.keys_of(kind, state_dict, path)),
        num_trainable=None,
    )


def _compare(
    states: list[optimizer.AdamState], total: int, weights: FoundWeights | None, path: Path, found: _Notes
) -> None:
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


def _files(layout: Layout) -> dict[str, int | None]:
    """Names below the checkpoint's folder and their bytes, `None` for what is neither a file nor a link to one."""
    sizes: dict[str, int | None] = {}
    inside = [layout.weights] if layout.weights.is_relative_to(layout.folder) else []
    below = layout.folder.rglob("*") if layout.format in READERS else layout.folder.iterdir()
    for folder in (below, *(folder.iterdir() for folder in inside)):
        for path in sorted(folder):
            try:
                size = path.stat().st_size if path.is_file() else None
            except OSError:  # a loop of links
                size = None
            if size is not None or path.is_symlink():
                sizes[printable(os.path.relpath(path, layout.folder))] = size
    return sizes


def _values(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _size(size: int | None) -> str:
    if size is None:
        return "no file"
    power = min(max(size.bit_length() - 1, 0) // 10, 4)
    return f"{size / 1024**power:.{min(power, 1)}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _wrapped(label: str, value: Any, indent: str = " " * 12) -> str:
    return textwrap.fill(
        f"{label}{value}", _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
