"""What is stored is known before it is read, and is what is read then."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

import models
from entropy_probe.demo import checkpoint_path
from entropy_probe.errors import CheckpointError
from entropy_probe.layout import FORMATS, IN_PIECES, find_layout
from entropy_probe.model.checkpoint import readers
from entropy_probe.model.checkpoint.files import header
from entropy_probe.model.checkpoint.stored import Stored


def saved(folder: Path) -> Path:
    return models.full_checkpoint(folder, "llama")


def pickled(folder: Path) -> Path:
    model = models.tiny_model("llama")
    models.full_checkpoint(folder, "llama")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def in_pieces(folder: Path) -> Path:
    model = models.tiny_model("llama")
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    models.train_steps(model, optimizer)
    model.config.save_pretrained(folder)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


MADE = {"saved": saved, "pickled": pickled, "in pieces": in_pieces, "demo": lambda _: checkpoint_path()}


def stored_in(folder: Path) -> Stored:
    return readers.read(find_layout(folder))


def test_each_format_has_a_reader() -> None:
    assert set(readers.READERS) == set(FORMATS)
    assert set(FORMATS) > IN_PIECES


@pytest.mark.parametrize("form", list(MADE))
def test_headers_are_those_of_the_values(tmp_path: Path, form: str) -> None:
    weights = stored_in(MADE[form](tmp_path / "ckpt")).weights
    tensors = weights.tensors()
    assert weights.headers == {name: header(tensor) for name, tensor in tensors.items()}
    some = list(tensors)[1::2]
    chosen = weights.tensors(some)
    assert set(chosen) == set(some)
    assert all(torch.equal(chosen[name], tensors[name]) for name in some)


def test_nothing_is_read_until_it_is_asked_for(tmp_path: Path) -> None:
    folder = in_pieces(tmp_path / "ckpt")
    for file in folder.glob("*.distcp"):
        file.write_bytes(bytes(file.stat().st_size))
    stored = stored_in(folder)
    assert set(stored.weights.headers) == set(models.tiny_model("llama").state_dict())
    for read in (stored.weights.tensors, stored.optimizer):
        with pytest.raises(CheckpointError, match=r"\.distcp: "):
            read()
