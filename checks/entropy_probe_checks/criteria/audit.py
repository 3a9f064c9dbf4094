"""Every figure of the report, computed again by code that did not make it."""

from __future__ import annotations

from entropy_probe import ProbeReport
from entropy_probe_checks.audit import audit, worst
from entropy_probe_checks.criteria.verdicts import Criterion, Finding, at_most, not_applicable
from entropy_probe_checks.thresholds import limit_for


@Criterion
def figures_recomputed(report: ProbeReport) -> Finding:
    """Largest |reported − computed again| of any figure, over the size of its terms; infinite where a count or a text
    is another.

    A figure of the report is not what its own evidence (tokens, scores, derivatives, products of gradients) gives by
    the formulas: a sign, a factor, a standard error, a column or a batch is wrong. Do not believe that figure.
    """
    if report.evidence is None:
        return not_applicable(
            "The evidence is not at hand: the report was read from a file. `entropy-probe audit` reads both."
        )
    line = worst(audit(report.model_dump(mode="json"), report.evidence))
    return at_most(line.difference, limit_for(report, "figures_recomputed"), detail=f"[{line}]")
