"""Runs of real trainers with the callback and without, and everything in which they could differ.

    torchrun --nproc-per-node=2 tests/callback_runs.py FOLDER

writes what runs of two processes came to into `FOLDER`, a file for each rank: without the callback, with it, and with
one whose first process fails in the middle.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

import trl_runs
from entropy_probe.integrations.transformers import EntropyProbeCallback

PROMPTS = [f"{a}+{b}=" for a in range(6) for b in range(6)]
STEPS = 20
PROBE: dict[str, Any] = {"every": 7, "max_share": 1.0, "config": {"generation": {"num_return_sequences": 2}}}

AT = 5
Found = dict[str, Any]


class Watch(transformers.TrainerCallback):
    """After every step: θ, moments, generators, modes and gradients; and what was read, generated and logged. `at_step`
    is called at the beginning of step `AT`, by which something has gone wrong."""

    def __init__(self, trainer: Any, at_step: Callable[[], object] | None) -> None:
        self.trainer, self.found, self.at_step = trainer, list[Any](), at_step
        inner = trainer.training_step

        def step(model: Any, inputs: Any, *args: Any) -> Any:
            rows = inputs if isinstance(inputs, list) else [{k: _plain(v) for k, v in inputs.items()}]
            self.found.append(("batch", _digest(repr(rows))))
            return inner(model, inputs, *args)

        trainer.training_step = step
        if hasattr(trainer, "_generate_and_score_completions"):
            generate = trainer._generate_and_score_completions

            def generated(inputs: Any) -> Any:
                made = generate(inputs)
                self.found.append(("completions", _digest(_plain(made["completion_ids"]))))
                return made

            trainer._generate_and_score_completions = generated

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.at_step is not None and state.global_step == AT:
            self.at_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        gradients = [_plain(p.grad) for p in self.trainer.model.parameters() if p.grad is not None]
        self.found.append(("gradients", _digest(repr(gradients))))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append((state.global_step, everything(self.trainer), control.should_log, control.should_save))


def everything(trainer: Any) -> Found:
    """What a step leaves, as digests."""
    model, optimizer = trainer.model, trainer.optimizer
    modules = dict(model.named_modules())
    return {
        "theta": _digest(repr({name: _plain(p) for name, p in model.state_dict().items()})),
        "moments": _digest(repr(_plain(optimizer.state_dict()))),
        "random of Python": _digest(random.getstate()),
        "random of NumPy": _digest([repr(part) for part in map(_listed, np.random.get_state())]),
        "random of torch": _digest(_plain(torch.get_rng_state())),
        "modes": _digest(repr({name: part.training for name, part in modules.items()})),
        "hooks": sum(len(getattr(part, h)) for part in modules.values() for h in vars(part) if h.endswith("_hooks")),
        "grad": [p.grad is None for p in model.parameters()],
        "needs": [p.requires_grad for p in model.parameters()],
        "config": repr(model.config.to_dict()),
        "checkpointing": [getattr(part, "gradient_checkpointing", None) for part in modules.values()],
        "torch": (torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"),
                  torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
    }  # fmt: skip


def _listed(part: Any) -> Any:
    return part.tolist() if isinstance(part, np.ndarray) else part


def _plain(value: Any) -> Any:
    """Tensors as bytes of their numbers, at any depth; of one that is spread, this process's part."""
    value = value.to_local() if hasattr(value, "to_local") else value
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    if isinstance(value, dict):
        return {key: _plain(of) for key, of in value.items()}
    return [_plain(of) for of in value] if isinstance(value, list | tuple) else value


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def model(seed: int = 0) -> Any:
    made = trl_runs.tiny_model(seed)
    made.config.attention_dropout = 0.1  # so that a step draws random numbers of its own
    for layer in made.model.layers:
        layer.self_attn.attention_dropout = 0.1
    return made


OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 4},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "ddp": {"per_device_train_batch_size": 4},
}


def grpo(folder: Path, case: str, **options: Any) -> Any:
    """TRL's trainer on the tiny model."""
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": STEPS,
        "save_strategy": "no",
        "logging_steps": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "report_to": [],
        "seed": 5,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    adapter = None
    if case == "lora":
        targets = ["q_proj", "v_proj", "down_proj"]
        adapter = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    return GRPOTrainer(
        model=model(),
        reward_funcs=trl_runs.reward,
        args=GRPOConfig(**settings | OPTIONS.get(case, {}) | options),
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
        processing_class=copy.deepcopy(trl_runs.tokenizer()),
        peft_config=adapter,
    )


def supervised(folder: Path, case: str, **options: Any) -> Any:
    """`Trainer` itself, on next-token prediction."""
    ids = torch.randint(2, 40, (24, 9), generator=torch.Generator().manual_seed(3)).tolist()
    settings: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": STEPS, "save_strategy": "no",
        "logging_steps": 3, "learning_rate": 1e-2, "report_to": [], "seed": 5, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    return transformers.Trainer(
        model=model(),
        args=transformers.TrainingArguments(**settings | options),
        train_dataset=Dataset.from_list([{"input_ids": row, "labels": row} for row in ids]),
        processing_class=trl_runs.tokenizer(),
        data_collator=transformers.default_data_collator,
    )


def run(
    folder: Path,
    case: str = "full",
    probe: dict[str, Any] | None = None,
    make: Callable[..., Any] = grpo,
    resume: str | None = None,
    at_step: Callable[[], object] | None = None,
    **options: Any,
) -> tuple[Found, Any]:
    """Everything in which a run with a probe could differ from the same without, and the trainer."""
    random.seed(1)
    np.random.seed(1)
    trainer = make(folder, case, **options)
    watch = Watch(trainer, at_step)
    trainer.add_callback(watch)
    if probe is not None:
        trainer.add_callback(EntropyProbeCallback(trainer, **probe))
    trainer.train(resume_from_checkpoint=resume)
    # with the seconds that they took left out: another run takes others
    timed = ("step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    logs = [
        {k: v for k, v in entry.items() if k not in timed}
        for entry in trainer.state.log_history
        if not any(key.startswith("probe/") for key in entry)
    ]
    return {"steps": watch.found, "logs": logs}, trainer


def logged(trainer: Any) -> list[dict[str, Any]]:
    """What the callback logged."""
    return [entry for entry in trainer.state.log_history if "probe/entropy" in entry]


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    prompts, found = folder / "prompts.jsonl", {}
    for name in ("without", "with", "fails"):
        own = {**PROBE, "folder": folder / name} if name != "without" else None
        if name == "fails" and own is not None:
            own["prompts"] = prompts
            if int(os.environ["RANK"]) == 0:
                prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
        at_step = partial(prompts.unlink, missing_ok=True) if name == "fails" else None
        found[name], trainer = run(folder / "run", "ddp", own, at_step=at_step)
        found[f"{name}, logged"] = logged(trainer)
    torch.save(found, folder / f"rank-{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads, which outlive the group, abort one interpreter in ten while it shuts down


if __name__ == "__main__":
    main()
