"""The whole pipeline on one screen: checkpoint → batches → gradients → the next step → witnesses → report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from entropy_probe import __version__, sections
from entropy_probe import report as r
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import MeasurementError
from entropy_probe.model.checkpoint import Checkpoint, load_checkpoint
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.precision import numerics, str_to_dtype
from entropy_probe.model.registry import Registry, checksum, unwrap
from entropy_probe.next_step import Measured, NextStep, next_step, without_second_moment
from entropy_probe.stages import continuity, coverage, gradients, invariance
from entropy_probe.stages.batches import draw_batches, redraw_for, redrawn_shares
from entropy_probe.stages.projections import projection_agreement
from entropy_probe.stages.properties import drawn_properties
from entropy_probe.stages.rollouts import Rollouts, eos_ids
from entropy_probe.stages.scores import score
from entropy_probe.stages.witness import curvature_witness, gradient_witness

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
    prepared = prepare(checkpoint, config, rollouts, update_rollouts, prompts=prompts, progress=progress)
    return measure(prepared, name=name, progress=progress)


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


def prepare(
    checkpoint: Checkpoint,
    config: ProbeConfig,
    rollouts: str | Path | None = None,
    update_rollouts: str | Path | None = None,
    *,
    prompts: str | Path | None = None,
    progress: Progress | None = None,
) -> Prepared:
    """Bind the model, and read or sample the E and U batches. The arguments are those of `run_probe`."""
    clock = _Clock(progress, {})
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
            e, u = draw_batches(bound, checkpoint.tokenizer, config, rollouts, update_rollouts, prompts, progress)
            redrawn = redrawn_shares(bound, e, checkpoint.tokenizer, config) if rollouts is None else None
    given = str(rollouts or "sampled"), str((rollouts if e is u else update_rollouts) or "sampled")
    return Prepared(checkpoint, config, bound, e, u, given, redrawn, checksum_before, clock.seconds)


def measure(prepared: Prepared, *, name: str | None = None, progress: Progress | None = None) -> r.ProbeReport:
    """Everything from scores to report on the two batches."""
    checkpoint, config, bound = prepared.checkpoint, prepared.config, prepared.model
    e, u = prepared.rollouts, prepared.update_rollouts
    same_batch = e is u
    eos = eos_ids(bound.language_model, checkpoint.tokenizer)
    clock = _Clock(progress, dict(prepared.seconds))
    with numerics(config.precision, checkpoint.info.num_parameters) as threads:
        with clock("scores"):
            scores_e = score(bound, e, config, with_features=True)
            scores_u = (
                scores_e if same_batch else score(bound, u, config, with_features=config.first_order.estimator == "rb")
            )
        with clock("gradients"):
            of_x, of_y = gradients.payloads(u, scores_u, config)
            units_u = gradients.unit_gradients(bound, u, config, of_x, of_y, stage="gradients of U", progress=progress)
            units_e, of_x_e = units_u, of_x
            if not same_batch:
                of_x_e, _ = gradients.payloads(e, scores_e, config)
                units_e = gradients.unit_gradients(bound, e, config, of_x_e, stage="gradients of E", progress=progress)
        with clock("slopes"):
            float64 = bound if bound.dtype is torch.float64 else bind(checkpoint.model, torch.float64)
            own_copies = {bound.module, float64.module} - {unwrap(checkpoint.model)}
            copies = {model: checksum(model) for model in own_copies}
        ascent = gradients.prompt_mean(units_u.y, units_u.sizes)
        measured = Measured(checkpoint, config, bound, float64, e, u, scores_e, scores_u, units_e, units_u, ascent)
        if checkpoint.other is None:
            step = next_step(measured, clock, progress, redraw_for(bound, e, checkpoint.tokenizer, config))
        else:
            step = without_second_moment(measured)
        with clock("witnesses"):
            witness = _witness(measured, of_x_e, step)
        with clock("properties"):
            drawn = drawn_properties(bound, float64, config, eos)
        with clock("continuity"):
            zero = continuity.zero_check(bound, e, step.v)
            scaling = continuity.scaling(float64, e, step.v)
            taylor = None
            if "taylor" not in config.left_out:
                taylor = continuity.taylor(float64, bound, e, scores_e, step.v, config)
            invariant = invariance.invariance(bound, float64, e, config)
            covered = coverage.gradient_coverage(bound.registry, units_u)
        with clock("integrity"):
            checksum_after = checksum(checkpoint.model)
            copies_modified = sum(checksum(model) != before for model, before in copies.items())
    return r.ProbeReport(
        probe_version=__version__,
        checkpoint=sections.checkpoint_section(checkpoint, name),
        config=config.model_dump(mode="json"),
        left_out=list(config.left_out),
        batch=sections.batch_section(e, same_batch, config, prepared.given[0], eos),
        update_batch=sections.batch_section(u, same_batch, config, prepared.given[1], eos),
        sampling=sections.sampling_section(prepared.redrawn),
        entropy=sections.entropy_section(scores_e, config.generation.temperature),
        continuity=sections.continuity_section(zero, scaling, taylor),
        sampler_parity=sections.sampler_parity_section(e, scores_e),
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
        environment=sections.environment(bound, threads),
        timing=clock.seconds,
        **step.sections,
    )


def _witness(of: Measured, of_x: gradients.Payload, step: NextStep) -> dict[str, float | None]:
    """Gradients and curvature by other ways; what needs the second moment is `None` where there is none."""
    bound, config = of.bound, of.config
    witness: dict[str, float | None] = asdict(
        gradient_witness(bound, of.u, of.scores_u, config, of.units_u, step.precond)
    )
    if "projections" not in config.left_out:
        at_theta = None if step.along is None else step.along.at_theta
        witness |= asdict(
            projection_agreement(bound, of.e, of_x, config, of.units_e, step.precond, of.ascent, step.v, at_theta)
        )
    witness["curvature"] = None  # without the second derivative that the α-trick needs too
    if step.along is None:
        witness |= dict.fromkeys(("u_cross", "u_cross_fast"))
    elif witness.get("projections_alpha") is not None and "curvature witness" not in config.left_out:
        witness["curvature"] = curvature_witness(of.float64, of.e, of.scores_e, step.along, step.v, config)
    return witness


class _Clock:
    """Adds up the seconds of each stage, and reports its beginning and end as progress."""

    def __init__(self, progress: Progress | None, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self._progress = progress

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        if self._progress is not None:
            self._progress(stage, 0, 1)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
        if self._progress is not None:
            self._progress(stage, 1, 1)
