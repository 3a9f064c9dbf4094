"""Tensors whose data stands in a file: read where it is used, and its memory given back at any time.

`to_disk` for what is read alone, `zeros` for what is written too.

The file has no name: it is gone with its tensor, or with the process, however that ends.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_MAPS: Any = WeakTensorKeyDictionary()
"""Tensor → the map of the file that its data stands in."""


def to_disk(tensor: Tensor, folder: Path | None) -> None:
    """Write the data of `tensor` into a file in `folder` (default: the system's temporary one), and let it stand there.

    The map is private: writing to the tensor would not reach the file, and be lost with the next `give_back`. Raises
    `OSError` where nothing can be written.
    """
    data = tensor.detach().cpu().contiguous()
    if not data.numel():
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensor.data = torch.frombuffer(pages, dtype=data.dtype).view(data.shape)
    _MAPS[tensor] = pages


def zeros(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """`torch.zeros(shape, dtype)` in a file in `folder` (default: the system's temporary one).

    What is written reaches the file, and the system takes the memory that holds it back where it needs it. All room is
    reserved at once: raises `OSError` where there is not enough.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        pages = mmap.mmap(file.fileno(), size)
    return torch.frombuffer(pages, dtype=dtype).view(shape)


def is_on_disk(tensor: Tensor) -> bool:
    return tensor in _MAPS


def give_back(*tensors: Tensor) -> None:
    """The memory that holds what was read of these tensors; of those in memory none. Their values stay."""
    for tensor in tensors:
        pages = _MAPS.get(tensor)
        if pages is not None and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)
