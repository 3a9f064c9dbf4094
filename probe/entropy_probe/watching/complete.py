"""Whether a checkpoint's folder is whole: by what its files say of themselves, and by nothing changing any more.

No tensor is read and nothing is unpickled. What the formats say of themselves:

* a safetensors file begins with a header that gives its exact size;
* an index names every shard, and a shard's name says how many there are;
* a file of `torch.save` is a zip archive, whose directory stands at its end;
* verl's files name their rank, and how many ranks there are; torch.distributed.checkpoint writes `.metadata` last;
* JSON can be parsed, and transformers' Trainer writes `trainer_state.json` last;
* a file that is not finished has a name of its own (`*.tmp`, `tmp*`) in many trainers.

A pickle that is no archive says nothing of itself: only that it no longer changes tells that it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from entropy_probe.errors import ProbeError
from entropy_probe.layout import IN_PIECES, find_layout

_ENDS = 64 * 1024
"""Bytes from each end of a file that make its fingerprint."""
_LARGEST_HEADER = 100_000_000
"""Bytes, the limit of safetensors itself."""
_LARGEST_JSON = 1 << 28
_TRAINERS = ("rng_state*.pth", "scheduler.pt", "training_args.bin")
"""Files that transformers' Trainer writes before `trainer_state.json`."""
_UNFINISHED = re.compile(r"\.?tmp.*|.*\.(tmp|temp|part|partial|incomplete)", re.IGNORECASE)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\..+)")
_RANK = re.compile(r"(.+)_world_size_(\d+)_rank_(\d+)\.pt")


@dataclass(frozen=True)
class Seen:
    """The files of a folder at one moment: name below it → (size, time of the last change, inode).

    Two looks that are equal, some time apart, mean that nobody writes any more.
    """

    files: dict[str, tuple[int, int, int]]

    @classmethod
    def of(cls, folder: Path) -> Seen:
        """An empty one for a folder that is gone; links to files are followed."""
        found: dict[str, tuple[int, int, int]] = {}
        for place, _, names in os.walk(folder):
            for name in names:
                path = Path(place, name)
                try:
                    status = path.stat()
                except OSError:  # removed meanwhile, or a link to nothing
                    found[os.path.relpath(path, folder)] = (-1, 0, 0)
                    continue
                found[os.path.relpath(path, folder)] = (
                    status.st_size,
                    status.st_mtime_ns,
                    status.st_ino,
                )
        return cls(found)

    def __bool__(self) -> bool:
        return bool(self.files)


def fingerprint(folder: Path, seen: Seen) -> str:
    """SHA-256 over names and sizes of the files, and 64 KiB from both ends of each.

    It costs little for files of any size, stays as it is where a checkpoint is copied, and is another one where a
    training that began anew wrote the same step. Raises `OSError` where a file is gone.
    """
    digest = hashlib.sha256()
    for name in sorted(seen.files):
        size = seen.files[name][0]
        digest.update(f"{name}\0{size}\0".encode("utf-8", "surrogateescape"))
        with (folder / name).open("rb") as stream:
            digest.update(stream.read(_ENDS))
            if size > 2 * _ENDS:
                stream.seek(-_ENDS, os.SEEK_END)
            digest.update(stream.read(_ENDS))
    return digest.hexdigest()


def what_is_missing(folder: Path) -> str:
    """Why the checkpoint is not whole, in a few words; empty where nothing says so."""
    try:
        return _missing(folder, Seen.of(folder))
    except (OSError, ProbeError) as error:
        problem = error.problem if isinstance(error, ProbeError) else error.strerror
        return str(problem).partition(" (")[0]


def _missing(folder: Path, seen: Seen) -> str:
    if not seen:
        return "it is empty"
    for name, (size, _, _) in seen.files.items():
        if any(_UNFINISHED.fullmatch(part) for part in Path(name).parts):
            return f"{name} is being written"
        if why := _file(folder / name, size):
            return f"{name} {why}"
    names = {Path(name) for name in seen.files}
    for found in (_shards(folder, names), _ranks(names), _last_files(folder, names)):
        if found:
            return found
    layout = find_layout(folder)
    _ = layout.optimizer  # raises where there is none
    if layout.format in IN_PIECES:
        return ""
    if not any(
        (layout.weights / name).is_file() for name in ("config.json", "adapter_config.json")
    ):
        return "config.json is missing"
    weights = ("*model*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
    if not any(path for pattern in weights for path in layout.weights.glob(pattern)):
        return "the weights are missing"
    return ""


def _file(path: Path, size: int) -> str:
    """What the file says of itself that is not so."""
    if size < 0:
        return "is gone"
    if path.suffix == ".safetensors":
        return _safetensors(path, size)
    if path.suffix in (".pt", ".pth", ".bin", ".json") and size == 0:
        return "is empty"
    if path.suffix in (".pt", ".pth", ".bin"):
        return _archive(path, size)
    if path.suffix == ".json" and size <= _LARGEST_JSON:
        try:
            json.loads(path.read_bytes())
        except ValueError:
            return "is not JSON yet"
    return ""


def _safetensors(path: Path, size: int) -> str:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            return "is shorter than its header"
        try:
            header = json.loads(stream.read(length))
            ends = [of["data_offsets"][1] for key, of in header.items() if key != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            return "has no header yet"
    return "" if size == expected else f"has {size} of {expected} bytes"


def _archive(path: Path, size: int) -> str:
    """A zip archive ends with its directory, whose last record says how long the comment behind it is."""
    with path.open("rb") as stream:
        if stream.read(4) != b"PK\3\4":
            return ""
        start = max(0, size - (22 + 65535))
        stream.seek(start)
        tail = stream.read()
    at = tail.rfind(b"PK\5\6")
    comment = int.from_bytes(tail[at + 20 : at + 22], "little")
    return "" if at >= 0 and start + at + 22 + comment == size else "has no end yet"


def _shards(folder: Path, names: set[Path]) -> str:
    for name in sorted(names):
        if name.name.endswith(".index.json"):
            index = json.loads((folder / name).read_bytes())
            weights = index.get("weight_map") if isinstance(index, dict) else None
            shards = set(map(str, weights.values())) if isinstance(weights, dict) else set()
            gone = [
                shard for shard in sorted(shards) if name.with_name(Path(shard).name) not in names
            ]
            if gone:
                return f"{gone[0]} is missing, {name} names it"
    for name in sorted(names):
        if (part := _SHARD.fullmatch(name.name)) is not None:
            stem, _, count, suffix = part.groups()
            for k in range(1, int(count) + 1):
                shard = f"{stem}-{k:05d}-of-{count}{suffix}"
                if name.with_name(shard) not in names:
                    return f"{shard} is missing"
            if name.with_name(f"{stem}{suffix}.index.json") not in names:
                return f"{stem}{suffix}.index.json is missing"
    return ""


def _ranks(names: set[Path]) -> str:
    for name in sorted(names):
        if (part := _RANK.fullmatch(name.name)) is not None:
            kind, count, _ = part.groups()
            for rank in range(int(count)):
                file = f"{kind}_world_size_{count}_rank_{rank}.pt"
                if name.with_name(file) not in names:
                    return f"{file} is missing"
    return ""


def _last_files(folder: Path, names: set[Path]) -> str:
    """What a trainer writes last."""
    of_trainer = any(fnmatch(str(name), pattern) for name in names for pattern in _TRAINERS)
    if (
        of_trainer
        and folder.name.startswith("checkpoint-")
        and Path("trainer_state.json") not in names
    ):
        return "trainer_state.json is missing"
    pieces = {name.parent for name in names if name.suffix == ".distcp"}
    for place in sorted(pieces):
        if place / ".metadata" not in names:
            return f"{place / '.metadata'} is missing"
    return ""
