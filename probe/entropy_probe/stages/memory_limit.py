"""Sizes of batches and of pieces of logits with which the measurement stays below `memory_limit`.

They are chosen before the work begins: one and a few of the longest rows go through every kind of pass, whose tensors
are counted, and what more of them take is bounded by that. What is held through the run is known by formula.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from entropy_probe import memory
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import ConfigError, MeasurementError
from entropy_probe.model.capture import Capture
from entropy_probe.model.distributed import ALONE, World
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.stages.gradients import Payload, bytes_of_units, units_within_memory
from entropy_probe.stages.projections import by_alpha
from entropy_probe.stages.rollouts import Rollouts
from entropy_probe.stages.sampling import draw, masses
from entropy_probe.stages.scores import (
    policy_scores,
    read_rows,
    rows_without_graph,
    score_rows,
    scored_with_features,
)
from entropy_probe.stages.witness import FEWER_ROWS, lacks_derivative, rows_twice_in_reverse, terms

# What a pass takes beyond its tensors: buffers within operations, small blocks that the allocator keeps. Passes of 100
# to 1400 MB took up to 8 % more than was counted.
_UNSEEN, _SLACK = 0.08, 24 << 20
# Numbers of float64 for each trainable parameter, beside the units' gradients: Ȳ, P, v, v₀, D and X̄ are held; for a
# while come, at most, those of a real step: θ, its gradient, two moments and θ + ηv.
_HELD, _FOR_A_WHILE = 6, 5
_WHOLE = 4  # sets of whole logits that the zero check and scaling compare: two, their difference and its norm
_DRAWN = 48  # tokens of a drawn case's longest row, scored from whole logits
_OF_A_SCORE = 6  # numbers of float64 for a logit while it is scored
_OF_A_TOKEN = 30  # the same of a token, for scores, features and derivatives
_FEWEST = 4  # positions in a piece of logits


@dataclass(frozen=True)
class Plan:
    """What was chosen, and the memory that is expected at most."""

    config: ProbeConfig
    logits_at_once: int
    expected: int


Kind = Callable[[ProbeConfig, int], int]
"""The bytes of a kind of pass under a `tf_batch_size`, with so many positions in a piece of logits."""


@dataclass(frozen=True)
class _Passes:
    """Every kind of pass over four rows, each a prompt's only one, as long as any of the batches."""

    bound: BoundModel
    float64: BoundModel
    rollouts: Rollouts
    config: ProbeConfig

    @cached_property
    def _longest(self) -> int:
        return int((self.rollouts.prompt_lens + self.rollouts.gen_lens).argmax())

    @cached_property
    def _v(self) -> dict[str, Tensor]:
        return {name: torch.ones_like(p, device="cpu") for name, p in self.bound.registry.trainable.items()}

    def kinds(self, usable: int) -> Iterator[Kind]:
        """Those with a graph have `tf_batch_size` rows, or a part of them; the others more. No pass is tried that may
        take more than is `usable`, but for the least that there is."""

        def without_graph(config: ProbeConfig) -> int:
            return max(2, rows_without_graph(self.rollouts, config.generation))

        def of_graph(config: ProbeConfig) -> int:
            return config.generation.tf_batch_size

        def twice(config: ProbeConfig) -> int:
            return max(1, config.generation.tf_batch_size // FEWER_ROWS)

        yield self.counted(_score, without_graph, usable)
        yield self.counted(_score_at, without_graph, usable)
        yield self.counted(_differentiate, of_graph, usable)
        yield self.counted(_differentiate_alone, lambda config: 1, usable, most_rows=1)
        yield self.counted(_derive, without_graph, usable)
        if "projections" not in self.config.left_out:
            yield self.counted(_alpha, twice, usable, most_rows=2)
        if "curvature witness" not in self.config.left_out:
            yield self.counted(_twice, twice, usable, most_rows=2)
        of_column, columns = 8 * self.vocabulary, self.rollouts.ids.shape[1]
        # `BoundModel.spread_over`, of 8 rows: 4 pieces, or one column
        yield lambda config, positions: of_column * _WHOLE * min(8 + 4 * positions, 8 * columns)
        yield lambda config, positions: of_column * _OF_A_SCORE * _DRAWN

    def counted(
        self,
        work: Callable[[_Passes, Tensor], None],
        rows_of: Callable[[ProbeConfig], int],
        usable: int,
        most_rows: int = 4,
    ) -> Kind:
        """f(rows, positions) ≤ f(rows, 4) + f(1, positions) − f(1, 4), from one and `most_rows` rows, and from pieces
        of 4, 16 and 64 positions.

        It holds because f is the larger of what the layers take, which grows with the rows, and of what the output
        layer takes beside the rows' states, which grow less. Both are convex, so that a chord lies above them, and so
        does a line from the origin beyond the last point.
        """

        def count(rows: int, positions: int) -> int:
            models = (replace(m, logits_at_once=positions * self.vocabulary) for m in (self.bound, self.float64))
            passes = replace(self, **dict(zip(("bound", "float64"), models, strict=True)))
            return memory.counted_bytes(lambda: work(passes, torch.arange(rows)), self.bound.device)

        tokens, least = self.rollouts.max_gen_len, count(1, _FEWEST)
        by_rows, by_positions = {1: least}, {min(_FEWEST, tokens): least}
        if most_rows > 1:
            by_rows[most_rows] = count(most_rows, _FEWEST) if most_rows * least <= usable else most_rows * least
        for positions in (4 * _FEWEST, 16 * _FEWEST):
            most = 4 * max(by_positions.values())
            by_positions[min(positions, tokens)] = count(1, positions) if most <= usable else most

        def bytes_of(config: ProbeConfig, positions: int) -> int:
            rows = rows_of(config)
            return _above(by_rows, rows) + _above(by_positions, min(positions, tokens * rows)) - least

        return bytes_of

    def payload(self, rows: int) -> Payload:
        """Of so many of the rows, by the configured estimator."""
        steps, by_token = self.rollouts.max_gen_len, self.config.first_order.estimator == "rb"
        weights = torch.ones(rows, 1, dtype=torch.float64)
        return Payload(weights, torch.zeros(rows, 1, steps, dtype=torch.float64) if by_token else None)

    @cached_property
    def vocabulary(self) -> int:
        with torch.no_grad():
            ids = torch.zeros(1, 1, dtype=torch.long, device=self.bound.device)
            return self.bound.logits(ids).shape[-1]

    @cached_property
    def v(self) -> dict[str, Tensor]:
        return {name: torch.ones_like(p, device="cpu") for name, p in self.bound.registry.trainable.items()}


@torch.no_grad()
def _score(of: _Passes, rows: Tensor) -> None:
    policy = of.config.generation
    read = partial(scored_with_features, policy, policy_scores(of.bound, policy, of.config.precision))
    read_rows(of.bound, of.rollouts, rows, read)


@torch.no_grad()
def _score_at(of: _Passes, rows: Tensor) -> None:
    override = theta_plus_eta_v(of.float64.registry, of.v, 0.0, of.float64.dtype)
    score_rows(of.float64, of.rollouts, rows, of.config, override=override)


@torch.no_grad()
def _derive(of: _Passes, rows: Tensor) -> None:
    point = theta_plus_eta_v(of.float64.registry, of.v, 0.0, of.float64.dtype)
    with forward_ad.dual_level(), suppress(NotImplementedError):  # scores by difference then take its place
        dual = {n: forward_ad.make_dual(p, of.v[n].to(p)) for n, p in point.items()}
        score_rows(of.float64, of.rollouts, rows, of.config, override=dual, true_derivative=True)


def _differentiate(of: _Passes, rows: Tensor) -> None:
    payload = of.payload(len(rows))
    capture = Capture(of.bound.registry.trainable, torch.ones(2, len(rows), device=of.bound.device), 1)
    options = {"beside": payload.of_rows(torch.arange(len(rows))), "capture": capture, "true_derivative": True}
    (values,) = read_rows(of.bound, of.rollouts, rows, payload.read(of.config.generation.temperature), **options)
    capture.sums(values.sum(-1))


def _differentiate_alone(of: _Passes, rows: Tensor) -> None:
    """As the gradient witness does, response by response."""
    loss = terms(of.bound, of.rollouts, rows, of.payload(len(rows)), of.config, true=True).sum()
    torch.autograd.grad(loss, list(of.bound.registry.trainable.values()), allow_unused=True)


def _alpha(of: _Passes, rows: Tensor) -> None:
    few, config = of.rollouts.of_prompts(rows), _with_rows(of.config, FEWER_ROWS * len(rows))
    with suppress(NotImplementedError):
        by_alpha(of.bound, few, of.payload(len(rows)), of.v, config)


def _twice(of: _Passes, rows: Tensor) -> None:
    try:
        rho = torch.ones(len(rows), dtype=torch.float64)
        rows_twice_in_reverse(of.float64, of.rollouts, rows, rho, of.v, of.config)
    except RuntimeError as error:
        if not lacks_derivative(error):
            raise


def planned(
    bound: BoundModel, float64: BoundModel, batches: tuple[Rollouts, ...], config: ProbeConfig, world: World = ALONE
) -> Plan:
    """The configuration with as many rows at once as the limit allows, and no more than it has, and the logits at once;
    `batches` are those of all processes.

    Pieces of logits shrink where one row at a time is too much; units of gradients are blocks where those of all
    prompts do not fit, as under `max_gradient_gib`. Of several processes all choose what fits everywhere. Raises
    `MeasurementError` that says what would be needed.
    """
    limit, now = _limit(config), _held_now(bound.device)
    trainable = sum(p.numel() for p in bound.registry.trainable.values())
    tokens = sum(len(batch.ids) * batch.max_gen_len for batch in batches)
    held = 8 * (trainable * _HELD + tokens * _OF_A_TOKEN)
    usable = int((limit - now - _SLACK) / (1 + _UNSEEN)) - held
    fewest = bytes_of_units(bound, 2)
    passes = _Passes(bound, float64, _longest_rows(batches), config)
    kinds = [*passes.kinds(usable - fewest)]

    def largest(config: ProbeConfig, positions: int) -> int:
        return max(8 * trainable * _FOR_A_WHILE, *(kind(config, positions) for kind in kinds))

    least = largest(_with_rows(config, 1), _FEWEST)
    room = -int(world.largest(least - usable))
    if room < fewest:
        raise _too_little(limit, _needed(now, held + fewest + least), now, "for one response at a time")
    config = _with_gradients(config, min(config.first_order.max_gradient_gib, room / 2**30))
    units = max(units_within_memory(bound, batch, config)[1] for batch in batches)
    left, of_units = usable - bytes_of_units(bound, units), bytes_of_units(bound, units)
    fastest = bound.positions_at_once(passes.vocabulary)
    sizes = _sizes(config.generation.tf_batch_size, fastest)
    fitting = (i for i, (n, k) in enumerate(sizes) if largest(_with_rows(config, n), k) <= left)
    rows, positions = sizes[int(world.largest(next(fitting, len(sizes) - 1)))]
    config = _with_rows(config, rows)
    expected = _needed(now, held + of_units + largest(config, positions))
    return Plan(config, positions * passes.vocabulary, expected)


def _above(points: Mapping[int, int], x: int) -> int:
    """A bound of a convex function of which some points are known: the chord, or a line from the origin."""
    known = sorted(points)
    if x >= known[-1]:
        return points[known[-1]] * x // known[-1]
    right = next(k for k in known if k > x)
    left = max((k for k in known if k <= x), default=right)
    if left == right:
        return points[right]
    return points[left] + (points[right] - points[left]) * (x - left) // (right - left)


def _longest_rows(batches: tuple[Rollouts, ...]) -> Rollouts:
    """The row with the most tokens, four times, with as many of them generated as in any row."""
    of_longest = max(batches, key=lambda batch: int((batch.prompt_lens + batch.gen_lens).max()))
    totals, generated = of_longest.prompt_lens + of_longest.gen_lens, max(batch.max_gen_len for batch in batches)
    total = int(totals.max())
    return replace(
        of_longest,
        ids=of_longest.ids[totals.argmax()].repeat(4, 1),
        prompt_lens=torch.tensor([max(total - generated, 1)] * 4),
        gen_lens=torch.tensor([min(generated, total - 1)] * 4),
        rewards=torch.zeros(4, 1, dtype=torch.float64),
        advantages=None,
        logprobs=None,
    )


def _sizes(rows: int, positions: int) -> list[tuple[int, int]]:
    """(rows, positions in a piece), in the order in which they are tried: pieces of 16 positions cost less time than
    fewer rows do, and fewer than 16 more. The last is (1, `_FEWEST`)."""
    powers = [k for k in (64, 32, 16) if k < positions]
    fewer = [(n, min(16, positions)) for n in range(rows - 1, 0, -1)]
    return [*((rows, k) for k in (positions, *powers)), *fewer, (1, 8), (1, _FEWEST)]


def _needed(now: int, more: int) -> int:
    return now + _SLACK + int((1 + _UNSEEN) * more)


def for_sampling(bound: BoundModel, prompt_length: int, config: ProbeConfig) -> ProbeConfig:
    """The configuration with as many rows at once as sampling may have, prompts of that length among them.

    A row counts as a prompt as long as it ever gets, read with its cache.
    """
    if config.memory_limit is None:
        return config
    limit, now, policy = config.memory_limit, _held_now(bound.device), config.generation
    columns = getattr(getattr(bound.language_model, "config", None), "max_position_embeddings", None)
    length = prompt_length + policy.max_new_tokens
    length = min(length, columns) if isinstance(columns, int) else length

    def step(rows: int) -> None:
        ids = torch.zeros(rows, length - 1, dtype=torch.long, device=bound.device)
        mask = torch.ones(rows, length, dtype=torch.long, device=bound.device)
        _, cache = bound.next_logits(ids, mask[:, 1:])
        logits, _ = bound.next_logits(ids[:, :1], mask, cache)
        uniforms = torch.zeros(rows, logits.shape[-1].bit_length(), dtype=torch.float64, device=bound.device)
        draw(masses(logits, policy.temperature, policy.top_p), uniforms)

    one, two = (memory.counted_bytes(partial(step, rows), bound.device) for rows in (1, 2))
    each = max(two - one, 1)
    fits = 1 + int(((limit - now - _SLACK) / (1 + _UNSEEN) - one) / each)
    if fits < 1:
        raise _too_little(limit, _needed(now, one), now, "to sample one response at a time")
    generation = policy.model_copy(update={"gen_batch_size": min(policy.gen_batch_size, fits)})
    return config.model_copy(update={"generation": generation})


def require_loaded_within(config: ProbeConfig, loading: memory.Held | None) -> None:
    """Raise where loading the checkpoint took more than the limit."""
    if config.memory_limit is not None and loading is not None and loading.peak > config.memory_limit:
        raise MeasurementError(
            "memory_limit",
            f"{config.memory_limit / 2**30:.3g} GiB is too little: loading alone took {loading.peak / 2**30:.3g} GiB",
            "raise it",
        )


def _limit(config: ProbeConfig) -> int:
    assert config.memory_limit is not None
    return config.memory_limit


def _held_now(device: torch.device) -> int:
    held = memory.held_bytes(device)
    if held is None:
        raise ConfigError("memory_limit", f"memory cannot be measured here ({device.type})", "leave it out")
    return held


def _with_rows(config: ProbeConfig, rows: int) -> ProbeConfig:
    return config.model_copy(update={"generation": config.generation.model_copy(update={"tf_batch_size": rows})})


def _with_gradients(config: ProbeConfig, gib: float) -> ProbeConfig:
    return config.model_copy(update={"first_order": config.first_order.model_copy(update={"max_gradient_gib": gib})})


def _too_little(limit: int, needed: int, now: int, what: str) -> MeasurementError:
    limit_, needed_, now_ = (f"{size / 2**30:.3g}" for size in (limit, needed, now))
    return MeasurementError(
        "memory_limit",
        f"{limit_} GiB is too little {what}: {needed_} GiB are needed, {now_} of them for what is held already",
        "raise it, give shorter responses, or train fewer parameters",
    )
