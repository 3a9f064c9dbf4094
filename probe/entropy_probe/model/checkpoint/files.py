"""Reading the files of a checkpoint: safetensors, and pickles that can hold nothing but tensors.

Only safetensors and `torch.load(weights_only=True)` open a file; `rng_state.pth` stays closed, and
`training_args.bin` is followed without running it (`trainers/pickled.py`).
"""

from __future__ import annotations

import io
import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from entropy_probe.errors import CheckpointError, reason
from entropy_probe.text import read_json

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Header:
    """What is known of a tensor without its values; `dtype` such as `float32`."""

    dtype: str
    shape: tuple[int, ...]


Headers = dict[str, Header]


def load_pickle(path: Path, remedy: str, part: bytes | None = None) -> Any:
    """`torch.load(weights_only=True)` on the CPU; what is not tensors and plain containers is refused, not run.

    `part`: the bytes to read where they are a part of the file.
    """
    try:
        if part is None:
            _require_unpacked(path)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # of another pickle protocol, in a file that is refused next
            return torch.load(
                path if part is None else io.BytesIO(part), map_location="cpu", weights_only=True
            )
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise _broken(path, error) from error
        asked = re.search(r"GLOBAL ([\w.]{1,80}) ", str(error))
        what = f" ({asked[1]})" if asked else ""
        raise CheckpointError(
            path,
            f"holds more than tensors and plain values, and was not executed{what}",
            remedy,
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged file makes the unpickler raise
        raise _broken(path, error) from error


def _require_unpacked(path: Path) -> None:
    """torch packs nothing: an archive whose entries are larger than it is would fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):  # no archive; torch will say so
        return
    if size > path.stat().st_size:
        raise CheckpointError(
            path, f"is a packed archive of {size} bytes", "save it with torch.save"
        )


def _broken(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        path, f"cannot be read ({reason(error)})", "copy it again: it is truncated or no torch file"
    )


def weight_files(folder: Path, stem: str) -> list[Path]:
    """`stem.safetensors`, or the shards that its index names, else the same of a pickle; every one exists.

    `stem` is `model` (pickled: `pytorch_model.bin`) or `adapter_model`.
    """
    names = (f"{stem}.safetensors", "pytorch_model.bin" if stem == "model" else f"{stem}.bin")
    for single, index in ((folder / name, folder / f"{name}.index.json") for name in names):
        if single.is_file():
            return [single]
        if index.is_file() and stem == "model":  # peft has no shards
            return _shards(index)
    raise CheckpointError(
        folder, f"no weights, expected {names[0]}", "save the model with save_pretrained"
    )


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(n, str) for n in names.values())
    ):
        raise CheckpointError(index, "has no `weight_map`", "restore the file")
    shards = sorted({index.parent / Path(name).name for name in names.values()})
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(
                shard, f"is missing, {index.name} names it", "copy the whole checkpoint folder"
            )
    return shards


def read_tensors(path: Path, names: Container[str] | None = None) -> dict[str, Tensor]:
    """Tensors of one file, safetensors or pickle: those of `names`, or all.

    Raises on a damaged file and on the first non-finite tensor.
    """
    if path.suffix == ".bin":
        tensors = {
            n: tensor for n, tensor in _unpickled(path).items() if names is None or n in names
        }
    else:
        with _safetensors(path) as handle:
            wanted = [name for name in handle.keys() if names is None or name in names]  # noqa: SIM118 (no mapping)
            tensors = {name: handle.get_tensor(name) for name in wanted}
    require_finite(tensors, path)
    return tensors


def require_finite(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises for the first tensor that is non-finite or not in memory."""
    for name, tensor in tensors.items():
        require_dense(tensor, name, path)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(
                path,
                f"{name} holds {count} non-finite of {tensor.numel()} values",
                "use an earlier checkpoint",
            )


def require_dense(tensor: Tensor, name: str, path: Path) -> None:
    """Raises for a tensor that is no array of its own values: sparse, quantised, or one value that stands for many."""
    if type(tensor) not in (Tensor, nn.Parameter):
        raise CheckpointError(path, f"{name} is a {type(tensor).__name__}", "save dense tensors")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        raise CheckpointError(
            path, f"{name} is a {tensor.layout} tensor of {tensor.dtype}", "save dense tensors"
        )
    held = 0 if tensor.is_meta else tensor.untyped_storage().nbytes() // tensor.element_size()
    if tensor.numel() > held:
        raise CheckpointError(
            path, f"{name} has {tensor.numel()} values in storage for {held}", "save dense tensors"
        )


def header(tensor: Tensor) -> Header:
    return Header(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def read_headers(path: Path) -> Headers:
    """dtype and shape of every tensor of one file; of safetensors the header alone is read."""
    if path.suffix == ".bin":
        return {name: header(tensor) for name, tensor in _unpickled(path).items()}
    with _safetensors(path) as handle:
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
        dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        return {
            name: Header(_DTYPES.get(dtypes[name], dtypes[name]), tuple(part.get_shape()))
            for name, part in slices.items()
        }


def dtypes_of(headers: Headers) -> str:
    """The dtypes of the tensors, such as `bfloat16` or `bfloat16/float32`."""
    return "/".join(sorted({found.dtype for found in headers.values()}))


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as handle:
            yield handle
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            path, f"is not a readable safetensors file ({error})", "copy it again"
        ) from error


def _unpickled(path: Path) -> dict[str, Tensor]:
    tensors = load_pickle(path, "save the weights as safetensors")
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise CheckpointError(
            path,
            "is not a dict of tensors by name",
            "save model.state_dict(), or use save_pretrained",
        )
    for name, tensor in tensors.items():
        require_dense(tensor, name, path)
    return dict(tensors)


def logged_grad_norm(folder: Path) -> float | None:
    """The last norm of a gradient, before clipping, in the trainer's own log, where it is that of the last step."""
    path = folder / "trainer_state.json"
    if not path.is_file():
        return None
    state = read_json(path)
    history = state.get("log_history")
    for entry in reversed(history) if isinstance(history, list) else ():
        if isinstance(entry, dict) and type(entry.get("grad_norm")) in (int, float):
            of_last = entry.get("step") == state.get("global_step")
            return float(entry["grad_norm"]) if of_last else None
    return None


def logged_entropy(folder: Path) -> dict[str, float] | None:
    """The last `entropy` in the trainer's own log: its `value` in nats per token, the `step` of the entry, and over how
    many `steps` it is a mean, where the entry before tells. `None` where there is none that can be read."""
    path = folder / "trainer_state.json"
    try:
        history = read_json(path).get("log_history") if path.is_file() else None
    except CheckpointError:  # a second opinion, which nothing depends on
        return None
    logged = [
        entry
        for entry in (history if isinstance(history, list) else ())
        if isinstance(entry, dict)
        and type(entry.get("entropy")) in (int, float)
        and math.isfinite(entry["entropy"])
        and type(entry.get("step")) is int
    ]
    if not logged:
        return None
    found = {"value": float(logged[-1]["entropy"]), "step": logged[-1]["step"]}
    steps = logged[-1]["step"] - (logged[-2]["step"] if len(logged) > 1 else 0)
    return found | ({"steps": steps} if steps > 0 else {})


def global_step(folder: Path) -> int | None:
    """The trainer's own count of its steps, where it left one."""
    for name, key in (("trainer_state.json", "global_step"), ("training_info.json", "step")):
        if (folder / name).is_file():
            step = read_json(folder / name).get(key)
            return step if isinstance(step, int) else None
    return None
