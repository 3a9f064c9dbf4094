"""The memory that each kind of pass takes, as a bound from passes of few rows whose tensors are counted."""

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
from entropy_probe.errors import ProbeError
from entropy_probe.model.capture import Capture
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.stages.gradients.payloads import Payload
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import (
    policy_scores,
    read_rows,
    rows_without_graph,
    score_rows,
    scored_at_theta,
)
from entropy_probe.stages.shared_prompts import read_once
from entropy_probe.stages.witnesses.projections import by_alpha
from entropy_probe.stages.witnesses.shortened import shortened
from entropy_probe.stages.witnesses.witness import (
    FEWER_ROWS,
    lacks_derivative,
    rows_twice_in_reverse,
    terms,
)

FEWEST = 4  # positions in a piece of logits
_WHOLE = 4  # sets of whole logits that the zero check and scaling compare: two, their difference and its norm
_DRAWN_ROWS, _DRAWN_COLUMNS = 8, 56  # of the largest case that is drawn
_DRAWN = 48  # tokens of a drawn case's longest row, scored from whole logits
_OF_A_SCORE = 6  # numbers of float64 for a logit while it is scored

Kind = Callable[[ProbeConfig, int], int]
"""The bytes of a kind of pass under a `tf_batch_size`, with so many positions in a piece of logits."""


@dataclass(frozen=True)
class Passes:
    """Every kind of pass over four rows, each a prompt's only one, as long as any of the batches. `share_prompts`:
    rows may be read behind their prompts too."""

    bound: BoundModel
    float64: BoundModel
    rollouts: Rollouts
    config: ProbeConfig
    share_prompts: bool = False

    def kinds(self, usable: int) -> Iterator[Kind]:
        """Those with a graph have `tf_batch_size` rows, or a part of them; the others more. No pass is tried that may
        take more than is `usable`, but for the least that there is."""

        def without_graph(config: ProbeConfig) -> int:
            return max(2, rows_without_graph(self.rollouts, config.generation))

        def of_graph(config: ProbeConfig) -> int:
            return config.generation.tf_batch_size

        trainable = sum(p.numel() for p in self.bound.registry.trainable.values())
        yield self.counted(_score, without_graph, usable)
        yield self.counted(_score_at, without_graph, usable, fixed=8 * trainable)  # θ + ηv
        if self.share_prompts:  # as many at once as there are rows
            yield self.counted(_score_behind, without_graph, usable)
        yield self.counted(_differentiate, of_graph, usable, fixed=8 * trainable)  # of X and of Y
        yield self.counted(_differentiate_alone, lambda config: 1, usable, most_rows=1)
        yield self.counted(_derive, without_graph, usable, fixed=16 * trainable)  # θ and v
        yield replace(self, rollouts=self._drawn).counted(
            _score_at, lambda config: _DRAWN_ROWS, usable
        )
        of_column, columns = 8 * self.vocabulary, self.rollouts.ids.shape[1]
        # `BoundModel.spread_over`, of 4 rows: 4 pieces, or one column
        yield lambda config, positions: of_column * _WHOLE * min(4 + 4 * positions, 4 * columns)
        yield lambda config, positions: of_column * _OF_A_SCORE * _DRAWN

    def kinds_of_second_order(self, usable: int) -> Iterator[Kind]:
        """Gradients of gradients, which two witnesses take of `shortened` rows, where they are not left out."""
        few = replace(self, rollouts=shortened(self.rollouts))

        def rows_of(config: ProbeConfig) -> int:
            return max(1, config.generation.tf_batch_size // FEWER_ROWS)

        if "projections" not in self.config.left_out:
            yield few.counted(_alpha, rows_of, usable, most_rows=2)
        if "curvature witness" not in self.config.left_out:
            trainable = sum(p.numel() for p in self.bound.registry.trainable.values())
            yield few.counted(_twice, rows_of, usable, most_rows=2, fixed=8 * trainable)

    def counted(
        self,
        work: Callable[[Passes, Tensor], None],
        rows_of: Callable[[ProbeConfig], int],
        usable: int,
        most_rows: int = 4,
        fixed: int = 0,
    ) -> Kind:
        """f(rows, positions) ≤ f(rows, 4) + f(1, positions) − f(1, 4), from one and `most_rows` rows, and from pieces
        of 4, 16 and 64 positions.

        It holds because f is the larger of what the layers take, which grows with the rows, and of what the output
        layer takes beside the rows' states, which grow less. Both are convex, so that a chord lies above them, and so
        does a line from the origin, or from what is `fixed` in f, beyond the last point.
        """

        def count(rows: int, positions: int) -> int:
            models = (
                replace(m, logits_at_once=positions * self.vocabulary)
                for m in (self.bound, self.float64)
            )
            passes = replace(self, **dict(zip(("bound", "float64"), models, strict=True)))
            return memory.counted_bytes(lambda: work(passes, torch.arange(rows)), self.bound.device)

        tokens, least = self.rollouts.max_gen_len, count(1, FEWEST)
        by_rows, by_positions = {1: least}, {min(FEWEST, tokens): least}
        if most_rows > 1:
            by_rows[most_rows] = (
                count(most_rows, FEWEST) if most_rows * least <= usable else most_rows * least
            )
        for positions in (4 * FEWEST, 16 * FEWEST):
            if min(positions, tokens) in by_positions:  # no row has more
                continue
            most = 4 * max(by_positions.values())
            by_positions[min(positions, tokens)] = count(1, positions) if most <= usable else most

        def bytes_of(config: ProbeConfig, positions: int) -> int:
            rows = rows_of(config)
            return (
                _above(by_rows, rows, fixed)
                + _above(by_positions, min(positions, tokens * rows))
                - least
            )

        return bytes_of

    def payload(self, rows: int) -> Payload:
        """Of so many of the rows, by the configured estimator."""
        steps, first_order = self.rollouts.max_gen_len, self.config.first_order
        by_token = first_order.estimator == "rb" or self.config.whose_update.by_token
        weights = torch.ones(rows, 1, dtype=torch.float64)
        return Payload(
            weights, torch.zeros(rows, 1, steps, dtype=torch.float64) if by_token else None
        )

    @property
    def vocabulary(self) -> int:
        return self.bound.num_logits

    @property
    def _drawn(self) -> Rollouts:
        """The largest of the cases that are drawn."""
        width = max(2, min(_DRAWN_COLUMNS, self.bound.longest_row or _DRAWN_COLUMNS))
        return replace(
            self.rollouts,
            ids=torch.zeros(_DRAWN_ROWS, width, dtype=torch.long),
            prompt_lens=torch.full((_DRAWN_ROWS,), width // 2),
            gen_lens=torch.full((_DRAWN_ROWS,), width - width // 2),
            rewards=torch.zeros(_DRAWN_ROWS, 1, dtype=torch.float64),
        )

    @cached_property
    def v(self) -> dict[str, Tensor]:
        return {
            name: torch.ones_like(p, device="cpu")
            for name, p in self.bound.registry.trainable.items()
        }


@torch.no_grad()
def _score(of: Passes, rows: Tensor) -> None:
    policy = of.config.generation
    scored = policy_scores(of.bound, policy, of.config.precision)
    read = partial(scored_at_theta, policy, scored, True, True)
    read_rows(of.bound, of.rollouts, rows, read)


@torch.no_grad()
def _score_behind(of: Passes, rows: Tensor) -> None:
    override = theta_plus_eta_v(of.bound.registry, of.v, 0.0, of.bound.dtype)
    policy = of.config.generation
    scored = policy_scores(of.bound, policy, of.config.precision)
    read = partial(scored_at_theta, policy, scored, True, True)
    with suppress(ProbeError):  # of a model that cannot, whole rows are read
        for _ in read_once(
            of.bound, of.rollouts, len(rows), read, override, some=rows, tokens=2**62
        ):
            pass


@torch.no_grad()
def _score_at(of: Passes, rows: Tensor) -> None:
    override = theta_plus_eta_v(of.float64.registry, of.v, 0.0, of.float64.dtype)
    score_rows(of.float64, of.rollouts, rows, of.config, override=override)


@torch.no_grad()
def _derive(of: Passes, rows: Tensor) -> None:
    point = theta_plus_eta_v(of.float64.registry, of.v, 0.0, of.float64.dtype)
    with (
        forward_ad.dual_level(),
        suppress(NotImplementedError),
    ):  # scores by difference then take its place
        dual = {n: forward_ad.make_dual(p, of.v[n].to(p)) for n, p in point.items()}
        score_rows(of.float64, of.rollouts, rows, of.config, override=dual, true_derivative=True)


def _differentiate(of: Passes, rows: Tensor) -> None:
    payload = of.payload(len(rows))
    capture = Capture(
        of.bound.registry.trainable, torch.ones(2, len(rows), device=of.bound.device), 1
    )
    options = {
        "beside": payload.of_rows(torch.arange(len(rows))),
        "capture": capture,
        "true_derivative": True,
    }
    (values,) = read_rows(
        of.bound, of.rollouts, rows, payload.read(of.config.generation.temperature), **options
    )
    capture.sums(values.sum(-1))


def _differentiate_alone(of: Passes, rows: Tensor) -> None:
    """As the gradient witness does, response by response."""
    payload = of.payload(len(rows))
    loss = terms(of.bound, of.rollouts, rows, payload, of.config, true=True, once=True).sum()
    torch.autograd.grad(loss, list(of.bound.registry.trainable.values()), allow_unused=True)


def _alpha(of: Passes, rows: Tensor) -> None:
    few, config = of.rollouts.of_prompts(rows), with_rows(of.config, FEWER_ROWS * len(rows))
    with suppress(NotImplementedError):
        by_alpha(of.bound, few, of.payload(len(rows)), of.v, config)


def _twice(of: Passes, rows: Tensor) -> None:
    try:
        rho = torch.ones(len(rows), dtype=torch.float64)
        rows_twice_in_reverse(of.float64, of.rollouts, rows, rho, of.v, of.config)
    except RuntimeError as error:
        if not lacks_derivative(error):
            raise


def with_rows(config: ProbeConfig, rows: int) -> ProbeConfig:
    return config.model_copy(
        update={"generation": config.generation.model_copy(update={"tf_batch_size": rows})}
    )


def _above(points: Mapping[int, int], x: int, fixed: int = 0) -> int:
    """A bound of a convex function of which some points are known: the chord, or a line from (0, fixed)."""
    known = sorted(points)
    if x >= known[-1]:
        least = min(fixed, points[known[0]])
        return least + (points[known[-1]] - least) * x // known[-1]
    right = next(k for k in known if k > x)
    left = max((k for k in known if k <= x), default=right)
    if left == right:
        return points[right]
    return points[left] + (points[right] - points[left]) * (x - left) // (right - left)


def longest_rows(batches: tuple[Rollouts, ...]) -> Rollouts:
    """The row with the most tokens, four times, with as many of them generated as in any row."""
    of_longest = max(batches, key=lambda batch: int((batch.prompt_lens + batch.gen_lens).max()))
    totals, generated = (
        of_longest.prompt_lens + of_longest.gen_lens,
        max(batch.max_gen_len for batch in batches),
    )
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
