"""Batches of policies that have collapsed, or nearly, sent through every criterion: none may be red.

    python tests/collapsed.py [COUNT]

A batch is drawn: a model, how sure of itself its policy is, what the responses have in common, and their rewards. The
responses are the policy's own.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import models
from entropy_probe import ProbeConfig, load_checkpoint, run_probe
from entropy_probe_checks.criteria import CRITERIA
from faults.subjects import MODELS, TARGETS

POLICIES = ("open", "sharp", "sharper", "in thousands", "trained", "trained on")
KINDS = ("sampled", "equal", "one alive", "one token", "one short")
REWARDS = ("drawn", "of a prompt", "equal")
_SHARPER = {"sharp": 10.0, "sharper": 100.0, "in thousands": 1000.0}
_STEPS = {"trained": 40, "trained on": 150}
_LONGEST = 8


def policy(folder: Path, *, lora: bool, of: str, architecture: str = "llama") -> Path:
    """A checkpoint whose logits are as large as `of` says, or that was trained to repeat one token."""
    torch.manual_seed(0)
    config = MODELS[architecture]()
    config.pad_token_id, config.num_hidden_layers = None, 1
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        model.lm_head.weight.mul_(_SHARPER.get(of, 1.0))
    if of in _STEPS:
        _trained(model, _STEPS[of])
    model.eval()
    if lora:
        from peft import LoraConfig, get_peft_model

        base = folder.parent / f"{folder.name}-base"
        model.save_pretrained(base)
        targets = TARGETS.get(architecture, ["q_proj", "v_proj", "down_proj"])
        adapter = LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM")
        model = get_peft_model(model, adapter)
        model.peft_config["default"].base_model_name_or_path = str(base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.1)
    models.train_steps(model, optimizer)
    return models.save_checkpoint(folder, model, optimizer)


def _trained(model: Any, steps: int) -> None:
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(3)
    for _ in range(steps):
        asked = torch.randint(3, models.VOCABULARY, (16, 5), generator=generator)
        ids = torch.cat([asked, torch.tensor([7, 7, 7, 7, models.EOS]).repeat(16, 1)], 1)
        optimizer.zero_grad()
        logits = model(ids).logits[:, 4:-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 5:].flatten()).backward()
        optimizer.step()


@dataclass(frozen=True)
class Batch:
    """What is drawn."""

    lora: bool
    policy: str
    kind: str
    rewards: str
    prompts: int
    responses: int
    seed: int

    @property
    def copied(self) -> bool:
        """Whether responses are copies where the policy would draw others: they share their noise, which `on_policy` is
        there to see."""
        return self.kind in ("equal", "one token", "one alive") and self.policy in ("open", "sharp")

    @classmethod
    def of(cls, number: int) -> Batch:
        """The same one for a number; every two in a row have both models."""
        generator = torch.Generator().manual_seed(number)

        def one(of: Any) -> Any:
            return of[int(torch.randint(len(of), (1,), generator=generator))]

        own = {"policy": one(POLICIES), "kind": one(KINDS), "rewards": one(REWARDS)}
        return cls(number % 2 == 0, **own, prompts=one(range(2, 6)), responses=one(range(2, 5)), seed=number)

    def file(self, path: Path, model: Any, seed: int) -> Path:
        generator = torch.Generator().manual_seed(seed)

        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high, (1,), generator=generator))

        def response(prompt: list[int], most: int) -> list[int]:
            tokens: list[int] = []
            while len(tokens) < most and tokens[-1:] != [models.EOS]:
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].double()
                tokens.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
            return tokens

        lines, common = [], float(torch.rand((), generator=generator))
        for n in range(self.prompts):
            prompt = torch.randint(3, models.VOCABULARY, (number(2, 7),), generator=generator).tolist()
            longest = [1 if self.kind == "one token" else _LONGEST] * self.responses
            if self.kind == "one short" and n == 0:
                longest[0] = 1
            drawn = [response(prompt, most) for most in longest]
            if self.kind in ("equal", "one token") or (self.kind == "one alive" and n):
                drawn = drawn[:1] * self.responses
            rewards = torch.rand(self.responses, generator=generator).tolist()
            if self.rewards == "of a prompt":
                rewards = rewards[:1] * self.responses
            if self.rewards == "equal":
                rewards = [common] * self.responses
            lines.append({"prompt_ids": prompt, "response_ids": drawn, "rewards": rewards})
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path


def red(folder: Path, batch: Batch) -> dict[str, Any]:
    """The criteria that fail on it, each with what it found."""
    checkpoint = folder / f"{batch.lora}-{batch.policy}".replace(" ", "-")
    if not checkpoint.exists():
        policy(checkpoint, lora=batch.lora, of=batch.policy)
    model = load_checkpoint(checkpoint).model
    e, u = (batch.file(folder / f"{which}.jsonl", model, 2 * batch.seed + k) for k, which in enumerate("eu"))
    report = run_probe(checkpoint, ProbeConfig.from_mapping({"batch": {"seed": batch.seed}}), e, u)
    found = {name: criterion(report) for name, criterion in CRITERIA.items()}
    if batch.copied:
        del found["on_policy"]
    return {name: of for name, of in found.items() if of.status == "fail"}


def main(count: int, first: int = 0) -> None:
    counted: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(first, first + count):
            batch = Batch.of(number)
            failed = red(Path(folder), batch)
            counted.update(list(failed) or ["none"])
            for name, of in failed.items():
                print(f"{number} {batch}: {name} {of.value} of {of.limit}: {of.hint[:120]}", flush=True)
    print(dict(counted))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]) if len(sys.argv) > 1 else (200,))
