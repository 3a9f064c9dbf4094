"""What X and Y of every prompt cost, against one forward and backward of their batch and against the notes' loop.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/gradients.py [rounds]

Prompts of 24 tokens with 4 responses of 20 to 60 random tokens each; random Qwen2 models in float32 with LoRA (r = 8)
on all linear layers of the blocks: `s32k` (hidden size 256, 6 layers, vocabulary 32k) with 16 and with 32 prompts,
`deep` (512, 12, 8k) with 16; then `s32k` with all parameters trainable and 16 prompts, whose gradients are held as
means over 4 blocks; one thread.

    bare      one forward and one backward of Σ S a microbatch, written out for this model: hidden states of generated
              positions, then head and cross-entropy in pieces that are differentiated as they are made
    ours      `unit_gradients`, as the product calls it: X and Y of every prompt
    loop      for every prompt full logits, log_softmax over [G, L, V], gather, one backward for X; the same for Y.
              L is the batch's, as in the notes, whose sequences are one padded tensor that nothing is cut from
    totals    full logits again, a microbatch at a time: one forward and backward for Σ X, one for Σ Y

The notes' procedure is `totals`, then `loop`: four forwards and four backwards. These two are slow and linear in the
prompts: they run on 4 prompts, and their time is multiplied. Every call has a process of its own, after
a warm-up on two prompts of two tokens. Time is processor time, which a busy machine disturbs less than wall time, the
median of rounds in which each takes its turn. Memory is the largest resident size above that before the call, with the
model loaded. First, X and Y of four prompts by `ours` and by `loop` are compared.
"""

from __future__ import annotations

import multiprocessing
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.stages.gradients import payloads, unit_gradients
from entropy_probe.stages.rollouts import Rollouts
from entropy_probe.stages.scores import Scores, batches_by_length, score

PROMPT, GROUP, SHORTEST, LONGEST = 24, 4, 20, 60
BATCH, BLOCKS = 8, 4
PIECE = 1 << 23  # logits in a piece of `bare`
FEW = 4  # prompts that go through the slow ways
SLOWER_THAN_BARE, FASTER_THAN_NOTES = 1.15, 8.0  # the first for LoRA, the second for s32k with LoRA
TOLERANCE = 1e-3
VOCABULARY = {"s32k": 32_000, "deep": 8192}
KINDS = {"s32k LoRA": ("s32k", True), "deep LoRA": ("deep", True), "s32k full": ("s32k", False)}
PROMPTS = {"s32k LoRA": (16, 32), "deep LoRA": (16,), "s32k full": (16,)}

_T = TypeVar("_T")
Units = dict[str, Tensor]


def random_model(kind: str) -> BoundModel:
    name, lora = KINDS[kind]
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY[name],
        hidden_size=256 if name == "s32k" else 512,
        intermediate_size=768 if name == "s32k" else 1536,
        num_hidden_layers=6 if name == "s32k" else 12,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config).eval()
    if lora:
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.02)
    return bind(model.eval())


def config_for(kind: str) -> ProbeConfig:
    first_order = {"mode": "exact" if KINDS[kind][1] else "block", "num_blocks": BLOCKS}
    return ProbeConfig.from_mapping({"generation": {"tf_batch_size": BATCH}, "first_order": first_order})


def rollouts_for(kind: str, prompts: int) -> Rollouts:
    rows = prompts * GROUP
    lengths = SHORTEST + 17 * torch.arange(rows) % (LONGEST - SHORTEST + 1)  # 20 … 60, in no order
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY[KINDS[kind][0]], (rows, PROMPT + LONGEST), generator=random)
    ids[torch.arange(PROMPT + LONGEST) >= PROMPT + lengths[:, None]] = 0
    rewards = torch.randn(prompts, GROUP, generator=random, dtype=torch.float64)
    return Rollouts(ids, torch.full((rows,), PROMPT), lengths, rewards, None, None, "benchmark", 0)


def warm_up_rollouts() -> Rollouts:
    four, two = torch.ones(2 * GROUP, 4, dtype=torch.long), torch.full((2 * GROUP,), 2)
    return Rollouts(four, two, two, torch.zeros(2, GROUP, dtype=torch.float64), None, None, "warm-up", 0)


# The ways, each with its X and Y; `bare` and `totals` have none to give


def bare(bound: BoundModel, rollouts: Rollouts, scores: Scores, config: ProbeConfig) -> None:
    model: Any = bound.language_model
    head = model.lm_head.weight
    others = [parameter for parameter in bound.registry.trainable.values() if parameter is not head]
    for rows in batches_by_length(rollouts, BATCH):
        start, lengths = rollouts.prompt_lens[rows], rollouts.gen_lens[rows]
        ids = rollouts.ids[rows, : int((start + lengths).max())]
        row, step = (torch.arange(int(lengths.max())) < lengths[:, None]).nonzero(as_tuple=True)
        column = start[row] - 1 + step
        states, tokens = model.model(ids, use_cache=False)[0][row, column], ids[row, column + 1]
        gradient, of_head = torch.empty_like(states), torch.zeros_like(head)
        for part in torch.arange(len(states)).split(PIECE // len(head)):
            own = states[part].detach().requires_grad_()
            logp = -F.cross_entropy(F.linear(own, head), tokens[part], reduction="sum")
            if head.requires_grad:
                gradient[part], added = torch.autograd.grad(logp, [own, head])
                of_head += added
            else:
                (gradient[part],) = torch.autograd.grad(logp, own)
        torch.autograd.grad(states, others, gradient)


def ours(bound: BoundModel, rollouts: Rollouts, scores: Scores, config: ProbeConfig) -> tuple[Units, Units]:
    gradients = unit_gradients(bound, rollouts, config, *payloads(rollouts, scores, config))
    return gradients.x, gradients.y


def full_logp(bound: BoundModel, rollouts: Rollouts, rows: Tensor) -> Tensor:
    """S [rows] through the logits of every position."""
    model: Any = bound.language_model
    start, end = rollouts.prompt_lens[rows, None], (rollouts.prompt_lens + rollouts.gen_lens)[rows, None]
    ids = rollouts.ids[rows]
    column = torch.arange(1, ids.shape[1])
    logp = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return (logp.gather(-1, ids[:, 1:, None]).squeeze(-1) * ((column >= start) & (column < end))).sum(-1)


def loss_x(bound: BoundModel, rollouts: Rollouts, rows: Tensor) -> Tensor:
    """Σ over the prompts of mean_g (S − mean of the others)·S, the factor held constant."""
    logp = full_logp(bound, rollouts, rows).reshape(-1, GROUP)
    others = (logp.sum(1, keepdim=True) - logp) / (GROUP - 1)
    return ((logp - others).detach() * logp).mean(1).sum()


def loss_y(bound: BoundModel, rollouts: Rollouts, rows: Tensor) -> Tensor:
    """Σ over the prompts of mean_g (A / Lmax)·S."""
    rewards = rollouts.rewards.reshape(-1)[rows].reshape(-1, GROUP)
    advantage = (rewards - rewards.mean(1, keepdim=True)).float()
    longest = rollouts.gen_lens[rows].reshape(-1, GROUP).amax(1, keepdim=True)
    return (advantage / longest * full_logp(bound, rollouts, rows).reshape(-1, GROUP)).mean(1).sum()


def loop(bound: BoundModel, rollouts: Rollouts, scores: Scores, config: ProbeConfig) -> tuple[Units, Units]:
    prompts, first_order = rollouts.num_prompts, config.first_order
    size_u = prompts if first_order.mode == "exact" else min(first_order.num_blocks, prompts)
    unit_of = torch.arange(prompts) * size_u // prompts
    sizes = torch.bincount(unit_of)
    parameters = bound.registry.trainable
    x = {name: torch.zeros(size_u, parameter.numel()) for name, parameter in parameters.items()}
    y = {name: torch.zeros(size_u, parameter.numel()) for name, parameter in parameters.items()}
    for n, u in enumerate(unit_of.tolist()):
        rows = torch.arange(n * GROUP, (n + 1) * GROUP)
        for into, loss in ((x, loss_x), (y, loss_y)):
            gradients = torch.autograd.grad(loss(bound, rollouts, rows), list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                into[name][u] += gradient.reshape(-1) / sizes[u]
    return x, y


def totals(bound: BoundModel, rollouts: Rollouts, scores: Scores, config: ProbeConfig) -> None:
    parameters = list(bound.registry.trainable.values())
    for loss in (loss_x, loss_y):
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for rows in torch.arange(len(rollouts.ids)).split(BATCH):
            for whole, part in zip(sums, torch.autograd.grad(loss(bound, rollouts, rows), parameters), strict=True):
                whole += part


Way = Callable[[BoundModel, Rollouts, Scores, ProbeConfig], object]
WAYS: dict[str, Way] = {"bare": bare, "ours": ours, "loop": loop, "totals": totals}
SLOW = ("loop", "totals")


def resident(key: str) -> float:
    """`VmRSS` or `VmHWM` (the largest so far) of this process, in MB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def measured(kind: str, prompts: int, way: str, scores: Scores) -> tuple[float, float]:
    """Seconds and MB of one call."""
    function, config = WAYS[way], config_for(kind)
    bound, rollouts, small = random_model(kind), rollouts_for(kind, prompts), warm_up_rollouts()
    function(bound, small, score(bound, small, config), config)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    before, start = resident("VmRSS"), time.process_time()
    function(bound, rollouts, scores, config)
    return time.process_time() - start, resident("VmHWM") - before


def scored(kind: str, prompts: int) -> Scores:
    return score(random_model(kind), rollouts_for(kind, prompts), config_for(kind))


def largest_difference(kind: str) -> float:
    """|ours − loop| / |loop| over all parameters, the largest of X and Y of four prompts."""
    bound, rollouts, config = random_model(kind), rollouts_for(kind, FEW), config_for(kind)
    scores = score(bound, rollouts, config)
    worst = 0.0
    for some, expected in zip(
        ours(bound, rollouts, scores, config), loop(bound, rollouts, scores, config), strict=True
    ):
        off = sum((some[name] - expected[name]).double().square().sum(1) for name in expected)
        scale = sum(expected[name].double().square().sum(1) for name in expected)
        assert isinstance(off, Tensor)
        worst = max(worst, float((off / scale).sqrt().max()))
    return worst


def apart(function: Callable[..., _T], *args: object) -> _T:
    """What the function returns in a process forked off before this one has computed anything."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
        return process.submit(function, *args).result()


def median_and_peak(taken: list[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(seconds for seconds, _ in taken), max(megabytes for _, megabytes in taken)


def compare(kind: str, rounds: int) -> None:
    few = apart(scored, kind, FEW)
    for prompts in PROMPTS[kind]:
        scores = apart(scored, kind, prompts)
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, calls in taken.items():
                calls.append(apart(measured, kind, *((FEW, way, few) if way in SLOW else (prompts, way, scores))))
        results = {way: median_and_peak(calls) for way, calls in taken.items()}
        results |= {way: (results[way][0] * prompts / FEW, results[way][1]) for way in SLOW}
        print(f"  {prompts} prompts")
        for way, (seconds, megabytes) in results.items():
            print(f"    {way:<8}{seconds:7.2f} s{seconds / results['bare'][0]:7.2f} of bare{megabytes:8.0f} MB")
        time_of = {way: seconds for way, (seconds, _) in results.items()}
        target = f", target {SLOWER_THAN_BARE}" if KINDS[kind][1] else ""
        print(f"    ours to bare {time_of['ours'] / time_of['bare']:.3f}{target}; ", end="")
        print(f"loop to ours {time_of['loop'] / time_of['ours']:.1f}; ", end="")
        target = f", target {FASTER_THAN_NOTES:g}" if kind == "s32k LoRA" else ""
        print(f"both to ours {(time_of['loop'] + time_of['totals']) / time_of['ours']:.1f}{target}", flush=True)


def main(rounds: int) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    for kind in KINDS:
        off = apart(largest_difference, kind)
        assert off < TOLERANCE, off
        print(f"{kind}: X and Y of four prompts off by {off:.1e} of the loop's", flush=True)
        compare(kind, rounds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
