"""Libraries that do the same job, side by side: vocabularies of 32 000 and 151 936, responses of 512 and 2048 tokens.

A random Qwen2 with hidden size 64, 2 layers and 4 heads, LoRA on all linear layers: nearly all of the work is at the
output layer, which is what the ways differ in. Prompts of 16 tokens. All in float32 but what `ours` sums in float64 by
default. Every way's numbers are compared with ours before the race.

scores          log p and entropy of every token of one response
    TRL         `selective_log_softmax` and `entropy_from_logits` of TRL, on the logits of the response's positions
    naive       log_softmax over [T, V], gather, −Σ p log p
    ours in float32    with entropy_fp64 off
    ours at θ   `score` at θ, which also finds how much mass stands before each token; `ours` is the sweep's, without it
log_p           log p alone, one response
    Liger       the forward of its fused linear GRPO loss, which reads the vocabulary in blocks
loss            gradient of Σ_t log p_t of one response with respect to LoRA's factors
    Liger       `LigerFusedLinearGRPOLoss`, whose gradient at ratio 1 is that; plain torch, unlike its Triton kernels
    TRL         `selective_log_softmax`, and a backward pass
per_prompt      X and Y of 2 prompts with 2 responses each: gradients of single responses, weighted
    Opacus      `GradSampleModule`
    vmap        `torch.func.vmap(grad(S))`
    loop        one backward pass a response
    Each reads as many responses at once as make 2²⁸ logits, at least one.
jvp             derivative of log p and entropy of one response along a direction of LoRA's factors
    torch.func  `torch.func.jvp` through the logits of the response's positions; not of more than 2²⁸ logits
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import subjects
import torch
import transformers
from subjects import random_rollouts, relative_error, small
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from entropy_probe.config import ProbeConfig
from entropy_probe.model.capture import Capture
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.stages.derivatives import directional_derivatives
from entropy_probe.stages.gradients.payloads import Payload, payloads
from entropy_probe.stages.gradients.unit_gradients import unit_gradients
from entropy_probe.stages.gradients.units import units_of
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import read_rows, score
from entropy_probe.stages.share import Share

PROMPT, PROMPTS, GROUP = 16, 2, 2
SIZES = pytest.mark.parametrize(
    ("vocabulary", "length"),
    [(v, t) for v in (32_000, 151_936) for t in (512, 2048)],
    ids=lambda n: f"{round(n / 1000)}k" if n > 10_000 else str(n),
)
NATS = 1e-4  # a float32 sum over a vocabulary
RELATIVE = 1e-3  # of the norm: float32 sums of as many terms in another order
LOGITS_AT_ONCE = 1 << 28
Race = Callable[..., dict[str, float]]
Parts = list[Tensor]


def model_of(vocabulary: int, device: torch.device) -> BoundModel:
    import peft

    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        **small(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        max_position_embeddings=4096,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return bind(model.eval().to(device))


def responses(bound: BoundModel, length: int, rows: int = 1, group: int = 1) -> Rollouts:
    length = 12 if subjects.TINY else length
    full = torch.full((rows,), length)
    return random_rollouts(bound.vocabulary, torch.full((rows,), PROMPT), full, group)


def rounds(vocabulary: int, length: int) -> dict[str, Any]:
    """Every way has run once, to be compared. Fewer of what takes minutes."""
    return {"rounds": 5 if vocabulary * length < 1 << 25 else 2, "warm": True}


def config_of(rows: int, *, in_float64: bool = True) -> ProbeConfig:
    return ProbeConfig.from_mapping(
        {"generation": {"tf_batch_size": rows}, "precision": {"entropy_fp64": in_float64}}
    )


def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """[R, T, V], those that predict the response's tokens."""
    keep = ids.shape[1] - PROMPT + 1
    return model(ids, use_cache=False, logits_to_keep=keep, **options).logits[:, :-1]


def naive_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)


def lean_logp(logits: Tensor, tokens: Tensor) -> Tensor:
    """As TRL's, but it can be mapped: gather − logsumexp."""
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - logits.logsumexp(-1)


def largest(some: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    return max(
        float((a.cpu().double() - b.cpu().double()).abs().max())
        for a, b in zip(some, others, strict=True)
    )


def compared(
    ours: Parts, others: dict[str, Callable[[], Parts]], by: Callable[[Parts, Parts], float]
) -> dict[str, float]:
    return {f"difference from {name}": by(ours, way()) for name, way in others.items()}


def states_of(bound: BoundModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden states [1, T, h] that predict the response's tokens, the output layer's weight)."""
    model: Any = bound.language_model
    return model.model(ids, use_cache=False)[0][:, PROMPT - 1 : -1], model.lm_head.weight


@SIZES
@torch.no_grad()
def test_scores(race: Race, device: torch.device, vocabulary: int, length: int) -> None:
    bound = model_of(vocabulary, device)
    batch = responses(bound, length)
    ids = batch.ids.to(device)
    tokens = ids[:, PROMPT:]

    def ours(*, in_float64: bool = True, at_theta: bool = False) -> Parts:
        config = config_of(1, in_float64=in_float64)
        scores = score(bound, batch, config, None if at_theta else {})
        return [scores.token_logp[0], scores.rb_entropy[0]]

    def trl() -> Parts:
        logits = logits_of(bound.language_model, ids)
        return [selective_log_softmax(logits, tokens), entropy_from_logits(logits)]

    def naive() -> Parts:
        logp = logits_of(bound.language_model, ids).log_softmax(-1)
        return [logp.gather(-1, tokens[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)]

    others = {
        "TRL": trl,
        "naive": naive,
        "ours in float32": lambda: ours(in_float64=False),
        "ours at θ": lambda: ours(at_theta=True),
    }
    errors = compared(ours(), others, largest)
    assert max(errors.values()) < NATS, errors
    race(ours, others, **rounds(vocabulary, length), quality=errors, memory=True)


@SIZES
@torch.no_grad()
def test_log_p(race: Race, device: torch.device, vocabulary: int, length: int) -> None:
    bound = model_of(vocabulary, device)
    batch = responses(bound, length)
    ids = batch.ids.to(device)
    tokens, read = ids[:, PROMPT:], Payload(torch.ones(1, 1)).read(1.0)

    def ours() -> Parts:
        return [*read_rows(bound, batch, torch.arange(1), read)]

    others: dict[str, Callable[[], Parts]] = {
        "TRL": lambda: [selective_log_softmax(logits_of(bound.language_model, ids), tokens)]
    }
    ppo = liger("chunked_loss.fused_linear_ppo")
    if ppo is not None:

        def by_liger() -> Parts:
            return [ppo.LigerFusedLinearPPOBase.chunk_forward(*states_of(bound, ids), tokens)]

        others["Liger"] = by_liger
    errors = compared(ours(), others, largest)
    assert max(errors.values()) < NATS, errors
    race(ours, others, **rounds(vocabulary, length), quality=errors, memory=True)


def liger(module: str) -> Any | None:
    """A part of Liger, or `None` where it is not installed."""
    import importlib

    try:
        return importlib.import_module(f"liger_kernel.{module}")
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] != "liger_kernel":
            raise
        return None


@SIZES
def test_loss(race: Race, device: torch.device, vocabulary: int, length: int) -> None:
    bound = model_of(vocabulary, device)
    batch = responses(bound, length)
    ids, parameters = batch.ids.to(device), bound.registry.trainable
    tokens, read = ids[:, PROMPT:], Payload(torch.ones(1, 1)).read(1.0)
    count = tokens.shape[1]

    def ours() -> Parts:
        capture = Capture(parameters, torch.ones(1, 1, device=device), 1)
        (values,) = read_rows(bound, batch, torch.arange(1), read, once=True, capture=capture)
        sums = capture.sums(values.sum(-1))
        return [sums[name][0][0] for name in parameters]

    def by_trl() -> Parts:
        logp = selective_log_softmax(logits_of(bound.language_model, ids), tokens)
        return [*torch.autograd.grad(logp.sum(), list(parameters.values()))]

    others: dict[str, Callable[[], Parts]] = {"TRL": by_trl}
    losses = liger("chunked_loss")
    if losses is not None:
        mask, advantage = torch.ones_like(tokens), torch.ones(1, device=device)
        loss_of = losses.LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False)

        def by_liger() -> Parts:
            states, weight = states_of(bound, ids)
            loss = loss_of(states, weight, tokens, mask, advantage)[0]
            return [*torch.autograd.grad(-count * loss, list(parameters.values()))]

        others["Liger"] = by_liger
    errors = compared(ours(), others, relative_error)
    assert max(errors.values()) < RELATIVE, errors
    race(ours, others, **rounds(vocabulary, length), quality=errors, memory=True)


def causal(columns: int, device: torch.device) -> Tensor:
    """[1, 1, L, L] as transformers takes it; under `vmap` it cannot make its own."""
    inside = torch.ones(columns, columns, dtype=torch.bool, device=device).tril()
    return inside[None, None]


def weighted(
    rows_of: Iterable[tuple[Tensor, dict[str, Tensor]]],
    batch: Rollouts,
    config: ProbeConfig,
    scores: Any,
) -> Parts:
    """X and Y of every prompt, from gradients [r, …] of some responses at a time."""
    weights = [of.weights.reshape(-1).float() for of in payloads(batch, scores, config)]
    sides: list[dict[str, Tensor]] = [{}, {}]
    for rows, gradients in rows_of:
        for side, weight in zip(sides, weights, strict=True):
            for name, gradient in gradients.items():
                own = gradient.reshape(len(rows), -1).cpu()
                whole = side.setdefault(name, torch.zeros(batch.num_prompts, own.shape[1]))
                whole.index_add_(0, rows // GROUP, weight[rows, None] * own)
    return [side[name] for side in sides for name in sides[0]]


@SIZES
def test_per_prompt(race: Race, device: torch.device, vocabulary: int, length: int) -> None:
    bound = model_of(vocabulary, device)
    rows = PROMPTS * GROUP
    batch, config = responses(bound, length, rows, GROUP), config_of(rows)
    scores = score(bound, batch, config)
    parameters, module = bound.registry.trainable, bound.module
    frozen = {n: p for n, p in module.named_parameters() if n not in parameters}
    at_once = max(1, LOGITS_AT_ONCE // (vocabulary * length))
    mask = causal(batch.ids.shape[1], device)

    def ours() -> Parts:
        alone = Share.of(batch, units_of(bound, batch, config))
        found = unit_gradients(bound, alone, config, *payloads(batch, scores, config))
        return [side[name] for side in (found.x, found.y) for name in parameters]

    def s_of(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        output = torch.func.functional_call(
            module,
            {**frozen, **values},
            (ids[None],),
            {"use_cache": False, "attention_mask": mask, "logits_to_keep": len(ids) - PROMPT + 1},
        )
        return lean_logp(output.logits[:, :-1], ids[None, PROMPT:]).sum()

    def by_vmap() -> Parts:
        detached = {name: p.detach() for name, p in parameters.items()}
        each = torch.func.vmap(torch.func.grad(s_of), in_dims=(None, 0))

        def some() -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
            for part in torch.arange(rows).split(at_once):
                yield part, each(detached, batch.ids[part].to(device))

        return weighted(some(), batch, config, scores)

    opacus = pytest.importorskip("opacus.grad_sample")
    # its hooks work in train mode alone; there is no dropout here
    per_sample = opacus.GradSampleModule(
        copy.deepcopy(module).train(), loss_reduction="sum", strict=False
    )
    named = {n: p for n, p in per_sample._module.named_parameters() if p.requires_grad}

    def by_opacus() -> Parts:
        def some() -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
            for part in torch.arange(rows).split(at_once):
                ids = batch.ids[part].to(device)
                lean_logp(logits_of(per_sample, ids), ids[:, PROMPT:]).sum().backward()
                yield part, {n: p.grad_sample for n, p in named.items()}
                per_sample.zero_grad(set_to_none=True)

        return weighted(some(), batch, config, scores)

    def loop() -> Parts:
        def some() -> Iterable[tuple[Tensor, dict[str, Tensor]]]:
            for part in torch.arange(rows).split(1):
                ids = batch.ids[part].to(device)
                s = lean_logp(logits_of(bound.language_model, ids), ids[:, PROMPT:]).sum()
                gradients = torch.autograd.grad(s, list(parameters.values()))
                yield part, {n: g[None] for n, g in zip(parameters, gradients, strict=True)}

        return weighted(some(), batch, config, scores)

    others = {"Opacus": by_opacus, "vmap": by_vmap, "loop": loop}
    errors = compared(ours(), others, relative_error)
    assert max(errors.values()) < RELATIVE, errors
    race(ours, others, **rounds(vocabulary, length), quality=errors, memory=True)


@SIZES
@torch.no_grad()
def test_jvp(race: Race, device: torch.device, vocabulary: int, length: int) -> None:
    bound, config = model_of(vocabulary, device), config_of(1, in_float64=False)
    batch = responses(bound, length)
    ids, module = batch.ids.to(device), bound.module
    tokens = ids[:, PROMPT:]
    random = torch.Generator().manual_seed(0)
    values = {name: p.detach() for name, p in bound.registry.trainable.items()}
    v = {name: torch.randn(p.shape, generator=random).to(p) for name, p in values.items()}

    def ours() -> Parts:
        found = directional_derivatives(bound, batch, v, config)
        return [found.d_logp[0], found.d_entropy[0]]

    def scored(named: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        keep = {"use_cache": False, "logits_to_keep": tokens.shape[1] + 1}
        logits = torch.func.functional_call(module, named, (ids,), keep).logits[:, :-1]
        logp = logits.log_softmax(-1)
        return logp.gather(-1, tokens[..., None]).squeeze(-1), -(logp.exp() * logp).sum(-1)

    def by_func() -> Parts:
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels know no forward mode
            return [*torch.func.jvp(scored, (values,), (v,))[1]]

    others = {"torch.func": by_func}
    if vocabulary * length > LOGITS_AT_ONCE:  # it holds ten times the logits, 12 GB
        others = {}
    errors = compared(ours(), others, relative_error)
    assert max(errors.values(), default=0.0) < RELATIVE, errors
    race(ours, others, **rounds(vocabulary, length), quality=errors, memory=True)
