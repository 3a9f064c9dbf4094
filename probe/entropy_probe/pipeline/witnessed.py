"""Gradients, projections and curvature of the run beside the same numbers by other ways."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor

from entropy_probe.pipeline.measured import Measured
from entropy_probe.stages.slopes import Slopes
from entropy_probe.stages.witnesses.projections import projection_agreement
from entropy_probe.stages.witnesses.witness import (
    curvature_witness,
    gradient_witness,
    off_in_reverse,
)

_HAS_SECOND_DERIVATIVE = 1e-4
"""Of its terms: what float32 leaves of a second derivative in two ways; a cut graph lacks a part of them."""


def witnessed(
    of: Measured,
    precond: Mapping[str, Tensor],
    v: Mapping[str, Tensor],
    along: Slopes | None,
    *,
    second_order: bool = True,
) -> dict[str, float | None]:
    """The section `witness` of the report. Without slopes `along` v there is no second moment, and what needs one is
    `None`; so is what needs second derivatives, without `second_order`."""
    bound, config, e, u = of.bound, of.config, of.e, of.u
    by_loop = gradient_witness(
        bound, u.share, u.scores, config, u.gradients, precond, u.of_x, u.as_update
    )
    witness: dict[str, float | None] = {} if by_loop is None else asdict(by_loop)
    if "projections" not in config.left_out:
        at_theta = None if along is None else along.at_theta
        witness |= asdict(
            projection_agreement(
                bound,
                e.share,
                e.of_x,
                config,
                e.gradients,
                precond,
                of.ascent,
                v,
                at_theta,
                second_order=second_order,
            )
        )
    witness["curvature"] = None  # without the second derivative that the α-trick needs too
    if along is None:
        return witness | dict.fromkeys(("u_cross", "u_cross_fast"))
    if "curvature witness" in config.left_out or not e.share.world.first:
        return witness
    if witness.get("projections_alpha") is not None:
        curvature = curvature_witness(of.float64, e.rollouts, e.scores, along, v, config)
        witness["curvature"] = curvature
    elif second_order and "projections_alpha" in witness:
        off = off_in_reverse(of.bound, e.rollouts, e.scores, along, v, config)
        if off is not None and off < _HAS_SECOND_DERIVATIVE:
            witness["projections_alpha"] = math.inf  # lost: the same model has all that it needs
    return witness
