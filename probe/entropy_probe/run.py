"""What is measured, on one screen: checkpoint → batches → gradients → the next step → witnesses → report."""

from __future__ import annotations

from pathlib import Path

import torch

from entropy_probe import __version__
from entropy_probe import report as r
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import ProbeError
from entropy_probe.loading import load_configured
from entropy_probe.model.checkpoint import Checkpoint
from entropy_probe.model.precision import numerics
from entropy_probe.pipeline.checkpoint import checkpoint_section
from entropy_probe.pipeline.environment import distributed_section, environment
from entropy_probe.pipeline.evidence import evidence_of
from entropy_probe.pipeline.integrity import Watched
from entropy_probe.pipeline.measured import Models, measured
from entropy_probe.pipeline.next_step import after_the_real_step, next_step, without_second_moment
from entropy_probe.pipeline.prepared import Prepared, allocating, prepare
from entropy_probe.pipeline.witnessed import witnessed
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.batches import batch_section, redraw_for
from entropy_probe.stages.entropy import entropy_section, sampler_parity_section, surprises
from entropy_probe.stages.gradients.coverage import cancels, gradient_coverage
from entropy_probe.stages.gradients.payloads import response_advantages
from entropy_probe.stages.memory.memory_limit import memory_section
from entropy_probe.stages.predictors import of_slopes, of_update_batch, predictors_section
from entropy_probe.stages.responses.ids import eos_ids
from entropy_probe.stages.responses.rollouts import Progress, Rollouts
from entropy_probe.stages.witnesses.cache import cache_section
from entropy_probe.stages.witnesses.continuity import continuity_section
from entropy_probe.stages.witnesses.invariance import invariance
from entropy_probe.stages.witnesses.properties import drawn_properties, with_drawn

__all__ = ["Prepared", "measure", "prepare", "run_probe"]


def run_probe(
    path_or_checkpoint: str | Path | Checkpoint,
    config: ProbeConfig | None = None,
    rollouts: str | Path | None = None,
    update_rollouts: str | Path | None = None,
    *,
    prompts: str | Path | None = None,
    base_model: str | Path | None = None,
    next_checkpoint: str | Path | None = None,
    name: str | None = None,
    progress: Progress | None = None,
    world: World = ALONE,
) -> r.ProbeReport:
    """Measure a checkpoint: U_cross and δH₁, the update direction v, slopes along it, ΔH(η), continuity, coverage.

    `rollouts` is the E batch and `update_rollouts` the U batch as JSON lines; one file alone serves as both and is
    flagged `same_batch`; without files both are sampled, from `prompts` or the configured dataset. `progress(stage,
    done, total)` is called as the work goes on. The model is not modified, and nothing is judged. Raises `ProbeError`.

    With a `world` of several processes all of them call this alike, share the prompts, and get rank 0's report, or the
    same error. What the numbers are made of is beside the report of rank 0, as `report.evidence`.
    """
    config = config or ProbeConfig()
    with world.together():
        if isinstance(path_or_checkpoint, Checkpoint):
            checkpoint = path_or_checkpoint
        else:
            checkpoint = load_configured(path_or_checkpoint, base_model, config, world)
    given = {
        "prompts": prompts,
        "next_checkpoint": next_checkpoint,
        "progress": progress,
        "world": world,
    }
    prepared = prepare(checkpoint, config, rollouts, update_rollouts, **given)
    own = measure(prepared, name=name, progress=progress)
    told = world.told(None if own is None else own.with_evidence(None))
    report = own or told
    assert report is not None
    return report


def measure(
    prepared: Prepared, *, name: str | None = None, progress: Progress | None = None
) -> r.ProbeReport | None:
    """Everything from scores to report on the two batches.

    Of several processes each scores and differentiates its own prompts. What does not grow with the batch, such as
    witnesses on a few prompts, rank 0 does alone, and it alone has the report: `None` elsewhere.
    """
    with prepared.world.together(), allocating(prepared.config):
        return _measure(prepared, name, progress)


def _measure(
    prepared: Prepared, name: str | None, progress: Progress | None
) -> r.ProbeReport | None:
    checkpoint, config, world = prepared.checkpoint, prepared.config, prepared.world
    e, u = prepared.rollouts, prepared.update_rollouts
    clock = prepared.clock.continued(prepared.model.device, progress)
    eos = eos_ids(prepared.model.language_model, checkpoint.tokenizer)
    with numerics(config.precision, checkpoint.info.num_parameters) as threads:
        with clock("integrity"):
            models = Models.of(checkpoint, prepared.model, config, world)
            watched = Watched.of(checkpoint.model, prepared.checksum_before, models)
        models, config, plan = models.planned((_largest(e, config), u), config, clock)
        of = measured(checkpoint, models, e, u, config, clock)
        e = of.e.rollouts
        reported = None if e.logprobs is None else of.e.share.all_tokens(of.e.tokens.token_logq)
        unlikely = surprises(of.e.share, of.e.tokens)
        frozen = checkpoint.info.taken_as_frozen
        same = cancels(of.u.rollouts, response_advantages(of.u.rollouts, config))
        covered = gradient_coverage(
            models.bound.registry, of.u.gradients, frozen, world, y_cancels=same
        )
        if checkpoint.other is None:
            redraw = redraw_for(models.bound, of.e.share, checkpoint.tokenizer, config)
            step = next_step(of, clock, redraw)
        else:
            step = without_second_moment(of)
        with clock("evidence"):
            of_batch = of_update_batch(of.u.share, of.u.tokens, config)
        of_slope = {}
        if step.along is not None and step.lr is not None:
            of_slope = of_slopes(step.along, of.e.scores, step.lr)
        real_update = real_update_missing = None
        if prepared.next_checkpoint is not None:
            try:
                with world.together():
                    real_update = after_the_real_step(of, step, prepared.next_checkpoint, clock)
            except Exception as error:  # of all processes, which go on together or end together
                if not prepared.next_was_found or world.any(not isinstance(error, ProbeError)):
                    raise
                real_update_missing = str(error)
        with clock("witnesses"):
            second_order = plan is None or plan.left_out is None
            witness = witnessed(of, step.precond, step.v, step.along, second_order=second_order)
        with clock("evidence"):
            evidence = evidence_of(of, step, prepared, eos)
        v, sections = step.v, step.sections
        del step  # two vectors as long as the parameters
        with clock("integrity"):
            elsewhere = watched.modified_elsewhere(world)
            clock.most_of_all()
        if not world.first:
            return None
        with clock("properties"):
            drawn = drawn_properties(models.bound, models.float64, config, eos)
        with clock("continuity"):
            continuous, of_taylor = continuity_section(
                models.bound, models.float64, e, of.e.scores, v, config
            )
            of_rows = invariance(models.bound, models.float64, e, config)
            of_cache = cache_section(models.bound, e)
        with clock("integrity"):
            integrity = watched.section(elsewhere)
    assert sections is not None  # of rank 0
    report = r.ProbeReport(
        probe_version=__version__,
        checkpoint=checkpoint_section(checkpoint, name),
        config=prepared.config.model_dump(mode="json"),
        left_out=list(config.left_out),
        recipe=prepared.recipe,
        batch=batch_section(e, of.same_batch, config, prepared.given[0], eos),
        update_batch=batch_section(u, of.same_batch, config, prepared.given[1], eos),
        sampling=prepared.sampling,
        entropy=entropy_section(of.e.scores, config.generation.temperature, unlikely),
        first_order=sections.first_order,
        two_batch=sections.two_batch,
        update=sections.update,
        predictors=predictors_section(of_batch, of_slope),
        entropy_change=sections.entropy_change,
        resolution=sections.resolution,
        preconditioner=sections.preconditioner,
        real_step=sections.real_step,
        real_step_missing=sections.real_step_missing,
        real_update=real_update,
        real_update_missing=real_update_missing,
        continuity=continuous,
        invariance=with_drawn(of_rows, drawn),
        cache=of_cache,
        sampler_parity=sampler_parity_section(e, reported),
        witness=witness,
        registry=covered,
        integrity=integrity,
        verdicts=[],
        baseline=None,
        distributed=distributed_section(world),
        environment=environment(models.bound, threads),
        memory=memory_section(models.bound, (e, u), clock.held, config, plan),
        timing=clock.seconds,
    )
    return report.with_evidence(None if evidence is None else evidence.having("taylor", of_taylor))


def _largest(e: Rollouts, config: ProbeConfig) -> Rollouts:
    """A batch as large as E may grow, for which there must be room."""
    if e.further is None:
        return e
    return e.of_prompts(torch.arange(config.batch.max_prompts) % e.num_prompts)
