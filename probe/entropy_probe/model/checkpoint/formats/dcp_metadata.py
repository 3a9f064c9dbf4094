"""The `.metadata` of a `torch.distributed.checkpoint` folder: which part of which file holds what of which tensor.

It is a pickle. `Restricted` opens it and makes inert records of what it names; no file but
`.metadata` is opened.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint.files import reason

COPY_AGAIN = "copy the whole checkpoint folder again"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """`length` bytes from `start` of a file: the part of a tensor at `offset`, of that shape; or a whole value."""

    file: Path
    start: int
    length: int
    offset: Shape
    shape: Shape


@dataclass(frozen=True)
class Item:
    """What was saved under the keys `path`: a tensor in pieces, or (without `dtype`) any other value in one piece."""

    path: tuple[str | int, ...]
    dtype: torch.dtype | None
    shape: Shape
    pieces: list[Piece]

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))

    def below(self, key: str | int) -> Item:
        """The same without `key`, where its path begins with it and goes on."""
        return (
            replace(self, path=self.path[1:])
            if self.path[0] == key and len(self.path) > 1
            else self
        )


def damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(folder / ".metadata", what[:160], COPY_AGAIN)


def read_items(folder: Path) -> list[Item]:
    """What `.metadata` lists, every piece checked against the size of its file; nothing else is opened."""
    path = folder / ".metadata"
    try:
        with path.open("rb") as stream:
            listed: Any = Restricted(stream, path, _ALLOWED).load().fields
        return _items(folder, listed)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(path, "is missing", COPY_AGAIN) from None
    except OSError as error:
        raise CheckpointError(
            path, f"cannot be read ({error.strerror})", "make it readable"
        ) from error
    except (
        Exception
    ) as error:  # whatever a damaged pickle makes the unpickler, or what it left to be read, raise
        raise damaged(
            folder, f"is not metadata of torch.distributed.checkpoint ({reason(error)})"
        ) from error


def _items(folder: Path, listed: dict[str, Any]) -> list[Item]:
    places = {
        (
            key.fields["fqn"],
            None if key.fields.get("offset") is None else _shape(key.fields["offset"]),
        ): place.fields
        for key, place in listed["storage_data"].items()
    }
    paths, found, sizes = listed.get("planner_data") or {}, [], {}
    for name, entry in listed["state_dict_metadata"].items():
        keys = tuple(paths.get(name, (name,)))
        if not keys or not all(type(key) in (str, int) for key in keys):
            raise damaged(folder, f"{name} has the keys {keys!r}")
        if not isinstance(entry, _Tensor):
            found.append(Item(keys, None, (), [_piece(folder, name, places[name, None], sizes)]))
            continue
        dtype, shape = entry.fields["properties"].fields[0], _shape(entry.fields["size"])
        if not isinstance(dtype, torch.dtype):
            raise damaged(folder, f"{name} has no dtype")
        chunks = {
            _shape(chunk.fields["offsets"]): _shape(chunk.fields["sizes"])
            for chunk in entry.fields["chunks"]
        }
        pieces = []
        for offset, size in chunks.items():
            if len({len(shape), len(offset), len(size)}) > 1 or any(
                start + n > of for start, n, of in zip(offset, size, shape, strict=True)
            ):
                raise damaged(
                    folder, f"{name} has shape {shape}, and a piece of shape {size} at {offset}"
                )
            pieces.append(_piece(folder, name, places[name, offset], sizes, offset, size, dtype))
        if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
            raise damaged(folder, f"the pieces of {name} do not make up its shape {shape}")
        found.append(Item(keys, dtype, shape, pieces))
    # pieces that share bytes could make gigabytes of a small file
    total = sum(piece.length for item in found for piece in item.pieces)
    if total > sum(sizes.values()):
        raise damaged(folder, f"names {total} bytes, its files have {sum(sizes.values())}")
    return found


def _piece(
    folder: Path,
    name: str,
    place: dict[str, Any],
    sizes: dict[Path, int],
    offset: Shape = (),
    shape: Shape = (),
    dtype: torch.dtype | None = None,
) -> Piece:
    inside, start, length = place["relative_path"], *_shape((place["offset"], place["length"]))
    if not isinstance(inside, str) or inside != Path(inside).name or inside == "..":
        raise CheckpointError(
            folder / ".metadata",
            f"names a file outside its folder: {inside!r}"[:120],
            "do not trust this file",
        )
    if place.get("transform_descriptors"):
        raise CheckpointError(
            folder / ".metadata",
            f"{name} is compressed or otherwise transformed",
            "save it without extensions",
        )
    file = folder / inside
    if file not in sizes:
        if not file.is_file():
            raise CheckpointError(file, "is missing, .metadata names it", COPY_AGAIN)
        sizes[file] = file.stat().st_size
    if start + length > sizes[file]:
        raise CheckpointError(
            file, f"has {sizes[file]} bytes, {name} would end at {start + length}", COPY_AGAIN
        )
    if dtype is not None and math.prod(shape) * dtype.itemsize > length:
        raise damaged(
            folder, f"{name}: a piece of shape {shape} does not fit into its {length} bytes"
        )
    return Piece(file, start, length, offset, shape)


def _shape(sizes: Any) -> Shape:
    if not isinstance(sizes, tuple | list) or not all(
        type(size) is int and size >= 0 for size in sizes
    ):
        raise TypeError(f"{sizes!r} is not a shape")
    if math.prod(max(size, 1) for size in sizes) >= 2**60:
        raise TypeError(f"{sizes!r} is larger than any file")
    return tuple(sizes)


class Restricted(pickle.Unpickler):
    """An unpickler that knows the names in `allowed` and no others: what a pickle calls is looked up there alone.

    `allowed[module, name]` is what the pickle gets for that name. Anything else raises
    `CheckpointError`.
    """

    def __init__(
        self, stream: BinaryIO, path: Path, allowed: Mapping[tuple[str, str], Any]
    ) -> None:
        super().__init__(stream)
        self._path, self._allowed = path, allowed

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._allowed:
            raise CheckpointError(
                self._path,
                f"asks for {module}.{name}"[:120] + ", and was not executed",
                "do not trust this file",
            )
        return self._allowed[module, name]


class _Record:
    """What stands for an object in `.metadata`: its fields and nothing else."""

    def __init__(self, *_: Any) -> None:
        self.fields: Any = {}

    def __setstate__(self, fields: Any) -> None:
        self.fields = fields


class _Tensor(_Record):
    """Stands for TensorStorageMetadata."""


def _unchanged(sizes: Any = ()) -> Any:
    """Stands for torch.Size."""
    return sizes


_METADATA, _OLDER = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed._shard.sharded_tensor.metadata",
)
_DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
_ALLOWED: dict[tuple[str, str], Any] = {
    **dict.fromkeys(
        [
            *(
                (_METADATA, name)
                for name in (
                    "Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "BytesStorageMetadata",
                    "TensorProperties", "_MEM_FORMAT_ENCODING",
                )
            ),
            (_OLDER, "TensorProperties"),
            (_OLDER, "MEM_FORMAT_ENCODING"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            *((module, "PosixPath") for module in ("pathlib", "pathlib._local")),
        ],
        _Record,
    ),
    (_METADATA, "TensorStorageMetadata"): _Tensor,
    ("torch", "Size"): _unchanged,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
}  # fmt: skip
