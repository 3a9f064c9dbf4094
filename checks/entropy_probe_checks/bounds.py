"""Bounds of gates: training-health limits that the user sets. A gate without bounds is off.

    limits: {entropy: {min: 0.05, fall: 0.5}, zero_advantage: {max: 0.8}, adam_step: {max: 0}}

min, max            of the quantity itself
fall, rise          of a baseline report's quantity b, as a share of |b|
fall_se, rise_se    of the baseline's, in standard errors of the difference
noise               standard errors beyond a bound that count as noise (4)

x ± s fails `min: m` where x < m − noise·s: a change smaller than its noise fails no gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from entropy_probe.errors import ConfigError

GATES = (
    "entropy",
    "predicted_change",
    "realised_ratio",
    "zero_advantage",
    "adam_step",
    "finite_moments",
    "reward",
)
COUNTS = ("adam_step", "finite_moments")
"""Quantities without noise, to which only `max` applies."""
SIGNED = ("realised_ratio", "reward")
"""Quantities that can be negative; the others do not fall by their whole size or more."""
UNITS = {
    "fall": "share of the baseline",
    "rise": "share of the baseline",
    "fall_se": "SE of the difference",
    "rise_se": "SE of the difference",
}
"""Of the bounds that are no values of the quantity itself; what is held against them is in the same unit."""
OF_A_BASELINE = tuple(UNITS)
NOISE = 4.0
"""Standard errors within which a criterion on a noisy quantity does not fail; of a normal, once in 3e4."""


def bounds_of(limits: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """The gates that are on: gate → its bounds."""
    return {
        name: bounds
        for name, bounds in limits.items()
        if name in GATES and isinstance(bounds, Mapping)
    }


def require_sensible(name: str, bounds: Mapping[str, float], *, has_baseline: bool) -> None:
    """Raise on bounds that can't be met, that the gate does not take, or that lack the baseline they speak of."""
    for key, value in bounds.items():
        where = f"`limits.{name}.{key}`"
        if name in COUNTS and key != "max":
            raise ConfigError("configuration", f"{where}: the gate is a count", "give only `max`")
        if key in OF_A_BASELINE and not has_baseline:
            raise ConfigError(
                "configuration",
                f"{where} needs a baseline",
                "give --probe-baseline=report.json",
            )
        lowest = 1.0 if key in ("noise", "fall_se", "rise_se") else 0.0
        if key != "min" and not (key == "max" and name in SIGNED) and value < lowest:
            raise ConfigError("configuration", f"{where} is {value:g}", f"give {lowest:g} or more")
        if key == "fall" and name not in SIGNED and value >= 1:
            raise ConfigError(
                "configuration",
                f"{where} is {value:g}, and nothing can fall by its whole size",
                "give a share below 1",
            )
        if key in ("min", "max") and name == "zero_advantage" and not 0 <= value <= 1:
            raise ConfigError("configuration", f"{where} is {value:g}", "give a share from 0 to 1")
    if not set(bounds) - {"noise"}:
        raise ConfigError(
            "configuration", f"`limits.{name}` has no bound", "give `min`, `max` or another"
        )
    if bounds.get("min", -math.inf) > bounds.get("max", math.inf):
        raise ConfigError("configuration", f"`limits.{name}`: min is above max", "exchange them")
