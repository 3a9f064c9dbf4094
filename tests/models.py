"""Tiny random checkpoints, made by the real libraries: transformers configurations, peft adapters, torch's AdamW."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from entropy_probe.config import ProbeConfig
from entropy_probe.model.forward import bind
from entropy_probe.stages.gradients.units import units_of
from entropy_probe.stages.responses.sampling import Stream, sample
from entropy_probe.stages.share import Share

VOCABULARY = 67
FLOAT64 = {"dtype": "float64"}
EOS = 2
COMMON = {"vocab_size": VOCABULARY, "eos_token_id": EOS, "bos_token_id": 1, "pad_token_id": 0}
ROPE = {
    **COMMON,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**ROPE),
    "qwen2": lambda: transformers.Qwen2Config(**ROPE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**ROPE),
    "mistral": lambda: transformers.MistralConfig(**ROPE, sliding_window=8),
    "gemma2": lambda: transformers.Gemma2Config(**ROPE, query_pre_attn_scalar=6, sliding_window=8),
    "gpt2": lambda: transformers.GPT2Config(
        **COMMON, n_embd=24, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=True
    ),
}
_TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"]}


def tiny_model(architecture: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model with weights large enough that attention, norms and entropies are far from trivial."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def add_adapter(model: Any, architecture: str, seed: int = 1, **lora: Any) -> Any:
    """A LoRA adapter whose lora_B is not zero, as after training."""
    torch.manual_seed(seed)
    targets = _TARGETS.get(architecture, ["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def random_rollouts(path: Path, *, prompts: int, responses: int, seed: int, truncate: bool = True) -> Path:
    """A rollouts file of random tokens: prompts and responses of different length, some without EOS."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    lines = []
    for _ in range(prompts):
        group = [tokens(1, 8) for _ in range(responses)]
        group = [g if truncate and i == 0 else [*g, EOS] for i, g in enumerate(group)]
        rewards = torch.rand(responses, generator=generator).tolist()
        lines.append(json.dumps({"prompt_ids": tokens(2, 7), "response_ids": group, "rewards": rewards}))
    path.write_text("\n".join(lines) + "\n")
    return path


def alone(bound: Any, rollouts: Any, config: ProbeConfig | None = None) -> Share:
    """The share of a process that is alone: all of the batch."""
    return Share.of(rollouts, units_of(bound, rollouts, config or ProbeConfig()))


def sampled_rollouts(path: Path, model: Any, *, prompts: int, responses: int, seed: int) -> Path:
    """A rollouts file of the model's own responses to random prompts, with random rewards."""
    bound, generator = bind(model), torch.Generator().manual_seed(seed)
    given = [
        torch.randint(
            3, VOCABULARY, (int(torch.randint(2, 7, (1,), generator=generator)),), generator=generator
        ).tolist()
        for _ in range(prompts)
    ]
    drawn = sample(
        bound,
        given,
        num_return_sequences=responses,
        temperature=1.0,
        top_p=1.0,
        max_new_tokens=8,
        eos_ids=[EOS],
        gen_batch_size=32,
        noise=Stream.of(seed, len(given)),
    )
    lines = [
        {
            "prompt_ids": prompt,
            "response_ids": drawn[n * responses : (n + 1) * responses],
            "rewards": torch.rand(responses, generator=generator).tolist(),
        }
        for n, prompt in enumerate(given)
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


def train_steps(model: Any, optimizer: torch.optim.Optimizer, steps: int = 3, seed: int = 5) -> None:
    """A few real steps on random text, with dropout off, so that the moments are what the optimizer made of them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(3, VOCABULARY, (4, 9), generator=generator)
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()


def save_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer, base: Path | None = None) -> Path:
    """`save_pretrained` + optimizer.pt; the base model of an adapter goes to `base`."""
    if base is not None:
        model.get_base_model().config.save_pretrained(base)
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder


def full_checkpoint(
    folder: Path, architecture: str, optimizer: type[torch.optim.Adam] = torch.optim.AdamW, **settings: Any
) -> Path:
    """A full fine-tune with two groups, as the Trainer makes them: decay for matrices, none for norms and biases."""
    model = tiny_model(architecture)
    trainer = transformers.Trainer(model, transformers.TrainingArguments(str(folder), use_cpu=True, report_to="none"))
    decayed = set(trainer.get_decay_parameter_names(model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if n in decayed], "weight_decay": 0.1},
        {"params": [p for n, p in model.named_parameters() if n not in decayed], "weight_decay": 0.0},
    ]
    stepped = optimizer(groups, **{"lr": 1e-3, **settings})
    train_steps(model, stepped)
    return save_checkpoint(folder, model, stepped)


def adapter_checkpoint(folder: Path, architecture: str, adamw: dict[str, Any] | None = None, **lora: Any) -> Path:
    """An adapter over `folder/../base`, one group."""
    base = folder.parent / f"{folder.name}-base"
    model = tiny_model(architecture)
    model.save_pretrained(base)
    model = add_adapter(transformers.AutoModelForCausalLM.from_pretrained(base), architecture, **lora)
    model.peft_config["default"].base_model_name_or_path = base.name
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, **{"lr": 1e-3, "weight_decay": 0.05, **(adamw or {})})
    train_steps(model, optimizer)
    return save_checkpoint(folder, model, optimizer)
