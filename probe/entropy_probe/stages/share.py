"""The part of a batch that one of several processes works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.estimators.baselines import Among
from entropy_probe.processes.world import World
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import Scores

if TYPE_CHECKING:
    from jaxtyping import Int


@dataclass(frozen=True)
class Share:
    """`own` are the prompts of this process's units, in a row: positions `prompts` of the batch, and units `units`.

    Every process knows the whole batch, and scores and differentiates its own prompts only. Alone they are all.
    """

    world: World
    rollouts: Rollouts
    unit_of: Int[Tensor, " B"]
    own: Rollouts
    units: slice
    prompts: slice

    @classmethod
    def of(cls, rollouts: Rollouts, unit_of: Int[Tensor, " B"], world: World) -> Share:
        units = world.share(int(unit_of.max()) + 1)
        first, last = (int((unit_of < bound).sum()) for bound in (units.start, units.stop))
        own = rollouts
        if world.size > 1:
            own = rollouts.of_prompts(torch.arange(first, last), first_prompt=first)
        return cls(world, rollouts, unit_of, own, units, slice(first, last))

    @property
    def several(self) -> bool:
        return self.world.size > 1

    def whole(self, values: Tensor) -> Tensor:
        """[B, …] from [b, …], the values of everybody's own prompts."""
        return self.world.placed(values, self.prompts, self.rollouts.num_prompts)

    def of_units(self, values: Tensor) -> Tensor:
        """[U, …] from [u, …], the values of everybody's own units."""
        return self.world.placed(values, self.units, int(self.unit_of.max()) + 1)

    def scores(self, scores: Scores) -> Scores:
        """The scores of the whole batch from those of everybody's own prompts, with a response's sum in place of its
        tokens (T = 1); alone as they are."""
        if not self.several:
            return scores
        sums = [scores.seq_logp, scores.seq_logq, scores.rb_sum, scores.rb_sum_q, scores.gen_lens.double()]
        features = [] if scores.features is None else [*scores.features.sum(2).unbind(-1)]
        whole = self.whole(torch.stack([*sums, *features], -1))[:, :, None]
        logp, logq, entropy, entropy_q, lengths = whole[..., :5].unbind(-1)
        phi = None if scores.features is None else whole[..., 5:]
        return Scores(logp, logq, entropy, entropy_q, lengths[:, :, 0].long(), phi)

    def rows(self, values: Tensor, chosen: Int[Tensor, " k"], at: slice) -> Tensor:
        """Entries `chosen` of the whole, wherever they stand; `values` are positions `at` of it."""
        if not self.several:
            return values[chosen]
        found = values.new_zeros(len(chosen), *values.shape[1:])
        here = (chosen >= at.start) & (chosen < at.stop)
        found[here] = values[chosen[here] - at.start]
        return self.world.total(found)

    def tokens(self, values: Tensor, chosen: Int[Tensor, " k"]) -> Tensor:
        """[k, G, T] of the prompts `chosen`, from [b, G, t] of everybody's own."""
        if self.several:
            missing = self.rollouts.max_gen_len - values.shape[2]
            values = torch.nn.functional.pad(values, (0, missing))
        return self.rows(values, chosen, self.prompts)

    def all_tokens(self, values: Tensor) -> Tensor:
        """[B, G, T] from [b, G, t] of everybody's own; alone as they are."""
        missing = self.rollouts.max_gen_len - values.shape[2]
        return self.whole(torch.nn.functional.pad(values, (0, missing))) if self.several else values

    @property
    def among(self) -> Among | None:
        """Where the own prompts stand among the others, for baselines that come from those."""
        if not self.several:
            return None
        return Among(self.prompts.start, self.rollouts.num_prompts, self.rollouts.max_gen_len, self._total_of_tokens)

    def _total_of_tokens(self, values: Tensor) -> Tensor:
        return self.world.total(values, of_prompts=True)
