"""What a checkpoint's folder holds, found without loading the model: `entropy-probe inspect`.

Sizes and dtypes come from what is stored of the weights without values, and whether they fit from
a model without values (torch's meta device), which is made as loading makes it; everything about
the optimizer comes from its state. Values of a full model's weights, and the mapping of moments to
names, are not looked at; values of an adapter are.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from entropy_probe.base_model import find_base_model
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import CheckpointError, printable
from entropy_probe.layout import TORCHTITAN, Layout, configured, file_sizes, find_layout
from entropy_probe.model.checkpoint import readers
from entropy_probe.model.checkpoint.files import dtypes_of, global_step
from entropy_probe.model.checkpoint.inspect_optimizer import found_optimizer
from entropy_probe.model.checkpoint.inspection import (
    FoundWeights,
    Inspection,
    Notes,
    Shapes,
    values_in,
)
from entropy_probe.model.checkpoint.stored import Saved, Stored, Weights
from entropy_probe.model.checkpoint.weights import adapter, pretrained
from entropy_probe.model.checkpoint.weights.build import build
from entropy_probe.model.checkpoint.weights.tokenizer import load_tokenizer
from entropy_probe.text import read_json
from entropy_probe.trainers.resolved import resolved

_NEVER_OPENED = (
    "rng_state*.pth",
    "random_states_*.pkl",
    "scheduler.pt",
    "extra_state_*.pt",
)


def inspect_checkpoint(path: str | Path, base_model: str | Path | None = None) -> Inspection:
    """Look at a checkpoint, or a run's newest one, as far as it can be read.

    Nothing of it is executed or written.
    """
    found = Notes()
    try:
        layout = find_layout(path)
    except CheckpointError as error:
        return Inspection(printable(path), problems=[str(error)])
    base = None if base_model is None else Path(base_model).expanduser()
    stored, weights, of_optimizer, step, tokenizer = None, None, None, None, None
    model: Any = None
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
                model = build(layout, stored, base, values=False).model
            with found.trying():
                weights = _weights(layout, stored, base, model, found)
        if stored is not None:
            with found.trying():
                of_optimizer = found_optimizer(layout, stored, weights, found)
        with found.trying():
            step = global_step(layout.folder) if stored is None else stored.global_step
        with found.trying():
            rows = None if model is None else model.get_input_embeddings().weight.shape[0]
            loaded = load_tokenizer([layout.weights, layout.folder, base], rows)
            tokenizer = None if loaded is None else len(loaded)
    steps = of_optimizer.step[-1:] if of_optimizer is not None else []
    if step is not None and steps not in ([], [step]):
        said = f"the optimizer's step is {steps[0]:g}, but the trainer's global step is {step}"
        found.warnings.append(said)
    files = file_sizes(layout)
    if skipped := [name for name in files if any(map(Path(name).match, _NEVER_OPENED))]:
        found.warnings.append(f"never opened: {', '.join(skipped)}")
    _, recipe = resolved(ProbeConfig(), layout.folder, has_reference=layout.is_adapter)
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
        recipe=recipe,
    )


def _weights(
    layout: Layout, stored: Stored, base: Path | None, model: Any, found: Notes
) -> FoundWeights:
    """`model`: without values; `None` where none could be made."""
    if layout.is_adapter:
        return _adapter(layout, stored, base, model, found)
    pretrained.require_config(layout.weights)
    model_type, shapes = _stored_model(layout.weights, stored.weights, model, found)
    values, dtype = values_in(shapes), dtypes_of(stored.weights.headers)
    if stored.lora is None:
        return FoundWeights("full model", model_type, None, values, dtype, shapes)
    found.warnings += adapter.without_effect(stored.lora, stored.weights)
    lora = {name: shape for name, shape in shapes.items() if ".lora_" in name}
    is_dora = any("lora_magnitude_vector" in name for name in lora)
    kind = "DoRA adapter" if is_dora else "LoRA adapter"
    return FoundWeights(kind, model_type, None, values, dtype, lora)


def _adapter(
    layout: Layout, stored: Stored, base: Path | None, model: Any, found: Notes
) -> FoundWeights:
    folder, weights = layout.weights, stored.weights
    kind, path = adapter.check_config(folder), folder / "adapter_config.json"
    names = adapter.names_of_adapter(weights)
    weights.tensors(names)  # raises for what is not finite
    found.warnings += adapter.without_effect(path, weights)
    model_type = "unknown"
    if base is not None:
        with found.trying():
            model_type, _ = _stored_model(base, Saved(base, "model"), model, found)
    # peft also keeps the base model's own embeddings, where the adapter is on them
    config = read_json(path)
    only_own = not config.get("modules_to_save") and config.get("bias", "none") == "none"
    trained = {
        name: weights.headers[name].shape
        for name in names
        if not only_own or adapter.is_trained(name)
    }
    count = None if model is None else sum(p.numel() for p in model.parameters())
    return FoundWeights(
        kind=f"{kind} adapter",
        model_type=model_type,
        base_model=None if base is None else printable(base),
        num_parameters=count,
        dtype=dtypes_of(weights.headers),
        shapes=trained,
    )


def _stored_model(folder: Path, weights: Weights, model: Any, found: Notes) -> tuple[str, Shapes]:
    """The model's type, and the shapes of its parameters in the files without a tied head."""
    model_type, headers = pretrained.check_config(folder), weights.headers
    config = None if model is None else model.config.get_text_config()
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if tied:
        found.warnings.append("tied head: lm_head is the embedding, and has no moments of its own")
    shapes = {name: header.shape for name, header in headers.items() if "float" in header.dtype}
    if tied:
        shapes = {name: shape for name, shape in shapes.items() if "lm_head" not in name}
    return model_type, shapes
