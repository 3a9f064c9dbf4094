"""The checkpoint's second moments beside the gradients of the same tensors on this batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from entropy_probe.estimators.moments import exchange_evidence
from entropy_probe.model.checkpoint import AdamState
from entropy_probe.model.registry import Registry, spread_over
from entropy_probe.processes.world import ALONE, World
from entropy_probe.report import MomentsMatch, PreconditionerSection

if TYPE_CHECKING:
    from jaxtyping import Float

_ENTRIES = 4096
_CLEAR = 5.0
_VAGUE = 0.5  # a logarithm known to 0.7, less than what it varies by within a tensor


def moments_match(
    adam: Mapping[str, AdamState], y: Mapping[str, Float[Tensor, "U D"]], world: World = ALONE
) -> tuple[MomentsMatch, dict[str, Tensor]]:
    """mean_u Y_u² against `exp_avg_sq`, entry by entry, of up to 4096 entries of each tensor; of several processes each
    has some u. Beside it what it is made of: that of every pair, and the entries of the pair with the most."""
    num_units = int(world.total(torch.tensor(len(next(iter(y.values()), ())))))
    of_pairs: list[_Pairs] = []
    for names in _of_one_shape(adam, y, world):
        size = y[names[0]].shape[1]
        some = spread_over(size, _ENTRIES)
        sums = torch.stack([y[name][:, some].double().square().sum(0).cpu() for name in names])
        squares = world.total(sums) / num_units
        states = (_known_squares(adam[name]).flatten() for name in names)
        moments = torch.stack([of_state[some.to(of_state.device)] for of_state in states])
        evidence = exchange_evidence(squares, moments.double().cpu())
        first, second = torch.triu_indices(len(names), len(names), offset=1)
        pairs = _Pairs(names, size, first, second, evidence[first, second], squares, moments)
        of_pairs.append(pairs)
    return _summed_up(of_pairs), _made_of(of_pairs)


def _known_squares(state: AdamState) -> Tensor:
    """`exp_avg_sq`, with 0, which says nothing, where rounding to 8 bits may have made half of it or taken as much."""
    if "exp_avg_sq" not in state.blocks:
        return state.exp_avg_sq
    vague = state.rounding("exp_avg_sq") > _VAGUE * state.exp_avg_sq
    return state.exp_avg_sq.masked_fill(vague, 0.0)


@dataclass(frozen=True)
class _Pairs:
    """Pairs of the tensors `names` of one shape, by position, with the evidence of each."""

    names: list[str]
    size: int
    first: Tensor
    second: Tensor
    evidence: Tensor
    squares: Tensor
    moments: Tensor

    def names_of(self, pair: int) -> tuple[str, str]:
        return self.names[int(self.first[pair])], self.names[int(self.second[pair])]


def _of_one_shape(
    adam: Mapping[str, AdamState], y: Mapping[str, Tensor], world: World
) -> list[list[str]]:
    """Names of two or more tensors of one shape that have moments and, anywhere, a gradient."""
    moving = torch.tensor([bool((y[name] != 0).any()) for name in adam], dtype=torch.int64)
    by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for (name, state), has_moved in zip(adam.items(), world.total(moving).tolist(), strict=True):
        if state.step > 0 and has_moved:
            by_shape[tuple(state.exp_avg_sq.shape)].append(name)
    return [names for names in by_shape.values() if len(names) >= 2]


def _summed_up(found: list[_Pairs]) -> MomentsMatch:
    """The pair with the most evidence of an exchange, and the pairs that nothing speaks against."""
    worst, pair = None, None
    undecided: dict[str, int] = {}
    for pairs in found:
        for k in (pairs.evidence > -_CLEAR).nonzero()[:, 0].tolist():
            undecided |= dict.fromkeys(pairs.names_of(k), pairs.size)
        largest = int(pairs.evidence.argmax())
        if worst is None or float(pairs.evidence[largest]) > worst:
            worst, pair = float(pairs.evidence[largest]), pairs.names_of(largest)
    evidence = torch.cat([pairs.evidence for pairs in found]) if found else torch.zeros(0)
    return MomentsMatch(
        exchanged=worst,
        exchanged_pair=pair,
        num_pairs=len(evidence),
        num_undecided=int((evidence > -_CLEAR).sum()),
        undecided=sorted(undecided, key=lambda name: (undecided[name], name)),
    )


def _made_of(found: list[_Pairs]) -> dict[str, Tensor]:
    if not found:
        return {}
    most = max(found, key=lambda pairs: float(pairs.evidence.max()))
    pair = int(most.evidence.argmax())
    both = torch.stack([most.first[pair], most.second[pair]])
    return {
        "pairs": torch.cat([pairs.evidence for pairs in found]),
        "squares": most.squares[both],
        "of_pair": most.moments.double().cpu()[both],
    }


def preconditioner_section(
    adam: Mapping[str, AdamState],
    precond: Mapping[str, Tensor],
    registry: Registry,
    difference_from_torch: float | None,
    match: MomentsMatch,
) -> PreconditionerSection:
    """P = 1/(√v̂+ε): its size and range, and what the witnesses of it found."""
    missing = [n for n in registry.trainable if n not in adam or adam[n].step == 0]
    values = [
        (int((~torch.isfinite(p)).sum()), float(p.min()), float(p.max())) for p in precond.values()
    ]
    return PreconditionerSection(
        num_tensors=len(precond),
        missing=missing,
        num_nonfinite=sum(nonfinite for nonfinite, _, _ in values),
        smallest=min(smallest for _, smallest, _ in values),
        largest=max(largest for _, _, largest in values),
        difference_from_torch=difference_from_torch,
        **match.model_dump(),
    )
