"""X and Y of every prompt, against one forward and backward of their batch, the notes' loop, and Opacus.

Prompts of 24 tokens with 4 responses of 20 to 60 random tokens each; 16 prompts; LoRA on `s32k` and on `deep`,
and all parameters of `s32k`, whose gradients are held as means over 4 blocks.

    ours      `unit_gradients`, as the product calls it
    bare      one forward and one backward of Σ S a microbatch, written out for this model: hidden states of generated
              positions, then head and cross-entropy in pieces that are differentiated as they are made. No X or Y
    loop      for every prompt full logits, log_softmax over [G, L, V], gather, one backward for X; the same for Y.
              L is the batch's, as in the notes, whose sequences are one padded tensor that nothing is cut from
    notes     the loop, and before it ΣX and ΣY: full logits again, a forward and a backward for each
    Opacus    full logits, one backward; per-sample gradients of S by `GradSampleModule`, weighted into X and Y

The last three are slow and linear in the prompts: they run on 4 prompts, and their time is multiplied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from subjects import random_model, random_rollouts, relative_error, vocabulary
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.gradients.payloads import payloads
from entropy_probe.stages.gradients.unit_gradients import unit_gradients
from entropy_probe.stages.gradients.units import units_of
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import Scores, batches_by_length, score
from entropy_probe.stages.share import Share

PROMPT, GROUP, SHORTEST, LONGEST = 24, 4, 20, 60
BATCH, BLOCKS, FEW = 8, 4, 4
PIECE = 1 << 23  # logits in a piece of `bare`
TOLERANCE = 1e-3  # of the norm: float32 sums in another order, through a vocabulary of 32 000
Units = tuple[dict[str, Tensor], dict[str, Tensor]]


def rollouts_for(name: str, prompts: int) -> Rollouts:
    rows = prompts * GROUP
    lengths = SHORTEST + 17 * torch.arange(rows) % (LONGEST - SHORTEST + 1)  # 20 … 60, in no order
    return random_rollouts(vocabulary(name), torch.full((rows,), PROMPT), lengths, GROUP)


def config_for(*, lora: bool) -> ProbeConfig:
    first_order = {"mode": "exact" if lora else "block", "num_blocks": BLOCKS}
    return ProbeConfig.from_mapping(
        {"generation": {"tf_batch_size": BATCH}, "first_order": first_order}
    )


def bare(bound: BoundModel, rollouts: Rollouts) -> None:
    model: Any = bound.language_model
    head = model.lm_head.weight
    others = [parameter for parameter in bound.registry.trainable.values() if parameter is not head]
    for rows in batches_by_length(rollouts, BATCH):
        start, lengths = rollouts.prompt_lens[rows], rollouts.gen_lens[rows]
        ids = rollouts.ids[rows, : int((start + lengths).max())].to(bound.device)
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


def ours(bound: BoundModel, rollouts: Rollouts, scores: Scores, config: ProbeConfig) -> Units:
    alone = Share.of(rollouts, units_of(bound, rollouts, config))
    gradients = unit_gradients(bound, alone, config, *payloads(rollouts, scores, config))
    return gradients.x, gradients.y


def full_logp(bound: BoundModel, rollouts: Rollouts, rows: Tensor, model: Any = None) -> Tensor:
    """S [rows] through the logits of every position."""
    start, end = (
        rollouts.prompt_lens[rows, None],
        (rollouts.prompt_lens + rollouts.gen_lens)[rows, None],
    )
    ids = rollouts.ids[rows].to(bound.device)
    column = torch.arange(1, ids.shape[1])
    inside = ((column >= start) & (column < end)).to(bound.device)
    logp = (model or bound.language_model)(ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return (logp.gather(-1, ids[:, 1:, None]).squeeze(-1) * inside).sum(-1)


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
    return (
        (
            (advantage / longest).to(bound.device)
            * full_logp(bound, rollouts, rows).reshape(-1, GROUP)
        )
        .mean(1)
        .sum()
    )


def units(rollouts: Rollouts, config: ProbeConfig) -> Tensor:
    """The unit of each prompt: itself, or its block."""
    prompts, first_order = rollouts.num_prompts, config.first_order
    count = prompts if first_order.mode == "exact" else min(first_order.num_blocks, prompts)
    return torch.arange(prompts) * count // prompts


def loop(bound: BoundModel, rollouts: Rollouts, config: ProbeConfig) -> Units:
    unit_of, parameters = units(rollouts, config), bound.registry.trainable
    sizes = torch.bincount(unit_of)
    x = {name: torch.zeros(len(sizes), parameter.numel()) for name, parameter in parameters.items()}
    y = {name: torch.zeros(len(sizes), parameter.numel()) for name, parameter in parameters.items()}
    for n, u in enumerate(unit_of.tolist()):
        rows = torch.arange(n * GROUP, (n + 1) * GROUP)
        for into, loss in ((x, loss_x), (y, loss_y)):
            gradients = torch.autograd.grad(loss(bound, rollouts, rows), list(parameters.values()))
            for name, gradient in zip(parameters, gradients, strict=True):
                into[name][u] += gradient.reshape(-1).cpu() / sizes[u]
    return x, y


def notes(bound: BoundModel, rollouts: Rollouts, config: ProbeConfig) -> Units:
    parameters = list(bound.registry.trainable.values())
    for loss in (loss_x, loss_y):
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        for rows in torch.arange(len(rollouts.ids)).split(BATCH):
            for whole, part in zip(
                sums, torch.autograd.grad(loss(bound, rollouts, rows), parameters), strict=True
            ):
                whole += part
    return loop(bound, rollouts, config)


def by_opacus(
    bound: BoundModel, model: Any, rollouts: Rollouts, scores: Scores, config: ProbeConfig
) -> Units:
    unit_of = units(rollouts, config)
    sizes = torch.bincount(unit_of)
    weights = [of.weights.reshape(-1).float() for of in payloads(rollouts, scores, config)]
    named = {name: p for name, p in model._module.named_parameters() if p.requires_grad}
    sides: Units = tuple(
        {n: torch.zeros(len(sizes), p.numel()) for n, p in named.items()} for _ in weights
    )  # pyright: ignore[reportAssignmentType]
    for rows in torch.arange(len(rollouts.ids)).split(BATCH):
        full_logp(bound, rollouts, rows, model).sum().backward()
        of_rows = unit_of[rows // GROUP]
        for side, weight in zip(sides, weights, strict=True):
            scale = (weight[rows] / sizes[of_rows])[:, None]
            for name, parameter in named.items():
                side[name].index_add_(
                    0, of_rows, scale * parameter.grad_sample.reshape(len(rows), -1).cpu()
                )
        model.zero_grad(set_to_none=True)
    return sides


@pytest.mark.parametrize(
    ("name", "lora", "prompts"),
    [("s32k", True, 16), ("deep", True, 16), ("s32k", False, 16)],
    ids=["s32k LoRA 16", "deep LoRA 16", "s32k full 16"],
)
def test_gradients(
    race: Callable[..., dict[str, float]], device: torch.device, name: str, lora: bool, prompts: int
) -> None:
    bound, config = random_model(name, lora=lora, device=device), config_for(lora=lora)
    whole, few = rollouts_for(name, prompts), rollouts_for(name, FEW)
    scores, of_few = score(bound, whole, config), score(bound, few, config)
    slow: dict[str, Callable[[], Units]] = {
        "loop": lambda: loop(bound, few, config),
        "notes": lambda: notes(bound, few, config),
    }
    opacus = pytest.importorskip("opacus.grad_sample")
    # its hooks work in train mode alone; there is no dropout here
    per_sample = opacus.GradSampleModule(
        copy.deepcopy(bound.module).train(), loss_reduction="sum", strict=False
    )
    slow["Opacus"] = lambda: by_opacus(bound, per_sample, few, of_few, config)
    found = [side[n] for side in ours(bound, few, of_few, config) for n in bound.registry.trainable]
    errors = {}
    for way, function in slow.items():
        sides = function()
        errors[f"difference from {way}, relative"] = relative_error(
            found, [side[n] for side in sides for n in bound.registry.trainable]
        )
    assert max(errors.values()) < TOLERANCE, errors
    race(
        lambda: ours(bound, whole, scores, config),
        {"bare": lambda: bare(bound, whole), **slow},
        rounds=3,
        once=tuple(slow),
        times=dict.fromkeys(slow, prompts / FEW),
        quality=errors,
        targets={"bare": 1 / 1.15, "notes": 8.0} if lora else None,
        memory=True,
    )
