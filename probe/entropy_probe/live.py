"""The step that a live model's optimizer is about to take, measured before it is taken, and after.

    loss.backward()
    step = measure_step(model, optimizer, tokenizer, prompts)
    optimizer.step()
    report = step.after(model)

Where FSDP2 has spread the model over the processes of one machine, all of them do the same, and measure together: each
some of the prompts, with one copy of the model in the memory of the machine. All have the same numbers. Processes that
have the whole model each, as under DDP, measure together with `measure_step(…, by_all=True)`.

On several machines the first process gathers the model and measures alone:

    step = measure_step(model, optimizer, tokenizer, prompts)      # None in the other processes
    optimizer.step()
    now = whole(model)                                             # in all processes; None in the others
    report = None if step is None else step.after(now)

Nothing of the model, the optimizer or torch's generators is changed. The update is the optimizer's own, whatever the
loss is: no U batch is sampled, no reward is asked and no gradient is taken.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from entropy_probe import __version__
from entropy_probe import report as r
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import ConfigError, MeasurementError
from entropy_probe.estimators import prediction, resolution
from entropy_probe.estimators.slope import PromptMean
from entropy_probe.model.beside import beside, name_in_copy
from entropy_probe.model.forward import BoundModel, bind, without_grouped_experts
from entropy_probe.model.live_step import LiveStep, live_step
from entropy_probe.model.precision import numerics, str_to_dtype
from entropy_probe.model.sharded import (
    gathered,
    is_sharded,
    resharded,
    spread_as,
    together,
    whole,
    written_once,
)
from entropy_probe.pipeline.environment import environment
from entropy_probe.processes.of_training import agreed, are_joined, on_one_machine, size
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.batches import fingerprint, with_limit
from entropy_probe.stages.derivatives import Second, directional_derivatives
from entropy_probe.stages.entropy import entropy_section, surprises
from entropy_probe.stages.entropy_change import EntropyChange, change_row, sweep
from entropy_probe.stages.gradients.units import units_of_prompts
from entropy_probe.stages.responses.ids import Door, eos_ids
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.rewards import of_each
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.sampled_rollouts import sample_rollouts
from entropy_probe.stages.responses.tasks import as_prompt, draw_prompts, read_prompts
from entropy_probe.stages.scores import Scores, score
from entropy_probe.stages.share import Share
from entropy_probe.stages.slopes import Derived, Slopes, derived, slopes_of
from entropy_probe.step_report import (
    StepBatchSection,
    StepPrediction,
    StepReport,
    StepUpdateSection,
)

_WHOLE = 1.0
"""η of the step: the direction is the step itself."""
_APART = 1e-6
"""Of the norm of a step: far above what two kernels leave of a sum in float64, and far below any other step."""
RECIPE = r.RecipeSection(
    name="given",
    source="the optimizer's own step on the gradients of the loss, clipped as they were",
    settings={},
    not_reproduced=[],
    unread=[],
)


@dataclass
class _Seconds:
    """What each stage took."""

    of: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Any:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.of[stage] = self.of.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class ProbedStep:
    """A step that was measured before it was taken: its `report`, and what is needed to measure what it did. `tokens`
    are the scores of this process's own prompts, `scores` those of all."""

    report: StepReport
    config: ProbeConfig
    share: Share
    tokens: Scores
    scores: Scores
    along: Slopes
    predicted: _Predicted

    @property
    def is_of_all(self) -> bool:
        """Whether several processes have measured together, each some of the prompts."""
        return self.share.several

    def after(self, model: nn.Module) -> StepReport:
        """The report, with the change that came: at the parameters that the model has now, on the same responses.

        One scoring pass. The processes that have measured together all call this with their model; where the first has
        measured alone, give `whole(model)`. Raises `ProbeError`.
        """
        world = self.share.world
        if not self.is_of_all and is_sharded(model):
            problem = "is spread over processes"
            remedy = "give `entropy_probe.live.whole(model)`, called in all of them"
            raise MeasurementError("the model", problem, remedy)
        seconds = _Seconds(dict(self.report.timing))
        with world.together(), _undisturbed(self.config, model), seconds("after"):
            change = self._change(model)
        give_back(self.config)
        came = self.predicted.beside(change, self.config)
        return self.report.model_copy(update={"came": came, "timing": seconds.of})

    def _change(self, model: nn.Module) -> EntropyChange:
        world = self.share.world
        if is_sharded(model):
            model, world = together(model, world.in_one_copy())
        bound = _in(model, str_to_dtype(self.config.precision.dtype), world)
        (change,) = sweep(
            bound, self.share, self.scores, {}, [_WHOLE], self.config,
            tokens=self.tokens, coefficients=self.along.coefficients,
        )  # fmt: skip
        return change


@dataclass(frozen=True)
class _Predicted:
    """(slope, curvature) along the whole step, per response and per token; without curvature it is 0."""

    of_response: tuple[PromptMean, PromptMean]
    of_tokens: tuple[PromptMean, PromptMean]
    has_curvature: bool
    unit_of: Tensor

    def section(self, of: tuple[PromptMean, PromptMean]) -> StepPrediction:
        slope, curvature = of
        second = None
        if self.has_curvature:
            bent = prediction.predicted_change(_WHOLE, slope, curvature, self.unit_of)
            second = r.Estimate(value=bent.value, se=bent.se)
        return StepPrediction(
            first_order=r.Estimate(value=slope.value, se=slope.se), second_order=second
        )

    def beside(self, change: EntropyChange, config: ProbeConfig) -> r.EntropyChangeRow:
        """A change beside what was predicted for it."""
        per_token = config.true_delta_h.normalize == "per_token"
        asked = self.of_tokens if per_token else self.of_response
        of_asked = prediction.predict(_WHOLE, change.realised, *asked, self.unit_of)
        of_tokens = prediction.predict(
            _WHOLE, change.realised_per_token, *self.of_tokens, self.unit_of
        )
        reach, least = prediction.reach(*asked), config.true_delta_h.min_ess_fraction
        return change_row(change, of_asked, of_tokens, reach, least)


@dataclass(frozen=True)
class Ready:
    """What is measured: a module that has all of its parameters, the step by its names, the seconds it took, and the
    processes that measure."""

    module: nn.Module
    step: LiveStep
    seconds: float
    world: World = ALONE


def ready(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradient_scale: float = 1.0,
    *,
    wide: bool = False,
) -> Ready | None:
    """The model and the step that its optimizer is about to take; `wide` where it will be measured in float64 too.

    Where FSDP2 has spread the model all processes call this, and an error of one is raised in all. Each takes the step
    of its own shards, and writes both into the memory of the machine. On several machines they are brought together in
    the first process, and the others have `None`.
    """
    start, world = time.perf_counter(), ALONE
    module = resharded(model)
    parameters = dict(module.named_parameters())
    step = live_step(optimizer, parameters, gradient_scale)
    if is_sharded(module):
        if not step.finite:
            return None
        parts = agreed(lambda: {n: spread_as(parameters[n], of) for n, of in step.move.items()})
        if on_one_machine():
            world = World.of_training()
            with world.together():
                world = world.in_one_copy() if world.is_of_one_machine() else ALONE
        if world is ALONE:
            copied = whole(module)
            moves = gathered(parts.items())
            if copied is None:
                return None
        else:
            dtypes = {name: part.dtype for name, part in parts.items()}
            here = world
            with here.together():
                copied, world = together(module, here, wide=wide)
                moves = written_once(parts, dtypes, here)
        step, module = replace(step, move=moves), copied
    step = replace(step, move={name_in_copy(name): move for name, move in step.move.items()})
    return Ready(module, step, time.perf_counter() - start, world)


def ready_in_all(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradient_scale: float = 1.0,
    *,
    wide: bool = False,
) -> Ready | None:
    """`ready`, for all processes of the training, where each of them has the whole model (DDP) as where FSDP2 has
    spread it: all call this and measure together."""
    if size() == 1 or is_sharded(model):
        return ready(model, optimizer, gradient_scale, wide=wide)
    found = agreed(lambda: ready(model, optimizer, gradient_scale))
    assert found is not None
    world, norm = World.of_training(), found.step.norm
    seen = norm, sum(float(move.double().sum()) for move in found.step.move.values())
    with world.together():
        if world.any(not found.step.finite):
            return None
        if any(world.largest(x) + world.largest(-x) > _APART * norm for x in seen):
            remedy = "look for what differs between them, or probe the checkpoints"
            raise MeasurementError("the step", "is another in each process", remedy)
    return replace(found, world=world)


def measure_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: Any,
    prompts: Any,
    config: ProbeConfig | Mapping[str, Any] | None = None,
    *,
    after_step: int = 0,
    seed: int | None = None,
    gradient_scale: float = 1.0,
    where: str = "",
    by_all: bool = False,
) -> ProbedStep | None:
    """What the optimizer's next step does to the entropy, from `.grad` as it stands; `None` where gradient or step are
    not finite, so that there is nothing to be said, and in processes that only wait.

        v = θ' − θ of `optimizer.step()`,   ΔH ≈ ∇Hᵀv (+ ½vᵀ∇²Hv),   H(θ + v) − H(θ) by the performance difference

    `batch.num_prompts` of the `prompts` (a file, or texts, lists of messages or rows with a `prompt`) are drawn with
    `seed`, by default that of the configuration plus `after_step`, and `generation.num_return_sequences` responses of
    each are sampled at θ with generators of their own. The curvature needs a copy in float64 and is left out under
    budget `smoke`. Raises `ProbeError`.

    Where FSDP2 has spread the model over one machine all processes call this and measure together, and an error of one
    is raised in all; the `prompts` are the first one's. On several machines the first measures alone, and what then
    fails is raised in that one. With `by_all` processes that have the whole model each, as under DDP, do as under FSDP2
    on one machine; without it each measures everything by itself.
    """

    def checked() -> ProbeConfig:
        given = config if isinstance(config, ProbeConfig) else dict(config or {})
        found = given if isinstance(given, ProbeConfig) else ProbeConfig.from_mapping(given)
        require_predicted(found)
        return found

    config = agreed(checked) if by_all or is_sharded(model) else checked()

    def probed() -> ProbedStep | None:
        of = ready_in_all if by_all else ready
        found = of(model, optimizer, gradient_scale, wide=in_float64(config))
        if found is None or not found.step.finite:
            return None
        return measured(
            found, tokenizer, prompts, config, after_step=after_step, seed=seed, where=where
        )

    step = probed()
    give_back(config)
    return step


def in_float64(config: ProbeConfig) -> bool:
    """Whether the model is measured in float64 as well."""
    return config.budget != "smoke" or config.precision.dtype == "float64"


def require_predicted(config: ProbeConfig) -> None:
    """Raise where nothing can be predicted."""
    if config.generation.top_p < 1:
        problem = "is below 1, and then nothing is predicted about the policy's entropy"
        raise ConfigError("generation.top_p", problem, "leave it out")


def measured(
    found: Ready,
    tokenizer: Any,
    prompts: Any,
    config: ProbeConfig,
    *,
    after_step: int = 0,
    seed: int | None = None,
    where: str = "",
) -> ProbedStep:
    """What the step does to the entropy, as `measure_step` says; by all processes of `found.world`, who call this."""
    world = found.world
    with world.together():
        require_predicted(config)
        world.same(
            {
                "configuration": config.model_dump_json(),
                "the seed": str(seed),
                "after_step": str(after_step),
            }
        )
        return _measured(found, tokenizer, prompts, config, after_step, seed, where)


def _measured(
    found: Ready,
    tokenizer: Any,
    prompts: Any,
    config: ProbeConfig,
    after_step: int,
    seed: int | None,
    where: str,
) -> ProbedStep:
    seed = config.batch.seed + after_step if seed is None else seed
    module, step, world = found.module, found.step, found.world
    seconds = _Seconds({"update": found.seconds})
    with _undisturbed(config, module) as threads:
        with seconds("copy"):
            bound = _in(module, str_to_dtype(config.precision.dtype), world)
        with seconds("sampling"):
            e = _sampled(bound, tokenizer, prompts, config, seed, world)
            if e.limit is not None:
                config = with_limit(config, e.limit)
        share = Share.of(e, units_of_prompts(e), world)
        with seconds("scores"):
            tokens = score(bound, share.own, config, with_features=True)
            scores = share.scores(tokens)
        with seconds("slopes"):
            of, has_curvature = _derived(bound, module, share, step, config)
            _require_moved(step, of, world)
            along = slopes_of(share, tokens, of, config)
        predicted = _Predicted(
            (along.slope, along.curvature),
            (along.per_token, along.per_token_curvature),
            has_curvature,
            share.units.of_prompt,
        )
        with seconds("entropy change"):
            (change,) = sweep(
                bound, share, scores, step.move, [_WHOLE], config,
                tokens=tokens, coefficients=along.coefficients,
            )  # fmt: skip
        unlikely, around = surprises(share, tokens), environment(bound, threads)
    of_token, of_response = map(predicted.section, (predicted.of_tokens, predicted.of_response))
    report = StepReport(
        probe_version=__version__,
        after_step=after_step,
        config=config.model_dump(mode="json"),
        recipe=RECIPE,
        batch=StepBatchSection(
            num_prompts=e.num_prompts,
            num_responses=e.num_responses,
            num_tokens=int(e.gen_lens.sum()),
            prompts=where or (str(prompts) if isinstance(prompts, str | Path) else "given"),
            fingerprint=fingerprint(e),
            found=list(e.found),
        ),
        entropy=entropy_section(scores, config.generation.temperature, unlikely),
        update=_update_section(step),
        predicted_per_token=of_token,
        predicted_per_response=of_response,
        realised=predicted.beside(change, config),
        resolution=_resolution(e, of_token.best, of_response.best),
        came=None,
        since=None,
        gates=[],
        environment=around,
        timing=seconds.of,
    )
    return ProbedStep(report, config, share, tokens, scores, along, predicted)


def give_back(config: ProbeConfig) -> None:
    """Free the copies that were measured beside the model. One that closes over itself, as that of TRL's models does,
    would hold a whole model until Python looks for garbage by itself, which may be long after."""
    if are_joined() or in_float64(config):
        gc.collect()


def _undisturbed(config: ProbeConfig, model: nn.Module) -> AbstractContextManager[int]:
    """`numerics` for a model of this size."""
    return numerics(config.precision, sum(p.numel() for p in model.parameters()))


def _in(module: nn.Module, dtype: torch.dtype, world: World) -> BoundModel:
    """A model beside this one, in this dtype; frozen parameters are lent, never copied.

    Processes that hold one model together hold a copy of it once, but for an adapter, of which each has its own.
    """
    parameters = {n: p for n, p in module.named_parameters() if p.is_floating_point()}
    trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
    is_adapter = 2 * trained < sum(p.numel() for p in parameters.values())
    if not world.one_copy or is_adapter or {p.dtype for p in parameters.values()} == {dtype}:
        return bind(beside(module), dtype, lend_frozen=True)
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    found = world.made(shapes, lambda name: parameters[name].detach().to(dtype), dtype)
    held = {id(p): p for p in module.parameters()}
    held |= {
        id(p): nn.Parameter(found[name], requires_grad=p.requires_grad)
        for name, p in parameters.items()
    }
    made = nn.Module.to(beside(module, held), dtype)
    return bind(without_grouped_experts(made, dtype), dtype)


def _sampled(
    bound: BoundModel,
    tokenizer: Any,
    prompts: Any,
    config: ProbeConfig,
    seed: int,
    world: World,
) -> Rollouts:
    """The E batch: some of the first process's prompts, and responses of each at θ."""
    batch, generation = config.batch, config.generation
    drawn = world.told(_drawn(prompts, config, seed) if world.first else [])
    door = Door(
        tokenizer,
        eos_ids(bound.language_model, tokenizer),
        batch.system_prompt,
        batch.chat_template_kwargs,
    )
    limit = None
    if tokenizer is not None and bound.longest_row is not None:
        room = bound.longest_row - max(len(door.of_prompt(prompt)) for prompt in drawn)
        if 0 < room < generation.max_new_tokens:
            limit = room
            generation = generation.model_copy(update={"max_new_tokens": room})
    made = sample_rollouts(
        bound,
        tokenizer,
        drawn,
        generation,
        seed=seed,
        rewards=of_each(lambda text, gold: 0.0),
        door=door,
        world=world,
    )
    return replace(made, reward="none", limit=limit)


def _drawn(prompts: Any, config: ProbeConfig, seed: int) -> list[Prompt]:
    is_file = isinstance(prompts, str | Path)
    pool = read_prompts(prompts, config.batch.split) if is_file else _Rows(prompts)
    if not len(pool):
        raise MeasurementError("prompts", "there are none", "give at least two")
    count = min(config.batch.num_prompts, len(pool))
    if count < 2:
        raise MeasurementError(
            "prompts", "there is one, and a standard error needs two", "give at least two"
        )
    drawn = draw_prompts(pool, count, seed=seed, with_replacement=False)
    return [replace(prompt, gold=None, columns={}) for prompt in drawn]  # nobody asks for a reward


class _Rows(Sequence[Prompt]):
    """Rows of anything that has a length and places, as prompts, each made when it is asked for."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        try:
            return len(self._rows)
        except TypeError as error:
            problem = f"are a {type(self._rows).__name__}, which has no length"
            raise ConfigError("prompts", problem, "give a list, a data set or a file") from error

    def __getitem__(self, index: Any) -> Any:
        row = self._rows[int(index)]
        if isinstance(row, str) or (
            isinstance(row, list) and all(isinstance(m, Mapping) for m in row)
        ):
            row = {"prompt": row}
        return as_prompt(row, f"entry {int(index)}", "prompts")


def _derived(
    bound: BoundModel, module: nn.Module, share: Share, step: LiveStep, config: ProbeConfig
) -> tuple[Derived, bool]:
    """D_v along the step, and the second derivative where the budget has it; the copy in float64 is made for that, and
    for models that have no forward-mode derivative."""
    world = share.world
    if config.budget == "smoke":
        try:
            at_theta = directional_derivatives(bound, share.own, step.move, config, world=world)
        except NotImplementedError:
            at_theta = None
        if not world.any(at_theta is None):
            assert at_theta is not None
            nothing = torch.zeros_like(at_theta.d_logp)
            twice = Second(nothing, nothing, torch.zeros_like(at_theta.d_seq_logp))
            return Derived(at_theta, twice, 0), False
    float64 = bound
    if bound.dtype is not torch.float64:
        float64 = _in(module, torch.float64, world)
    return derived(bound, float64, share, step.move, config), True


def _require_moved(step: LiveStep, of: Derived, world: World) -> None:
    """A step that moves no logit at all is not seen by the model: something in its forward is bound to other
    parameters than those that are moved."""
    if step.norm > 0 and not world.any(bool(of.at_theta.d_logit.any())):
        raise MeasurementError(
            "the model",
            "no logit moves along the step, so that its forward does not use the parameters that are trained",
            "take off what was put in place of a `forward`, or probe checkpoints",
        )


def _update_section(step: LiveStep) -> StepUpdateSection:
    return StepUpdateSection(
        optimizer=step.kind,
        lr=step.lr,
        norm=step.norm,
        grad_norm=step.grad_norm,
        momentum_share=step.momentum_share,
        in_float64=step.in_float64,
    )


def _resolution(
    e: Rollouts, per_token: r.Estimate, per_response: r.Estimate
) -> r.ResolutionSection:
    return r.ResolutionSection(
        per_token=2 * per_token.se,
        per_response=2 * per_response.se,
        prompts_needed=resolution.prompts_needed(e.num_prompts, per_token.value, per_token.se),
        next_step=None,
        target_se=None,
        looks=[],
    )
