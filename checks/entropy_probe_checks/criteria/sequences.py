"""A score depends on the sequence alone."""

from __future__ import annotations

from entropy_probe import ProbeReport
from entropy_probe_checks.criteria.verdicts import Criterion, Finding, at_most


@Criterion
def padding_invariance(report: ProbeReport) -> Finding:
    """Largest |difference| of a token's log p between unpadded, right-padded and left-padded rows, in true float64.

    Padding changes a score: positions count padding, the mask lets it through, or the model does not honour
    attention_mask and position_ids.
    """
    measured = report.invariance.padding
    return at_most(measured.worst, measured.bound, detail=f"[{measured.example}]")
