"""The run as one HTML file, `--probe-html`: what was measured and judged, handed to `entropy_probe.page`.

What only the evidence tells goes from xdist's workers to their controller as JSON, beside the reports.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from entropy_probe import ProbeError
from pytest_entropy_probe import library
from pytest_entropy_probe.library import warnings_are_not_errors
from pytest_entropy_probe.shown.tables import Row, Step, trouble_of

if TYPE_CHECKING:
    from entropy_probe import ProbeReport, Verdict
    from entropy_probe.page.contents import Judged
    from pytest_entropy_probe.subject import Subject


def details(subjects: Iterable[Subject]) -> dict[str, str]:
    """What the page needs of the evidence of each checkpoint that was measured in this process."""
    from entropy_probe.page.details import details_of

    found: dict[str, str] = {}
    for subject in subjects:
        of = None if subject.report is None else details_of(subject.report)
        if of is not None:
            found[subject.name] = json.dumps(of)
    return found


def write(
    path: Path,
    title: str,
    steps: Sequence[Step],
    rows: Mapping[str, Sequence[Row]],
    sources: Sequence[Mapping[str, str]],
    found: Mapping[str, str],
    notes: Mapping[str, str],
) -> str | None:
    """Write the page of the checkpoints in the order of `steps`. `sources` are reports as JSON, one for each process
    that judged; `found` what `details` gave. The error line, if any."""
    from entropy_probe.page.contents import Checkpoint
    from entropy_probe.page.writing import write_page

    with warnings_are_not_errors():
        checkpoints: list[Checkpoint] = []
        for step in steps:
            name, mine = step.name, rows.get(step.name, ())
            texts = [source[name] for source in sources if name in source]
            reports = [library.read_report(text) for text in texts]
            checkpoints.append(
                Checkpoint(
                    name=name,
                    run=step.run,
                    step=step.step,
                    report=reports[0] if reports else None,
                    details=json.loads(found[name]) if name in found else None,
                    judged=_judged(reports, mine),
                    trouble="" if reports else trouble_of(mine) or step.verdicts,
                    notes=[notes[name]] if name in notes else (),
                )
            )
        try:
            write_page(path, checkpoints, title)
        except ProbeError as error:
            return str(error)
        except Exception as error:  # whatever a drawing library raises, the verdicts stand
            return f"{path}: cannot be drawn ({type(error).__name__}: {error})"
    return None


def _judged(reports: Sequence[ProbeReport], rows: Sequence[Row]) -> list[Judged]:
    """Every criterion that a test asked about, in the order of the tests, with the status that the test ended in."""
    from entropy_probe import Verdict
    from entropy_probe_checks.shown import explained

    of_reports = {v.criterion: v for report in reports for v in report.verdicts}
    verdicts: list[Verdict] = []
    for row in rows:
        if row.criterion in of_reports:
            verdicts.append(of_reports[row.criterion])
        elif row.criterion:  # of golden files
            status = {"xfail": "fail", "xpass": "pass"}.get(row.status, row.status)
            found = {"value": row.value, "limit": row.limit, "hint": row.message, "unit": row.unit}
            of = {"criterion": row.criterion, "family": "golden", "status": status}
            verdicts.append(Verdict.model_validate(of | found))
    known = {row.criterion: row.status for row in rows if row.status in ("xfail", "xpass")}
    return explained(verdicts, known)
