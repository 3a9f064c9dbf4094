"""Healthy checkpoints of many kinds, as their trainers leave them, and what the one-command run says of each.

    python tests/healthy.py [SEEDS]

Nothing is given but the checkpoint: no prompts, no reward, no configuration. A run passes where no criterion fails and
none is inconclusive. `collapsed` has one response for every prompt, and must end as inconclusive.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import chat
import forked
import models as tiny
import verl_writer
from entropy_probe import ProbeConfig, run_probe
from entropy_probe.stages.responses.tasks import dataset_prompts
from entropy_probe_checks.criteria import CRITERIA
from test_dcp import save as save_dcp


def model_of(architecture: str, own: Any, seed: int) -> Any:
    torch.manual_seed(seed)
    config, positions = tiny.CONFIGS[architecture](), 128 if architecture == "gpt2" else 512
    ids = {f"{name}_token_id": getattr(own, f"{name}_token_id") for name in ("bos", "eos")}
    config.update({"vocab_size": len(own), "pad_token_id": None, "max_position_embeddings": positions, **ids})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def supervised(
    architecture: str, folder: Path, seed: int, *, dtype: torch.dtype = torch.float32, steps: int = 3
) -> Path:
    """All parameters, after a few steps of AdamW on text."""
    own = chat.tokenizer(None)
    model = model_of(architecture, own, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    tiny.train_steps(model, optimizer, steps, seed)
    own.save_pretrained(folder)
    return tiny.save_checkpoint(folder, model.to(dtype), optimizer)


def adapter(architecture: str, folder: Path, seed: int, **lora: Any) -> Path:
    own, base = chat.tokenizer(None), folder.parent / "base"
    model_of(architecture, own, seed).save_pretrained(base)
    model = tiny.add_adapter(
        transformers.AutoModelForCausalLM.from_pretrained(base), architecture, seed=seed + 1, **lora
    )
    model.peft_config["default"].base_model_name_or_path = str(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tiny.train_steps(model, optimizer, seed=seed)
    own.save_pretrained(folder)
    return tiny.save_checkpoint(folder, model, optimizer)


def grpo(folder: Path, seed: int) -> Path:
    """By TRL, on messages."""
    chat.run_of_trl(folder, seed=seed)
    return folder / "checkpoint-1"


def grpo_adapter(folder: Path, seed: int) -> Path:
    from trl_runs import train

    return train(folder, lora=True, seed=seed).checkpoint(2)


def in_dcp(folder: Path, seed: int) -> Path:
    own = chat.tokenizer(None)
    model = model_of("llama", own, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tiny.train_steps(model, optimizer, seed=seed)
    save_dcp(folder, "nested", model, optimizer)
    own.save_pretrained(folder)
    return folder


def in_verl(folder: Path, seed: int) -> Path:
    folder.mkdir()
    forked.python(verl_writer.__file__, "0", "1", folder, "full").check_returncode()
    actor = folder / "full-1" / "global_step_3" / "actor"
    letters(17).save_pretrained(actor / "huggingface")
    return actor


def in_zero(folder: Path, seed: int) -> Path:
    data = Path(__file__).parent / "data" / "deepspeed" / "checkpoints.tar.xz"
    with tarfile.open(data) as archive:
        archive.extractall(folder, filter="data")
    case = folder / ("2-fp32-1", "3-bf16-lora-2", "1-bf16-2")[seed % 3]
    config = transformers.AutoConfig.from_pretrained(next(case.parent.glob(f"{case.name}/**/config.json")).parent)
    letters(config.vocab_size).save_pretrained(case)
    return case


def letters(size: int) -> Any:
    """As many tokens as a tiny model has: padding, BOS, EOS, and single characters."""
    names = ["<p>", "<b>", "<e>", *"0123456789+-? aehistwW"][:size]
    names += [chr(0x4E00 + n) for n in range(size - len(names))]
    plain = Tokenizer(models.WordLevel({name: k for k, name in enumerate(names)}, unk_token="0"))  # noqa: S106
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    plain.decoder = decoders.Fuse()
    named = {"bos_token": "<b>", "eos_token": "<e>", "pad_token": "<p>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **named)


def collapsed(folder: Path, seed: int) -> Path:
    """A policy that was trained until it says one thing, whatever it is asked."""
    own = chat.tokenizer(None)
    model = model_of("llama", own, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    answer = [*own("No.").input_ids, own.eos_token_id]
    questions = [own(prompt.text).input_ids for prompt in dataset_prompts("arithmetic", "train")[:256]]
    for step in range(400):
        some = [question for question in questions[step % 16 :: 16] if len(question) == len(questions[step % 16])]
        ids = torch.tensor([[*question, *answer] for question in some])
        optimizer.zero_grad()
        logits = model(ids).logits[:, -len(answer) - 1 : -1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -len(answer) :].flatten()).backward()
        optimizer.step()
    own.save_pretrained(folder)
    return tiny.save_checkpoint(folder, model, optimizer)


KINDS: dict[str, Callable[[Path, int], Path]] = {
    "GPT-2, 128 positions": partial(supervised, "gpt2"),
    "Llama, bfloat16": partial(supervised, "llama", dtype=torch.bfloat16),
    "Llama, 30 steps": partial(supervised, "llama", steps=30),
    "Qwen2, tied": partial(supervised, "qwen2"),
    "Qwen3": partial(supervised, "qwen3"),
    "Mistral": partial(supervised, "mistral"),
    "Gemma2": partial(supervised, "gemma2"),
    "LoRA on Llama": partial(adapter, "llama"),
    "LoRA on GPT-2": partial(adapter, "gpt2"),
    "DoRA on Qwen2": partial(adapter, "qwen2", use_dora=True),
    "GRPO by TRL, a chat model": grpo,
    "GRPO by TRL, LoRA": grpo_adapter,
    "DCP": in_dcp,
    "verl": in_verl,
    "ZeRO": in_zero,
    "collapsed": collapsed,
}


def statuses(folder: Path, kind: str, seed: int) -> tuple[dict[str, str], list[str]]:
    """Of the criteria that are neither passed nor not applicable; and what is said first."""
    place = folder / f"{list(KINDS).index(kind)}-{seed}"
    place.mkdir()
    config = ProbeConfig.from_mapping({"batch": {"seed": seed}})
    report = run_probe(KINDS[kind](place / "ckpt", seed), config)
    found = {name: criterion(report) for name, criterion in CRITERIA.items()}
    odd = {n: f"{v.status} {v.value} {v.hint[:90]}" for n, v in found.items() if v.status in ("fail", "inconclusive")}
    return odd, report.doubts


def main(seeds: int) -> None:
    passed = 0
    with tempfile.TemporaryDirectory() as place:
        for kind in KINDS:
            for seed in range(seeds):
                odd, doubts = statuses(Path(place), kind, seed)
                passed += not odd
                print(f"{kind}, seed {seed}: {odd or 'passes'}", flush=True)
                if seed == 0:
                    print("   ", "; ".join(doubts), flush=True)
    print(f"{passed} of {len(KINDS) * seeds} pass")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
