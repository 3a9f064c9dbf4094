"""What scoring costs when only the generated positions go through the output layer, a piece at a time.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/scoring.py [rounds]

32 rows of up to 192 tokens, 1645 of them generated (4 prompts with 8 responses each, right-padded); a random Qwen2 with
hidden size 256 and 6 layers in float32, with a vocabulary of 32k (`s32k`) or of 152k with tied embeddings (`s152k`);
one thread. log p of every generated token and the entropy at its position, by

    naive 32    logits of all 32 rows in one call, log_softmax over [N, L, V], gather, −Σ p log p
    naive 8     the same, 8 rows a call
    rectangle   8 rows of similar length a call, `logits_to_keep` from the shortest prompt on, and the functions of TRL
    score       ours, as the product calls it; then with entropy_fp64 off

Every call has a process of its own, after a warm-up on two rows of four tokens. Time is processor time, which a busy
machine disturbs less than wall time, the median of rounds in which each takes its turn; naive, which is slow, takes
part in the first only. Memory is the largest resident size above that before the call, with the model loaded.
Gradients are one round. `naive 8` stands in where 32 rows do not fit.
"""

from __future__ import annotations

import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from entropy_probe.config import ProbeConfig
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.stages.rollouts import Rollouts
from entropy_probe.stages.scores import batches_by_length, score, score_rows

VOCABULARY = {"s32k": 32_000, "s152k": 151_936}
PROMPT_LENGTHS, GROUP, GENERATED, WIDTH = (72, 80, 88, 92), 8, 1645, 192
BATCH = 8
TARGETS = {"s32k": (1 / 8, 1 / 2), "s152k": (1 / 20, 1 / 3)}  # of naive 32: memory, time
TOLERANCE = 1e-4
IN_DOUBLE = ProbeConfig.from_mapping({"generation": {"tf_batch_size": BATCH}})
IN_SINGLE = ProbeConfig.from_mapping({"generation": {"tf_batch_size": BATCH}, "precision": {"entropy_fp64": False}})
assert ProbeConfig() == IN_DOUBLE

Values = tuple[Tensor, ...]
Way = Callable[[BoundModel, Rollouts], Values]


def random_model(name: str) -> BoundModel:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY[name],
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=name == "s152k",
    )
    return bind(transformers.AutoModelForCausalLM.from_config(config).eval())


def rollouts_for(vocabulary: int) -> Rollouts:
    prompts = torch.tensor(PROMPT_LENGTHS).repeat_interleave(GROUP)
    lengths = 4 + 41 * torch.arange(len(prompts)) % 97  # 4 … 100, in no order
    lengths[-1] += GENERATED - lengths.sum()
    assert int(lengths.min()) > 0
    assert int((prompts + lengths).max()) <= WIDTH
    ids = torch.randint(vocabulary, (len(prompts), WIDTH), generator=torch.Generator().manual_seed(0))
    ids[torch.arange(WIDTH) >= (prompts + lengths)[:, None]] = 0
    rewards = torch.zeros(len(PROMPT_LENGTHS), GROUP, dtype=torch.float64)
    return Rollouts(ids, prompts, lengths, rewards, None, None, "benchmark", 0)


def generated(rollouts: Rollouts, first: int) -> Tensor:
    """Mask over the columns from `first` on."""
    column = torch.arange(first, rollouts.ids.shape[1])
    start = rollouts.prompt_lens[:, None]
    return (column >= start) & (column < start + rollouts.gen_lens[:, None])


def in_order(per_batch: Iterable[tuple[Tensor, ...]], count: int) -> Values:
    """The generated tokens' values, row by row, from (rows, their mask, values [r, ..] ...) of every batch."""
    found: list[Values] = [()] * count
    for rows, mask, *values in per_batch:
        for i, row in enumerate(rows.tolist()):
            found[row] = tuple(value[i][mask[i]] for value in values)
    return tuple(map(torch.cat, zip(*found, strict=True)))


@torch.no_grad()
def naive(bound: BoundModel, rollouts: Rollouts, rows_per_call: int) -> Values:
    model: Any = bound.language_model
    mask = generated(rollouts, 1)

    def batches() -> Iterable[tuple[Tensor, ...]]:
        for rows in torch.arange(len(rollouts.ids)).split(rows_per_call):
            ids = rollouts.ids[rows]
            logp = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            token_logp = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
            yield rows, mask[rows], token_logp, -(logp.exp() * logp).sum(-1)

    return in_order(batches(), len(rollouts.ids))


@torch.no_grad()
def rectangle(bound: BoundModel, rollouts: Rollouts) -> Values:
    model: Any = bound.language_model

    def batches() -> Iterable[tuple[Tensor, ...]]:
        for rows in batches_by_length(rollouts, BATCH):
            first = int(rollouts.prompt_lens[rows].min())
            last = int((rollouts.prompt_lens + rollouts.gen_lens)[rows].max())
            ids = rollouts.ids[rows, :last]
            logits = model(ids, use_cache=False, logits_to_keep=last - first + 1).logits[:, :-1]
            mask = generated(rollouts, first)[rows, : last - first]
            yield rows, mask, selective_log_softmax(logits, ids[:, first:]), entropy_from_logits(logits)

    return in_order(batches(), len(rollouts.ids))


def ours(bound: BoundModel, rollouts: Rollouts, config: ProbeConfig) -> Values:
    scores = score(bound, rollouts, config)
    return scores.token_logp.flatten(0, 1)[rollouts.gen_mask], scores.rb_entropy.flatten(0, 1)[rollouts.gen_mask]


def gradients_of(bound: BoundModel, logps: Iterable[Tensor]) -> Values:
    """Σ log p of every batch, differentiated by what is trainable."""
    parameters = list(bound.registry.trainable.values())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for logp in logps:
        for whole, part in zip(sums, torch.autograd.grad(logp.sum(), parameters), strict=True):
            whole += part
    return tuple(sums)


def naive_gradients(bound: BoundModel, rollouts: Rollouts) -> Values:
    model: Any = bound.language_model
    mask = generated(rollouts, 1)

    def logps() -> Iterable[Tensor]:
        for rows in torch.arange(len(rollouts.ids)).split(BATCH):
            ids = rollouts.ids[rows]
            logp = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            yield logp.gather(-1, ids[:, 1:, None]).squeeze(-1)[mask[rows]]

    return gradients_of(bound, logps())


def our_gradients(bound: BoundModel, rollouts: Rollouts, config: ProbeConfig) -> Values:
    batches = batches_by_length(rollouts, BATCH)
    return gradients_of(bound, (score_rows(bound, rollouts, rows, config).logp for rows in batches))


SCORING: dict[str, Way] = {
    "naive 32": lambda bound, rollouts: naive(bound, rollouts, 32),
    "naive 8": lambda bound, rollouts: naive(bound, rollouts, BATCH),
    "rectangle": rectangle,
    "score": lambda bound, rollouts: ours(bound, rollouts, IN_DOUBLE),
    "score float32": lambda bound, rollouts: ours(bound, rollouts, IN_SINGLE),
}
GRADIENTS: dict[str, Way] = {
    "naive 8, gradient": naive_gradients,
    "score_rows, gradient": lambda bound, rollouts: our_gradients(bound, rollouts, IN_DOUBLE),
    "the same in float32": lambda bound, rollouts: our_gradients(bound, rollouts, IN_SINGLE),
}
WAYS = SCORING | GRADIENTS


def model_for(name: str, way: str) -> BoundModel:
    """The random model; gradients are those of the layers' query weights."""
    bound = random_model(name)
    for parameter_name, parameter in bound.module.named_parameters():
        parameter.requires_grad_(way in GRADIENTS and parameter_name.endswith("q_proj.weight"))
    return bind(bound.module)


def resident(key: str) -> float:
    """`VmRSS` or `VmHWM` (the largest so far) of this process, in MB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024 / 1e6


def measured(name: str, way: str) -> tuple[float, float, Values]:
    """Seconds and MB of one call, and what it returned."""
    function = WAYS[way]
    bound, rollouts = model_for(name, way), rollouts_for(VOCABULARY[name])
    four, two = torch.ones(2, 4, dtype=torch.long), torch.full((2,), 2)
    function(bound, Rollouts(four, two, two, torch.zeros(1, 2), None, None, "warm-up", 0))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    before, start = resident("VmRSS"), time.process_time()
    values = function(bound, rollouts)
    return time.process_time() - start, resident("VmHWM") - before, values


def measured_apart(name: str, way: str) -> tuple[float, float, Values]:
    """The same in a process forked off before this one has computed anything."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
        return process.submit(measured, name, way).result()


def fits(name: str) -> bool:
    """Whether three tensors [32, 192, V] and the model fit into what is free now."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    return found is not None and int(found[1]) * 1024 > 3.3 * 4 * 32 * WIDTH * VOCABULARY[name] + 1e9


def off_by(some: Values, others: Values) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(some, others, strict=True))


def compare(name: str, ways: tuple[str, ...], rounds: int) -> dict[str, tuple[float, float]]:
    """way → (seconds, MB), printed as parts of the first one's, which takes part in the first round only."""
    reference, *others = ways
    taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    errors = dict.fromkeys(ways, 0.0)
    expected, scale = (), 1.0
    for way in (reference, *others * rounds):
        seconds, megabytes, values = measured_apart(name, way)
        taken[way].append((seconds, megabytes))
        if way == reference:
            expected = values
            scale = max(1.0, *(float(value.abs().max()) for value in values)) if way in GRADIENTS else 1.0
        errors[way] = max(errors[way], off_by(values, expected) / scale)
    assert max(errors.values()) < TOLERANCE, errors
    results = {
        way: (statistics.median(s for s, _ in all_of), max(m for _, m in all_of)) for way, all_of in taken.items()
    }
    for way, (seconds, megabytes) in results.items():
        time_ratio, memory_ratio = results[reference][0] / seconds, results[reference][1] / megabytes
        print(
            f"  {way:<22}{seconds:7.2f} s   1/{time_ratio:<6.2f}{megabytes:8.0f} MB   1/{memory_ratio:<7.1f}"
            f"off by {errors[way]:.1e}",
            flush=True,
        )
    return results


def main(rounds: int) -> None:
    for name, (memory_target, time_target) in TARGETS.items():
        print(f"{name}, vocabulary {VOCABULARY[name]}: time, its part of the first line's; memory, its part")
        reference = "naive 32" if fits(name) else "naive 8"
        if reference == "naive 8":
            print("  too little memory is free for 32 rows in one call; compared with 8 rows a call")
        results = compare(name, (reference, "rectangle", "score", "score float32"), rounds)
        time_ratio, memory_ratio = (a / b for a, b in zip(results["score"], results[reference], strict=True))
        print(f"    score is {results['rectangle'][0] / results['score'][0]:.2f} times as fast as rectangle; target 1")
        print(f"    score to {reference}: time {time_ratio:.3f}, target {time_target:.3f}; ", end="")
        print(f"memory {memory_ratio:.4f}, target {memory_target:.4f}")
    print("s32k, gradient of Σ log p by the query weights, 8 rows a call")
    compare("s32k", tuple(GRADIENTS), 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
