"""Sizes of batches and of pieces of logits with which the measurement stays below `memory_limit`.

They are chosen before the work begins: one and a few of the longest rows go through every kind of pass, whose tensors
are counted, and what more of them take is bounded by that. What is held through the run is known by formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from entropy_probe import memory
from entropy_probe import report as r
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import CacheError, ConfigError, MeasurementError
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.recompute import layers_of
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages import made
from entropy_probe.stages.gradients.products import IN_FLOAT64
from entropy_probe.stages.gradients.units import bytes_of_units, units_within_memory
from entropy_probe.stages.memory.pass_memory import FEWEST, Passes, longest_rows, with_rows
from entropy_probe.stages.responses.drawing import draw, masses
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.steps import OverCache, WholeRows
from entropy_probe.stages.scores import sharing
from entropy_probe.stages.shared_prompts import worth
from entropy_probe.stages.witnesses.shortened import shortened

# What a pass takes beyond its tensors: buffers within operations, small blocks that the allocator keeps. Passes of 100
# to 1400 MB took up to 8 % more than was counted.
_UNSEEN, _SLACK = 0.08, 24 << 20
# Numbers of float64 for each trainable parameter, beside the units' gradients: Ȳ, P, v, v₀, D and X̄ are held, or v
# alone where these are many (stages/made.py).
_HELD = 6
_OF_A_STEP = 4  # the same of one tensor, beside the copy that a real step is taken on: its gradient and its moments
_PRODUCT = 4  # sets of rows in float64 while units are multiplied: both sides, one of them scaled, and a sum
_OF_A_TOKEN = 30  # the same of a token, for scores, features and derivatives


@dataclass(frozen=True)
class Plan:
    """What was chosen, and the memory that is expected at most. `recompute`: layers are run again in gradients;
    `left_out`: why there are no second derivatives, `None` where there is room for them."""

    config: ProbeConfig
    logits_at_once: int
    expected: int
    recompute: bool = False
    left_out: str | None = None


def planned(
    bound: BoundModel,
    float64: BoundModel,
    batches: tuple[Rollouts, ...],
    config: ProbeConfig,
    world: World = ALONE,
) -> Plan:
    """The configuration with as many rows at once as the limit allows, and no more than it has, and the logits at once;
    `batches` are those of all processes.

    Pieces of logits shrink where one row at a time is too much; where that is not enough, decoder layers are run again
    in gradients, if `recompute` is `auto`; units of gradients are blocks where those of all
    prompts do not fit, as under `max_gradient_gib`. Second derivatives, of two witnesses, are left out where they alone
    are too much. Of several processes all choose what fits everywhere. Raises `MeasurementError` that says what would
    be needed.
    """
    if config.recompute == "auto":
        try:
            return _planned(bound, float64, batches, config, world)
        except MeasurementError:  # of all processes alike
            if not layers_of(bound.language_model):
                raise
    again = config.recompute != "never"
    bound, float64 = (replace(model, recompute=again) for model in (bound, float64))
    return replace(_planned(bound, float64, batches, config, world), recompute=again)


def _planned(
    bound: BoundModel,
    float64: BoundModel,
    batches: tuple[Rollouts, ...],
    config: ProbeConfig,
    world: World,
) -> Plan:
    limit, now = _limit(config), _held_now(bound.device)
    trainable = sum(p.numel() for p in bound.registry.trainable.values())
    tokens = sum(len(batch.ids) * batch.max_gen_len for batch in batches)
    accelerator = (
        bound.device.type != "cpu"
    )  # beside which the units' gradients and all that is held are in memory
    held = 0 if accelerator else 8 * (trainable * _held(trainable) + tokens * _OF_A_TOKEN)
    usable = int((limit - now - _SLACK) / (1 + _UNSEEN)) - held
    units = max(batch.num_prompts for batch in batches)

    def of_units(units: int) -> int:
        return 0 if accelerator else bytes_of_units(bound, units)

    fewest = of_units(
        2 if config.first_order.mode == "exact" else min(config.first_order.num_blocks, units)
    )
    largest_tensor = max(p.numel() for p in bound.registry.trainable.values())
    of_products = 0 if accelerator else 8 * _PRODUCT * min(IN_FLOAT64, units * largest_tensor)
    sizes = {1, config.generation.tf_batch_size}  # that may be chosen
    shared = config.share_prompts == "auto" and any(
        worth(batch, size) is None for batch in batches for size in sizes
    )
    passes = Passes(bound, float64, longest_rows(batches), config, shared)
    kinds = [*passes.kinds(usable - fewest)]

    def largest(config: ProbeConfig, positions: int) -> int:
        return max(
            8 * (trainable + _OF_A_STEP * largest_tensor),
            of_products,
            *(kind(config, positions) for kind in kinds),
        )

    def beside_one_response() -> tuple[int, int]:
        """What is left for gradients beside a pass of one response, and what is needed in all."""
        least = largest(with_rows(config, 1), FEWEST)
        needed = int(world.largest(_needed(now, held + fewest + least)))
        return -int(world.largest(least - usable)), needed

    room, needed = beside_one_response()
    if room < fewest:
        fewer = "" if config.first_order.mode == "exact" else "first_order.num_blocks, "
        remedy = f"set {fewer}generation.max_new_tokens or the number of trained parameters lower"
        raise _too_little(limit, needed, now, "for one response at a time", remedy)
    first_order, room_without, left_out = [*kinds], room, None
    kinds += passes.kinds_of_second_order(usable - fewest)
    room, needed = beside_one_response()
    if room < fewest:
        left_out = (
            f"second derivatives are left out: with them one response needs {needed / 2**30:.3g} GiB, "
            f"and memory_limit is {limit / 2**30:.3g} GiB"
        )
        kinds[:], room = first_order, room_without
    if not accelerator:
        allowed = min(config.first_order.max_gradient_gib, room / 2**30)
        config = _with_gradients(config, allowed)
    gradients = of_units(max(units_within_memory(bound, batch, config)[1] for batch in batches))
    left = usable - gradients
    fastest = bound.positions_at_once(passes.vocabulary)
    sizes = _sizes(config.generation.tf_batch_size, fastest)
    fitting = (i for i, (n, k) in enumerate(sizes) if largest(with_rows(config, n), k) <= left)
    rows, positions = sizes[int(world.largest(next(fitting, len(sizes) - 1)))]
    config = with_rows(config, rows)
    expected = _needed(now, held + gradients + largest(config, positions))
    return Plan(config, positions * passes.vocabulary, expected, left_out=left_out)


def memory_section(
    bound: BoundModel,
    batches: tuple[Rollouts, ...],
    held: Mapping[str, memory.Held],
    config: ProbeConfig,
    plan: Plan | None,
) -> r.MemorySection:
    """What each stage `held`, beside what was planned under a limit."""
    columns = max(int((batch.prompt_lens + batch.gen_lens).max()) for batch in batches)
    stages = {
        stage: r.StageMemory(at_start=of.at_start, peak=of.peak) for stage, of in held.items()
    }
    return r.MemorySection(
        counted=memory.kind(bound.device),
        stages=stages,
        limit=config.memory_limit,
        expected=None if plan is None else plan.expected,
        tf_batch_size=config.generation.tf_batch_size,
        logits_at_once=None if plan is None else plan.logits_at_once,
        recompute=bound.recompute,
        prompts_unshared=sharing(bound, batches[0], config).why,
        attention=bound.attention_of(config.generation.tf_batch_size, columns),
        second_order_tokens=_second_order_tokens(batches[0], config, plan),
        left_out=None if plan is None else plan.left_out,
    )


def _second_order_tokens(e: Rollouts, config: ProbeConfig, plan: Plan | None) -> int | None:
    """Of a row at most, in second derivatives; `None` where no row of E is shortened for them, or there are none."""
    if {"projections", "curvature witness"} <= {*config.left_out} or (plan and plan.left_out):
        return None
    short = shortened(e)
    return None if short is e else int((short.prompt_lens + short.gen_lens).max())


def _sizes(rows: int, positions: int) -> list[tuple[int, int]]:
    """(rows, positions in a piece), in the order in which they are tried: pieces of 16 positions cost less time than
    fewer rows do, and fewer than 16 more. The last is (1, `FEWEST`)."""
    powers = [k for k in (64, 32, 16) if k < positions]
    fewer = [(n, min(16, positions)) for n in range(rows - 1, 0, -1)]
    return [*((rows, k) for k in (positions, *powers)), *fewer, (1, 8), (1, FEWEST)]


def _needed(now: int, more: int) -> int:
    return now + _SLACK + int((1 + _UNSEEN) * more)


def for_sampling(
    bound: BoundModel, prompt_length: int, config: ProbeConfig, *, later: bool = False
) -> ProbeConfig:
    """The configuration with as many rows at once as sampling may have, prompts of that length among them.

    A row counts as a prompt as long as it ever gets, read with its cache. `later`: once P, v and θ + ηv are held too.
    """
    if config.memory_limit is None:
        return config
    limit, now, policy = config.memory_limit, _held_now(bound.device), config.generation
    length = prompt_length + policy.max_new_tokens
    length = min(length, bound.longest_row or length)

    def step(rows: int) -> None:
        prompts, more = [[0] * (length - 1)] * rows, torch.zeros(rows, dtype=torch.long)
        try:
            steps = OverCache(bound, prompts)
        except CacheError:
            steps = WholeRows(bound, prompts)
        steps.read(more.to(bound.device))
        logits = steps.logits
        uniforms = torch.zeros(
            rows, logits.shape[-1].bit_length(), dtype=torch.float64, device=bound.device
        )
        draw(masses(logits, policy.temperature, policy.top_p), uniforms)

    if later:
        trainable = sum(p.numel() for p in bound.registry.trainable.values())
        now += 8 * (_held(trainable) + 1) * trainable
    one, two = (memory.counted_bytes(partial(step, rows), bound.device) for rows in (1, 2))
    each = max(two - one, 1)
    fits = 1 + int(((limit - now - _SLACK) / (1 + _UNSEEN) - one) / each)
    if fits < 1:
        what = "to sample one response at a time"
        raise _too_little(
            limit, _needed(now, one), now, what, "set generation.max_new_tokens lower"
        )
    generation = policy.model_copy(update={"gen_batch_size": min(policy.gen_batch_size, fits)})
    return config.model_copy(update={"generation": generation})


def lends_frozen(bound: BoundModel, config: ProbeConfig) -> bool:
    """Whether the float64 copy should share the frozen parameters and upcast them as they are used: under a limit,
    where its own would take more than half of what is left. It costs time (docs/scaling.md), and changes no number."""
    if config.memory_limit is None:
        return False
    frozen = sum(p.numel() for p in bound.registry.parameters.values() if not p.requires_grad)
    return 8 * frozen > (config.memory_limit - _held_now(bound.device)) / 2


def require_loaded_within(config: ProbeConfig, loading: memory.Held | None) -> None:
    """Raise where loading the checkpoint took more than the limit."""
    if (
        config.memory_limit is not None
        and loading is not None
        and loading.peak > config.memory_limit
    ):
        raise MeasurementError(
            "memory_limit",
            f"{config.memory_limit / 2**30:.3g} GiB is too little: merely loading took {loading.peak / 2**30:.3g} GiB",
            "raise it",
        )


def _held(trainable: int) -> int:
    return _HELD if trainable <= made.FEW else 1


def _limit(config: ProbeConfig) -> int:
    assert config.memory_limit is not None
    return config.memory_limit


def _held_now(device: torch.device) -> int:
    held = memory.held_bytes(device)
    if held is None:
        raise ConfigError(
            "memory_limit", f"memory cannot be measured here ({device.type})", "leave it out"
        )
    return held


def _with_gradients(config: ProbeConfig, gib: float) -> ProbeConfig:
    return config.model_copy(
        update={"first_order": config.first_order.model_copy(update={"max_gradient_gib": gib})}
    )


def _too_little(limit: int, needed: int, now: int, what: str, remedy: str) -> MeasurementError:
    limit_, needed_, now_ = (f"{size / 2**30:.3g}" for size in (limit, needed, now))
    return MeasurementError(
        "memory_limit",
        f"{limit_} GiB is too little {what}: {needed_} GiB are needed, {now_} of them for what is held already",
        f"raise it, or {remedy}",
    )
