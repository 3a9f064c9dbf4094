"""A score depends on the sequence alone."""

from __future__ import annotations

from entropy_probe import ProbeReport, Verdict
from entropy_probe_checks.criteria.verdicts import at_most


def padding_invariance(report: ProbeReport) -> Verdict:
    """Largest |difference| of a token's log p between unpadded, right-padded and left-padded rows, in true float64.

    The limit is the rounding bound that the report derives from depth and length.
    """
    measured = report.invariance.padding
    return at_most(
        "padding_invariance",
        "sequences",
        measured.worst,
        measured.bound,
        f"Padding changes a score ({measured.example}): positions count padding, the mask lets it through, or the "
        "model does not honour attention_mask and position_ids.",
    )
