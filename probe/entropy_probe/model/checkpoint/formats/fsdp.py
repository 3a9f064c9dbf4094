"""What accelerate leaves under FSDP, by `Accelerator.save_state` or by the Trainer.

Sharded: two folders of `torch.distributed.checkpoint`, `pytorch_model_fsdp_0/` and `optimizer_0/`.
Full: `pytorch_model_fsdp.bin` (or the model's usual files) and an `optimizer.bin` by names.
Neither need hold a config.json.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import Tensor

from entropy_probe.layout import Layout
from entropy_probe.model.checkpoint.formats import dcp
from entropy_probe.model.checkpoint.formats.dcp_metadata import read_items
from entropy_probe.model.checkpoint.moments import adam
from entropy_probe.model.checkpoint.moments.order import bare_name
from entropy_probe.model.checkpoint.stored import Gathered, Saved, Stored

_ONE_FILE = "pytorch_model_fsdp"


def read(layout: Layout) -> Stored:
    """Weights and optimizer by name."""
    sharded = layout.folder / "pytorch_model_fsdp_0"
    if sharded.is_dir():
        items = read_items(sharded)
        weights = dcp.weights(layout, sharded, items, dcp.files(sharded, items))
    else:
        weights = _full(layout)
        dcp.require_configuration(layout, weights.headers)
    folder = layout.folder / "optimizer_0"
    if folder.is_dir():
        items = read_items(folder)
        state, files = dcp.of_optimizer(folder, items), dcp.files(folder, items)
        return Stored(layout.folder, weights, partial(dcp.optimizer, folder, state), lambda: files)
    return Stored(
        folder=layout.folder,
        weights=weights,
        optimizer=partial(adam.read_state, layout.optimizer),
        optimizer_files=partial(adam.state_files, layout.optimizer),
    )


def _full(layout: Layout) -> Gathered:
    """Weights in one file, or in the usual ones; a wrapper may have put prefixes to their names."""
    usual = "adapter_model" if layout.is_adapter else "model"
    is_one = (layout.folder / f"{_ONE_FILE}.bin").is_file()
    saved = Saved(layout.folder, _ONE_FILE if is_one else usual)
    in_file = {bare_name(name): name for name in saved.headers}

    def read(names: Iterable[str]) -> dict[str, Tensor]:
        wanted = {name: in_file[name] for name in names}
        found = saved.tensors(wanted.values())
        return {name: found[stored] for name, stored in wanted.items()}

    headers = {name: saved.headers[stored] for name, stored in in_file.items()}
    return Gathered(headers, read, layout.folder, saved.files)
