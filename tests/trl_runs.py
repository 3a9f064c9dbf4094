"""Runs of TRL's own GRPOTrainer on a tiny model: batches, the gradients that Adam was given, checkpoints."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from entropy_probe.trl import CaptureBatch

WORDS = [chr(c) for c in range(97, 123)] + list("0123456789+-=?")
EOS, PAD = "<e>", "<p>"


def tokenizer() -> Any:
    vocabulary = {word: k for k, word in enumerate([PAD, EOS, *WORDS])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    plain.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token=EOS, pad_token=PAD, padding_side="left"
    )


def tiny_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
    return model


def reward(completions: list[str], **_: Any) -> list[float]:
    """Letters before m, less a little for every token."""
    return [sum(c < "m" for c in text) / (len(text) + 1) - 0.01 * len(text) for text in completions]


def probe_reward(response: str, gold: str | None) -> float:
    """The same, for responses that the probe samples."""
    return reward([response])[0]


class _Watch(transformers.TrainerCallback):
    """The gradient after clipping, at every step."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.gradients.append({n: p.grad.detach().clone() for n, p in trained.items() if p.grad is not None})


@dataclass(frozen=True)
class Run:
    folder: Path
    gradients: list[dict[str, Tensor]]
    """Of step k: what Adam was given after checkpoint k."""
    logs: list[dict[str, Any]]

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def base(self, step: int) -> Path | None:
        """The base model of an adapter."""
        is_adapter = (self.checkpoint(step) / "adapter_config.json").is_file()
        return self.folder / "base" if is_adapter else None

    def batch(self, step: int) -> Path:
        return self.folder / "batches" / f"after-{step}.jsonl"


def train(
    folder: Path,
    *,
    lora: bool = False,
    steps: int = 3,
    seed: int = 0,
    dropout: float = 0.0,
    rates: tuple[float, float] | None = None,
    capture: bool = True,
    rloo: bool = False,
    **options: Any,
) -> Run:
    """A run that saves every step. `rates`: learning rates of matrices and of vectors."""
    folder.mkdir(parents=True)
    base, own = folder / "base", tokenizer()
    model = tiny_model(seed)
    model.save_pretrained(base)
    own.save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": steps,
        "save_steps": 1,
        "save_strategy": "steps",
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "seed": 5,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    } | options
    prompts = [{"prompt": f"{a}+{b}="} for a in range(6) for b in range(6)]
    adapter = None
    if lora:
        targets = ["q_proj", "v_proj", "down_proj"]
        adapter = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")
    trainer = (RLOOTrainer if rloo else GRPOTrainer)(
        model=model,
        reward_funcs=reward,
        args=(RLOOConfig if rloo else GRPOConfig)(**settings),
        train_dataset=Dataset.from_list(prompts),
        processing_class=copy.deepcopy(own),
        peft_config=adapter,
        optimizers=(None if rates is None else _two_rates(model, *rates), None),
    )
    watch = _Watch()
    trainer.add_callback(watch)
    if capture:
        trainer.add_callback(CaptureBatch(trainer, folder / "batches"))
    trainer.train()
    return Run(folder, watch.gradients, trainer.state.log_history)


def _two_rates(model: Any, of_matrices: float, of_vectors: float) -> torch.optim.AdamW:
    groups = [[p for p in model.parameters() if (p.dim() > 1) is matrix] for matrix in (True, False)]
    rates = zip(groups, (of_matrices, of_vectors), strict=True)
    return torch.optim.AdamW([{"params": group, "lr": lr} for group, lr in rates], lr=of_matrices)
