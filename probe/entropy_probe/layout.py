"""Where the files of a checkpoint are: names of files and folders are looked at, of `.metadata` also two words in it.

A checkpoint is a folder with an optimizer's file. Configuration, weights and tokenizer lie beside it (Trainer, TRL,
`save_pretrained`) or in its `model/` (`training_state/step_N/`). A run folder stands for its newest checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from entropy_probe.errors import CheckpointError, printable

OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "training_state.pt")
FSDP, DCP, TORCHTITAN = "accelerate", "torch.distributed.checkpoint", "torchtitan"
_NUMBERED = re.compile(r"(?:checkpoint|step)[-_](\d+)", re.ASCII)
_RUNS = (".", "training_state", "checkpoint", "checkpoints")


@dataclass(frozen=True)
class Layout:
    """`folder` holds the optimizer, `weights` the rest: the same folder, or its `model/`.

    `format` is what `entropy-probe inspect` calls it. `note` says which of a run's checkpoints was taken; it is empty
    where a checkpoint itself was given.
    """

    folder: Path
    weights: Path
    format: str
    note: str = ""

    @property
    def is_adapter(self) -> bool:
        return (self.weights / "adapter_config.json").is_file()

    @property
    def optimizer(self) -> Path:
        """The optimizer's file. Raises `CheckpointError` where there is none."""
        found = _optimizer_file(self.folder)
        if found is None:
            raise _no_optimizer(self.folder, "has no optimizer state")
        return found


def find_layout(path: str | Path) -> Layout:
    """The checkpoint at `path`, or the one with the largest N of `checkpoint-N`, `step-N` (or `_N`) in a run folder.

    A folder is a run where it has no optimizer's file of its own; of its checkpoints, also below its `training_state/`,
    `checkpoint/` or `checkpoints/`, those that have one count. Raises `CheckpointError` for what is no folder, or a run
    without optimizer states.
    """
    folder = Path(path).expanduser()
    try:
        if not folder.is_dir():
            got = "is a file" if folder.exists() else "does not exist"
            raise CheckpointError(
                folder, f"{got}, expected a checkpoint folder", "give the folder that the trainer wrote"
            )
        if printable(folder) != str(folder):
            raise CheckpointError(folder, "its name is not UTF-8, which safetensors cannot open", "rename the folder")
        chosen, note = _chosen(folder)
        inner = chosen / "model"
        if _has_config(inner) and not _has_config(chosen):
            return Layout(chosen, inner, "training_state/step_N", note)
        if (pieces := _format_in_pieces(chosen)) is not None:
            return Layout(chosen, chosen, pieces, note)
        by_trainer = (chosen / "trainer_state.json").is_file()
        return Layout(chosen, chosen, "trainer folder" if by_trainer else "save_pretrained + optimizer", note)
    except OSError as error:
        raise CheckpointError(folder, f"cannot be read ({error.strerror})", "make it readable") from error


def configured(layout: Layout, base: Path | None) -> Layout:
    """The same with `weights` at the `base` model, where a format that may lack config.json does lack it.

    Raises `CheckpointError` where neither has one.
    """
    if layout.format not in (FSDP, DCP, TORCHTITAN) or _has_config(layout.weights):
        return layout
    if base is None or not (base / "config.json").is_file():
        where = layout.folder if base is None else base
        raise CheckpointError(where, "has no config.json", "name the base model's folder with --probe-base-model")
    return replace(layout, weights=base)


def _format_in_pieces(folder: Path) -> str | None:
    if (folder / ".metadata").is_file():
        return TORCHTITAN if _mentions(folder / ".metadata", b"tok_embeddings") else DCP
    if (folder / "optimizer_0").is_dir() or (folder / "pytorch_model_fsdp_0").is_dir():
        return FSDP
    # save_state leaves the configuration out; the Trainer writes weights that need no help beside optimizer.bin
    alone = (folder / "optimizer.bin").is_file() and not _has_config(folder)
    weights = [*folder.glob("*model*.safetensors"), *folder.glob("pytorch_model*.bin"), folder / "adapter_model.bin"]
    only_fsdp = all(path.name == "pytorch_model_fsdp.bin" for path in weights if path.is_file())
    return FSDP if alone or (only_fsdp and (folder / "pytorch_model_fsdp.bin").is_file()) else None


def _mentions(metadata: Path, word: bytes) -> bool:
    return word in metadata.read_bytes()


def _chosen(folder: Path) -> tuple[Path, str]:
    if _optimizer_file(folder) is not None:
        return folder, ""
    for run in (folder / name for name in _RUNS):
        children = run.iterdir() if run.is_dir() else ()
        numbered = {c: int(m[1]) for c in children if (m := _NUMBERED.fullmatch(c.name)) and c.is_dir()}
        whole = [child for child in numbered if _optimizer_file(child) is not None]
        if whole:
            newest = max(whole, key=numbered.__getitem__)
            passed_over = sum(number > numbered[newest] for number in numbered.values())
            without = f"; {passed_over} newer without optimizer state" if passed_over else ""
            return newest, f"{newest.name} is the newest of {len(numbered)} checkpoints in {printable(run)}{without}"
        if numbered:
            raise _no_optimizer(run, f"none of its {len(numbered)} checkpoints has an optimizer state")
    return folder, ""


def _optimizer_file(folder: Path) -> Path | None:
    """The optimizer's file, or a folder of torch.distributed.checkpoint: its own, or that of model and optimizer."""
    for name in OPTIMIZER_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / "optimizer_0" / ".metadata").is_file():
        return folder / "optimizer_0"
    whole = folder / ".metadata"  # torchtitan's last step may hold the model alone
    return folder if whole.is_file() and _mentions(whole, b"optim") else None


def _no_optimizer(folder: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        folder, f"{problem} ({', '.join(OPTIMIZER_FILES)})", "save optimizer.state_dict() as optimizer.pt"
    )


def _has_config(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
