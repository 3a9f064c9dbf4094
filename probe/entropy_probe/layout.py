"""Where the files of a checkpoint are, by names of files and folders; only `latest` and `.metadata` are looked into.

A checkpoint is a folder with an optimizer's file. Configuration, weights and tokenizer lie beside it (Trainer, TRL,
`save_pretrained`) or in its `model/` (`training_state/step_N/`), an adapter also in a folder of its name. A run folder
stands for its newest checkpoint.

verl: `global_step_N/actor/` with a file a rank, the configuration in its `huggingface/`. DeepSpeed: `latest` names the
folder of the ranks' files; the configuration lies beside `latest`, or one folder up or down.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from entropy_probe.errors import CheckpointError, printable

OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "training_state.pt")
TRAINER, PRETRAINED, NOTES = (
    "trainer folder",
    "save_pretrained + optimizer",
    "training_state/step_N",
)
FSDP, DCP, TORCHTITAN = "accelerate", "torch.distributed.checkpoint", "torchtitan"
VERL, ZERO, UNIVERSAL = "verl FSDP", "DeepSpeed ZeRO", "DeepSpeed universal"
FORMATS = (
    TRAINER,
    PRETRAINED,
    NOTES,
    FSDP,
    DCP,
    TORCHTITAN,
    VERL,
    ZERO,
    UNIVERSAL,
)  # docs/formats.md
IN_PIECES = frozenset({FSDP, DCP, TORCHTITAN, VERL, ZERO, UNIVERSAL})
"""Formats whose weights and moments lie in several files, also in folders below the checkpoint's."""
_NUMBERED = re.compile(r"(?:(?:checkpoint|step)[-_]|global_step_?)(\d+)", re.ASCII)
_RUNS = (".", "training_state", "checkpoint", "checkpoints")
_SHOWN = 5
"""Checkpoints below a folder that a message names."""
_OF_RANKS = {  # one of the optimizer's files, below the checkpoint's or DeepSpeed's own folder → format
    "optim_world_size_*_rank_*.pt": VERL,
    "*_optim_states.pt": ZERO,
    "zero/optimizer_state.pt": UNIVERSAL,
}


@dataclass(frozen=True)
class Layout:
    """`folder` holds the optimizer, `weights` the rest: the same folder, or its `model/`.

    `format` is what `entropy-probe inspect` calls it. `note` says which of a run's checkpoints was taken; it is empty
    where a checkpoint itself was given. `adapter_name` stands in the names of an adapter's parameters.
    """

    folder: Path
    weights: Path
    format: str
    note: str = ""
    adapter_name: str = "default"

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
    `checkpoint/` or `checkpoints/`, those that have one count. Raises `CheckpointError` for what is not a folder, a run
    without optimizer states, or a folder of runs, whose checkpoints the message names.
    """
    folder = Path(path).expanduser()
    try:
        if not folder.is_dir():
            got = "is a file" if folder.exists() else "does not exist"
            raise CheckpointError(
                folder,
                f"{got}, expected a checkpoint folder",
                "give the folder that the trainer wrote",
            )
        if printable(folder) != str(folder):
            raise CheckpointError(
                folder, "its name is not UTF-8, which safetensors cannot open", "rename the folder"
            )
        chosen, note = _chosen(folder)
        if (of_rank := _of_rank(chosen)) is not None:
            return Layout(chosen, _beside(chosen, of_rank[0]), of_rank[1], note)
        inner = chosen / "model"
        if _has_config(inner) and not _has_config(chosen):
            return Layout(chosen, inner, NOTES, note)
        by_trainer = (chosen / "trainer_state.json").is_file()
        form = TRAINER if by_trainer else PRETRAINED
        if (named := _named_adapter(chosen)) is not None:
            return Layout(chosen, named, form, note, adapter_name=named.name)
        if (pieces := _format_in_pieces(chosen)) is not None:
            return Layout(chosen, chosen, pieces, note)
        return Layout(chosen, chosen, form, note)
    except OSError as error:
        raise CheckpointError(
            folder, f"cannot be read ({error.strerror})", "make it readable"
        ) from error


def numbered(run: Path) -> list[tuple[int, Path]]:
    """(N, folder) of every `checkpoint-N`, `step-N`, `global_step_N` in a run's folder, in the order of N.

    Those below its `training_state/`, `checkpoint/` or `checkpoints/` count. Whether they are whole is not asked.
    """
    found = []
    for place in (run / name for name in _RUNS):
        try:
            children = list(place.iterdir())
        except OSError:  # no such folder, or one that was removed just now
            continue
        found += [
            (int(m[1]), c) for c in children if (m := _NUMBERED.fullmatch(c.name)) and c.is_dir()
        ]
    return sorted(found)


def configured(layout: Layout, base: Path | None) -> Layout:
    """The same with `weights` at the `base` model, where a format that may lack config.json does lack it.

    Raises `CheckpointError` where neither has one.
    """
    if layout.format not in (FSDP, DCP, TORCHTITAN) or _has_config(layout.weights):
        return layout
    if base is None or not (base / "config.json").is_file():
        where = layout.folder if base is None else base
        raise CheckpointError(
            where, "has no config.json", "name the base model's folder with --probe-base-model"
        )
    return replace(layout, weights=base)


def file_sizes(layout: Layout) -> dict[str, int | None]:
    """Names below the checkpoint's folder and their bytes, `None` for what is neither a file nor a link to one."""
    sizes: dict[str, int | None] = {}
    inside = [layout.weights] if layout.weights.is_relative_to(layout.folder) else []
    below = layout.folder.rglob("*") if layout.format in IN_PIECES else layout.folder.iterdir()
    for folder in (below, *(folder.iterdir() for folder in inside)):
        for path in sorted(folder):
            try:
                size = path.stat().st_size if path.is_file() else None
            except OSError:  # a loop of links
                size = None
            if size is not None or path.is_symlink():
                sizes[printable(os.path.relpath(path, layout.folder))] = size
    return sizes


def _named_adapter(folder: Path) -> Path | None:
    """The adapter below the folder: peft saves one whose name is not `default` in a folder of its name."""
    if _has_config(folder):
        return None
    found = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    if len(found) > 1:
        names = ", ".join(printable(place.name) for place in found)
        raise CheckpointError(
            folder,
            f"holds several adapters ({names})",
            "leave only the adapter of the policy in it",
        )
    return next(iter(found), None)


def _format_in_pieces(folder: Path) -> str | None:
    if (folder / ".metadata").is_file():
        return TORCHTITAN if _mentions(folder / ".metadata", b"tok_embeddings") else DCP
    if (folder / "optimizer_0").is_dir() or (folder / "pytorch_model_fsdp_0").is_dir():
        return FSDP
    # save_state leaves the configuration out; the Trainer writes weights that need no help beside optimizer.bin
    alone = (folder / "optimizer.bin").is_file() and not _has_config(folder)
    weights = [
        *folder.glob("*model*.safetensors"),
        *folder.glob("pytorch_model*.bin"),
        folder / "adapter_model.bin",
    ]
    only_fsdp = all(path.name == "pytorch_model_fsdp.bin" for path in weights if path.is_file())
    return FSDP if alone or (only_fsdp and (folder / "pytorch_model_fsdp.bin").is_file()) else None


def _mentions(metadata: Path, word: bytes) -> bool:
    return word in metadata.read_bytes()


def _chosen(folder: Path) -> tuple[Path, str]:
    if (own := _with_optimizer(folder)) is not None:
        return own, ""
    tag = _tagged(folder)
    if (folder / "latest").is_file() and (tag is None or _with_optimizer(tag) is None):
        named = printable(_latest(folder))[:60]
        raise CheckpointError(
            folder / "latest",
            f"names {named!r}, which holds no *_optim_states.pt",
            "give the folder that holds them",
        )
    for run in (folder / name for name in _RUNS):
        children = run.iterdir() if run.is_dir() else ()
        numbered = {
            c: int(m[1]) for c in children if (m := _NUMBERED.fullmatch(c.name)) and c.is_dir()
        }
        whole = {child: own for child in numbered if (own := _with_optimizer(child)) is not None}
        if whole:
            newest = max(whole, key=numbered.__getitem__)
            passed_over = sum(number > numbered[newest] for number in numbered.values())
            without = f"; {passed_over} newer without optimizer state" if passed_over else ""
            note = f"{newest.name} is the newest of {len(numbered)} checkpoints in {printable(run)}{without}"
            return whole[newest], note
        if numbered:
            raise _no_optimizer(
                run, f"none of its {len(numbered)} checkpoints has an optimizer state"
            )
    if not _has_config(folder) and (below := one_level_below(folder)):
        raise CheckpointError(
            folder,
            "is neither a checkpoint nor a run, but it has checkpoints one level below: "
            + listed(folder, below),
            f"give one of them, such as {printable(below[-1])}",
        )
    return folder, ""


def listed(folder: Path, places: Sequence[Path]) -> str:
    """The first few places, by their names below the folder."""
    names = [printable(place.relative_to(folder)) for place in places]
    return ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")


def one_level_below(folder: Path) -> list[Path]:
    """Checkpoints among the folders in `folder`, and in these: by the folder's name, then by their number."""
    found: list[Path] = []
    for child in sorted(folder.iterdir()):
        try:
            if not child.is_dir():
                continue
            inside = [place for _, place in numbered(child) if _with_optimizer(place) is not None]
            found += inside or ([child] if _with_optimizer(child) is not None else [])
        except OSError:  # a folder that cannot be read is no reason to refuse the others
            continue
    return found


def _with_optimizer(folder: Path) -> Path | None:
    """The folder itself, or its part for the policy in verl (`actor`), OpenRLHF (`_actor`), prime-rl (`trainer`)."""
    places = (folder, folder / "actor", folder / "_actor", folder / "trainer")
    return next((place for place in places if _optimizer_file(place) is not None), None)


def _optimizer_file(folder: Path) -> Path | None:
    """The optimizer's file, or a folder of torch.distributed.checkpoint: its own, or that of model and optimizer."""
    for name in OPTIMIZER_FILES:
        if (folder / name).is_file():
            return folder / name
    if (folder / "optimizer_0" / ".metadata").is_file():
        return folder / "optimizer_0"
    whole = folder / ".metadata"  # torchtitan's last step may hold the model alone
    if whole.is_file() and any(_mentions(whole, word) for word in (b"optim", b"param_groups")):
        return folder
    of_rank = _of_rank(folder)
    return None if of_rank is None else of_rank[0]


def _of_rank(folder: Path) -> tuple[Path, str] | None:
    """The first of the optimizer's files with one a rank, and the format; none beside an optimizer's own file."""
    if any((folder / name).is_file() for name in OPTIMIZER_FILES):
        return None
    tag = _tagged(folder)
    for place in (folder, tag) if tag is not None else (folder,):
        for pattern, form in _OF_RANKS.items():
            if found := sorted(place.glob(pattern)):
                return found[0], form
    return None


def _tagged(folder: Path) -> Path | None:
    """The folder beside `latest` that it names, if it is one."""
    name = _latest(folder)
    beside = Path(name).name == name and name not in ("", "..") and "\0" not in name
    return folder / name if beside and (folder / name).is_dir() else None


def following(folder: Path) -> Path | None:
    """checkpoint-(N+1) beside checkpoint-N, where it is there."""
    named = re.fullmatch(r"checkpoint-(\d{1,12})", folder.name)
    beside = None if named is None else folder.with_name(f"checkpoint-{int(named[1]) + 1}")
    return beside if beside is not None and (beside / "trainer_state.json").is_file() else None


def _latest(folder: Path) -> str:
    """The name that DeepSpeed's `latest` holds, empty without one."""
    if not (folder / "latest").is_file():
        return ""
    with (folder / "latest").open(encoding="utf-8", errors="replace") as stream:
        return stream.read(300).strip()


def _beside(folder: Path, piece: Path) -> Path:
    """Where the configuration of a checkpoint with a file for each rank is."""
    places = (folder / "huggingface", folder, piece.parent, piece.parent.parent, folder.parent)
    return next((place for place in places if _has_config(place)), folder)


def _no_optimizer(folder: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        folder,
        f"{problem} ({', '.join(OPTIMIZER_FILES)})",
        "save optimizer.state_dict() as optimizer.pt",
    )


def _has_config(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
