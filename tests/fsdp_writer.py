"""One rank of a run under accelerate's FSDP on the CPU: `fsdp_writer.py FOLDER`, with RANK, WORLD_SIZE, MASTER_* set.

accelerate takes FSDP on accelerators only, so its state is told by hand that it runs; all else is its own: how the
model is wrapped (FSDP1, or FSDP2's `fully_shard`), trained and saved. What the live parameters and the optimizer held
is gathered from the ranks' own tensors into `<case>.pt`, past every state_dict.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, save_fsdp_model, save_fsdp_optimizer
from torch.distributed.tensor import DTensor

import models

# case → version of FSDP, kind of state_dict, architecture, whether LoRA is on, whether saved as the Trainer does
CASES: dict[str, tuple[int, str, str, bool, bool]] = {
    "fsdp1-sharded": (1, "SHARDED_STATE_DICT", "llama", False, False),
    "fsdp1-full": (1, "FULL_STATE_DICT", "llama", False, False),
    "fsdp2-sharded": (2, "SHARDED_STATE_DICT", "llama", False, False),
    "fsdp2-full": (2, "FULL_STATE_DICT", "llama", False, False),
    "fsdp1-tied": (1, "SHARDED_STATE_DICT", "qwen2", False, False),
    "fsdp2-tied": (2, "SHARDED_STATE_DICT", "qwen2", False, True),
    "fsdp1-lora": (1, "SHARDED_STATE_DICT", "llama", True, False),
    "fsdp2-lora": (2, "SHARDED_STATE_DICT", "llama", True, False),
    "fsdp1-lora-trainer": (1, "SHARDED_STATE_DICT", "llama", True, True),
    "fsdp2-lora-trainer": (2, "SHARDED_STATE_DICT", "llama", True, True),
    "fsdp2-lora-full": (2, "FULL_STATE_DICT", "llama", True, True),
}

ALONE = "fsdp1-full"  # rank 0 writes it in one process: in two, torch's offload of a full state_dict crashes on the CPU


def write(folder: Path, case: str) -> None:
    version, kind, architecture, lora, by_trainer = CASES[case]
    layer = {"llama": "LlamaDecoderLayer", "qwen2": "Qwen2DecoderLayer"}[architecture]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        state_dict_type=kind,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[layer],
        use_orig_params=True if version == 1 else None,
    )
    accelerator = Accelerator(cpu=True)
    for state in (PartialState, AcceleratorState):
        state._shared_state.update(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    model: Any = models.tiny_model(architecture).train()
    if lora:
        model = models.add_adapter(model, architecture)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "lr": 5e-4},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-3, betas=(0.8, 0.95))
    model, optimizer = accelerator.prepare(model, optimizer)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer.optimizer, total_iters=7)
    generator = torch.Generator().manual_seed(accelerator.process_index)
    for _ in range(3):
        ids = torch.randint(3, models.VOCABULARY, (4, 9), generator=generator)
        optimizer.zero_grad()
        accelerator.backward(model(ids, labels=ids).loss)
        optimizer.step()
        scheduler.step()
    if by_trainer:  # the two calls in Trainer._save_optimizer_and_scheduler
        save_fsdp_model(plugin, accelerator, model, folder / case, adapter_only=True)
        save_fsdp_optimizer(plugin, accelerator, optimizer, model, folder / case)
    else:
        accelerator.save_state(folder / case)
    held = {}
    for name, parameter in model.named_parameters():
        name = name.replace("_fsdp_wrapped_module.", "")
        held[name] = {"parameter": whole(parameter.detach(), shapes[name])}
        for group in optimizer.param_groups:
            if any(parameter is p for p in group["params"]):
                state = optimizer.state[parameter]
                held[name] |= {key: group[key] for key in ("lr", "initial_lr", "betas", "eps", "weight_decay")}
                held[name] |= {key: whole(state.get(key), shapes[name]) for key in ("exp_avg", "exp_avg_sq")}
                held[name] |= {"step": max(gathered(float(state.get("step", 0))))}
    if dist.get_rank() == 0:
        if by_trainer:
            state = transformers.TrainerState(global_step=3)
            state.save_to_json(str(folder / case / "trainer_state.json"))
        torch.save(held, folder / f"{case}.pt")


def gathered(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def whole(local: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    """FSDP2 keeps DTensors, FSDP1 a stretch of the flattened parameter on each rank, or nothing."""
    if isinstance(local, DTensor):
        return local.full_tensor()
    stretches = gathered(torch.empty(0) if local is None else local.flatten())
    return torch.cat(stretches).reshape(shape)


if __name__ == "__main__":
    for case in sorted(CASES.keys() - {ALONE}):
        write(Path(sys.argv[1]), case)
    last = dist.get_rank() > 0
    dist.barrier()  # rank 0 holds the store: a rank that still asks it for something would be aborted
    dist.destroy_process_group()
    if not last:
        AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.update(WORLD_SIZE="1", MASTER_PORT=str(int(os.environ["MASTER_PORT"]) + 1))
        write(Path(sys.argv[1]), ALONE)
        dist.destroy_process_group()
