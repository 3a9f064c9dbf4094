"""From what the stages measured to the sections of the report: statistics of matrices, sums and means."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, fields

import torch
from torch import Tensor

from entropy_probe import memory
from entropy_probe import report as r
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import printable
from entropy_probe.estimators import advantages, importance, parity, prediction, two_batch, ustat
from entropy_probe.estimators.baselines import Baseline
from entropy_probe.estimators.slope import PromptMean
from entropy_probe.estimators.token_stats import LOGIT_VAR
from entropy_probe.model.checkpoint import AdamState, Checkpoint, OtherOptimizer
from entropy_probe.model.checkpoint.moments.adam import hyper_parameters
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.parts import part_of
from entropy_probe.processes.world import World
from entropy_probe.stages import entropy_change, gradients, update
from entropy_probe.stages.memory.memory_limit import Plan
from entropy_probe.stages.moments import MomentsMatch
from entropy_probe.stages.responses.rollouts import Rollouts, early_eos
from entropy_probe.stages.scores import Scores
from entropy_probe.stages.slopes import Slopes, SlopeSources
from entropy_probe.stages.witnesses import continuity
from entropy_probe.stages.witnesses.invariance import Invariance, WorstDifference
from entropy_probe.stages.witnesses.properties import Drawn, nearest
from entropy_probe.stages.witnesses.torch_step import StepAgreement


def checkpoint_section(checkpoint: Checkpoint, name: str | None) -> r.CheckpointSection:
    info = checkpoint.info
    return r.CheckpointSection(
        name=printable(name or info.path.name),
        path=printable(info.path),
        fingerprint=info.fingerprint,
        model_type=info.model_type,
        num_parameters=info.num_parameters,
        num_trainable=info.num_trainable,
        weights_dtype=info.weights_dtype,
        adapter=info.adapter,
        global_step=info.global_step,
        optimizer=_adam(checkpoint.adam, info.saved_states) if checkpoint.other is None else _other(checkpoint.other),
        warnings=list(info.warnings),
        device_map=info.device_map,
    )


def _adam(adam: Mapping[str, AdamState], saved: dict[str, int]) -> r.OptimizerSection:
    first = next(iter(adam.values()))
    return r.OptimizerSection(
        type=first.kind,
        lr=max(state.lr for state in adam.values()),
        betas=first.betas,
        eps=first.eps,
        weight_decay=first.weight_decay,
        step=int(max(state.step for state in adam.values())),
        covered=sum(state.step > 0 for state in adam.values()),
        total=len(adam),
        saved=saved,
        read=dict(Counter(_hyper_parameters(state) for state in adam.values() if state.step > 0)),
    )


def _other(optimizer: OtherOptimizer) -> r.OptimizerSection:
    return r.OptimizerSection(
        type=optimizer.kind,
        lr=optimizer.lr,
        betas=None,
        eps=None,
        weight_decay=None,
        step=None if optimizer.step is None else int(optimizer.step),
        covered=0,
        total=len(optimizer.trained),
        saved={},
        read={},
        no_second_moment=optimizer.reason,
    )


def _hyper_parameters(state: AdamState) -> str:
    return hyper_parameters(state.lr, *state.betas, state.eps, state.weight_decay)


def batch_section(
    rollouts: Rollouts, same_batch: bool, config: ProbeConfig, given: str, eos: Collection[int]
) -> r.BatchSection:
    advantage = gradients.response_advantages(rollouts, config.first_order)
    cut = [response for response in rollouts.responses if response[-1] not in eos]
    limit = config.generation.max_new_tokens
    known = rollouts.source == "sampled" and not config.generation.stop
    return r.BatchSection(
        num_prompts=rollouts.num_prompts,
        num_responses=rollouts.num_responses,
        num_tokens=int(rollouts.gen_lens.sum()),
        source=printable(rollouts.source),
        same_batch=same_batch,
        mean_reward=float(rollouts.rewards.mean()),
        mean_reward_se=importance.mean_and_se(rollouts.rewards)[1],
        zero_advantage_fraction=float(advantages.zero_advantage(advantage, rollouts.rewards).double().mean()),
        missing_gold=rollouts.missing_gold,
        given=printable(given),
        early_eos=sum(early_eos(response, eos) is not None for response in rollouts.responses),
        unended=sum(len(response) < limit for response in cut) if known else None,
        fingerprint=fingerprint(rollouts),
    )


def fingerprint(rollouts: Rollouts) -> str:
    """SHA-256 of every row's token ids, with where its response begins, and of what was given beside them.

    Not of advantages by rule: they follow from the rewards, in the rounding of the machine.
    """
    starts = rollouts.prompt_lens.tolist()
    rows = [
        [start, *row[: start + length]]
        for row, start, length in zip(rollouts.ids.tolist(), starts, rollouts.gen_lens.tolist(), strict=True)
    ]
    given = None if rollouts.advantages is None else rollouts.advantages.tolist()
    content = (rows, rollouts.rewards.tolist(), given)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def sampling_section(redrawn: tuple[float, float] | None) -> r.SamplingSection | None:
    return None if redrawn is None else r.SamplingSection(same_seed=redrawn[0], other_seed=redrawn[1])


def entropy_section(scores: Scores, temperature: float) -> r.EntropySection:
    naive, rb = importance.mean_and_se(-scores.seq_logp), importance.mean_and_se(scores.rb_sum)
    rb_q = importance.mean_and_se(scores.rb_sum_q)
    per_token = importance.ratio_and_se(scores.rb_sum, scores.gen_lens)
    assert scores.features is not None
    logit_var = scores.features[..., LOGIT_VAR]
    surprise = importance.surprise(scores.seq_logq, scores.rb_sum_q, logit_var, temperature)
    return r.EntropySection(
        naive=r.Estimate(value=naive[0], se=naive[1]),
        rb=r.Estimate(value=rb[0], se=rb[1]),
        rb_q=r.Estimate(value=rb_q[0], se=rb_q[1]),
        surprise=r.Estimate(value=surprise[0], se=surprise[1]),
        per_token=r.Estimate(value=per_token[0], se=per_token[1]),
        rb_by_prompt=scores.rb_sum.mean(1).tolist(),
    )


def first_order_section(
    units: gradients.UnitGradients, precond: Mapping[str, Tensor], lr: float, lr_source: str, estimator: str
) -> r.FirstOrderSection:
    def statistic_of(gram: Tensor) -> tuple[ustat.CrossMoments, ustat.UStatistic]:
        moments = ustat.cross_moments_of_sums(gram) if units.several else ustat.cross_moments(gram)
        return moments, ustat.u_statistic(moments, None if units.several else gram)

    def delta_h1(gram: Tensor) -> r.Estimate:
        statistic = statistic_of(gram)[1]
        return r.Estimate(value=-lr * statistic.u_cross, se=lr * statistic.se_plugin)

    if units.several:  # of each matrix K the sums of rows and columns, and the diagonal, are enough
        own = _with_parts(gradients.own_dots(units, precond))
        parts = dict(zip(own, units.of_units(torch.stack(list(own.values()), 1)).unbind(1), strict=True))
        plain = float(sum(torch.dot(units.sums_x[n], t) for n, t in units.sums_y.items())) / len(units.sizes) ** 2
    else:
        parts = _with_parts(gradients.grams(units.x, units.y, precond))
        plain = ustat.cross_moments(gradients.gram(units.x, units.y)).bars_dot
    moments, statistic = statistic_of(parts.pop(_WHOLE))
    num_prompts = float(units.sizes.sum())
    return r.FirstOrderSection(
        mode=units.mode,
        estimator=estimator,
        num_units=moments.num_units,
        interval=ustat.interval(statistic, moments.num_units),
        bars_dot_plain=plain,
        delta_h1_by_unit=(-lr / moments.num_units * moments.row_means).tolist(),
        delta_h1_parts=_parts(parts, delta_h1),
        row_means=moments.row_means.tolist(),
        bars_dot=moments.bars_dot,
        diag_sum=moments.diag_sum,
        norm_x_sum=num_prompts * update.norm(units.mean_x()),
        norm_y_sum=num_prompts * update.norm(units.mean_y()),
        lr=lr,
        lr_source=lr_source,
        delta_h1=-lr * statistic.u_cross,
        delta_h1_se=lr * statistic.se_plugin,
        **asdict(statistic),
    )


_Key = tuple[str, str]
_WHOLE: _Key = ("", "")


def _with_parts(matrices: Mapping[str, Tensor]) -> dict[_Key, Tensor]:
    """(table, label) → the sum of the matrices of a group of tensors; at `_WHOLE` that of all."""
    groups: dict[_Key, Tensor] = {_WHOLE: torch.stack(list(matrices.values())).sum(0)}
    for table in r.Parts.model_fields:
        for name, matrix in matrices.items():
            key = table, getattr(part_of(name), table)
            groups[key] = matrix + groups.get(key, 0.0)
    return groups


def _parts(groups: Mapping[_Key, Tensor], delta_h1: Callable[[Tensor], r.Estimate]) -> r.Parts:
    """δH₁ of the summed matrices of each group of tensors."""
    tables: dict[str, dict[str, r.Estimate]] = {table: {} for table in r.Parts.model_fields}
    for (table, label), matrix in groups.items():
        tables[table][label] = delta_h1(matrix)
    return r.Parts(**tables)


def two_batch_section(
    e: gradients.UnitGradients, u: gradients.UnitGradients, precond: Mapping[str, Tensor], lr: float
) -> r.TwoBatchSection:
    def moments_of(gram: Tensor) -> two_batch.TwoBatchMoments:
        if e.several:
            return two_batch.two_batch_moments_of_sums(gram[: len(e.sizes)], gram[len(e.sizes) :], e.sizes)
        return two_batch.two_batch_moments(gram, e.sizes, u.sizes)

    def delta_h1(gram: Tensor) -> r.Estimate:
        moments = moments_of(gram)
        return r.Estimate(value=-lr * moments.bars_dot, se=lr * moments.total_se)

    if e.several:  # of each matrix K the weighted sums of rows and of columns, one after the other
        s, t = (
            {key: sums[:, None] for key, sums in _with_parts(gradients.dots(side, mean, precond)).items()}
            for side, mean in ((e.x, u.mean_y()), (u.y, e.mean_x()))
        )
        of_e, of_u = e.of_units(torch.cat(list(s.values()), 1)), u.of_units(torch.cat(list(t.values()), 1))
        parts = dict(zip(s, torch.cat([of_e, of_u]).unbind(1), strict=True))
    else:
        parts = _with_parts(gradients.grams(e.x, u.y, precond))
    moments = moments_of(parts.pop(_WHOLE))
    return r.TwoBatchSection(
        bars_dot=moments.bars_dot,
        delta_h1=-lr * moments.bars_dot,
        delta_h1_se=lr * moments.total_se,
        conditional_se=lr * moments.conditional_se,
        projections=moments.projections.tolist(),
        update_projections=moments.update_projections.tolist(),
        interaction=moments.interaction,
        delta_h1_parts=_parts(parts, delta_h1),
    )


def sampler_parity_section(rollouts: Rollouts, token_logq: Tensor | None) -> r.SamplerParitySection | None:
    if rollouts.logprobs is None or token_logq is None:
        return None
    reported, inside = rollouts.per_prompt(rollouts.logprobs), rollouts.per_prompt(rollouts.gen_mask)
    return r.SamplerParitySection(**asdict(parity.sampler_parity(token_logq, reported, inside)))


def update_section(
    direction: update.UpdateDirection,
    along: Slopes,
    cross: PromptMean | None,
    predicting: tuple[PromptMean, PromptMean],
    agreement: StepAgreement,
    sources: SlopeSources,
    baseline: Baseline,
) -> r.UpdateSection:
    rb = along.rb[baseline]
    estimators = {"naive": along.naive} | {f"rb_{name}": slope for name, slope in along.rb.items()}
    return r.UpdateSection(
        norm=direction.norm,
        norm_v0=update.norm(direction.v0),
        grad_norm=direction.grad_norm,
        delta_h1_per_lr_naive=along.naive.value,
        delta_h1_per_lr_naive_se=along.naive.se,
        delta_h1_per_lr_rb=rb.value,
        delta_h1_per_lr_rb_se=rb.se,
        delta_h1_per_lr_cross=None if cross is None else cross.value,
        delta_h1_per_lr_cross_se=None if cross is None else cross.se,
        estimators={name: r.Estimate(value=slope.value, se=slope.se) for name, slope in estimators.items()},
        slope_of_v0=sources.of_v0,
        slope_by_unit=sources.by_unit.tolist(),
        delta_h1_per_lr_per_token=along.per_token.value,
        delta_h1_per_lr_per_token_se=along.per_token.se,
        slope_of_change=float(along.of_change.sum()),
        slope_of_change_size=float(along.of_change.abs().sum()),
        curvature_of_change=along.curvature_of_change[0],
        curvature_of_change_size=along.curvature_of_change[1],
        curvature=along.curvature.value,
        curvature_se=along.curvature.se,
        curvature_per_token=along.per_token_curvature.value,
        curvature_per_token_se=along.per_token_curvature.se,
        eta_star=prediction.eta_star(*predicting),
        cosine_with_optimizer_step=agreement.cosine,
        norm_ratio_with_optimizer_step=agreement.norm_ratio,
        worst_parameter=agreement.worst,
    )


def change_row(
    change: entropy_change.EntropyChange, predicted: prediction.Prediction | None, reach: float, min_ess: float
) -> r.EntropyChangeRow:
    low, middle, high = change.log_weights
    near = abs(change.eta) <= reach and change.unclipped_ess_fraction >= min_ess
    return r.EntropyChangeRow(
        eta=change.eta,
        delta_h=change.naive.value,
        delta_h_se=change.naive.se,
        delta_h_rb=change.rb.value,
        delta_h_rb_se=change.rb.se,
        delta_h_rb_by_prompt=change.rb.influence.mean(1).tolist(),
        ess=change.ess,
        ess_fraction=change.ess_fraction,
        pareto_k=change.pareto_k,
        clip_fraction=change.clip_fraction,
        restricted=change.restricted,
        delta_h_interval=change.naive.interval(),
        delta_h_rb_interval=change.rb.interval(),
        delta_h_per_token=change.per_token.value,
        delta_h_per_token_se=change.per_token.se,
        delta_h_per_token_interval=change.per_token.interval(),
        delta_h_per_token_naive=change.naive_per_token.value,
        delta_h_per_token_naive_se=change.naive_per_token.se,
        unclipped_ess_fraction=change.unclipped_ess_fraction,
        log_weight_min=low,
        log_weight_median=middle,
        log_weight_max=high,
        method=change.method,
        reliable=change.reliable,
        predicted=None if predicted is None else predicted.value,
        predicted_se=None if predicted is None else predicted.se,
        difference=None if predicted is None else predicted.difference,
        difference_se=None if predicted is None else predicted.difference_se,
        ratio=change.rb.value / predicted.value if predicted is not None and predicted.value != 0 else None,
        in_range=None if predicted is None else change.reliable and near,
    )


# Names of the section → names of `Taylor`.
_OF_TAYLOR = {
    f"taylor_{f.name}" if f.name in ("eta_min", "eta_max", "radius", "slope") else f.name: f.name
    for f in fields(continuity.Taylor)
}


def continuity_section(
    zero: continuity.ZeroCheck, scaling: continuity.Scaling, taylor: continuity.Taylor | None
) -> r.ContinuitySection:
    return r.ContinuitySection(
        zero_check_max_abs=zero.max_abs,
        zero_check_bitwise=zero.bitwise,
        eta_main=continuity.ETA_MAIN,
        eta_tiny=continuity.ETA_TINY,
        param_ratio=scaling.param_ratio,
        logit_ratio=scaling.logit_ratio,
        **{key: None if taylor is None else getattr(taylor, name) for key, name in _OF_TAYLOR.items()},
    )


def invariance_section(fixed: Invariance, drawn: Drawn | None) -> r.InvarianceSection:
    """The rows of the batch and the drawn cases together: of each property the difference nearest to its bound."""
    both = [fixed] if drawn is None else [fixed, drawn]
    return r.InvarianceSection(
        padding=_worst_case(*(measured.padding for measured in both)),
        batch=_worst_case(*(measured.batch for measured in both)),
        chunk=_worst_case(*(measured.chunk for measured in both)),
        precision=_worst_case(fixed.precision),
        zero_step=None if drawn is None else _worst_case(drawn.zero_step),
        scaling=None if drawn is None or drawn.scaling is None else _worst_case(drawn.scaling),
        num_examples=0 if drawn is None else drawn.num_examples,
    )


def _worst_case(*found: WorstDifference) -> r.WorstCase:
    return r.WorstCase(**asdict(nearest(*found)))


def preconditioner_section(
    checkpoint: Checkpoint,
    precond: Mapping[str, Tensor],
    bound: BoundModel,
    of_torch: float | None,
    match: MomentsMatch,
) -> r.PreconditionerSection:
    missing = [n for n in bound.registry.trainable if n not in checkpoint.adam or checkpoint.adam[n].step == 0]
    values = list(precond.values())
    return r.PreconditionerSection(
        num_tensors=len(precond),
        missing=missing,
        num_nonfinite=sum(int((~torch.isfinite(p)).sum()) for p in values),
        smallest=min(float(p.min()) for p in values),
        largest=max(float(p.max()) for p in values),
        difference_from_torch=of_torch,
        exchanged=match.worst,
        exchanged_pair=match.pair,
        num_pairs=match.num_pairs,
        num_undecided=match.num_undecided,
        undecided=match.undecided,
    )


def distributed_section(world: World) -> r.DistributedSection | None:
    if world.size == 1:
        return None
    return r.DistributedSection(
        world_size=world.size, bytes_sent_per_rank=world.bytes_sent, bytes_of_prompts_per_rank=world.bytes_of_prompts
    )


def memory_section(
    device: torch.device, held: Mapping[str, memory.Held], config: ProbeConfig, plan: Plan | None
) -> r.MemorySection:
    return r.MemorySection(
        counted=memory.kind(device),
        stages={stage: r.StageMemory(**asdict(of)) for stage, of in held.items()},
        limit=config.memory_limit,
        expected=None if plan is None else plan.expected,
        tf_batch_size=config.generation.tf_batch_size,
        logits_at_once=None if plan is None else plan.logits_at_once,
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
