"""Gradients and curvature of a few prompts by slow ways, beside those of the run, on the user's own model."""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.errors import MeasurementError
from entropy_probe.estimators.baselines import chosen, rb_coefficients
from entropy_probe.estimators.update_weights import UpdateBatch
from entropy_probe.estimators.ustat import cross_moments
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages.gradients.payloads import Payload, update_batch
from entropy_probe.stages.gradients.products import gram, norm
from entropy_probe.stages.gradients.unit_gradients import UnitGradients
from entropy_probe.stages.gradients.units import Rows, units_of_prompts
from entropy_probe.stages.made import Made
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import (
    Scores,
    batches_by_length,
    policy_scores,
    read_rows,
    score_rows,
)
from entropy_probe.stages.share import Share, Units
from entropy_probe.stages.slopes import Slopes, derived
from entropy_probe.stages.witnesses.shortened import shortened
from entropy_probe.stages.witnesses.update_by_loop import y_payload_by_loop

if TYPE_CHECKING:
    from jaxtyping import Float, Int

FEWER_ROWS = 4
"""With so many times fewer rows the graph of a gradient takes less memory than the pass behind X with all of them."""

_ROUNDED = 1e-9
"""Of S: where all responses of a prompt are one, S − S̄ is rounding, and two ways to add it up do not agree."""

_CERTAIN = 1e-2
"""Nats of a response, below which the gradients of its logits cancel."""
_ROUNDINGS_OF_GRADIENT = 1e3
_ROUNDINGS = 1e6
Found = TypeVar("Found")

_NO_DERIVATIVE = re.compile(r"derivative .*not implemented|once_differentiable|double backward")


@dataclass(frozen=True)
class Witness:
    """U_cross of two units by the naive loop and by the fast path, and the larger of their ‖X_fast − X_naive‖, relative
    to the sum of the norms of the terms, Σ_i ‖w_i ∇f_i‖, and a thousand times their rounding; the same of Y.
    Norms over all trainable parameters. A single unit has no U_cross."""

    u_cross: float | None
    u_cross_fast: float | None
    x_difference: float
    y_difference: float


def gradient_witness(
    bound: BoundModel,
    share: Share,
    scores: Scores,
    config: ProbeConfig,
    units: UnitGradients,
    precond: Mapping[str, Tensor],
    of_x_fast: Payload | None = None,
    batch: UpdateBatch | None = None,
) -> Witness | None:
    """The two units with the largest weights in Y, so that both sides have something to compare: prompts, or blocks.

    for n in unit, for g in responses:  X += w_ng · autograd.grad(f_ng),   Y += a_ng · autograd.grad(S_ng)

    Of several processes rank 0 does it, with the fast rows of whoever has them; `None` elsewhere. Their entropies stay
    where they are: κ is then that of `of_x_fast`.
    """
    rollouts = share.rollouts
    of_x, of_y = payloads_by_loop(
        rollouts, scores, config, batch, with_coefficients=not share.several
    )
    chosen = largest(of_y, units.units, 2)
    fast_x, fast_y = units.chosen(chosen)
    if share.several and of_x_fast is not None and of_x_fast.coefficients is not None:
        prompts = torch.isin(share.units.of_prompt, chosen).nonzero()[:, 0]
        kappa = torch.zeros(*of_x.weights.shape, rollouts.max_gen_len, dtype=torch.float64)
        kappa[prompts] = share.tokens(of_x_fast.coefficients, prompts)
        of_x = Payload(of_x.weights, kappa)
    if not share.world.first:
        return None
    own = bound.autograd_is_derivative_of(rollouts.tokens)
    if of_x.coefficients is None and of_y.coefficients is None and own:
        sums = _naive(bound, rollouts, units.units, chosen, [of_x, of_y], config, true=True)
    else:
        sums = _naive(bound, rollouts, units.units, chosen, [of_x], config, true=True)
        sums += _naive(bound, rollouts, units.units, chosen, [of_y], config, true=own)
    (naive_x, *scales_x), (naive_y, *scales_y) = sums
    sides = ((naive_x, naive_y), (fast_x, fast_y))
    slow, fast = (
        cross_moments(gram(x, y, precond)).u_cross if len(chosen) > 1 else None for x, y in sides
    )
    return Witness(
        u_cross=slow,
        u_cross_fast=fast,
        x_difference=_difference(fast_x, naive_x, *scales_x),
        y_difference=_difference(fast_y, naive_y, *scales_y),
    )


def payloads_by_loop(
    rollouts: Rollouts,
    scores: Scores,
    config: ProbeConfig,
    batch: UpdateBatch | None = None,
    *,
    with_coefficients: bool = True,
) -> tuple[Payload, Payload]:
    """`payloads` response by response: nothing of what the fast pass has its weights from, but for `hk_ridge`."""
    first, s = config.first_order, scores.seq_logp.tolist()
    x = torch.zeros(rollouts.num_prompts, rollouts.num_responses, dtype=torch.float64)
    for n, lengths in enumerate(scores.gen_lens.tolist()):
        own = [k for k, length in enumerate(lengths) if length]
        for g in own:
            others = math.fsum(s[n][k] for k in own if k != g) / max(len(own) - 1, 1)
            naive = first.estimator == "naive"
            x[n, g] = (s[n][g] - others) / len(own) if naive else -1.0 / len(own)
    kappa = first.estimator == "rb" and with_coefficients
    y = y_payload_by_loop(config.whose_update, batch or update_batch(rollouts, config))
    return Payload(x, _coefficients_by_loop(scores, config) if kappa else None), y


def _coefficients_by_loop(scores: Scores, config: ProbeConfig) -> Tensor:
    """κ_t = R_{≥t} − b_t, with sums of Python floats; fitted baselines by `rb_coefficients` itself."""
    baseline = chosen(config.first_order.baseline)
    if baseline in ("hk_ridge", "hk_group"):
        return rb_coefficients(scores.rb_entropy, scores.gen_lens, baseline, scores.features)
    entropy, lengths = scores.rb_entropy.double().tolist(), scores.gen_lens.tolist()
    later = [
        [
            [math.fsum(row[t + 1 : end]) for t in range(end)]
            for row, end in zip(*of_prompt, strict=True)
        ]
        for of_prompt in zip(entropy, lengths, strict=True)
    ]
    result = torch.zeros_like(scores.rb_entropy, dtype=torch.float64)
    for n, g in itertools.product(*map(range, scores.gen_lens.shape)):
        for t in range(lengths[n][g]):
            b = 0.0 if baseline == "none" else entropy[n][g][t]
            if baseline == "hk_ema":
                others = [
                    row[t] for m, rows in enumerate(later) if m != n for row in rows if len(row) > t
                ]
                b += math.fsum(others) / len(others) if others else 0.0
            result[n, g, t] = entropy[n][g][t] + later[n][g][t] - b
    return result


def largest(payload: Payload, units: Units, count: int) -> Int[Tensor, " u"]:
    """The units with the largest mean of |weight|, in ascending order; all of them if there are fewer."""
    sums = torch.zeros(len(units.sizes), dtype=torch.float64)
    sums.index_add_(0, units.of_prompt, payload.size())
    return (sums / units.sizes).topk(min(count, len(sums))).indices.sort().values


def _naive(
    bound: BoundModel,
    rollouts: Rollouts,
    units: Units,
    chosen: Tensor,
    payloads: list[Payload],
    config: ProbeConfig,
    *,
    true: bool,
) -> list[tuple[dict[str, Tensor], list[float], list[float]]]:
    """For each payload (of the same f) [u, numel] by name, and of each unit Σ_i ‖w_i ∇f_i‖ and what one rounding of
    logits leaves of that; one backward pass for each response."""
    parameters, group = bound.registry.trainable, rollouts.num_responses
    present = rollouts.present.sum(1).tolist()
    where = Rows.of(bound, len(units.sizes), config)
    sums = [
        {n: where.zeros(len(chosen), p.numel(), bound.dtype) for n, p in parameters.items()}
        for _ in payloads
    ]
    scales = [[0.0] * len(chosen) for _ in payloads]
    floors = [[0.0] * len(chosen) for _ in payloads]
    for i, unit in enumerate(chosen.tolist()):
        prompts = (units.of_prompt == unit).nonzero()[:, 0]
        for n, g in itertools.product(prompts.tolist(), range(group)):
            row = torch.tensor([n * group + g])
            if not rollouts.gen_lens[row]:
                continue
            loss = terms(bound, rollouts, row, payloads[0], config, true=true, once=True).sum()
            if not loss.requires_grad:
                raise MeasurementError(
                    "gradients",
                    "no trainable parameter influences the scores",
                    "load the adapter without merging it",
                )
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            found = {
                k: d.reshape(-1).cpu()
                for k, d in zip(parameters, gradients, strict=True)
                if d is not None
            }
            value = abs(float(loss.detach()))
            size, rounding = norm(found), _ROUNDED * value / (len(prompts) * present[n])
            of_logits = rounding_of_gradient(bound, rollouts, row) if value < _CERTAIN else 0.0
            for payload, total, scale, floor in zip(payloads, sums, scales, floors, strict=True):
                weight = float(payload.weights[n, g]) / len(prompts)
                scale[i] += (abs(weight) + rounding) * size
                floor[i] += abs(weight) * payload.largest(n, g) * of_logits
                for name, gradient in found.items():
                    total[name][i] += weight * gradient
            del gradients, found  # so that no two are held
    return list(zip(sums, scales, floors, strict=True))


def rounding_of_gradient(bound: BoundModel, rollouts: Rollouts, row: Int[Tensor, " 1"]) -> float:
    """eps·max(1, |z|)·‖∇Σ_t z_t‖ of the logits z of a response's own tokens.

    ∇log p = ∇z − Σ_j p_j ∇z_j: where a token is all but certain the terms cancel, and what is left is rounding.
    """

    def read(logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        return (logits.gather(-1, tokens[:, None])[:, 0],)

    (z,) = read_rows(bound, rollouts, row, read, true_derivative=True, once=True)
    parameters = list(bound.registry.trainable.values())
    gradients = torch.autograd.grad(z.sum(), parameters, allow_unused=True)
    size = norm({str(k): d for k, d in enumerate(gradients) if d is not None})
    return torch.finfo(bound.dtype).eps * max(1.0, float(z.detach().abs().max())) * size


def terms(
    bound: BoundModel,
    rollouts: Rollouts,
    rows: Int[Tensor, " R"],
    payload: Payload,
    config: ProbeConfig,
    *,
    true: bool,
    once: bool = False,
) -> Float[Tensor, " R"]:
    """f of some responses (`Payload`), with a graph, as `score_rows` scores them; `once`: which is differentiated once.

    Where f is S, log p is read alone: of what goes unused the graph would keep every piece of logits.
    """
    read = policy_scores(bound, config.generation, config.precision)
    if payload.coefficients is None:
        (logp,) = read_rows(
            bound, rollouts, rows, lambda *of: read(*of)[:1], true_derivative=true, once=once
        )
        return payload.sums(logp, logp, rows)
    scored = score_rows(bound, rollouts, rows, config, true_derivative=true, once=once)
    return payload.sums(scored.logp, scored.entropy, rows)


def _difference(
    fast: Mapping[str, Tensor],
    naive: Mapping[str, Tensor],
    scales: Sequence[float],
    floors: Sequence[float],
) -> float:
    """Largest ‖fast − naive‖/(scale + 1000·floor) of a unit, 0 where it is a vanishing part of one rounding; infinite
    where there is a difference and the scale is zero."""
    ratios = []
    for i, (scale, floor) in enumerate(zip(scales, floors, strict=True)):
        off = norm(Made(naive, lambda name, i=i: fast[name][i].double() - naive[name][i].double()))
        size = scale + _ROUNDINGS_OF_GRADIENT * floor
        vanishes = off <= sys.float_info.epsilon * floor
        ratios.append(0.0 if vanishes else off / size if size > 0 else float("inf"))
    return max(ratios, key=lambda ratio: float("inf") if ratio != ratio else ratio)


def curvature_witness(
    float64: BoundModel,
    rollouts: Rollouts,
    scores: Scores,
    along: Slopes,
    v: Mapping[str, Tensor],
    config: ProbeConfig,
) -> float | None:
    """|Σ by central difference − Σ by `twice_in_reverse`| / Σ_i[|D²_vR_i| + |ρ_i·D²_vS_i|], in true float64, where

        Σ = Σ_i [D²_vR_i + ρ_i·D²_vS_i],   ρ_i = R_i − mean of R over the batch's other responses

    or over a million roundings of the difference, where the terms are as small as these;
    over the prompt with the largest |ρ|. `None` where an operation of the model has no second derivative. Where its
    rows are `shortened`, the central difference is made again, of the same rows; ρ stays that of whole ones.
    """
    rho, few, prompts = _most_extreme(rollouts, scores)
    short = shortened(few)
    expected = unless_lacking(lambda: twice_in_reverse(float64, short, rho, v, config))
    if expected is None:
        return None
    d2_r, d2_s = along.d2_rb_sum[prompts], along.d2_seq_logp[prompts]
    rounding = along.d2_rounding[prompts]
    if short is not few:
        alone = Share.of(short, units_of_prompts(short))
        twice = derived(float64, float64, alone, v, config).twice
        d2_r, d2_s, rounding = twice.entropy.sum(-1), twice.logp.sum(-1), twice.rounding
    of_s = rho * d2_s
    off = abs(float((d2_r + of_s).sum()) - expected)
    size = float((d2_r.abs() + of_s.abs()).sum())
    rounding = ((1 + rho.abs()) * rounding).square().sum().sqrt()
    size += _ROUNDINGS * float(rounding)
    return 0.0 if off == 0 else off / size if size > 0 else float("inf")


def off_in_reverse(
    bound: BoundModel,
    rollouts: Rollouts,
    scores: Scores,
    along: Slopes,
    v: Mapping[str, Tensor],
    config: ProbeConfig,
) -> float | None:
    """The difference of `curvature_witness` in the precision of this model, over the terms without their rounding:
    where it is small, the model has a second derivative in reverse mode. `None` where it lacks one, or rows are long.
    """
    rho, few, prompts = _most_extreme(rollouts, scores)
    if shortened(few) is not few:
        return None
    found = unless_lacking(lambda: twice_in_reverse(bound, few, rho, v, config))
    if found is None:
        return None
    terms = torch.stack([along.d2_rb_sum[prompts], rho * along.d2_seq_logp[prompts]])
    size = float(terms.abs().sum())
    return abs(float(terms.sum()) - found) / size if size > 0 else None


def _most_extreme(
    rollouts: Rollouts, scores: Scores
) -> tuple[Float[Tensor, "1 G"], Rollouts, Int[Tensor, " 1"]]:
    """ρ of the prompt with the largest |ρ|, and that prompt."""
    rb_sum = scores.rb_sum
    rho = rb_sum - (rb_sum.sum() - rb_sum) / (rb_sum.numel() - 1)
    prompts = rho.abs().sum(1).topk(1).indices
    return rho[prompts], rollouts.of_prompts(prompts), prompts


def twice_in_reverse(
    float64: BoundModel,
    rollouts: Rollouts,
    rho: Float[Tensor, "B G"],
    v: Mapping[str, Tensor],
    config: ProbeConfig,
) -> float:
    """d²/dη² of Σ_i [R_i(θ + ηv) + ρ_i·S_i(θ + ηv)] at η = 0: one number, differentiated twice in reverse mode."""
    batches = batches_by_length(rollouts, max(1, config.generation.tf_batch_size // FEWER_ROWS))
    return sum(
        rows_twice_in_reverse(float64, rollouts, rows, rho.reshape(-1)[rows], v, config)
        for rows in batches
    )


def rows_twice_in_reverse(
    float64: BoundModel,
    rollouts: Rollouts,
    rows: Int[Tensor, " R"],
    rho: Float[Tensor, " R"],
    v: Mapping[str, Tensor],
    config: ProbeConfig,
) -> float:
    """The terms of some rows, with their ρ, in one pass."""
    theta = float64.registry.parameters
    eta = torch.zeros((), dtype=float64.dtype, device=float64.device, requires_grad=True)
    override = {
        n: theta[n].detach() + eta.to(theta[n].device) * d.to(theta[n].device, eta.dtype)
        for n, d in v.items()
    }
    scored = score_rows(float64, rollouts, rows, config, override=override, true_derivative=True)
    f = (
        scored.entropy.double().sum(-1) + rho.to(float64.device) * scored.logp.double().sum(-1)
    ).sum()
    with float64.recording():
        (first,) = torch.autograd.grad(f, eta, create_graph=True)
    return float(torch.autograd.grad(first, eta)[0]) if first.requires_grad else 0.0


def unless_lacking(way: Callable[[], Found]) -> Found | None:
    """What a way finds, `None` where an operation of the model lacks the derivative that it needs."""
    try:
        return way()
    except RuntimeError as error:
        if not lacks_derivative(error):
            raise
        return None


def lacks_derivative(error: RuntimeError) -> bool:
    """Whether torch says that an operation has no forward-mode or no second derivative."""
    return isinstance(error, NotImplementedError) or _NO_DERIVATIVE.search(str(error)) is not None
