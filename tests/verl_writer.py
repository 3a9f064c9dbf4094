"""Writes checkpoints as verl's actor does: torch's own FSDP, the same calls in the same order, one file a rank.

verl itself needs ray. Of its checkpoint manager these are the calls: `torch.save` of `model.state_dict()` and of
`optimizer.state_dict()`, config.json in `huggingface/`, fsdp_config.json, and lora_train_meta.json for an adapter.

    python verl_writer.py RANK RANKS FOLDER CASE...
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardedStateDictConfig, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy


def write(folder: Path, case: str) -> None:
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    # hybrid: every rank has a replica
    shape, dims = ((ranks, 1), ("ddp", "fsdp")) if case == "hybrid" else ((ranks,), ("fsdp",))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=dims)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(  # odd sizes, which no two ranks share evenly
        vocab_size=17, hidden_size=5, intermediate_size=7, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model: Any = transformers.LlamaForCausalLM(config)
    layers = list(model.model.layers)
    if case == "lora":
        lora = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    if case == "fsdp1":
        policy = ModuleWrapPolicy({type(layers[0])})
        model = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, device_mesh=mesh, device_id=torch.device("cpu"), use_orig_params=False
        )
    else:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        ids = torch.randint(3, 17, (2, 9), generator=generator)
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    actor = folder / "global_step_3" / "actor"
    actor.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    if case == "fsdp1":
        sharded = ShardedStateDictConfig(offload_to_cpu=False)
        FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT, sharded)
    torch.save(model.state_dict(), actor / f"model_world_size_{ranks}_rank_{rank}.pt")
    torch.save(optimizer.state_dict(), actor / f"optim_world_size_{ranks}_rank_{rank}.pt")
    torch.save({"rng": transformers.TrainingArguments}, actor / f"extra_state_world_size_{ranks}_rank_{rank}.pt")
    if rank == 0:
        config.save_pretrained(actor / "huggingface")
        version = {"FSDP_version": 1 if case == "fsdp1" else 2, "world_size": ranks}
        (actor / "fsdp_config.json").write_text(json.dumps(version))
        if case == "lora":
            meta = {"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
            (actor / "lora_train_meta.json").write_text(json.dumps(meta))
    if case == "fsdp1":
        return
    held: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        held[f"{name}|weight"] = parameter.full_tensor().detach().clone()
        for moment in ("exp_avg", "exp_avg_sq") if parameter.requires_grad else ():
            held[f"{name}|{moment}"] = optimizer.state[parameter][moment].full_tensor().clone()
    if rank == 0:
        save_file(held, folder / "held.safetensors")


if __name__ == "__main__":
    distributed.init_process_group(
        "gloo", init_method=f"file://{sys.argv[3]}/store-{sys.argv[2]}", rank=int(sys.argv[1]),
        world_size=int(sys.argv[2]),
    )  # fmt: skip
    for name in sys.argv[4:]:
        write(Path(sys.argv[3]) / f"{name}-{sys.argv[2]}", name)
    distributed.destroy_process_group()
