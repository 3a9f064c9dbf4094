"""From what the stages measured to the sections of the report; nothing is computed here but sums and means."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict

import torch
from torch import Tensor

from entropy_probe import report as r
from entropy_probe.config import FirstOrderConfig
from entropy_probe.errors import printable
from entropy_probe.estimators import advantages, importance, parity, two_batch, ustat
from entropy_probe.estimators.slope import PromptMean
from entropy_probe.model.checkpoint import Checkpoint
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages import continuity, entropy_change, gradients, update
from entropy_probe.stages.optimizer_step import StepAgreement
from entropy_probe.stages.rollouts import Rollouts
from entropy_probe.stages.scores import Scores
from entropy_probe.stages.slopes import Slopes


def checkpoint_section(checkpoint: Checkpoint, name: str | None) -> r.CheckpointSection:
    info, adam = checkpoint.info, checkpoint.adam
    first = next(iter(adam.values()))
    return r.CheckpointSection(
        name=printable(name or info.path.name),
        path=printable(info.path),
        fingerprint=info.fingerprint,
        model_type=info.model_type,
        num_parameters=info.num_parameters,
        num_trainable=info.num_trainable,
        weights_dtype=info.weights_dtype,
        adapter=info.adapter,
        optimizer=r.OptimizerSection(
            type=("AdamW" if first.decoupled else "Adam") + (" (AMSGrad)" if first.amsgrad else ""),
            lr=max(state.lr for state in adam.values()),
            betas=first.betas,
            eps=first.eps,
            weight_decay=first.weight_decay,
            step=int(max(state.step for state in adam.values())),
            covered=sum(state.step > 0 for state in adam.values()),
            total=len(adam),
        ),
    )


def batch_section(rollouts: Rollouts, same_batch: bool, config: FirstOrderConfig) -> r.BatchSection:
    advantage = gradients.response_advantages(rollouts, config)
    return r.BatchSection(
        num_prompts=rollouts.num_prompts,
        num_responses=rollouts.num_responses,
        num_tokens=int(rollouts.gen_lens.sum()),
        source=printable(rollouts.source),
        same_batch=same_batch,
        mean_reward=float(rollouts.rewards.mean()),
        zero_advantage_fraction=float(advantages.zero_advantage(advantage, rollouts.rewards).double().mean()),
        missing_gold=rollouts.missing_gold,
    )


def entropy_section(scores: Scores) -> r.EntropySection:
    naive, rb = importance.mean_and_se(-scores.seq_logp), importance.mean_and_se(scores.rb_sum)
    rb_q = importance.mean_and_se(scores.rb_sum_q)
    per_token = importance.ratio_and_se(scores.rb_sum, scores.gen_lens)
    return r.EntropySection(
        naive=r.Estimate(value=naive[0], se=naive[1]),
        rb=r.Estimate(value=rb[0], se=rb[1]),
        rb_q=r.Estimate(value=rb_q[0], se=rb_q[1]),
        per_token=r.Estimate(value=per_token[0], se=per_token[1]),
    )


def first_order_section(
    units: gradients.UnitGradients, precond: Mapping[str, Tensor], lr: float, lr_source: str
) -> r.FirstOrderSection:
    matrix = gradients.gram(units.x, units.y, precond)
    moments = ustat.cross_moments(matrix)
    statistic = ustat.u_statistic(moments, matrix)
    sums_x, sums_y = (
        {n: (units.sizes.double()[:, None] * t.double()).sum(0) for n, t in side.items()} for side in (units.x, units.y)
    )
    return r.FirstOrderSection(
        mode=units.mode,
        num_units=moments.num_units,
        row_means=moments.row_means.tolist(),
        bars_dot=moments.bars_dot,
        diag_sum=moments.diag_sum,
        norm_x_sum=update.norm(sums_x),
        norm_y_sum=update.norm(sums_y),
        lr=lr,
        lr_source=lr_source,
        delta_h1=-lr * statistic.u_cross,
        delta_h1_se=None if statistic.se_plugin is None else lr * statistic.se_plugin,
        **asdict(statistic),
    )


def two_batch_section(
    e: gradients.UnitGradients, u: gradients.UnitGradients, precond: Mapping[str, Tensor], lr: float
) -> r.TwoBatchSection:
    moments = two_batch.two_batch_moments(gradients.gram(e.x, u.y, precond), e.sizes, u.sizes)
    return r.TwoBatchSection(
        bars_dot=moments.bars_dot,
        delta_h1=-lr * moments.bars_dot,
        delta_h1_se=None if moments.total_se is None else lr * moments.total_se,
        conditional_se=None if moments.conditional_se is None else lr * moments.conditional_se,
        projections=moments.projections.tolist(),
    )


def sampler_parity_section(rollouts: Rollouts, scores: Scores) -> r.SamplerParitySection | None:
    if rollouts.logprobs is None:
        return None
    reported, inside = rollouts.per_prompt(rollouts.logprobs), rollouts.per_prompt(rollouts.gen_mask)
    return r.SamplerParitySection(**asdict(parity.sampler_parity(scores.token_logq, reported, inside)))


def update_section(
    direction: update.UpdateDirection, along: Slopes, cross: PromptMean | None, agreement: StepAgreement
) -> r.UpdateSection:
    return r.UpdateSection(
        norm=direction.norm,
        grad_norm=direction.grad_norm,
        delta_h1_per_lr_naive=along.naive.value,
        delta_h1_per_lr_naive_se=along.naive.se,
        delta_h1_per_lr_rb=along.rb.value,
        delta_h1_per_lr_rb_se=along.rb.se,
        delta_h1_per_lr_cross=None if cross is None else cross.value,
        delta_h1_per_lr_cross_se=None if cross is None else cross.se,
        curvature=along.curvature.value,
        curvature_se=along.curvature.se,
        eta_star=entropy_change.eta_star(along.rb, along.curvature),
        cosine_with_optimizer_step=agreement.cosine,
        norm_ratio_with_optimizer_step=agreement.norm_ratio,
        worst_parameter=agreement.worst,
    )


def change_row(change: entropy_change.EntropyChange, slope: PromptMean, curvature: PromptMean) -> r.EntropyChangeRow:
    predicted, predicted_se = None, None
    if not change.restricted:
        predicted, predicted_se = entropy_change.predicted(change.eta, slope, curvature)
    return r.EntropyChangeRow(
        eta=change.eta,
        delta_h=change.naive.value,
        delta_h_se=change.naive.se,
        delta_h_rb=change.rb.value,
        delta_h_rb_se=change.rb.se,
        ess=change.ess,
        ess_fraction=change.ess_fraction,
        pareto_k=change.pareto_k,
        clip_fraction=change.clip_fraction,
        restricted=change.restricted,
        predicted=predicted,
        predicted_se=predicted_se,
    )


def continuity_section(zero: continuity.ZeroCheck, scaling: continuity.Scaling) -> r.ContinuitySection:
    return r.ContinuitySection(
        zero_check_max_abs=zero.max_abs,
        zero_check_bitwise=zero.bitwise,
        eta_main=continuity.ETA_MAIN,
        eta_tiny=continuity.ETA_TINY,
        param_ratio=scaling.param_ratio,
        logit_ratio=scaling.logit_ratio,
        taylor_order=None,
    )


def preconditioner_section(
    checkpoint: Checkpoint, precond: Mapping[str, Tensor], bound: BoundModel
) -> r.PreconditionerSection:
    missing = [n for n in bound.registry.trainable if n not in checkpoint.adam or checkpoint.adam[n].step == 0]
    values = list(precond.values())
    return r.PreconditionerSection(
        num_tensors=len(precond),
        missing=missing,
        num_nonfinite=sum(int((~torch.isfinite(p)).sum()) for p in values),
        smallest=min(float(p.min()) for p in values),
        largest=max(float(p.max()) for p in values),
    )


def environment(bound: BoundModel, threads: int) -> dict[str, str | int]:
    import peft
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": str(bound.device),
        "threads": threads,
    }
