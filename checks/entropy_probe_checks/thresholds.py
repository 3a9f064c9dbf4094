"""Every limit of every criterion, with its source. `limits: {name: value}` in the configuration replaces a value."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from entropy_probe import ProbeError, ProbeReport


@dataclass(frozen=True)
class Limit:
    """A threshold and where it comes from."""

    value: float
    source: str


LIMITS: dict[str, Limit] = {
    "zero_check": Limit(0.0, "same numbers through the same kernels in the same order: bit for bit"),
    "param_scaling": Limit(2.0, "tiny-step test of the precision notes; 1 ± 3e-9 is measured in true float64"),
    "logit_scaling": Limit(3.0, "tiny-step test of the precision notes; 1 ± 3e-4 is measured in true float64"),
    "x_coverage": Limit(1.0, "a tensor without a gradient is missing from every dot product"),
    "y_coverage": Limit(1.0, "a tensor without a gradient is missing from every dot product"),
    "preconditioner_complete": Limit(0.0, "a tensor without Adam state would silently get P = 1"),
    "preconditioner_finite": Limit(0.0, "one non-finite entry makes every dot product NaN"),
    "buffers_overridden": Limit(0.0, "the default path maps parameters only"),
    "live_model_unmodified": Limit(0.0, "checksum over parameters, buffers, gradients and training mode"),
    "u_cross_identity": Limit(1e-9, "float64 sums of at most 1e4 terms lose at most 1e-12 of their absolute sum"),
    "se_identity": Limit(1e-9, "se_jackknife/se_plugin = (U−1)/(U−2) exactly; float64 rounding only"),
    "se_agreement": Limit(3.0, "notes: jackknife and plug-in within a factor of 2 to 3 on few units"),
    "zero_step_change": Limit(0.0, "at η = 0 both entropies are the same expression"),
    "zero_step_ess": Limit(0.0, "at η = 0 every weight is 1"),
}


def limit_for(report: ProbeReport, name: str) -> float:
    """The limit in force: the configuration's, else the default."""
    return float(report.config["limits"].get(name, LIMITS[name].value))


def require_known(names: Mapping[str, float]) -> None:
    """Raise on the first name that no criterion has."""
    for name in names:
        if name not in LIMITS:
            near = difflib.get_close_matches(name, LIMITS, n=1)
            remedy = f"did you mean `{near[0]}`?" if near else f"choose from {', '.join(LIMITS)}"
            raise ProbeError("configuration", f"unknown limit `limits.{name}`", remedy)
