"""What one η of the sweep costs beyond a forward: the mapping θ + ηv, and scoring through `functional_call`.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/sweep.py [rounds]

A random Qwen2 (hidden size 512, 12 layers, vocabulary 8k) in float32, with LoRA (r = 8) on all linear layers and with
all parameters trainable; 16 responses of 64 tokens after prompts of 64; one thread.

    direct    `module(ids)`, and the logits of the last 64 positions
    mapped    `theta_plus_eta_v`, then the same logits through `BoundModel.logits(ids, override=...)`

Each takes its turn; processor time, the median over rounds. The two logits at η = 0 are compared first.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.overrides import theta_plus_eta_v

ROWS, LENGTH, KEPT = 16, 128, slice(63, 127)
TARGET = 1.05


def random_model(*, lora: bool) -> BoundModel:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    return bind(peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear")) if lora else model)


@torch.no_grad()
def compare(*, lora: bool, rounds: int) -> None:
    bound = random_model(lora=lora)
    ids = torch.randint(8192, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    v = {name: torch.randn_like(p) for name, p in bound.registry.trainable.items()}

    def mapped(eta: float) -> Tensor:
        override = theta_plus_eta_v(bound.registry, v, eta, bound.dtype)
        return bound.logits(ids, keep=KEPT, override=override)

    ways: dict[str, Callable[[], Tensor]] = {
        "direct": lambda: bound.direct_logits(ids, keep=KEPT),
        "mapped": lambda: mapped(1e-6),
    }
    assert torch.equal(ways["direct"](), mapped(0.0))
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, call in ways.items():
            start = time.process_time()
            call()
            taken[way].append(time.process_time() - start)
    seconds = {way: statistics.median(times) for way, times in taken.items()}
    ratio = seconds["mapped"] / seconds["direct"]
    kind = "LoRA" if lora else "full"
    print(f"{kind}: direct {seconds['direct']:.3f} s, mapped {seconds['mapped']:.3f} s, {ratio:.3f}, target {TARGET}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    torch.set_num_threads(1)
    for adapted in (True, False):
        compare(lora=adapted, rounds=int(sys.argv[1]) if len(sys.argv) > 1 else 9)
