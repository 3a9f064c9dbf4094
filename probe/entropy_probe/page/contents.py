"""What stands on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from entropy_probe.report import ProbeReport

BAD = ("fail", "xpass")
OPEN = ("inconclusive",)


@dataclass(frozen=True)
class Judged:
    """One criterion: its verdict, and what is known of it in general. `hint` is what the verdict says of this report,
    `failure` what a failure usually means and what to do. `status` may also be `xfail` or `xpass`, a known failure that
    failed or passed. `margin` is how far inside its limit the value is, as the terminal writes it;
    `steps` are what to do, the first thing first."""

    name: str
    family: str
    status: str
    value: float | str | None
    limit: float | str | None
    margin: str
    measures: str
    source: str
    failure: str
    hint: str
    unit: str = ""
    steps: Sequence[str] = ()


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of the run. Without a report, `trouble` says why there is none. `details` is from `details_of`."""

    name: str
    run: str
    step: int | None
    report: ProbeReport | None
    details: Mapping[str, Any] | None = None
    judged: Sequence[Judged] = ()
    trouble: str = ""
    notes: Sequence[str] = field(default=())
