"""Gates on a step that was probed while a run was training: the bounds of `bounds.py`, on the report of that step."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from entropy_probe import Verdict
from entropy_probe.errors import ConfigError
from entropy_probe.report import Estimate
from entropy_probe.step_report import StepReport
from entropy_probe_checks.bounds import GATES, require_sensible
from entropy_probe_checks.criteria import gate
from entropy_probe_checks.criteria.verdicts import Finding

STEP_GATES = {
    "entropy": gate.entropy.meaning,
    "predicted_change": gate.predicted_change.meaning,
    "realised_ratio": gate.realised_ratio.meaning,
    "ess": "The step is so large that few of the responses still represent the policy after it. So its effect on the "
    "entropy cannot be known beforehand. A smaller learning rate is needed.",
}
"""Gates that are asked inside of the loop, and what it means that one is missed; the others speak of rewards, or of
files. `ess` is ESS/N at the whole step, the share of the responses that still represent the policy after it."""

Bounds = Mapping[str, Mapping[str, float]]


def checked_bounds(gates: Mapping[str, object]) -> dict[str, dict[str, float]]:
    """The bounds of each gate. `fall` and `rise` speak of the first probe of the run. Raises `ConfigError`."""
    found: dict[str, dict[str, float]] = {}
    for name, bounds in gates.items():
        if name in GATES and name not in STEP_GATES:
            problem = f"`{name}` is not measured inside of the training loop"
            raise ConfigError("gates", problem, f"choose from {', '.join(STEP_GATES)}")
        if name not in STEP_GATES:
            near = difflib.get_close_matches(name, STEP_GATES, n=1)
            remedy = (
                f"did you mean `{near[0]}`?" if near else f"choose from {', '.join(STEP_GATES)}"
            )
            raise ConfigError("gates", f"unknown gate `{name}`", remedy)
        found[name] = _numbers(name, bounds)
        require_sensible(name, found[name], has_baseline=True)
    return found


_KEYS = ("min", "max", "fall", "rise", "fall_se", "rise_se", "noise")


def _numbers(name: str, bounds: object) -> dict[str, float]:
    if not isinstance(bounds, Mapping):
        raise ConfigError("gates", f"`{name}` is {bounds!r}", f'write {{"{name}": {{"max": …}}}}')
    for key, value in bounds.items():
        if key not in _KEYS:
            raise ConfigError("gates", f"`{name}.{key}` is not a bound", f"give {', '.join(_KEYS)}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError("gates", f"`{name}.{key}` is {value!r}", "give a number")
    return {str(key): float(value) for key, value in bounds.items()}


def quantity_of_step(report: StepReport, name: str) -> Estimate | Finding:
    """What a gate holds against its bounds: that of the same name of a checkpoint's report, to first order."""
    size, change = report.entropy.per_token, report.predicted_per_token.first_order
    if name == "predicted_change":
        return gate.share_of_entropy(change.value, change.se, size)
    if name == "realised_ratio":
        return gate.ratio_of_changes(report.came or report.realised)
    if name == "ess":  # of these responses: no noise is known of it
        return Estimate(value=report.realised.unclipped_ess_fraction, se=0.0)
    return size


def baseline_of_step(report: StepReport) -> dict[str, Estimate]:
    """What bounds that speak of a baseline compare with."""
    found = {name: quantity_of_step(report, name) for name in STEP_GATES}
    return {name: value for name, value in found.items() if isinstance(value, Estimate)}


def judged_step(
    report: StepReport, gates: Bounds, baseline: Mapping[str, Estimate]
) -> list[Verdict]:
    """A verdict for each gate that is on."""
    return [_verdict(report, name, bounds, baseline.get(name)) for name, bounds in gates.items()]


def _verdict(
    report: StepReport, name: str, bounds: Mapping[str, float], before: Estimate | None
) -> Verdict:
    found = quantity_of_step(report, name)
    if isinstance(found, Estimate):
        found = gate.held_against(name, found, before, bounds)
    asked = found.status in ("pass", "fail")
    return Verdict(
        criterion=name,
        family="gate",
        status=found.status,
        value=found.value,
        limit=found.limit,
        hint=f"{found.detail} {STEP_GATES[name]}" if asked else found.detail,
        unit=found.unit,
    )
