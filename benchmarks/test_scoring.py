"""log p of every generated token and the entropy at its position: ours, the naive way, and TRL's functions.

32 rows of up to 192 tokens, 1645 of them generated (4 prompts with 8 responses each, right-padded).

    naive 32     logits of all 32 rows in one call, log_softmax over [N, L, V], gather, −Σ p log p; at 32k alone
    naive 8      the same, 8 rows a call
    TRL          8 rows of similar length a call, `logits_to_keep` from the shortest prompt on, and TRL's selective
                 log-softmax and entropy
    ours         `score`, as the sweep calls it; `in float32` with entropy_fp64 off
    ours at θ    `score` at θ, which also finds how much mass stands before each token

The gradient is that of Σ log p by the query weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from subjects import random_model, random_rollouts, relative_error, vocabulary
from torch import Tensor
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from entropy_probe.config import ProbeConfig
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import batches_by_length, score, score_rows

PROMPT_LENGTHS, GROUP, GENERATED, BATCH = (72, 80, 88, 92), 8, 1645, 8
IN_DOUBLE = ProbeConfig.from_mapping({"generation": {"tf_batch_size": BATCH}})
IN_SINGLE = ProbeConfig.from_mapping(
    {"generation": {"tf_batch_size": BATCH}, "precision": {"entropy_fp64": False}}
)
TOLERANCE = 1e-4  # nats, of sums over a vocabulary in float32
Values = tuple[Tensor, ...]


def rollouts_for(name: str) -> Rollouts:
    prompts = torch.tensor(PROMPT_LENGTHS).repeat_interleave(GROUP)
    lengths = 4 + 41 * torch.arange(len(prompts)) % 97  # 4 … 100, in no order
    lengths[-1] += GENERATED - lengths.sum()
    return random_rollouts(vocabulary(name), prompts, lengths, GROUP)


def generated(rollouts: Rollouts, first: int) -> Tensor:
    """Mask over the columns from `first` on."""
    column, start = torch.arange(first, rollouts.ids.shape[1]), rollouts.prompt_lens[:, None]
    return (column >= start) & (column < start + rollouts.gen_lens[:, None])


def in_order(per_batch: Iterable[tuple[Tensor, ...]], count: int) -> Values:
    """The generated tokens' values, row by row, from (rows, their mask, values [r, ..] ...) of every batch."""
    found: list[Values] = [()] * count
    for rows, mask, *values in per_batch:
        for i, row in enumerate(rows.tolist()):
            found[row] = tuple(value[i].cpu()[mask[i]] for value in values)
    return tuple(map(torch.cat, zip(*found, strict=True)))


@torch.no_grad()
def naive(bound: BoundModel, rollouts: Rollouts, rows_per_call: int) -> Values:
    model: Any = bound.language_model
    mask = generated(rollouts, 1)

    def batches() -> Iterable[tuple[Tensor, ...]]:
        for rows in torch.arange(len(rollouts.ids)).split(rows_per_call):
            ids = rollouts.ids[rows].to(bound.device)
            logp = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            token_logp = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
            yield rows, mask[rows], token_logp, -(logp.exp() * logp).sum(-1)

    return in_order(batches(), len(rollouts.ids))


@torch.no_grad()
def by_trl(bound: BoundModel, rollouts: Rollouts) -> Values:
    model: Any = bound.language_model

    def batches() -> Iterable[tuple[Tensor, ...]]:
        for rows in batches_by_length(rollouts, BATCH):
            first = int(rollouts.prompt_lens[rows].min())
            last = int((rollouts.prompt_lens + rollouts.gen_lens)[rows].max())
            ids = rollouts.ids[rows, :last].to(bound.device)
            logits = model(ids, use_cache=False, logits_to_keep=last - first + 1).logits[:, :-1]
            mask = generated(rollouts, first)[rows, : last - first]
            yield (
                rows,
                mask,
                selective_log_softmax(logits, ids[:, first:]),
                entropy_from_logits(logits),
            )

    return in_order(batches(), len(rollouts.ids))


def ours(
    bound: BoundModel, rollouts: Rollouts, config: ProbeConfig, *, at_theta: bool = False
) -> Values:
    scores = score(bound, rollouts, config, None if at_theta else {})
    return scores.token_logp.flatten(0, 1)[rollouts.gen_mask], scores.rb_entropy.flatten(0, 1)[
        rollouts.gen_mask
    ]


def off_by(some: Values, others: Values) -> float:
    return max(
        float((a.cpu().double() - b.cpu().double()).abs().max())
        for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("name", ["s32k", "s152k"])
def test_scoring(race: Callable[..., dict[str, float]], device: torch.device, name: str) -> None:
    bound, rollouts = random_model(name, device=device), rollouts_for(name)
    others: dict[str, Callable[[], Values]] = {
        "naive 8": lambda: naive(bound, rollouts, BATCH),
        "TRL": lambda: by_trl(bound, rollouts),
        "ours in float32": lambda: ours(bound, rollouts, IN_SINGLE),
        "ours at θ": lambda: ours(bound, rollouts, IN_DOUBLE, at_theta=True),
    }
    targets = {"TRL": 1.0}
    if name == "s32k" or device.type == "cuda":  # 12 GB at 152k
        targets["naive 32"] = 2.0
        others = {"naive 32": lambda: naive(bound, rollouts, 32), **others}
    expected = ours(bind(bound.module, torch.float64), rollouts, IN_DOUBLE)
    errors = {
        f"error of {way}, nats": off_by(function(), expected)
        for way, function in {"ours": lambda: ours(bound, rollouts, IN_DOUBLE), **others}.items()
    }
    assert max(errors.values()) < TOLERANCE, errors
    race(
        lambda: ours(bound, rollouts, IN_DOUBLE),
        others,
        rounds=3 if name == "s32k" else 2,
        warm=True,
        once=("naive 32", "naive 8"),
        quality=errors,
        targets=targets,
        memory=True,
    )


def gradients_of(bound: BoundModel, logps: Iterable[Tensor]) -> list[Tensor]:
    """Σ log p of every batch, differentiated by what is trainable."""
    parameters = list(bound.registry.trainable.values())
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for logp in logps:
        for whole, part in zip(sums, torch.autograd.grad(logp.sum(), parameters), strict=True):
            whole += part
    return sums


def naive_gradients(bound: BoundModel, rollouts: Rollouts) -> list[Tensor]:
    model: Any = bound.language_model
    mask = generated(rollouts, 1)

    def logps() -> Iterable[Tensor]:
        for rows in torch.arange(len(rollouts.ids)).split(BATCH):
            ids = rollouts.ids[rows].to(bound.device)
            logp = model(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
            yield logp.gather(-1, ids[:, 1:, None]).squeeze(-1)[mask[rows].to(bound.device)]

    return gradients_of(bound, logps())


def our_gradients(bound: BoundModel, rollouts: Rollouts, config: ProbeConfig) -> list[Tensor]:
    batches = batches_by_length(rollouts, BATCH)
    return gradients_of(bound, (score_rows(bound, rollouts, rows, config).logp for rows in batches))


def test_gradient_of_scores(race: Callable[..., dict[str, float]], device: torch.device) -> None:
    module, rollouts = random_model("s32k", device=device).module, rollouts_for("s32k")
    for parameter_name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter_name.endswith("q_proj.weight"))
    bound = bind(module)
    error = relative_error(
        our_gradients(bound, rollouts, IN_DOUBLE), naive_gradients(bound, rollouts)
    )
    assert error < TOLERANCE
    race(
        lambda: our_gradients(bound, rollouts, IN_DOUBLE),
        {
            "naive 8": lambda: naive_gradients(bound, rollouts),
            "ours in float32": lambda: our_gradients(bound, rollouts, IN_SINGLE),
        },
        rounds=2,
        quality={"difference from naive, relative": error},
        memory=True,
    )
