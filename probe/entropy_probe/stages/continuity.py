"""Does the network move with η as it must: not at all at η = 0, and in proportion for tiny η, in true float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.stages.rollouts import Rollouts
from entropy_probe.stages.update import norm

ETA_MAIN = 1e-5
ETA_TINY = 1e-10
_ROWS = 8


@dataclass(frozen=True)
class ZeroCheck:
    """max|direct − functional(η = 0)| over logits in the configured precision, and whether they agree bit for bit."""

    max_abs: float
    bitwise: bool


@dataclass(frozen=True)
class Scaling:
    """(‖Δ(η_tiny)‖/‖Δ(η_main)‖)/(η_tiny/η_main) of parameters and of logits: 1 is perfect, NaN where nothing moved."""

    param_ratio: float
    logit_ratio: float


def _some_rows(rollouts: Rollouts) -> Tensor:
    """Up to 8 rows spread over the batch, cut to the longest of them."""
    rows = torch.linspace(0, len(rollouts.ids) - 1, min(_ROWS, len(rollouts.ids))).long()
    longest = int((rollouts.prompt_lens + rollouts.gen_lens)[rows].max())
    return rollouts.ids[rows, :longest]


@torch.no_grad()
def zero_check(bound: BoundModel, rollouts: Rollouts, v: Mapping[str, Tensor]) -> ZeroCheck:
    """Compare the module called directly with `functional_call` at θ + 0·v, on rows of the batch."""
    ids = _some_rows(rollouts).to(bound.device)
    direct = bound.direct_logits(ids)
    functional = bound.logits(ids, override=theta_plus_eta_v(bound.registry, v, 0.0, bound.dtype))
    return compared(direct, functional)


def compared(direct: Tensor, functional: Tensor) -> ZeroCheck:
    """Two sets of logits that must be the same."""
    return ZeroCheck(float((direct - functional).abs().max()), bool(torch.equal(direct, functional)))


@torch.no_grad()
def scaling(float64: BoundModel, rollouts: Rollouts, v: Mapping[str, Tensor]) -> Scaling:
    """Tiny/main ratios at η = 1e-10 and 1e-5, on a float64 copy of the model."""
    ids = _some_rows(rollouts).to(float64.device)
    theta = {name: float64.registry.parameters[name].detach() for name in v}
    logits = float64.logits(ids)
    moved = {}
    for eta in (ETA_MAIN, ETA_TINY):
        override = theta_plus_eta_v(float64.registry, v, eta, torch.float64)
        moved[eta] = (
            norm({name: value - theta[name] for name, value in override.items()}),
            float((float64.logits(ids, override=override) - logits).norm()),
        )
    expected = ETA_TINY / ETA_MAIN
    ratios = (
        tiny / main / expected if main > 0 else float("nan")
        for tiny, main in zip(moved[ETA_TINY], moved[ETA_MAIN], strict=True)
    )
    return Scaling(*ratios)
