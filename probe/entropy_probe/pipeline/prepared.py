"""What a measurement starts from: a checkpoint bound to the configured precision, and its two batches."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from entropy_probe import memory
from entropy_probe import report as r
from entropy_probe.config import ProbeConfig
from entropy_probe.demo import is_of_the_demo
from entropy_probe.errors import ConfigError, MeasurementError
from entropy_probe.layout import following
from entropy_probe.model.checkpoint import Checkpoint
from entropy_probe.model.forward import BoundModel, bind, require_held
from entropy_probe.model.placement import Placement, main_device, place, taken_home
from entropy_probe.model.precision import numerics, str_to_dtype
from entropy_probe.model.registry import Registry, checksum, unwrap
from entropy_probe.pipeline.clock import Clock
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.batches import (
    Unasked,
    draw_batches,
    fingerprint,
    sampling_section,
    with_limit,
)
from entropy_probe.stages.memory.memory_limit import require_loaded_within
from entropy_probe.stages.reference import has_reference
from entropy_probe.stages.responses.rollouts import Progress, Rollouts
from entropy_probe.trainers.resolved import resolved


@dataclass(frozen=True)
class Prepared:
    """`given` says where E and U are from: a file that was asked for, or `sampled`. `prompts` is the file to sample
    from, where one was given. `clock` has what it took."""

    checkpoint: Checkpoint
    config: ProbeConfig
    model: BoundModel
    rollouts: Rollouts
    update_rollouts: Rollouts
    given: tuple[str, str]
    sampling: r.SamplingSection | None
    checksum_before: str
    recipe: r.RecipeSection
    clock: Clock
    prompts: str | None = None
    next_checkpoint: Path | None = None
    next_was_found: bool = False

    @property
    def world(self) -> World:
        return self.clock.world


def prepare(
    checkpoint: Checkpoint,
    config: ProbeConfig,
    rollouts: str | Path | None = None,
    update_rollouts: str | Path | None = None,
    *,
    prompts: str | Path | None = None,
    next_checkpoint: str | Path | None = None,
    progress: Progress | None = None,
    world: World = ALONE,
) -> Prepared:
    """Bind the model, and read or sample the E and U batches. The arguments are those of `run_probe`."""
    world = world.in_one_copy(one_copy=checkpoint.in_one_copy)
    world.count_anew()
    asked = config
    with world.together(), allocating(config):
        if config.sharding == "parameter" and world.size > 1 and not world.one_copy:
            problem = "parameter needs a folder to load; this checkpoint is each process's own"
            raise ConfigError("sharding", problem, "give the folder, or set sharding: prompt")
        held = {} if checkpoint.held is None else {"load": checkpoint.held}
        require_loaded_within(config, checkpoint.held)
        require_held(checkpoint.model)
        clock = Clock(world, main_device(unwrap(checkpoint.model)), progress, held=held)
        world.same(
            {
                "checkpoint": checkpoint.info.fingerprint,
                "configuration": config.model_dump_json(),
            }
        )
        _require_state(checkpoint)
        with numerics(config.precision, checkpoint.info.num_parameters):
            config, recipe = resolved(
                config,
                checkpoint.info.path if checkpoint.info.path.name else None,
                has_reference=has_reference(checkpoint.model, config),
                samples_update=rollouts is None and update_rollouts is None,
            )
            _require_direction(checkpoint, config)
            files = (rollouts, update_rollouts, prompts)
            unasked = _unasked(asked, checkpoint, prompts)
            world.same({"recipe": config.model_dump_json()})
            after = world.told(_with_room(following(checkpoint.info.path), checkpoint, config))
            if next_checkpoint is not None:
                after = Path(next_checkpoint).expanduser()
            made = _prepared(checkpoint, config, recipe, *files, clock, unasked)
            was_found = next_checkpoint is None
            return replace(made, next_checkpoint=after, next_was_found=was_found)


def _unasked(config: ProbeConfig, checkpoint: Checkpoint, prompts: str | Path | None) -> Unasked:
    """What was left to chance; the demo was trained on the built-in prompts and for the built-in reward."""
    batch = config.batch.model_fields_set
    mine = not is_of_the_demo(checkpoint.tokenizer)
    return Unasked(
        prompts=mine and prompts is None and "dataset" not in batch,
        reward=mine and "reward" not in batch,
        length="max_new_tokens" not in config.generation.model_fields_set,
    )


def _with_room(beside: Path | None, checkpoint: Checkpoint, config: ProbeConfig) -> Path | None:
    """The next checkpoint that stands beside this one, where it fits into the memory too: its files twice, and the
    model, which may be an adapter's base."""
    if beside is None or config.memory_limit is not None or config.device_map is not None:
        return None
    size = sum(file.stat().st_size for file in beside.iterdir() if file.is_file())
    size += 4 * checkpoint.info.num_parameters
    available = memory.available_bytes(torch.device("cpu"))
    return beside if available is None or 2 * size < available else None


def allocating(config: ProbeConfig) -> AbstractContextManager[None]:
    """Under a limit of memory, freed memory is given back at once."""
    return nullcontext() if config.memory_limit is None else memory.given_back_at_once()


def _require_state(checkpoint: Checkpoint) -> None:
    trained = checkpoint.adam if checkpoint.other is None else checkpoint.other.trained
    for name in Registry.of(checkpoint.model).trainable:
        if name not in trained:
            raise MeasurementError(
                f"parameter {name}",
                "is trainable and has no Adam state",
                "freeze it, or give its state in `adam`",
            )


def _require_direction(checkpoint: Checkpoint, config: ProbeConfig) -> None:
    if config.batch.target_se is not None and checkpoint.other is not None:
        remedy = "leave it out"
        raise MeasurementError(
            "batch.target_se", f"needs the next step: {checkpoint.other.reason}", remedy
        )


def bound_in(
    world: World, model: nn.Module, dtype: torch.dtype, *, lend_frozen: bool = False
) -> BoundModel:
    """`bind`; a copy that it makes, processes that hold one model together hold once, except where most of the model
    is frozen and lent: the rest of it is then each one's own."""
    model = unwrap(model)
    registry = Registry(model)
    if not world.one_copy or {p.dtype for p in registry.parameters.values()} == {dtype}:
        return bind(model, dtype, lend_frozen=lend_frozen)
    trained = sum(p.numel() for p in registry.trainable.values())
    if 2 * trained < sum(p.numel() for p in registry.parameters.values()):
        return bind(model, dtype, lend_frozen=True)
    copy, placement = world.one(lambda: taken_home(bind(model, dtype).module)), Placement.of(model)
    if placement is not None:
        place(copy, placement.device_map, placement.main)
    return bind(copy, dtype)


def _asked(file: str | Path | None) -> str:
    return str(file or "sampled")


def _of_u(rollouts: str | Path | None, update_rollouts: str | Path | None) -> str | Path | None:
    """The file that was asked for as U, under E's name where it is the same, whatever the batches were made of."""
    if rollouts is None or update_rollouts is None:
        return update_rollouts or rollouts
    same = os.path.realpath(rollouts) == os.path.realpath(update_rollouts)
    return rollouts if same else update_rollouts


def _prepared(
    checkpoint: Checkpoint,
    config: ProbeConfig,
    recipe: r.RecipeSection,
    rollouts: str | Path | None,
    update_rollouts: str | Path | None,
    prompts: str | Path | None,
    clock: Clock,
    unasked: Unasked,
) -> Prepared:
    world, tokenizer = clock.world, checkpoint.tokenizer
    with clock("integrity"):
        checksum_before = checksum(checkpoint.model)
        bound = bound_in(world, checkpoint.model, str_to_dtype(config.precision.dtype))
    with clock("rollouts"):
        files = (rollouts, update_rollouts, prompts)
        options = {"unasked": unasked}
        e, u = draw_batches(bound, tokenizer, config, *files, clock.progress, world, **options)
        if e.limit is not None:
            config = with_limit(config, e.limit)
        world.same({"E batch": fingerprint(e), "U batch": fingerprint(u)})
        sampling = None
        if rollouts is None and world.first:
            sampling = sampling_section(bound, e, tokenizer, config)
    given = _asked(rollouts), _asked(_of_u(rollouts, update_rollouts))
    return Prepared(
        checkpoint, config, bound, e, u, given, sampling, checksum_before, recipe, clock,
        None if prompts is None else str(prompts),
    )  # fmt: skip
