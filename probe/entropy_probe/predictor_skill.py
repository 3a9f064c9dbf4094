"""Predictors against the changes that a run itself made, from the reports of its checkpoints.

from entropy_probe import ProbeReport
from entropy_probe.predictor_skill import run_skill

run = run_skill([ProbeReport.from_json(path) for path in paths])
run.skills["probe"].skill
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from entropy_probe.differences import entropy_per_token
from entropy_probe.errors import ProbeError
from entropy_probe.estimators.skill import Skill, skill
from entropy_probe.report import ProbeReport

FEWEST = 4
"""Checkpoints that a skill needs: two changes that are scored, and one before them."""

HEADINGS = ("predictor", "right signs", "rank", "skill", "kappa")


def _next_step(report: ProbeReport) -> float | None:
    return None if report.next_step is None else report.next_step.predicted_per_token


PREDICTORS: dict[str, tuple[str, Callable[[ProbeReport], float | None], bool]] = {
    "probe": ("the probe's next step", _next_step, False),
    "of_entropies": ("its part of entropies", lambda r: r.predictors.of_entropies, False),
    "of_visits": ("its part of visits", lambda r: r.predictors.of_visits, False),
    "cov_logp_advantage": ("-Cov(log p, A)", lambda r: r.predictors.cov_logp_advantage, True),
    "steer": ("STEER", lambda r: r.predictors.steer, True),
    "wang": ("Wang et al.", lambda r: r.predictors.wang, True),
}
"""Name → what it is called in a table, its figure, and whether κ is fitted to it at any distance."""
PERSISTENCE = "persistence"


@dataclass(frozen=True)
class RunSkill:
    """Checkpoints at `steps`, `apart` of one another; the `changes` of the entropy per token from each to the next with
    their standard `errors` (nats), and how every predictor did, by name.

    A predictor whose figure a report lacks (as without a second moment, or at top_p < 1) is not among the `skills`.
    """

    steps: list[int]
    apart: int
    changes: list[float]
    errors: list[float]
    skills: dict[str, Skill]

    @property
    def title(self) -> str:
        """What the table is of."""
        scored = len(self.changes) - 1
        each = "1 step" if self.apart == 1 else f"{self.apart} steps"
        return f"predictors against the run: {scored} changes of H/token by {each}, to step {self.steps[-1]}"

    @property
    def note(self) -> str:
        """What was fitted."""
        if self.apart == 1:
            return "kappa is fitted on earlier changes only; nothing is fitted for the probe"
        return (
            f"{self.apart} steps lie between, and the probe predicts one: kappa is fitted for every predictor, on "
            "earlier changes only. Compare signs and ranks"
        )

    def rows(self) -> list[tuple[str, ...]]:
        """One a predictor, under `HEADINGS`."""
        return [
            (
                PREDICTORS[name][0] if name in PREDICTORS else "the last change again",
                f"{of.signs}/{of.count}",
                "-" if of.rank is None else f"{of.rank:+.2f}",
                "-" if of.skill is None else f"{of.skill:+.2f}",
                "-" if of.kappa is None else f"{of.kappa:+.2g}",
            )
            for name, of in self.skills.items()
        ]


def run_skill(reports: Sequence[ProbeReport]) -> RunSkill:
    """Every predictor of the reports against ΔH per token from each checkpoint to the next, H as the reports have it.

    κ is fitted on earlier changes, without intercept, to what is not in nats. The probe's own figures are those of one
    step. Where more lie between two checkpoints they are no prediction of the whole change: κ is fitted to them too.
    They are measured on the earlier report's responses, as the change is: their skill may come out above 1.

    Raises `ProbeError` for fewer than four checkpoints, for one without a step, for steps that are not equally far
    apart, for responses of one checkpoint that serve another, and for different settings of generation.
    """
    ordered = sorted(reports, key=_step)
    steps = [_step(report) for report in ordered]
    what = "predictors against a run"
    if len(ordered) < FEWEST:
        raise ProbeError(what, f"{len(ordered)} checkpoints", f"give {FEWEST} of one run, or more")
    pairs = list(itertools.pairwise(ordered))
    gaps = sorted({b - a for a, b in itertools.pairwise(steps)})
    if len(gaps) > 1 or gaps[0] < 1:
        apart = ", ".join(map(str, gaps))
        raise ProbeError(
            what, f"the checkpoints are {apart} steps apart", "give some at one distance"
        )
    if any(a.config["generation"] != b.config["generation"] for a, b in pairs):
        raise ProbeError(what, "the reports differ in `generation`", "measure all with one setting")
    if any(_same_file(a, b) for a, b in pairs):
        problem = "two checkpoints were measured on the responses of one file"
        raise ProbeError(what, problem, "let each sample its own, or give each its own rollouts")
    found = [entropy_per_token(a, b) for a, b in pairs]
    changes, errors = [one.value for one in found], [one.se for one in found]
    skills = {}
    for name, (_, figure, fit) in PREDICTORS.items():
        known = [value for a, _ in pairs if (value := figure(a)) is not None]
        if len(known) == len(pairs):
            skills[name] = skill(known, changes, errors, fit=fit or gaps[0] > 1)
    skills[PERSISTENCE] = skill([0.0, *changes[:-1]], changes, errors, fit=False)
    return RunSkill(steps, gaps[0], changes, errors, skills)


def _step(report: ProbeReport) -> int:
    step = report.checkpoint.global_step
    if step is None:
        step = report.checkpoint.optimizer.step
    if step is None:
        where = report.checkpoint.name
        raise ProbeError(where, "the report has no step", "leave it out")
    return step


def _same_file(one: ProbeReport, other: ProbeReport) -> bool:
    """Sampled responses may come out the same: the noise of one seed is, and a step may leave every choice."""
    given = one.batch.given != "sampled"
    return given and one.batch.fingerprint == other.batch.fingerprint
