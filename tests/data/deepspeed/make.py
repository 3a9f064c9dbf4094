"""Make DeepSpeed's checkpoints, and beside each what its live engine held: moments, masters, hyper-parameters.

    DS_ACCELERATOR=cpu python -m torch.distributed.run --standalone --nproc_per_node RANKS make.py OUT CASE...

A CASE is STAGE-DTYPE, such as 2-bf16 (or fp32, fp16), and goes to OUT/CASE-RANKS. With `-frozen` the embedding is not
trained, with `-lora` an adapter over OUT/CASE-RANKS/base is. make.sh made checkpoints.tar.xz so, with DeepSpeed 0.19.8,
torch 2.13, transformers 5.23 and peft 0.21.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file


def make(out: Path, stage: int, dtype: str, options: set[str]) -> None:
    rank = torch.distributed.get_rank()
    frozen, lora = "frozen" in options, "lora" in options
    # Odd sizes, so that every kind of padding is there.
    model_config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=5, intermediate_size=7, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=16, tie_word_embeddings=not frozen,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(model_config)
    model.model.embed_tokens.weight.requires_grad_(not frozen)
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        (model.save_pretrained(out / "base") if lora else model_config.save_pretrained(out))
    torch.distributed.barrier()
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"]))
        model.peft_config["default"].base_model_name_or_path = "base"
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 1.0,
    }
    if dtype != "fp32":
        config[dtype] = {"enabled": True} | ({"initial_scale_power": 4} if dtype == "fp16" else {})
        get_accelerator().is_fp16_supported = lambda: True  # torch computes it on any CPU
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_group = {name: int(p.ndim < 2) for name, p in trained.items()}
    groups = [
        {"params": [trained[n] for n in trained if not of_group[n]], "weight_decay": 0.1},
        {"params": [trained[n] for n in trained if of_group[n]], "weight_decay": 0.0, "lr": 2e-3},
    ][: 1 if lora else 2]
    adamw = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=config)
    generator = torch.Generator().manual_seed(3 + rank)
    for _ in range(3):
        ids = torch.randint(3, 17, (1, 9), generator=generator)
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    engine.save_checkpoint(str(out), exclude_frozen_parameters=lora)

    if stage < 3:  # DeepSpeed linked them after the first group's first step, when the second had no state
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    held: dict[str, torch.Tensor] = {}
    hyper: dict[str, Any] = {}
    (step,) = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
    for name, parameter in engine.module.named_parameters():
        if name in of_group:
            held[f"{name}|master"] = safe_get_full_fp32_param(parameter).clone()
            for moment in ("exp_avg", "exp_avg_sq"):
                held[f"{name}|{moment}"] = safe_get_full_optimizer_state(parameter, moment).clone()
            group = engine.optimizer.param_groups[of_group[name]]
            hyper[name] = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
            hyper[name]["step"] = step
        elif not lora:  # the base model's are not in the checkpoint
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                held[f"{name}|frozen"] = parameter.detach().clone()
    if lora:
        with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
            if rank == 0:
                engine.module.save_pretrained(out)
    if rank == 0:
        save_file(held, out / "held.safetensors")
        (out / "held.json").write_text(json.dumps(hyper))


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    for case in sys.argv[2:]:
        stage, dtype, *options = case.split("-")
        out = Path(sys.argv[1]) / f"{case}-{torch.distributed.get_world_size()}"
        make(out, int(stage), dtype, set(options))
