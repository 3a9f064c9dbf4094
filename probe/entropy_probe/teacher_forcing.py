"""Sequences scored by teacher forcing: what `SequenceProcessor` reads from the logits of one pass.

log π(token i | tokens before i) from the logits at i−1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.config import GenerationConfig, PrecisionSection
from entropy_probe.errors import MeasurementError, OverrideError, shown
from entropy_probe.estimators.token_stats import (
    TokenStepDiagnostics,
    features_of_steps,
    step_diagnostics,
)
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.sequences import BatchedSequences, LogprobResults
from entropy_probe.stages.scores import (
    policy_scores,
    read_responses,
    require_finite,
    require_inside_nucleus,
)

if TYPE_CHECKING:
    from jaxtyping import Float


@dataclass(frozen=True)
class Wanted:
    """What is asked for beside log π and log q, and whether these carry the graph."""

    graph: bool = False
    rb: bool = False
    features: bool = False
    logits: bool = False
    diagnostics: bool = False

    @property
    def steps(self) -> bool:
        """Whether every step is diagnosed: features are made of that."""
        return self.diagnostics or self.features


@dataclass(frozen=True)
class Scored:
    """What was read from the logits of every generated token; zero past the end of a response."""

    rollouts: Rollouts
    logp: Float[Tensor, "B G T"]
    logq: Float[Tensor, "B G T"]
    entropy: Float[Tensor, "B G T"]
    entropy_q: Float[Tensor, "B G T"]
    step: TokenStepDiagnostics | None
    logits: Float[Tensor, "B G T V"] | None


def teacher_forced(
    bound: BoundModel,
    rollouts: Rollouts,
    eos: Sequence[int],
    policy: GenerationConfig,
    precision: PrecisionSection,
    rows: int,
    mapping: Mapping[str, Tensor],
    wanted: Wanted,
) -> Scored:
    """One pass over the rollouts, so many rows at a time, with `mapping` in place of parameters."""
    score = policy_scores(bound, policy, precision)
    names: list[str] = []
    if wanted.steps:
        known = [field.name for field in fields(TokenStepDiagnostics)]
        names = [name for name in known if eos or name != "eos_prob"]

    def read(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        values = score(logits, tokens)
        if names:
            step = step_diagnostics(logits, policy.top_p, policy.temperature, eos)
            values += tuple(getattr(step, name) for name in names)
        return (*values, logits) if wanted.logits else values

    logp, logq, entropy, entropy_q, *more = read_responses(bound, rollouts, rows, read, mapping)
    of_steps = {name: value.detach().cpu() for name, value in zip(names, more, strict=False)}
    return Scored(
        rollouts,
        logp,
        logq,
        entropy,
        entropy_q,
        step=TokenStepDiagnostics(**of_steps) if names else None,
        logits=more[-1] if wanted.logits else None,
    )


def require_sound(scored: Scored, policy: GenerationConfig, *, overridden: bool) -> None:
    """Raise `MeasurementError` where a score is not finite, or outside of the nucleus at θ."""
    where, remedy = ("as the model is", "look into its weights")
    if overridden:
        where, remedy = ("with the override", "give a smaller step")
    logp, entropy = scored.logp.detach(), scored.entropy.detach()
    require_finite(scored.rollouts, logp, entropy, where, remedy)
    if not overridden:
        require_inside_nucleus(scored.rollouts, scored.logq.detach(), policy.top_p)


def require_graph(scored: Scored) -> None:
    """Raise `MeasurementError` where nothing can be differentiated."""
    if not scored.logp.requires_grad:
        nothing = "neither a parameter of the model nor a tensor of params_override"
        remedy = "call requires_grad_() on those that should"
        raise MeasurementError("with_grad", f"{nothing} requires a gradient", remedy)


def as_results(
    scored: Scored,
    sequences: BatchedSequences,
    rewards: Float[Tensor, "B G"],
    policy: GenerationConfig,
    wanted: Wanted,
) -> LogprobResults:
    """The scores as users get them: with the graph where it is wanted, else on the CPU."""

    def given(values: Tensor) -> Tensor:
        return values if wanted.graph else values.cpu()

    rollouts, logp, logq = scored.rollouts, _plain(scored.logp), _plain(scored.logq)
    results = LogprobResults(
        logprobs=given(scored.logp),
        entropies=-logp.numpy(),
        sequence_logprobs=logp.sum(-1),
        token_logqs=given(scored.logq),
        sequence_logqs=logq.sum(-1),
        rewards=rewards,
        gen_lens=sequences.gen_lens,
        logits=None if scored.logits is None else given(scored.logits),
    )
    if wanted.rb:
        differentiable = wanted.graph and policy.rb_requires_grad
        results = replace(
            results,
            rb_entropies=_plain(scored.entropy).numpy(),
            rb_entropies_q=_plain(scored.entropy_q).numpy(),
            rb_entropies_torch=scored.entropy if differentiable else None,
        )
    if wanted.features and scored.step is not None:
        features = features_of_steps(scored.step, policy.max_new_tokens)
        inside = rollouts.per_prompt(rollouts.gen_mask)[..., None]
        of_tokens = torch.where(inside, features, 0.0)
        results = replace(results, baseline_feats_torch=of_tokens)
    return results


def override_of(
    bound: BoundModel,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Both in one mapping, after a look at whether each name stands where it belongs."""
    for where, given, known in (
        ("params_override", params, bound.registry.parameters.keys()),
        ("buffers_override", buffers, bound.registry.buffer_names),
    ):
        tensors = isinstance(given, Mapping) and all(isinstance(v, Tensor) for v in given.values())
        if not tensors:
            raise OverrideError(where, f"is {shown(given)}", "give a mapping of names to tensors")
        unknown = next((name for name in given if name not in known), None)
        if unknown is not None:
            problem = f"the unwrapped model has no {unknown!r} among these"
            raise OverrideError(where, problem, "leave it out")
    return {**params, **buffers}


def _plain(values: Tensor) -> Tensor:
    return values.detach().double().cpu()
