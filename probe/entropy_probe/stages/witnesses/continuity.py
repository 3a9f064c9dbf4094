"""Small steps: nothing changes at η = 0, and a change is proportional to η down to where float64 ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.model.forward import BoundModel
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.report import ContinuitySection, TaylorTests
from entropy_probe.stages.gradients.products import norm
from entropy_probe.stages.made import Made
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.scores import SPREAD_ROWS, Scores, rows_spread_over, rows_without_graph
from entropy_probe.stages.witnesses.taylor import taylor

ETA_MAIN = 1e-5
ETA_TINY = 1e-10
_SHORTER = (1.0, 1e-1, 1e-2, 1e-3)
"""Of a step: the next is taken where the logits are not linear up to the one before (a router's choice, a kink)."""
_LINEAR = 0.1
"""‖Δz(η) − 2Δz(η/2)‖ over ‖Δz(η)‖ of what is linear in η; a jump between the two makes it 1."""
_NO_TAYLOR = TaylorTests(**dict.fromkeys(TaylorTests.model_fields))


def continuity_section(
    bound: BoundModel,
    float64: BoundModel,
    rollouts: Rollouts,
    scores: Scores,
    v: Mapping[str, Tensor],
    config: ProbeConfig,
) -> tuple[ContinuitySection, dict[str, Tensor]]:
    """Zero check, scaling and, where the budget has them, the Taylor tests with their evidence."""
    most_rows = max(2, rows_without_graph(rollouts, config.generation))
    zero = zero_check(bound, rollouts, v, most_rows)
    ratios = scaling(float64, rollouts, v, most_rows)
    tests, evidence = _NO_TAYLOR, {}
    if "taylor" not in config.left_out:
        tests, evidence = taylor(float64, bound, rollouts, scores, v, config)
    section = ContinuitySection(
        zero_check_max_abs=zero.max_abs,
        zero_check_bitwise=zero.bitwise,
        eta_main=ratios.eta_main,
        eta_tiny=ETA_TINY,
        param_ratio=ratios.param_ratio,
        logit_ratio=ratios.logit_ratio,
        **tests.model_dump(),
    )
    return section, evidence


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
    eta_main: float = ETA_MAIN


@torch.no_grad()
def zero_check(
    bound: BoundModel, rollouts: Rollouts, v: Mapping[str, Tensor], most_rows: int = SPREAD_ROWS
) -> ZeroCheck:
    """Compare the module called directly with `functional_call` at θ + 0·v, on rows of the batch.

    At every position, or at some spread over the rows where their logits would be too many (`spread_over`).
    """
    ids = rows_spread_over(rollouts, most_rows).to(bound.device)
    keep = bound.spread_over(*ids.shape)
    direct = bound.direct_logits(ids, keep=keep)
    functional = bound.logits(
        ids, keep=keep, override=theta_plus_eta_v(bound.registry, v, 0.0, bound.dtype)
    )
    return compared(direct, functional)


def compared(direct: Tensor, functional: Tensor) -> ZeroCheck:
    """Two sets of logits that must be the same."""
    return ZeroCheck(
        float((direct - functional).abs().max()), bool(torch.equal(direct, functional))
    )


@torch.no_grad()
def scaling(
    float64: BoundModel, rollouts: Rollouts, v: Mapping[str, Tensor], most_rows: int = SPREAD_ROWS
) -> Scaling:
    """Tiny/main ratios at η = 1e-10 and 1e-5, on a float64 copy of the model; positions as in `zero_check`.

    Where the logits are not linear up to 1e-5, the larger step is up to a thousand times shorter; if it never is short
    enough, it is 1e-5.
    """
    ids = rows_spread_over(rollouts, most_rows).to(float64.device)
    keep = float64.spread_over(*ids.shape)
    theta = {name: float64.registry.parameters[name].detach() for name in v}
    still = float64.logits(ids, keep=keep)

    def moved(eta: float) -> Tensor:
        override = theta_plus_eta_v(float64.registry, v, eta, torch.float64)
        return float64.logits(ids, keep=keep, override=override) - still

    def of_parameters(eta: float) -> float:
        def off(name: str) -> Tensor:
            one = {name: v[name]}
            return theta_plus_eta_v(float64.registry, one, eta, torch.float64)[name] - theta[name]

        return norm(Made(v, off))

    main, large = smooth_step(moved, ETA_MAIN)
    pairs = ((of_parameters(ETA_TINY), of_parameters(main)), (float(moved(ETA_TINY).norm()), large))
    expected = ETA_TINY / main
    of_theta, of_logits = (
        tiny / main / expected if main > 0 else float("nan") for tiny, main in pairs
    )
    return Scaling(of_theta, of_logits, main)


def smooth_step(moved: Callable[[float], Tensor], eta: float) -> tuple[float, float]:
    """η, or the first shorter one, up to which Δz(η), which `moved` gives, is linear; and ‖Δz‖ there.

    It is η itself where none is short enough: noise is linear nowhere, and is to be judged.
    """
    of_all = []
    for shorter in _SHORTER:
        whole = moved(shorter * eta)
        of_all.append((shorter * eta, float(whole.norm())))
        if float((whole - 2 * moved(shorter * eta / 2)).norm()) <= _LINEAR * of_all[-1][1]:
            return of_all[-1]
    return of_all[0]
