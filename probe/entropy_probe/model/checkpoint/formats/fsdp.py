"""What accelerate leaves under FSDP, by `Accelerator.save_state` or by the Trainer.

Sharded: two folders of `torch.distributed.checkpoint`, `pytorch_model_fsdp_0/` and `optimizer_0/`. Full:
`pytorch_model_fsdp.bin` (or the model's usual files) and an `optimizer.bin` by names. Neither need hold a config.json.
"""

from __future__ import annotations

from torch import Tensor

from entropy_probe.layout import Layout
from entropy_probe.model.checkpoint.files import read_tensors, weight_files
from entropy_probe.model.checkpoint.formats import dcp
from entropy_probe.model.checkpoint.formats.dcp_metadata import read_items
from entropy_probe.model.checkpoint.moments import adam as optimizer
from entropy_probe.model.checkpoint.moments.order import bare_name
from entropy_probe.model.checkpoint.sharded import Sharded
from entropy_probe.model.checkpoint.weights import adapter


def read(layout: Layout, values: bool = True) -> Sharded:
    """Weights and optimizer by name; `values=False` leaves the weights on the meta device."""
    folder = layout.folder
    sharded, full, of_optimizer = (
        folder / name for name in ("pytorch_model_fsdp_0", "pytorch_model_fsdp.bin", "optimizer_0")
    )
    if sharded.is_dir():
        items = read_items(sharded)
        weights, files = dcp.weights(sharded, items, values), dcp.files(sharded, items)
    else:
        files = [full] if full.is_file() else weight_files(folder, "adapter_model" if layout.is_adapter else "model")
        weights: dict[str, Tensor] = {}
        for path in files:
            weights |= {
                bare_name(n): tensor if values else tensor.to("meta") for n, tensor in read_tensors(path).items()
            }
    adapter.require_configuration(layout, weights)
    if of_optimizer.is_dir():
        items = read_items(of_optimizer)
        return Sharded(weights, dcp.optimizer(of_optimizer, items), [*files, *dcp.files(of_optimizer, items)])
    return Sharded(weights, optimizer.read_state(layout.optimizer), [*files, *optimizer.state_files(layout.optimizer)])
