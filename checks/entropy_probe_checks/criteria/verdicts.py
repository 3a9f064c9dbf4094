"""What a criterion is: a pure function of the report whose docstring says what it measures and what a failure means."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeVar

from scipy.special import ndtri, stdtr

from entropy_probe import ProbeReport, Verdict
from entropy_probe.budgets import Part

Status = Literal["pass", "fail", "inconclusive", "not_applicable"]
Section = TypeVar("Section")

ENOUGH_SURPRISES = 20
"""Of as many rare events a standard error is known to a sixth, 1/√(2·20)."""

_NOT_AT_HAND = (
    "The report was read from a file without its evidence. `entropy-probe audit` reads both."
)


@dataclass(frozen=True)
class Finding:
    """What one criterion found; `detail` is what this report adds to the general explanation. `unseen` is one that was
    not asked because rounding, kinks or a missing derivative hide what it would see. `unit`: of value and limit, where
    they are in one."""

    status: Status
    value: float | None
    limit: float | None
    detail: str = ""
    unseen: bool = False
    unit: str = ""


@dataclass(frozen=True)
class Criterion:
    """Call it with a report to get a `Verdict`.

    The first paragraph of the function's docstring says what is measured (`measures`), the second what a failure
    usually means and what to do (`meaning`); the name of its file is its family. `part` is the part of the measurement
    without which it is not asked, as some budgets leave it out. What `needs_second_moment` is only for Adam, what
    `needs_evidence` of a report that was just made, or read with its evidence.
    """

    judge: Callable[[ProbeReport], Finding]
    part: Part | None = None
    needs_second_moment: bool = False
    needs_evidence: bool = False

    @property
    def name(self) -> str:
        return self.judge.__name__

    @property
    def family(self) -> str:
        return self.judge.__module__.rpartition(".")[2]

    @property
    def measures(self) -> str:
        return self._paragraphs()[0]

    @property
    def meaning(self) -> str:
        return self._paragraphs()[1]

    def _paragraphs(self) -> tuple[str, str]:
        first, second = (inspect.getdoc(self.judge) or "").split("\n\n")
        return " ".join(first.split()), " ".join(second.split())

    def __call__(self, report: ProbeReport) -> Verdict:
        if self.part in report.left_out:
            found = not_applicable(f"The budget {report.config['budget']} leaves this out.")
        elif self.needs_second_moment and report.no_second_moment is not None:
            found = not_applicable(report.no_second_moment)
        elif self.needs_evidence and report.evidence is None:
            found = not_applicable(_NOT_AT_HAND)
        else:
            found = self.judge(report)
        asked = found.status in ("pass", "fail") or not found.detail
        return Verdict(
            criterion=self.name,
            family=self.family,
            status=found.status,
            value=found.value,
            limit=found.limit,
            hint=f"{found.detail} {self.meaning}".strip() if asked else found.detail,
            unseen=found.unseen,
            unit=found.unit,
        )


def part(
    name: Part, *, needs_second_moment: bool = False
) -> Callable[[Callable[[ProbeReport], Finding]], Criterion]:
    """`@part(name)` in place of `@Criterion`: a criterion that is not asked where a budget leaves this part out."""
    return partial(Criterion, part=name, needs_second_moment=needs_second_moment)


def second_moment(judge: Callable[[ProbeReport], Finding]) -> Criterion:
    """`@second_moment` in place of `@Criterion`: a criterion that is not asked where the optimizer is not Adam."""
    return Criterion(judge, needs_second_moment=True)


def from_evidence(
    *, needs_second_moment: bool = False
) -> Callable[[Callable[[ProbeReport], Finding]], Criterion]:
    """`@from_evidence()` in place of `@Criterion`: a criterion that is not asked where no evidence is at hand."""
    return partial(Criterion, needs_second_moment=needs_second_moment, needs_evidence=True)


def needed(section: Section | None) -> Section:
    """What is there whenever the criterion, which needs a second moment or evidence, is asked."""
    assert section is not None
    return section


def at_most(
    value: float,
    limit: float,
    *,
    detail: str = "",
    otherwise: Literal["fail", "inconclusive"] = "fail",
) -> Finding:
    """Pass where value ≤ limit; NaN never passes."""
    return Finding("pass" if value <= limit else otherwise, value, limit, detail)


def at_least(
    value: float,
    limit: float,
    *,
    detail: str = "",
    otherwise: Literal["fail", "inconclusive"] = "fail",
) -> Finding:
    """Pass where value ≥ limit; NaN never passes."""
    return Finding("pass" if value >= limit else otherwise, value, limit, detail)


def not_applicable(detail: str, value: float | None = None, limit: float | None = None) -> Finding:
    """The criterion cannot be asked here."""
    return Finding("not_applicable", value, limit, detail)


def unseen(detail: str) -> Finding:
    """The criterion would see nothing here: rounding, kinks or a missing derivative are in the way. A fault that makes
    it so hides itself; the summary says how often that happened."""
    return Finding("not_applicable", None, None, detail, unseen=True)


def none_drawn(report: ProbeReport) -> Finding:
    """No property was looked at on drawn rows: as it was asked, or a fault."""
    asked = report.config["invariance"]["max_examples"]
    if asked == 0:
        return not_applicable("invariance.max_examples is 0.")
    return at_least(0.0, asked, detail=f"[no case was drawn, and {asked} were asked for]")


def inconclusive(detail: str, value: float | None = None, limit: float | None = None) -> Finding:
    """More data could decide."""
    return Finding("inconclusive", value, limit, detail)


def factor_from_one(ratio: float) -> float:
    """max(ratio, 1/ratio): how many times too large or too small; infinite for zero, negative and NaN ratios."""
    return max(ratio, 1 / ratio) if ratio > 0 and math.isfinite(ratio) else math.inf


def largest(*values: float) -> float:
    """The largest value; NaN if any is NaN."""
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def by_two_ways(difference: float) -> float:
    """A relative difference of two sums in floating point; NaN where it is finer than float64 leaves any but 0, so that
    what it is relative to must be wrong: 1e-24 is eight digits below a rounding of one term."""
    return math.nan if 0 < difference < 1e-24 else difference


def in_se(difference: float | None, se: float | None) -> float:
    """|difference|/SE; 0 where the difference is 0, infinite where the SE is 0, NaN where one is missing or the SE is
    infinite, which would hide any difference."""
    if difference is None or se is None or math.isinf(se):
        return math.nan
    return 0.0 if difference == 0 else abs(difference) / se if se > 0 else math.inf


def of_a_normal(t: float, degrees: int) -> float:
    """As many standard errors of a normal as are as rare as `t` of Student's distribution.

    4 prompts easily give 6.
    """
    # What scipy.stats computes here, without the 0.3 s that its import takes.
    return float(-ndtri(stdtr(degrees, -t)))


def relative(difference: float, scale: float) -> float:
    """difference/scale; the difference itself where the scale is 0, NaN where it is not a number."""
    return difference if scale == 0 else difference / scale


def variance(values: Sequence[float]) -> float:
    """Σ(x − mean)²/(n−1); NaN where one is."""
    mean = math.fsum(values) / len(values)
    return math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1)
