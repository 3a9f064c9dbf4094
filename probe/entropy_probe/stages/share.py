"""The units of a batch, and the part of it that a process works on: all of it, where there is one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from entropy_probe.estimators.baselines import Among
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import Scores

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True)
class Units:
    """The unit of each prompt: a prompt itself (`exact`), or a block of prompts whose sizes differ by at
    most one (`block`)."""

    mode: str
    of_prompt: Int[Tensor, " B"]

    @property
    def sizes(self) -> Int[Tensor, " U"]:
        return torch.bincount(self.of_prompt)


_Fields = TypeVar("_Fields", bound=Any)


@dataclass(frozen=True)
class Share:
    """`own` are the prompts of this process's units, in a row: positions `prompts` of the batch, and
    units `own_units`.

    Every process knows the whole batch, and scores and differentiates its own prompts only. One process
    alone is a world of one, whose share is the whole.
    """

    world: World
    rollouts: Rollouts
    units: Units
    own: Rollouts
    own_units: slice
    prompts: slice

    @classmethod
    def of(cls, rollouts: Rollouts, units: Units, world: World = ALONE) -> Share:
        own_units = world.share(len(units.sizes))
        bounds = (own_units.start, own_units.stop)
        first, last = (int((units.of_prompt < bound).sum()) for bound in bounds)
        own = rollouts
        if world.size > 1:
            own = rollouts.of_prompts(torch.arange(first, last), first_prompt=first)
        return cls(world, rollouts, units, own, own_units, slice(first, last))

    @property
    def in_one_unit(self) -> Share:
        """The same prompts, each process's in one block."""
        world, units = self.world, len(self.units.sizes)
        ends = torch.tensor([(rank + 1) * units // world.size for rank in range(world.size)])
        blocks = Units("block", torch.searchsorted(ends, self.units.of_prompt, right=True))
        return replace(self, units=blocks, own_units=slice(world.rank, world.rank + 1))

    @property
    def several(self) -> bool:
        """Whether other processes have shares too."""
        return self.world.size > 1

    def whole(self, values: Tensor) -> Tensor:
        """[B, …] from [b, …], the values of everybody's own prompts."""
        return self.world.placed(values, self.prompts, self.rollouts.num_prompts)

    def of_units(self, values: Tensor) -> Tensor:
        """[U, …] from [u, …], the values of everybody's own units."""
        return self.world.placed(values, self.own_units, len(self.units.sizes))

    def scores(self, scores: Scores) -> Scores:
        """The scores of the whole batch from those of everybody's own prompts, with a response's sum in
        place of its tokens (T = 1); alone as they are."""
        if not self.several:
            return scores
        sums = [scores.seq_logp, scores.seq_logq, scores.rb_sum, scores.rb_sum_q]
        sums.append(scores.gen_lens.double())
        features = [] if scores.features is None else [*scores.features.sum(2).unbind(-1)]
        whole = self.whole(torch.stack([*sums, *features], -1))[:, :, None]
        logp, logq, entropy, entropy_q, lengths = whole[..., :5].unbind(-1)
        phi = None if scores.features is None else whole[..., 5:]
        return Scores(logp, logq, entropy, entropy_q, lengths[:, :, 0].long(), phi)

    def rows(self, values: Tensor, chosen: Int[Tensor, " k"], at: slice) -> Tensor:
        """Entries `chosen` of the whole, wherever they stand; `values` are positions `at` of it."""
        found = values.new_zeros(len(chosen), *values.shape[1:])
        here = (chosen >= at.start) & (chosen < at.stop)
        found[here] = values[chosen[here] - at.start]
        return self.world.total(found)

    def tokens(self, values: Tensor, chosen: Int[Tensor, " k"]) -> Tensor:
        """[k, G, T] of the prompts `chosen`, from [b, G, t] of everybody's own."""
        return self.rows(self._as_long_as_any(values), chosen, self.prompts)

    def all_tokens(self, values: Tensor) -> Tensor:
        """[B, G, T, …] from [b, G, t, …] of everybody's own."""
        return self.whole(self._as_long_as_any(values))

    def joined(self, first: tuple[Share, _Fields], then: tuple[Share, _Fields]) -> _Fields:
        """The own prompts' values, from everybody's own of two batches that follow one another in this one. They are
        the fields of a dataclass: [b, G] or [b, G, t, …] each, or `None`."""

        def both(name: str) -> Tensor | None:
            parts = []
            for share, fields in (first, then):
                values = getattr(fields, name)
                if values is None:
                    return None
                if values.dim() > 2:
                    values = self._as_long_as_any(values)
                parts.append(share.whole(values))
            own = torch.cat(parts)[self.prompts]
            return own if own.dim() == 2 else own[:, :, : self.own.max_gen_len].contiguous()

        return replace(first[1], **{name: both(name) for name in vars(first[1])})

    def _as_long_as_any(self, values: Tensor) -> Tensor:
        beyond = (0, 0) * (values.dim() - 3)
        return pad(values, (*beyond, 0, self.rollouts.max_gen_len - values.shape[2]))

    @property
    def among(self) -> Among:
        """Where the own prompts stand among the others, for baselines that come from those."""
        batch = self.rollouts
        return Among(
            self.prompts.start, batch.num_prompts, batch.max_gen_len, self._total_of_tokens
        )

    def _total_of_tokens(self, values: Tensor) -> Tensor:
        return self.world.total(values, of_prompts=True)
