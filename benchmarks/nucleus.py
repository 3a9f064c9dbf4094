"""What finding the nucleus costs against sorting every row.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/nucleus.py [rounds]

64 rows of log-probabilities in float32 over a vocabulary of 32k or 152k, top_p 0.9; one thread; processor time, each in
turn. `peaked` rows are like a language model's: logit −s·log(rank) plus noise of 0.5, tokens in random order, with s
from 1.5 to 3 in most rows (a nucleus of 1 to 100 tokens, of a few in half of them) and 1.35 in two (a few hundred).
`flat` rows are uniform up to noise: the worst case, where the largest entries do not do and every row is sorted.

    sort            the mask by a stable full sort, a cumulative sum in float64 and a scatter
    edge            the lowest entry inside, as `nucleus` and `score_tokens` find it
    nucleus         the mask: one more pass
    topk            the largest 64 entries alone
    max             one pass over the rows: nothing can be faster
    score_tokens    what top_p adds to it, in float32: its time at 0.9 less that at 1
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from entropy_probe.estimators import policy
from entropy_probe.estimators.policy import NUCLEUS_EDGE, nucleus, score_tokens

ROWS, TOP_P = 64, 0.9
VOCABULARIES = (32_000, 151_936)
TARGET = 20.0
PREFIX = policy._PREFIXES[0]  # pyright: ignore[reportPrivateUsage]


def peaked(vocabulary: int, generator: torch.Generator) -> Tensor:
    slope = torch.linspace(1.5, 3.0, ROWS)
    slope[:2] = 1.35
    logits = -slope[:, None] * torch.arange(1, vocabulary + 1).log()
    logits += 0.5 * torch.randn(ROWS, vocabulary, generator=generator)
    for row in logits:
        row.copy_(row[torch.randperm(vocabulary, generator=generator)])
    return logits.log_softmax(-1)


def flat(vocabulary: int, generator: torch.Generator) -> Tensor:
    return (1e-3 * torch.randn(ROWS, vocabulary, generator=generator)).log_softmax(-1)


def by_sort(logp: Tensor) -> Tensor:
    ranked, order = logp.sort(dim=-1, descending=True, stable=True)
    mass = ranked.double().exp()
    inside = mass.cumsum(-1) - mass < TOP_P + NUCLEUS_EDGE
    return torch.zeros_like(inside).scatter(-1, order, inside)


def edge(logp: Tensor) -> Tensor:
    none = torch.zeros(len(logp))
    return policy._lowest_inside(logp, none, TOP_P, NUCLEUS_EDGE, none)  # pyright: ignore[reportPrivateUsage]


def seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def compare(logp: Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of every way."""
    tokens = logp.argmax(-1)
    ways: dict[str, Callable[[], object]] = {
        "sort": lambda: by_sort(logp),
        "edge": lambda: edge(logp),
        "nucleus": lambda: nucleus(logp, TOP_P),
        "topk": lambda: logp.topk(PREFIX, dim=-1),
        "max": lambda: logp.amax(-1),
        "whole": lambda: score_tokens(logp, tokens, 1.0, 1.0),
        "score_tokens": lambda: score_tokens(logp, tokens, 1.0, TOP_P),
    }
    for function in ways.values():
        function()  # warms up
    taken = [[1000 * seconds(function) for function in ways.values()] for _ in range(rounds)]
    whole = list(ways).index("whole")
    for times in taken:
        times[-1] -= times[whole]
    medians = dict(zip(ways, map(statistics.median, zip(*taken, strict=True)), strict=True))
    del medians["whole"]
    return medians


def main(rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    print(f"{ROWS} rows, top_p {TOP_P}, median of {rounds} rounds; target on peaked rows: 1/{TARGET:.0f} of sort")
    for vocabulary in VOCABULARIES:
        for make in (peaked, flat):
            logp = make(vocabulary, generator)
            mask = by_sort(logp)
            differing = mask != nucleus(logp, TOP_P)
            assert bool((logp == edge(logp))[differing].all())
            sizes = mask.sum(-1).sort().values.tolist()
            print(f"  {make.__name__}, {vocabulary} tokens; the nucleus holds {sizes[0]} to {sizes[-1]}, ", end="")
            print(f"in half the rows up to {sizes[ROWS // 2]}, ", end="")
            print(f"more than {PREFIX} in {sum(size > PREFIX for size in sizes)}")
            times = compare(logp, rounds)
            for way, time_of_way in times.items():
                ratio = times["sort"] / time_of_way
                print(f"    {way:<14}{time_of_way:9.2f} ms   1/{ratio:.1f}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
