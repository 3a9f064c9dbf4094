"""Finding the nucleus against sorting every row.

64 rows of log-probabilities in float32, top_p 0.9. `peaked` rows are like a language model's: logit −s·log(rank) plus
noise of 0.5, tokens in random order, with s from 1.5 to 3 in most rows (a nucleus of 1 to 100 tokens, of a few in half
of them) and 1.35 in two (a few hundred). `flat` rows are uniform up to noise: the worst case, where the largest entries
do not do and every row is sorted.

    sort     the mask by a stable full sort, a cumulative sum in float64 and a scatter
    max      one pass over the rows: nothing can be faster
    ours     `nucleus`, the mask
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from subjects import small
from torch import Tensor

from entropy_probe.estimators.policy import NUCLEUS_EDGE, nucleus

ROWS, TOP_P = 64, 0.9


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


@pytest.mark.parametrize("vocabulary", [32_000, 151_936])
@pytest.mark.parametrize("make", [peaked, flat])
def test_nucleus(
    race: Callable[..., dict[str, float]],
    device: torch.device,
    make: Callable[[int, torch.Generator], Tensor],
    vocabulary: int,
) -> None:
    vocabulary = small(vocab_size=vocabulary)["vocab_size"]
    logp = make(vocabulary, torch.Generator().manual_seed(0)).to(device)
    sizes = by_sort(logp).sum(-1).sort().values
    differing = (by_sort(logp) != nucleus(logp, TOP_P)).sum(-1)  # ties at the edge are all kept
    race(
        lambda: nucleus(logp, TOP_P),
        {"sort": lambda: by_sort(logp), "max": lambda: logp.amax(-1)},
        rounds=5,
        quality={
            "tokens inside, median": float(sizes[ROWS // 2]),
            "rows that differ from sort": float((differing > 0).sum()),
        },
        targets={"sort": 20.0} if make is peaked else None,
    )
