"""What is seen: header, tables, report.json, figures, the HTML page, GitHub's step summary.

The tables are built from the properties of test reports, which reach the controller whichever
process ran the test; xdist's workers hand their reports over. Registered only when a checkpoint is
given.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_entropy_probe import library
from pytest_entropy_probe.collection.collect import DROPPED, suite_wanted
from pytest_entropy_probe.collection.shipped import NODE, withheld
from pytest_entropy_probe.judge import number
from pytest_entropy_probe.names import PAGE
from pytest_entropy_probe.settings import SETTINGS
from pytest_entropy_probe.shown import page
from pytest_entropy_probe.shown.markdown import append, summary
from pytest_entropy_probe.shown.records import records_of
from pytest_entropy_probe.shown.screen import show
from pytest_entropy_probe.shown.skills import skill_table
from pytest_entropy_probe.shown.tables import (
    PLAIN,
    Row,
    Step,
    by_step,
    long_names,
    step_of,
    steps_table,
    trouble_of,
)
from pytest_entropy_probe.shown.terminal import WIDTH, plain, write_table, written
from pytest_entropy_probe.subject import SUBJECTS, probe_config

if TYPE_CHECKING:
    from entropy_probe import ProbeReport
    from entropy_probe.answer import Answer
    from entropy_probe.predictor_skill import RunSkill

HANDED_OVER, NOTES = "entropy_probe_reports", "entropy_probe_notes"
DETAILS = "entropy_probe_details"
NOT_WRITTEN = "entropy_probe_not_written"
NO_CRITERIA = (
    f"{NODE}/test_checkpoint.py::test_loads",
    f"{NODE}/test_checkpoint.py::test_measures",
)
"""Tests that judge no number, and are not among the checks that the answer counts."""


class Summary:
    """Collects rows as tests end; writes and shows them when the session does."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._rows: dict[str, Row] = {}
        self._states: dict[str, str] = {}
        self._headlines: dict[str, str] = {}
        self._answers: dict[str, Answer] = {}
        self._handed_over: list[dict[str, str]] = []
        self._steps: list[Step] = []
        self._skills: list[RunSkill | str] = []
        self._predictions: dict[str, str] = {}
        self._notes: dict[str, str] = {}
        self._details: dict[str, str] = {}
        self._troubles: list[str] = []
        self._no_criteria = 0
        self._failed = False

    def pytest_report_header(self) -> list[str]:
        targets = self._config.stash[SETTINGS].targets
        chosen = [f"  {target.note}" for target in targets if target.note]
        verbose = self._config.get_verbosity() > 0
        return [self._what(), *chosen, *self._recipes(), *self._in_force(everything=verbose)]

    def _recipes(self) -> list[str]:
        """Whose update it is, for up to five checkpoints; under -v every setting with where it is from."""
        settings, config = self._config.stash[SETTINGS], probe_config(self._config)
        lines = []
        for target in settings.targets[:5]:
            first, *rest = library.recipe_lines(target.path, settings, config) or [""]
            if self._config.get_verbosity() <= 0:
                rest = [line for line in rest if line.startswith(("not reproduced", "left unread"))]
            name = f" of {target.name}" if len(settings.targets) > 1 else ""
            shown = [f"recipe{name}: {first}", *(f"  {line}" for line in rest)] if first else []
            for line in shown:
                lines += textwrap.wrap(
                    line,
                    80,
                    initial_indent="  ",
                    subsequent_indent="      ",
                    break_long_words=False,
                )
        return lines

    def _in_force(self, *, everything: bool) -> list[str]:
        """Budget and limits with where they come from; or what of them is not the default."""
        config, lines = probe_config(self._config), []
        if everything or config.budget != "standard":
            without = f", without {', '.join(config.left_out)}" if config.left_out else ""
            lines.append(f"  budget {config.budget}{without}")
        limits = library.limits_in_force(config, everything=everything)
        for name, (value, source) in limits.items():
            lines.append(f"  limit {name} = {'-' if value is None else number(value)}: {source}")
        selected = self._config.getoption("markexpr", "") or ""
        for family in ("gate", "benchmark"):
            if family in selected and (reason := withheld(f"test_{family}", self._config)):
                lines.append(f"  {reason}")
        return lines

    def _what(self) -> str:
        here = self._config.invocation_params.dir
        targets = self._config.stash[SETTINGS].targets
        if len(targets) == 1:
            path = targets[0].path
            shown = path.relative_to(here) if path.is_relative_to(here) else path
            what = f"{targets[0].name} ({shown})"
        else:
            more = ", ..." if len(targets) > 5 else ""
            names = ", ".join(target.name for target in targets[:5])
            what = f"{len(targets)} checkpoints: {names}{more}"
        if not suite_wanted(self._config):
            what += "; a path was given, add probe-checks to run the checks"
        return f"entropy-probe {version('pytest-entropy-probe')}: {what}"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        self._no_criteria += report.passed and report.nodeid.startswith(NO_CRITERIA)
        for found in records_of(report):
            checkpoint = found["probe_checkpoint"]
            self._states[checkpoint] = found.get("probe_state", "")
            if "probe_headline" in found:
                self._headlines[checkpoint] = found["probe_headline"]
            if "probe_criterion" in found or report.failed:
                criterion = found.get("probe_criterion", "")
                self._rows[f"{report.nodeid} {criterion}"] = Row(
                    checkpoint,
                    criterion,
                    _known(report) or found.get("probe_status", "fail"),
                    found.get("probe_value"),
                    found.get("probe_limit"),
                    report.longreprtext if report.failed else "",
                    noisy=found.get("probe_family") == "gate",
                    unseen=bool(found.get("probe_unseen")),
                    unit=found.get("probe_unit", ""),
                    family=found.get("probe_family", ""),
                )

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None]:
        """Innermost of the wrappers: a report that another plugin cannot write, JUnit's say, ends in one line, and what
        was measured is written and shown all the same."""
        try:
            yield
        except OSError as error:
            what = error.filename or "a report of another plugin"
            self._fail(f"{what}: cannot be written ({error.strerror})")
        self._finish()
        if self._failed and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _finish(self) -> None:
        subjects = self._config.stash.get(SUBJECTS, {}).values()
        judged = {subject.name: subject.judged_report() for subject in subjects}
        reports = {name: report.model_dump_json() for name, report in judged.items() if report}
        notes = {subject.name: said for subject in subjects if (said := subject.said())}
        not_written = [subject.not_written for subject in subjects if subject.not_written]
        html = self._config.stash[SETTINGS].html_path
        details = {} if html is None else page.details(subjects)
        output: dict[str, Any] | None = getattr(self._config, "workeroutput", None)
        if output is not None:
            output[HANDED_OVER], output[NOTES], output[NOT_WRITTEN] = reports, notes, not_written
            output[DETAILS] = details
            return
        self._notes |= notes
        self._details |= details
        for trouble in not_written:
            self._fail(trouble)
        sources = [reports, *self._handed_over]
        self._write(sources)
        self._compare(sources)
        self._log(sources)
        rows = {step.name: self._rows_of(step.name) for step in self._steps}
        if html is not None and self._steps:
            of = (self._steps, rows, sources, self._details, self._notes)
            self._fail(page.write(html, self._title(), *of))
        if os.environ.get(PAGE) and self._steps:
            notes = [*self._said(), *self._troubles]
            texts = (self._headlines, self._answers, notes, self._skills)
            text = summary(self._what(), self._steps, rows, *texts)
            self._fail(append(Path(os.environ[PAGE]), text))

    def _title(self) -> str:
        names = [step.name for step in self._steps]
        return names[0] if len(names) == 1 else f"{len(names)} checkpoints"

    def _complain(self, trouble: str | None) -> None:
        if trouble:
            self._troubles.append(trouble)

    def _fail(self, trouble: str | None) -> None:
        """What was asked for and could not be written makes the run fail."""
        self._complain(trouble)
        self._failed |= bool(trouble)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        output = getattr(node, "workeroutput", {})
        self._handed_over.append(output.get(HANDED_OVER, {}))
        self._notes |= output.get(NOTES, {})
        self._details |= output.get(DETAILS, {})
        for trouble in output.get(NOT_WRITTEN, []):
            self._fail(trouble)
        if output.get(DROPPED) not in self._troubles:
            self._complain(output.get(DROPPED))

    def _write(self, sources: list[dict[str, str]]) -> None:
        """Write report and figure of every checkpoint that was measured."""
        settings = self._config.stash[SETTINGS]
        for target in settings.targets:
            texts = [source[target.name] for source in sources if target.name in source]
            if texts and self._config.get_verbosity() > 0:
                self._predictions[target.name] = library.prediction(texts[0], plain=plain())
            for path, write in (
                (settings.json_file(target.name), library.write_reports),
                (settings.plot_file(target.name), library.write_figure),
            ):
                if path is not None and texts:
                    self._fail(write(path, texts))
                elif path is not None and target.name in self._states:
                    self._complain(f"{path}: not written; there is no report of {target.name}")

    def _compare(self, sources: list[dict[str, str]]) -> None:
        """Put the checkpoints of the run in the order of their steps, and draw them where a figure is asked for."""
        settings = self._config.stash[SETTINGS]
        reports: dict[str, ProbeReport | None] = {}
        for target in settings.targets:
            if target.name not in self._states:
                continue
            texts = (source[target.name] for source in sources if target.name in source)
            text, rows = next(texts, None), self._rows_of(target.name)
            report = reports[target.name] = None if text is None else library.read_report(text)
            run, state = str(target.path.parent), self._states[target.name]
            if report is not None or state:
                judged = [
                    (row.criterion, row.status, row.noisy or not row.criterion)
                    for row in rows
                    if row.criterion or row.status == "fail"
                ]
                why = trouble_of(rows) or state
                self._answers[target.name] = library.answer(report, judged, why)
            self._steps.append(step_of(target.name, run, report, rows, state))
        self._steps = by_step(self._steps)
        measured: list[tuple[str, int | None, ProbeReport]] = []
        for step in self._steps:
            if (report := reports[step.name]) is not None:
                measured.append((step.run, step.step, report))
        self._skills = library.skills_of_runs(measured)
        if settings.plot_path is not None and len(settings.targets) > 1 and measured:
            self._fail(library.write_steps(settings.plot_path / "by_step.png", measured))

    def _log(self, sources: list[dict[str, str]]) -> None:
        """Figures of every checkpoint that was measured, with all its verdicts."""
        settings, measured = self._config.stash[SETTINGS], []
        for step in self._steps if settings.log else ():
            texts = [source[step.name] for source in sources if step.name in source]
            if texts:
                report = library.whole_report(texts)
                measured.append((step.run, step.name, step.step, report))
        if measured:
            self._fail(library.log_figures(settings, measured))

    def _said(self) -> list[str]:
        """The notes, one line for all checkpoints that share one."""
        names: dict[str, list[str]] = {}
        for name, text in self._notes.items():
            names.setdefault(text, []).append(name)
        shared = {text: f"{len(of)} checkpoints" for text, of in names.items() if len(of) > 1}
        return [f"{shared.get(text, of[0])}: {text}" for text, of in names.items()]

    def _more_passed(self) -> str:
        """Where all checks passed, why pytest counts more tests than the answer counts checks."""
        of_all = self._no_criteria == len(NO_CRITERIA) * len(self._states)
        if not of_all or any(row.status not in PLAIN for row in self._rows.values()):
            return ""
        which = "checkpoints load" if len(self._states) > 1 else "checkpoint loads"
        return f"{self._no_criteria} more tests passed: the {which} and can be measured"

    def _rows_of(self, name: str) -> list[Row]:
        return [row for row in self._rows.values() if row.checkpoint == name]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The criteria of every checkpoint, then the run.

        Of several checkpoints, the criteria that did not pass; all of them under -v.
        """
        if self._config.get_verbosity() >= 0 and self._states:
            terminalreporter.write_sep("=", "entropy probe")
            in_full = len(self._states) == 1 or self._config.get_verbosity() > 0
            for name in sorted(self._states, key=self._order):
                show(
                    terminalreporter,
                    name,
                    self._answers.get(name),
                    self._headlines.get(name, ""),
                    self._rows_of(name),
                    prediction=self._predictions.get(name, ""),
                    in_full=in_full,
                    verbose=self._config.get_verbosity() > 0,
                )
            if len(self._steps) > 1:
                table = steps_table(self._steps, plain=plain())
                above = long_names(self._steps, plain=plain())
                write_table(terminalreporter, table, above=above, width=WIDTH)
            for skill in self._skills:
                if isinstance(skill, str):
                    terminalreporter.write_line(skill)
                else:
                    terminalreporter.write_line(skill.title, bold=True)
                    table = skill_table(skill, plain=plain())
                    write_table(terminalreporter, table, width=WIDTH)
                    for line in textwrap.wrap(skill.note, WIDTH):
                        terminalreporter.write_line(written(line))
            if more := self._more_passed():
                terminalreporter.write_line(f"entropy-probe: {more}")
        for line in self._said():
            terminalreporter.write_line(f"entropy-probe: {line}")
        for line in self._troubles:
            terminalreporter.write_line(f"entropy-probe: {line}", red=True)

    def _order(self, name: str) -> int:
        names = [target.name for target in self._config.stash[SETTINGS].targets]
        return names.index(name) if name in names else len(names)


def _known(report: pytest.TestReport) -> str | None:
    """`xfail` for a known failure that failed, `xpass` for one that passed."""
    if hasattr(report, "wasxfail") and report.skipped:
        return "xfail"
    strict = report.failed and str(report.longrepr).startswith("[XPASS(strict)]")
    return "xpass" if strict else None
