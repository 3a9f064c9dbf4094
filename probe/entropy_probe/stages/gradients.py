"""Per-unit gradients X_u and Y_u, and the matrices X_nᵀPY_m that every first-order number comes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entropy_probe.config import FirstOrderConfig, ProbeConfig
from entropy_probe.errors import MeasurementError
from entropy_probe.estimators.advantages import advantages, x_weights, y_weights
from entropy_probe.model.capture import Capture
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.rollouts import Progress, Rollouts
from entropy_probe.stages.scores import Scores, score_rows

# Columns of a Gram product that are held in float64 at once: U rows of 2^20 doubles are 8 U MiB.
_GRAM_COLUMNS = 1 << 20


@dataclass(frozen=True)
class UnitGradients:
    """name → [U, numel] in the compute dtype: X of every unit, and Y of every unit.

    A unit is a prompt (`exact`), or the mean over a block of prompts whose sizes differ by at most one (`block`).
    """

    x: dict[str, Float[Tensor, "U D"]]
    y: dict[str, Float[Tensor, "U D"]]
    sizes: Int[Tensor, " U"]
    mode: str


def response_advantages(rollouts: Rollouts, config: FirstOrderConfig) -> Float[Tensor, "B G"]:
    """The file's own `advantages`, where it has them, else the configured rule on the rewards."""
    return rollouts.advantages if rollouts.advantages is not None else advantages(rollouts.rewards, config.advantage)


def response_weights(
    rollouts: Rollouts, scores: Scores, config: ProbeConfig
) -> tuple[Float[Tensor, "B G"], Float[Tensor, "B G"]]:
    """(c, a) with X_n = Σ_g c_ng ∇S_ng and Y_n = Σ_g a_ng ∇S_ng."""
    rule, limit = config.first_order.loss, config.generation.max_new_tokens
    advantage = response_advantages(rollouts, config.first_order)
    return x_weights(scores.seq_logp), y_weights(advantage, scores.gen_lens, rule, limit)


def unit_gradients(
    bound: BoundModel,
    rollouts: Rollouts,
    scores: Scores,
    config: ProbeConfig,
    *,
    with_y: bool = True,
    stage: str = "gradients",
    progress: Progress | None = None,
) -> UnitGradients:
    """X_n = Σ_g c_ng ∇S_ng and Y_n = Σ_g a_ng ∇S_ng of every prompt n, averaged within blocks in `block` mode.

    c = (S − S̄_{−g})/G and a = A/(Lmax·G) (or as `loss` says) are constants of the derivative, taken from `scores`.
    Where the module detaches a part of itself (DoRA), X is the true derivative and Y the module's own autograd, because
    that is what the trainer's step uses; elsewhere both come from one forward. Without `with_y` only X.
    """
    first_order = config.first_order
    size_b = rollouts.num_prompts
    num_units = size_b if first_order.mode == "exact" else min(first_order.num_blocks, size_b)
    parameters = bound.registry.trainable
    # X and Y of the U batch are held together with X of the E batch
    _require_memory(3 * num_units * sum(p.numel() for p in parameters.values()), bound, first_order)
    if not parameters:
        raise MeasurementError("gradients", "no parameter of the model is trainable", "set requires_grad")
    weights_x, weights_y = response_weights(rollouts, scores, config)
    x = {n: torch.zeros(num_units, p.numel(), dtype=bound.dtype) for n, p in parameters.items()}
    y = {n: torch.zeros_like(value) for n, value in x.items()} if with_y else {}
    unit_of = torch.arange(size_b) * num_units // size_b
    sizes = torch.bincount(unit_of, minlength=num_units)

    def add(prompts: Tensor, rows: Tensor, sides: list[tuple[dict[str, Tensor], Tensor]], *, true: bool) -> None:
        """Σ over the rows of every prompt, for each side and its weights [R]; one forward and one backward."""
        weights = torch.stack([of_rows for _, of_rows in sides]).to(bound.device)
        capture = Capture(parameters, weights, len(prompts))
        scored = score_rows(bound, rollouts, rows, config, true_derivative=true, capture=capture)
        sums = capture.sums(scored.logp.double().sum(-1))
        for name, of_sides in sums.items():
            for (into, _), of_prompts in zip(sides, of_sides.to("cpu", bound.dtype).flatten(2), strict=True):
                for n, gradient in zip(prompts.tolist(), of_prompts, strict=True):
                    into[name][unit_of[n]] += gradient / sizes[unit_of[n]]

    done = 0
    for prompts, rows in _microbatches(rollouts, config.generation.tf_batch_size):
        c, a = weights_x.reshape(-1)[rows], weights_y.reshape(-1)[rows]
        if bound.autograd_is_derivative:
            add(prompts, rows, [(x, c), (y, a)] if with_y else [(x, c)], true=False)
        else:
            add(prompts, rows, [(x, c)], true=True)
            if with_y:
                add(prompts, rows, [(y, a)], true=False)
        done += len(rows)
        if progress is not None:
            progress(stage, done, len(rollouts.gen_lens))
    return UnitGradients(x, y, sizes, first_order.mode)


def _microbatches(rollouts: Rollouts, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(prompts, rows): whole prompts of similar length with at most `size` rows, or `size` rows of one prompt."""
    group = rollouts.num_responses
    lengths = rollouts.per_prompt(rollouts.prompt_lens + rollouts.gen_lens).amax(1)
    for prompts in torch.argsort(lengths, stable=True).split(max(1, size // group)):
        rows = (prompts[:, None] * group + torch.arange(group)).reshape(-1)
        for part in rows.split(max(size, 1)) if len(prompts) == 1 else [rows]:
            yield prompts, part


def gram(
    left: Mapping[str, Float[Tensor, "U D"]],
    right: Mapping[str, Float[Tensor, "V D"]],
    precond: Mapping[str, Float[Tensor, ...]] | None = None,
) -> Float[Tensor, "U V"]:
    """Σ_names left_u · P ⊙ right_v in float64; P enters each product exactly once (P = 1 without `precond`)."""
    first = next(iter(left.values()))
    total = torch.zeros(first.shape[0], next(iter(right.values())).shape[0], dtype=torch.float64)
    for name, a in left.items():
        b = right[name]
        p = None if precond is None else precond[name].reshape(-1)
        for start in range(0, a.shape[1], _GRAM_COLUMNS):
            part = slice(start, start + _GRAM_COLUMNS)
            scaled = b[:, part].double() if p is None else b[:, part].double() * p[part].double()
            total += a[:, part].double() @ scaled.T
    return total


def prompt_mean(units: Mapping[str, Float[Tensor, "U D"]], sizes: Int[Tensor, " U"]) -> dict[str, Float[Tensor, " D"]]:
    """Mean over prompts, in float64: units weighted by the number of their prompts."""
    share = (sizes.double() / sizes.sum())[:, None]
    return {name: (share * values.double()).sum(0) for name, values in units.items()}


def _require_memory(numbers: int, bound: BoundModel, config: FirstOrderConfig) -> None:
    needed = numbers * torch.finfo(bound.dtype).bits / 8 / 2**30
    if needed > config.max_gradient_gib:
        raise MeasurementError(
            "first_order.max_gradient_gib",
            f"per-unit gradients need {needed:.2g} GiB, {config.max_gradient_gib:g} are allowed",
            "set first_order.mode: block with few num_blocks, use fewer prompts, or raise it",
        )
