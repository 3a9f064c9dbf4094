"""The tiny checkpoints on which faults are planted, each with an E and a U batch that was sampled from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import models
from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe_checks.criteria import CRITERIA

MODELS: dict[str, Callable[[], Any]] = {
    **models.CONFIGS,
    "phi3": lambda: transformers.Phi3Config(**_LLAMA_LIKE),
    "olmo2": lambda: transformers.Olmo2Config(**_LLAMA_LIKE),
    "stablelm": lambda: transformers.StableLmConfig(**_LLAMA_LIKE),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        **models.COMMON,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **_LLAMA_LIKE, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager"
    ),
}
_LLAMA_LIKE = {key: value for key, value in models.ROPE.items() if key != "head_dim"}
TARGETS: dict[str, list[str]] = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "down_proj"],
    "mixtral": ["q_proj", "v_proj", "o_proj"],
}


def sampled_from(
    path: Path,
    model: Any,
    *,
    prompts: int,
    responses: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    reported: bool = False,
) -> Path:
    """A rollouts file drawn token by token from softmax(logits/temperature) cut to top_k and to its nucleus; with
    `reported`, the log-probabilities that the engine saw. Some responses are cut short before an EOS."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    def response(prompt: list[int]) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        logps: list[float] = []
        for _ in range(number(2, 9)):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].double() / temperature
            ranked, order = logits.softmax(-1).sort(descending=True)
            ranked[(ranked.cumsum(-1) - ranked >= top_p) | (torch.arange(len(ranked)) >= (top_k or len(ranked)))] = 0.0
            ranked = ranked / ranked.sum()
            k = int(torch.multinomial(ranked, 1, generator=generator))
            tokens.append(int(order[k]))
            logps.append(float(ranked[k].log()))
            if tokens[-1] == models.EOS:
                break
        return tokens, logps

    lines = []
    for _ in range(prompts):
        prompt = torch.randint(3, models.VOCABULARY, (number(2, 7),), generator=generator).tolist()
        drawn = [response(prompt) for _ in range(responses)]
        line = {
            "prompt_ids": prompt,
            "response_ids": [tokens for tokens, _ in drawn],
            "rewards": torch.rand(responses, generator=generator).tolist(),
        }
        lines.append(json.dumps(line | ({"logprobs": [logps for _, logps in drawn]} if reported else {})))
    path.write_text("\n".join(lines) + "\n")
    return path


def full(architecture: str, folder: Path, seed: int = 0, layers: int = 1, **adam: Any) -> Path:
    """Every parameter trained, two groups; `second_lr` is the second's learning rate over the first's."""
    optimizer, ratio = adam.pop("optimizer", torch.optim.AdamW), adam.pop("second_lr", 1.0)
    model = _model(architecture, seed, layers)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "lr": ratio * 1e-5},
    ]
    stepped = optimizer(groups, **{"lr": 1e-5, "betas": (0.8, 0.99), "eps": 1e-7, **adam})
    models.train_steps(model, stepped)
    return models.save_checkpoint(folder, model, stepped)


def adapter(architecture: str, folder: Path, seed: int = 0, layers: int = 1, **lora: Any) -> Path:
    """LoRA or DoRA over a base model that lies beside it."""
    from peft import LoraConfig, get_peft_model

    base = folder.parent / f"{folder.name}-base"
    _model(architecture, seed, layers).save_pretrained(base)
    targets = TARGETS.get(architecture, ["q_proj", "v_proj", "down_proj"])
    config = LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **lora)
    torch.manual_seed(seed + 1)
    model: Any = get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.peft_config["default"].base_model_name_or_path = base.name
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.05)
    models.train_steps(model, optimizer)
    return models.save_checkpoint(folder, model, optimizer)


def with_tokenizer(folder: Path, seed: int = 0) -> Path:
    """A Llama that can be sampled: the demo's tokenizer, and 30 of its tokens end a response."""
    from entropy_probe.demo import checkpoint_path

    base = checkpoint_path().parent / "base"
    torch.manual_seed(seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    changes = {
        "num_hidden_layers": 1,
        "vocab_size": len(tokenizer),
        "eos_token_id": list(range(30)),
        "pad_token_id": None,
    }
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**(_LLAMA_LIKE | changes)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        model.lm_head.weight.mul_(4)  # less than half of the tokens are likely anywhere
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    models.train_steps(model.eval(), optimizer)
    tokenizer.save_pretrained(folder)
    return models.save_checkpoint(folder, model, optimizer)


def _model(architecture: str, seed: int, layers: int) -> Any:
    """A random model without a padding token, which torch's embedding gives no gradient although it may be sampled."""
    torch.manual_seed(seed)
    config = MODELS[architecture]()
    config.pad_token_id = None
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def some_reward(response: str, gold: str | None) -> float:
    """A number that differs from response to response."""
    return sum(map(ord, response)) % 17 / 17


def reward_by_gold(response: str, gold: str | None) -> float:
    """A number that differs from response to response and from question to question."""
    return some_reward(response + str(gold), gold)


@dataclass(frozen=True)
class Subject:
    """How a checkpoint is made, with what its responses are sampled (`None`: by the probe), and its configuration."""

    what: str
    make: Callable[..., Path]
    sampling: dict[str, Any] | None = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    one_batch: bool = False
    uneven: bool = False
    captured: bool = False


def by_trl(folder: Path, seed: int = 0) -> Path:
    """A run of TRL's own trainer, with the batch of every step; gradients are clipped to half."""
    from trl_runs import train

    options = {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 12}
    return train(folder, steps=3, seed=seed, num_generations=3, **options).checkpoint(2)


def chatting(folder: Path, seed: int = 0) -> Path:
    from chat import run_of_trl

    run_of_trl(folder, seed=seed)
    return folder / "checkpoint-1"


def cut(file: Path) -> None:
    """Groups of 1, 2, 3, 1, … responses."""
    lines = map(json.loads, file.read_text().splitlines())
    own = [
        {
            key: value[: 1 + n % 3] if isinstance(value, list) and key != "prompt_ids" else value
            for key, value in of.items()
        }
        for n, of in enumerate(lines)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in own))


def _sampled_with(reward: str, **batch: Any) -> dict[str, Any]:
    """The configuration of responses that the probe samples, with a reward of this file."""
    return {
        "batch": {"num_prompts": 6, "num_update_prompts": 6, "reward": f"faults.subjects:{reward}", **batch},
        "generation": {"max_new_tokens": 12, "num_return_sequences": 6, "temperature": 0.7},
    }


SUBJECTS: dict[str, Subject] = {
    "llama": Subject("Llama, all parameters, two groups", partial(full, "llama")),
    "gpt2": Subject("GPT-2: learned positions, tied embeddings, dropout 0.1", partial(full, "gpt2")),
    "qwen2": Subject("Qwen2: tied embeddings", partial(full, "qwen2")),
    "lora": Subject("LoRA on Llama", partial(adapter, "llama")),
    "dora": Subject("DoRA on Llama", partial(adapter, "llama", use_dora=True)),
    "amsgrad": Subject(
        "AdamW with AMSGrad whose maximum is above its second moment",
        partial(full, "llama", amsgrad=True, betas=(0.8, 0.5)),
    ),
    "coupled": Subject("Adam: the decay goes through the moments", partial(full, "llama", optimizer=torch.optim.Adam)),
    "two lrs": Subject("a second group with a fifth of the learning rate", partial(full, "llama", second_lr=0.2)),
    "temperature": Subject(
        "temperature 0.7", partial(full, "llama"), {"temperature": 0.7}, {"generation": {"temperature": 0.7}}
    ),
    "nucleus": Subject("top_p 0.8", partial(full, "llama"), {"top_p": 0.8}, {"generation": {"top_p": 0.8}}),
    "sampled": Subject(
        "responses sampled by the probe itself",
        with_tokenizer,
        None,
        _sampled_with("some_reward"),
    ),
    "grown": Subject(
        "sampled by the probe, with prompts added to E until ten",
        with_tokenizer,
        None,
        _sampled_with("some_reward", target_se=1e-9, max_prompts=10),
    ),
    "one batch": Subject("one batch serves as both", partial(full, "llama"), one_batch=True),
    "sampled tag": Subject(
        "responses sampled by the probe itself, rewarded by what their prompt asks for",
        with_tokenizer,
        None,
        _sampled_with("reward_by_gold"),
    ),
    "trl": Subject("a step of TRL's own trainer, with its own batch", by_trl, captured=True),
    "uneven": Subject("groups of 1 to 3 responses in the update batch", partial(full, "llama"), uneven=True),
    "chat": Subject(
        "a chat model that TRL trained, with its own questions and reward",
        chatting,
        None,
        {
            "batch": {"num_prompts": 6, "num_update_prompts": 6, "dataset": "chat:questions", "reward": "chat:reward"},
            "generation": {"num_return_sequences": 4},
        },
    ),
    "top_k": Subject("an engine that sampled with its default top_k 50", partial(full, "llama"), {"top_k": 50}),
}


class Bench:
    """The subjects in one folder: each made at most once, and each clean run done at most once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[tuple[str, int], tuple[Path, Path | None, Path | None]] = {}
        self._clean: dict[str, dict[str, str]] = {}

    def files(self, name: str, seed: int = 0, subject: Subject | None = None) -> tuple[Path, Path | None, Path | None]:
        """(checkpoint, E batch, U batch)."""
        subject = subject or SUBJECTS[name]
        if (name, seed) not in self._made:
            folder = self._folder / f"{name}-{seed}".replace(" ", "-")
            folder.mkdir()
            checkpoint = subject.make(folder / "ckpt", seed=seed)
            self._made[name, seed] = checkpoint, None, None
            if subject.captured:
                e, u = (checkpoint.parent / "batches" / f"after-{step}.jsonl" for step in (0, 2))
                self._made[name, seed] = checkpoint, e, u
                return self._made[name, seed]
            if subject.sampling is None:
                return self._made[name, seed]
            model = load_checkpoint(checkpoint).model
            e = sampled_from(
                folder / "e.jsonl", model, prompts=5, responses=3, seed=10 * seed + 1, reported=True, **subject.sampling
            )
            u = sampled_from(folder / "u.jsonl", model, prompts=6, responses=3, seed=10 * seed + 2, **subject.sampling)
            if subject.uneven:
                cut(u)
            self._made[name, seed] = checkpoint, e, u
        return self._made[name, seed]

    def run(self, name: str, config: dict[str, Any], seed: int = 0, subject: Subject | None = None) -> ProbeReport:
        subject = subject or SUBJECTS[name]
        checkpoint, e, u = self.files(name, seed, subject)
        u = None if subject.one_batch else u
        return run_probe(checkpoint, ProbeConfig.from_mapping(_merged(subject.config, config)), e, u)

    def clean(self, name: str, config: dict[str, Any]) -> dict[str, str]:
        """criterion → status without a fault."""
        key = json.dumps([name, config], sort_keys=True)
        if key not in self._clean:
            self._clean[key] = statuses(self.run(name, config))
        return self._clean[key]


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return one | {k: _merged(one.get(k, {}), v) if isinstance(v, dict) else v for k, v in other.items()}


def statuses(report: ProbeReport) -> dict[str, str]:
    """criterion → status."""
    return {name: criterion(report).status for name, criterion in CRITERIA.items()}
