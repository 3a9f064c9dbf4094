"""The whole pipeline on one screen: checkpoint → batches → gradients → the next step → witnesses → report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from entropy_probe import __version__, memory, sections
from entropy_probe import report as r
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import MeasurementError
from entropy_probe.loading import load_configured
from entropy_probe.model.checkpoint import Checkpoint
from entropy_probe.model.forward import BoundModel, bind, require_held
from entropy_probe.model.placement import main_device
from entropy_probe.model.precision import numerics, str_to_dtype
from entropy_probe.model.registry import Registry, checksum, unwrap
from entropy_probe.next_step import Measured, NextStep, next_step, without_second_moment
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages import coverage, gradients
from entropy_probe.stages.batches import draw_batches, redraw_for, redrawn_shares
from entropy_probe.stages.memory.memory_limit import lends_frozen, planned, require_loaded_within
from entropy_probe.stages.responses.rollouts import Rollouts, eos_ids
from entropy_probe.stages.scores import rows_without_graph, score
from entropy_probe.stages.share import Share
from entropy_probe.stages.witnesses import continuity, invariance
from entropy_probe.stages.witnesses.projections import projection_agreement
from entropy_probe.stages.witnesses.properties import drawn_properties
from entropy_probe.stages.witnesses.witness import curvature_witness, gradient_witness

Progress = Callable[[str, int, int], None]
# Stages that every process goes through; the others are rank 0's.
_OF_ALL = (
    *("load", "integrity", "rollouts", "memory limit", "scores", "gradients"),
    *("first order", "update", "slopes", "entropy change", "witnesses"),
)


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
    world: World = ALONE,
) -> r.ProbeReport:
    """Measure a checkpoint: U_cross and δH₁, the update direction v, slopes along it, ΔH(η), continuity, coverage.

    `rollouts` is the E batch and `update_rollouts` the U batch as JSON lines; one file alone serves as both and is
    flagged `same_batch`; without files both are sampled, from `prompts` or the configured dataset. `progress(stage,
    done, total)` is called as the work goes on. The model is not modified, and nothing is judged. Raises `ProbeError`.

    With a `world` of several processes all of them call this alike, share the prompts, and get rank 0's report, or the
    same error.
    """
    config = config or ProbeConfig()
    with world.together():
        if isinstance(path_or_checkpoint, Checkpoint):
            checkpoint = path_or_checkpoint
        else:
            checkpoint = load_configured(path_or_checkpoint, base_model, config, world)
    given = {"prompts": prompts, "progress": progress, "world": world}
    prepared = prepare(checkpoint, config, rollouts, update_rollouts, **given)
    report = world.told(measure(prepared, name=name, progress=progress))
    assert report is not None
    return report


def _allocating(config: ProbeConfig) -> AbstractContextManager[None]:
    return nullcontext() if config.memory_limit is None else memory.given_back_at_once()


@dataclass(frozen=True)
class Prepared:
    """A checkpoint bound to the configured precision, with its two batches: what the measurement starts from."""

    checkpoint: Checkpoint
    config: ProbeConfig
    model: BoundModel
    rollouts: Rollouts
    update_rollouts: Rollouts
    given: tuple[str, str]
    redrawn: tuple[float, float] | None
    checksum_before: str
    seconds: dict[str, float]
    held: dict[str, memory.Held]
    world: World = ALONE


def prepare(
    checkpoint: Checkpoint,
    config: ProbeConfig,
    rollouts: str | Path | None = None,
    update_rollouts: str | Path | None = None,
    *,
    prompts: str | Path | None = None,
    progress: Progress | None = None,
    world: World = ALONE,
) -> Prepared:
    """Bind the model, and read or sample the E and U batches. The arguments are those of `run_probe`."""
    world.count_anew()
    with world.together(), _allocating(config):
        return _prepare(checkpoint, config, rollouts, update_rollouts, prompts, progress, world)


def _prepare(
    checkpoint: Checkpoint,
    config: ProbeConfig,
    rollouts: str | Path | None,
    update_rollouts: str | Path | None,
    prompts: str | Path | None,
    progress: Progress | None,
    world: World,
) -> Prepared:
    found = {} if checkpoint.held is None else {"load": checkpoint.held}
    require_loaded_within(config, checkpoint.held)
    require_held(checkpoint.model)
    clock = _Clock(progress, world, main_device(unwrap(checkpoint.model)), {}, found)
    world.same({"checkpoint": checkpoint.info.fingerprint, "configuration": config.model_dump_json()})
    trained = checkpoint.adam if checkpoint.other is None else checkpoint.other.trained
    stateless = [name for name in Registry.of(checkpoint.model).trainable if name not in trained]
    if stateless:
        raise MeasurementError(
            f"parameter {stateless[0]}", "is trainable and has no Adam state", "freeze it, or give its state in `adam`"
        )
    with numerics(config.precision, checkpoint.info.num_parameters):
        with clock("integrity"):
            checksum_before = checksum(checkpoint.model)
            bound = bind(checkpoint.model, str_to_dtype(config.precision.func_override.dtype))
        with clock("rollouts"):
            e, u = draw_batches(
                bound, checkpoint.tokenizer, config, rollouts, update_rollouts, prompts, progress, world
            )
            world.same({"E batch": sections.fingerprint(e), "U batch": sections.fingerprint(u)})
            redraws = rollouts is None and world.first
            redrawn = redrawn_shares(bound, e, checkpoint.tokenizer, config) if redraws else None
    given = str(rollouts or "sampled"), str((rollouts if e is u else update_rollouts) or "sampled")
    spent = clock.seconds, clock.held
    return Prepared(checkpoint, config, bound, e, u, given, redrawn, checksum_before, *spent, world)


def measure(prepared: Prepared, *, name: str | None = None, progress: Progress | None = None) -> r.ProbeReport | None:
    """Everything from scores to report on the two batches.

    Of several processes each scores and differentiates its own prompts. What does not grow with the batch, such as
    witnesses on a few prompts, rank 0 does alone, and it alone has the report: `None` elsewhere.
    """
    with prepared.world.together(), _allocating(prepared.config):
        return _measure(prepared, name, progress)


def _measure(prepared: Prepared, name: str | None, progress: Progress | None) -> r.ProbeReport | None:
    world = prepared.world
    checkpoint, config, bound = prepared.checkpoint, prepared.config, prepared.model
    e, u = prepared.rollouts, prepared.update_rollouts
    same_batch = e is u
    eos = eos_ids(bound.language_model, checkpoint.tokenizer)
    clock = _Clock(progress, world, bound.device, dict(prepared.seconds), dict(prepared.held))
    with numerics(config.precision, checkpoint.info.num_parameters) as threads:
        with clock("integrity"):
            if bound.dtype is torch.float64:
                float64 = bound
            else:
                float64 = bind(checkpoint.model, torch.float64, lend_frozen=lends_frozen(bound, config))
            own_copies = {bound.module, float64.module} - {unwrap(checkpoint.model)}
            copies = {model: checksum(model) for model in own_copies}
        plan = None
        if config.memory_limit is not None:
            with clock("memory limit"):
                plan = planned(bound, float64, (e, u), config, world)
                config = plan.config
                bound, float64 = (replace(m, logits_at_once=plan.logits_at_once) for m in (bound, float64))
        own_u = Share.of(u, gradients.units_of(bound, u, config)[1], world)
        own_e = own_u if same_batch else Share.of(e, gradients.units_of(bound, e, config)[1], world)
        with clock("scores"):  # by token of the own prompts, and of all
            tokens_e = tokens_u = score(bound, own_e.own, config, with_features=True)
            scores_e = scores_u = own_e.scores(tokens_e)
            reported = None if e.logprobs is None else own_e.all_tokens(tokens_e.token_logq)
            if not same_batch:
                tokens_u = score(bound, own_u.own, config, with_features=config.first_order.estimator == "rb")
                scores_u = own_u.scores(tokens_u)
        with clock("gradients"):
            of_x, of_y = gradients.payloads(own_u.own, tokens_u, config, own_u.among)
            shown = {"stage": "gradients of U", "progress": progress}
            units_u = gradients.unit_gradients(bound, u, config, of_x, of_y, share=own_u, **shown)
            units_e, of_x_e = units_u, of_x
            if not same_batch:
                of_x_e, _ = gradients.payloads(own_e.own, tokens_e, config, own_e.among)
                shown["stage"] = "gradients of E"
                units_e = gradients.unit_gradients(bound, e, config, of_x_e, share=own_e, **shown)
            covered = coverage.gradient_coverage(bound.registry, units_u)
        measured = Measured(
            checkpoint=checkpoint,
            config=config,
            bound=bound,
            float64=float64,
            own_e=own_e,
            own_u=own_u,
            tokens_e=tokens_e,
            scores_e=scores_e,
            scores_u=scores_u,
            units_e=units_e,
            units_u=units_u,
            ascent=units_u.mean_y(),
        )
        if checkpoint.other is None:
            redraw = redraw_for(bound, e, checkpoint.tokenizer, config, own_e)
            step = next_step(measured, clock, progress, redraw)
        else:
            step = without_second_moment(measured)
        with clock("witnesses"):
            witness = _witness(measured, of_x, of_x_e, step)
        with clock("integrity"):
            changed = [model for model, before in copies.items() if not world.first and checksum(model) != before]
            live = not world.first and checksum(checkpoint.model) != prepared.checksum_before
            modified_elsewhere, live_elsewhere = world.total(torch.tensor([len(changed), int(live)])).tolist()
            clock.most_of_all()
        if not world.first:
            return None
        with clock("properties"):
            drawn = drawn_properties(bound, float64, config, eos)
        with clock("continuity"):
            most_rows = max(2, rows_without_graph(e, config.generation))
            zero = continuity.zero_check(bound, e, step.v, most_rows)
            scaling = continuity.scaling(float64, e, step.v, most_rows)
            taylor = None
            if "taylor" not in config.left_out:
                taylor = continuity.taylor(float64, bound, e, scores_e, step.v, config)
            invariant = invariance.invariance(bound, float64, e, config)
        with clock("integrity"):
            checksum_after = "changed by another process" if live_elsewhere else checksum(checkpoint.model)
            copies_modified = modified_elsewhere + sum(checksum(model) != before for model, before in copies.items())
    return r.ProbeReport(
        probe_version=__version__,
        checkpoint=sections.checkpoint_section(checkpoint, name),
        config=prepared.config.model_dump(mode="json"),
        left_out=list(config.left_out),
        batch=sections.batch_section(e, same_batch, config, prepared.given[0], eos),
        update_batch=sections.batch_section(u, same_batch, config, prepared.given[1], eos),
        sampling=sections.sampling_section(prepared.redrawn),
        entropy=sections.entropy_section(scores_e, config.generation.temperature),
        continuity=sections.continuity_section(zero, scaling, taylor),
        sampler_parity=sections.sampler_parity_section(e, reported),
        invariance=sections.invariance_section(invariant, drawn),
        witness=witness,
        registry=r.RegistrySection(**asdict(covered), taken_as_frozen=list(checkpoint.info.taken_as_frozen)),
        integrity=r.IntegritySection(
            checksum_before=prepared.checksum_before,
            checksum_after=checksum_after,
            copies_modified=copies_modified,
            buffers_overridden=sorted((bound.overridden | float64.overridden) & bound.registry.buffer_names),
        ),
        verdicts=[],
        baseline=None,
        distributed=sections.distributed_section(world),
        environment=sections.environment(bound, threads),
        memory=sections.memory_section(bound.device, clock.held, config, plan),
        timing=clock.seconds,
        **step.sections,
    )


def _witness(
    of: Measured, of_x: gradients.Payload, of_x_e: gradients.Payload, step: NextStep
) -> dict[str, float | None]:
    """Gradients and curvature by other ways; what needs the second moment is `None` where there is none.

    `of_x` are the payloads of X on this process's prompts of U, and `of_x_e` those on its prompts of E.
    """
    bound, config, e = of.bound, of.config, of.own_e.rollouts
    by_loop = gradient_witness(bound, of.own_u.rollouts, of.scores_u, config, of.units_u, step.precond, of_x)
    witness: dict[str, float | None] = {} if by_loop is None else asdict(by_loop)
    if "projections" not in config.left_out:
        at_theta = None if step.along is None else step.along.at_theta
        witness |= asdict(
            projection_agreement(bound, e, of_x_e, config, of.units_e, step.precond, of.ascent, step.v, at_theta)
        )
    witness["curvature"] = None  # without the second derivative that the α-trick needs too
    if step.along is None:
        witness |= dict.fromkeys(("u_cross", "u_cross_fast"))
    elif witness.get("projections_alpha") is not None and "curvature witness" not in config.left_out:
        witness["curvature"] = curvature_witness(of.float64, e, of.scores_e, step.along, step.v, config)
    return witness


class _Clock:
    """Adds up the seconds of each stage, finds its peak of memory, and reports its beginning and end as progress."""

    def __init__(
        self,
        progress: Progress | None,
        world: World,
        device: torch.device,
        seconds: dict[str, float],
        held: dict[str, memory.Held],
    ) -> None:
        self.seconds, self.held = seconds, held
        self._progress = progress
        self._world = world
        self._device = device

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._world.at(stage)
        if self._progress is not None:
            self._progress(stage, 0, 1)
        start, peak = time.perf_counter(), memory.Peak(self._device)
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
            if (held := peak.held()) is not None:
                self.held[stage] = self.held[stage].then(held) if stage in self.held else held
        if self._progress is not None:
            self._progress(stage, 1, 1)

    def most_of_all(self) -> None:
        """The memory of each stage so far, in place of this process's own that of the one that held most."""
        rows = torch.zeros(self._world.size, len(_OF_ALL), 2, dtype=torch.long)
        for i, stage in enumerate(_OF_ALL):
            if stage in self.held:
                rows[self._world.rank, i] = torch.tensor([self.held[stage].at_start, self.held[stage].peak])
        most = self._world.total(rows).amax(0)
        self.held |= {stage: memory.Held(*row) for stage, row in zip(_OF_ALL, most.tolist(), strict=True) if row[1]}
