"""The whole pipeline on one screen: checkpoint → batches → first order → update → slopes → realised change → report."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from entropy_probe import __version__
from entropy_probe import report as r
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import ConfigError
from entropy_probe.estimators import advantages, importance, two_batch, ustat
from entropy_probe.estimators.slope import PromptMean
from entropy_probe.model.checkpoint import Checkpoint, load_checkpoint
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.precision import apply_global_precision, deterministic_algorithms, str_to_dtype, threads_for
from entropy_probe.model.quiet import quiet_transformers
from entropy_probe.model.registry import checksum
from entropy_probe.stages import continuity, coverage, entropy_change, gradients, invariance, slopes, tasks, update
from entropy_probe.stages.rollouts import Rollouts, read_rollouts, sample_rollouts
from entropy_probe.stages.scores import Scores, score

Progress = Callable[[str, int, int], None]


def run_probe(
    path_or_checkpoint: str | Path | Checkpoint,
    config: ProbeConfig | None = None,
    rollouts: str | Path | None = None,
    update_rollouts: str | Path | None = None,
    *,
    prompts: str | Path | None = None,
    base_model: str | Path | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> r.ProbeReport:
    """Measure a checkpoint: U_cross and δH₁, the update direction v, slopes along it, ΔH(η), continuity, coverage.

    `rollouts` is the E batch and `update_rollouts` the U batch as JSON lines; one file alone serves as both and is
    flagged `same_batch`; without files both are sampled, from `prompts` or the configured dataset. `progress(stage,
    done, total)` is called as the work goes on. The model is not modified, and nothing is judged. Raises `ProbeError`.
    """
    config = config or ProbeConfig()
    if isinstance(path_or_checkpoint, Checkpoint):
        checkpoint = path_or_checkpoint
    else:
        checkpoint = load_checkpoint(
            path_or_checkpoint, base_model, config.device, missing_state=config.first_order.missing_state
        )
    clock = _Clock(progress)
    with (
        apply_global_precision(config.precision.allow_tf32, config.precision.matmul_precision),
        deterministic_algorithms(config.precision.deterministic_probe),
        quiet_transformers(),
        threads_for(checkpoint.info.num_parameters) as threads,
    ):
        return _measure(checkpoint, config, rollouts, update_rollouts, prompts, name, clock, threads)


def _measure(
    checkpoint: Checkpoint,
    config: ProbeConfig,
    rollouts: str | Path | None,
    update_rollouts: str | Path | None,
    prompts: str | Path | None,
    name: str | None,
    clock: _Clock,
    threads: int,
) -> r.ProbeReport:
    with clock("integrity"):
        checksum_before = checksum(checkpoint.model)
        bound = bind(checkpoint.model, str_to_dtype(config.precision.func_override.dtype))
        float64 = bind(checkpoint.model, torch.float64) if bound.dtype is not torch.float64 else bound
    with clock("rollouts"):
        batch_e, batch_u = _batches(bound, checkpoint, config, rollouts, update_rollouts, prompts, clock.progress)
        same_batch = batch_e is batch_u
    with clock("scores"):
        scores_e = score(bound, batch_e, config)
        scores_u = scores_e if same_batch else score(bound, batch_u, config)
    with clock("gradients"):
        grads_u = gradients.unit_gradients(
            bound, batch_u, scores_u, config, stage="gradients of U", progress=clock.progress
        )
        grads_e = (
            grads_u
            if same_batch
            else gradients.unit_gradients(
                bound, batch_e, scores_e, config, stage="gradients of E", progress=clock.progress
            )
        )
    with clock("first order"):
        precond = update.adam_preconditioner(checkpoint.adam)
        lr, lr_source = update.learning_rate(checkpoint.adam, config.first_order.lr)
        first_order = _first_order(grads_u, precond, lr, lr_source)
        across = None if same_batch else _two_batch(grads_e, grads_u, precond, lr)
    with clock("update"):
        ascent = gradients.prompt_mean(grads_u.y, grads_u.sizes)
        direction = update.compute_update_vector_adamw(
            bound.registry, checkpoint.adam, ascent, config.update.max_grad_norm
        )
    with clock("slopes"):
        along = slopes.slopes_along(bound, float64, batch_e, scores_e, direction.v, config)
        cross = _cross_fitted_slope(grads_u, direction) if same_batch else None
    with clock("entropy change"):
        etas = entropy_change.grid(config, lr)
        changes = entropy_change.sweep(bound, batch_e, scores_e, direction.v, etas, config, clock.progress)
    with clock("continuity"):
        zero = continuity.zero_check_on(bound, batch_e, direction.v)
        scaling = continuity.scaling(float64, batch_e, direction.v)
        padding = invariance.padding_invariance(float64, batch_e)
        covered = coverage.gradient_coverage(bound.registry, grads_u)
    with clock("integrity"):
        checksum_after = checksum(checkpoint.model)
    star = entropy_change.eta_star(along.rb, along.curvature)
    return r.ProbeReport(
        probe_version=__version__,
        checkpoint=_checkpoint_section(checkpoint, name),
        config=config.model_dump(mode="json"),
        batch=_batch_section(batch_e, same_batch),
        update_batch=_batch_section(batch_u, same_batch),
        entropy=_entropy_section(scores_e),
        first_order=first_order,
        two_batch=across,
        update=r.UpdateSection(
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
            eta_star=star,
            cosine_with_optimizer_step=None,
            norm_ratio_with_optimizer_step=None,
        ),
        entropy_change=[_change_row(c, cross or along.rb, along.curvature) for c in changes],
        continuity=r.ContinuitySection(
            zero_check_max_abs=zero.max_abs,
            zero_check_bitwise=zero.bitwise,
            eta_main=continuity.ETA_MAIN,
            eta_tiny=continuity.ETA_TINY,
            param_ratio=scaling.param_ratio,
            logit_ratio=scaling.logit_ratio,
            taylor_order=None,
        ),
        invariance=r.InvarianceSection(padding=r.WorstCase(**asdict(padding))),
        witness=None,
        registry=r.RegistrySection(**asdict(covered)),
        preconditioner=_preconditioner_section(checkpoint, precond, bound),
        integrity=r.IntegritySection(
            checksum_before=checksum_before,
            checksum_after=checksum_after,
            buffers_overridden=sorted((bound.overridden | float64.overridden) & bound.registry.buffer_names),
        ),
        verdicts=[],
        environment=_environment(bound, threads),
        timing=clock.seconds,
    )


def _batches(
    bound: BoundModel,
    checkpoint: Checkpoint,
    config: ProbeConfig,
    rollouts: str | Path | None,
    update_rollouts: str | Path | None,
    prompts: str | Path | None,
    progress: Progress | None,
) -> tuple[Rollouts, Rollouts]:
    """E and U. Sampled batches have disjoint prompts and seeds of their own; one file alone serves as both."""
    batch = config.batch
    file_e = None if rollouts is None else read_rollouts(rollouts, bound, checkpoint.tokenizer)
    file_u = None if update_rollouts is None else read_rollouts(update_rollouts, bound, checkpoint.tokenizer)
    if file_e is not None:
        return file_e, file_u if file_u is not None else file_e
    if prompts is None and batch.dataset not in tasks.DATASETS:
        raise ConfigError(
            "batch.dataset",
            f"{batch.dataset!r} is not known",
            f"choose {', '.join(tasks.DATASETS)}, or give --probe-prompts",
        )
    pool = tasks.read_prompts(prompts) if prompts is not None else tasks.DATASETS[batch.dataset](batch.split)
    count = batch.num_prompts + (0 if file_u is not None else batch.num_update_prompts)
    drawn = tasks.draw_prompts(pool, count, seed=batch.seed, with_replacement=batch.with_replacement)

    def sampled(which: str, own: list[tasks.Prompt]) -> Rollouts:
        seed = int.from_bytes(hashlib.sha256(f"{which} {batch.seed}".encode()).digest()[:6])
        return sample_rollouts(
            bound, checkpoint.tokenizer, own, config.generation, seed=seed, stage=f"sampling {which}", progress=progress
        )

    batch_e = sampled("E", drawn[: batch.num_prompts])
    return batch_e, file_u if file_u is not None else sampled("U", drawn[batch.num_prompts :])


def _first_order(
    units: gradients.UnitGradients, precond: dict[str, torch.Tensor], lr: float, lr_source: str
) -> r.FirstOrderSection:
    matrix = gradients.gram(units.x, units.y, precond)
    moments = ustat.cross_moments(matrix)
    statistic = ustat.u_statistic(moments, matrix)
    sums_x, sums_y = (
        {n: moments.num_units * t.double().mean(0) for n, t in side.items()} for side in (units.x, units.y)
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


def _two_batch(
    e: gradients.UnitGradients, u: gradients.UnitGradients, precond: dict[str, torch.Tensor], lr: float
) -> r.TwoBatchSection:
    moments = two_batch.two_batch_moments(gradients.gram(e.x, u.y, precond))
    return r.TwoBatchSection(
        bars_dot=moments.bars_dot,
        delta_h1=-lr * moments.bars_dot,
        delta_h1_se=None if moments.total_se is None else lr * moments.total_se,
        conditional_se=None if moments.conditional_se is None else lr * moments.conditional_se,
        projections=moments.projections.tolist(),
    )


def _cross_fitted_slope(units: gradients.UnitGradients, direction: update.UpdateDirection) -> PromptMean:
    """−X̄ᵀv₀ − U_cross[P → D]: the slope along v without the diagonal X_nᵀDY_n that one batch for both sides adds.

    Its per-unit terms are −X_uᵀv₀ − (2r_u − U_cross): their mean is the value, their spread the SE to first order.
    """
    x = {name: units.x[name] for name in direction.v}
    momentum = gradients.gram(x, {name: value.reshape(1, -1) for name, value in direction.v0.items()})[:, 0]
    moments = ustat.cross_moments(gradients.gram(x, units.y, direction.diagonal))
    return PromptMean(-momentum - (2 * moments.row_means - moments.u_cross))


def _change_row(change: entropy_change.EntropyChange, slope: PromptMean, curvature: PromptMean) -> r.EntropyChangeRow:
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


def _checkpoint_section(checkpoint: Checkpoint, name: str | None) -> r.CheckpointSection:
    info, adam = checkpoint.info, checkpoint.adam
    first = next(iter(adam.values()))
    return r.CheckpointSection(
        name=name or info.path.name,
        path=str(info.path),
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


def _batch_section(rollouts: Rollouts, same_batch: bool) -> r.BatchSection:
    return r.BatchSection(
        num_prompts=rollouts.num_prompts,
        num_responses=rollouts.num_responses,
        num_tokens=int(rollouts.gen_lens.sum()),
        source=rollouts.source,
        same_batch=same_batch,
        mean_reward=float(rollouts.rewards.mean()),
        zero_advantage_fraction=float(advantages.zero_advantage(rollouts.rewards).double().mean()),
        missing_gold=rollouts.missing_gold,
    )


def _entropy_section(scores: Scores) -> r.EntropySection:
    naive, rb = importance.mean_and_se(-scores.seq_logp), importance.mean_and_se(scores.rb_sum)
    per_token = importance.ratio_and_se(scores.rb_sum, scores.gen_lens)
    return r.EntropySection(
        naive=r.Estimate(value=naive[0], se=naive[1]),
        rb=r.Estimate(value=rb[0], se=rb[1]),
        per_token=r.Estimate(value=per_token[0], se=per_token[1]),
    )


def _preconditioner_section(
    checkpoint: Checkpoint, precond: dict[str, torch.Tensor], bound: BoundModel
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


def _environment(bound: BoundModel, threads: int) -> dict[str, str | int]:
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


class _Clock:
    """Seconds per stage, and the progress callback."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self.progress = progress

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self.progress is not None:
            self.progress(stage, 0, 1)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
        if self.progress is not None:
            self.progress(stage, 1, 1)
