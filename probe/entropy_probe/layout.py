"""Where the files of a checkpoint are: names of files and folders are looked at, no file is opened.

A checkpoint is a folder with an optimizer's file. Configuration, weights and tokenizer lie beside it (Trainer, TRL,
`save_pretrained`) or in its `model/` (`training_state/step_N/`). A run folder stands for its newest checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from entropy_probe.errors import CheckpointError, printable

OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "training_state.pt")
_NUMBERED = re.compile(r"(?:checkpoint-|step_)(\d+)", re.ASCII)


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
    """The checkpoint at `path`, or the one with the largest N of `checkpoint-N` or `step_N` in a run folder.

    A folder is a run where it has no optimizer's file of its own; of its checkpoints, also below its `training_state/`,
    those that have one count. Raises `CheckpointError` for what is no folder, or a run without optimizer states.
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
        by_trainer = (chosen / "trainer_state.json").is_file()
        return Layout(chosen, chosen, "trainer folder" if by_trainer else "save_pretrained + optimizer", note)
    except OSError as error:
        raise CheckpointError(folder, f"cannot be read ({error.strerror})", "make it readable") from error


def _chosen(folder: Path) -> tuple[Path, str]:
    if _optimizer_file(folder) is not None:
        return folder, ""
    for run in (folder, folder / "training_state"):
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
    return next((folder / name for name in OPTIMIZER_FILES if (folder / name).is_file()), None)


def _no_optimizer(folder: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        folder, f"{problem} ({', '.join(OPTIMIZER_FILES)})", "save optimizer.state_dict() as optimizer.pt"
    )


def _has_config(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
