"""What is seen: header, tables, report.json, figures, GitHub's step summary; and the hand-over from xdist workers.

The tables are built from the properties of test reports, which reach the controller whichever process ran the test.
Registered only when a checkpoint is given.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

import pytest

from pytest_entropy_probe.collect import DROPPED, suite_wanted, withheld
from pytest_entropy_probe.fixtures import SUBJECTS, probe_config, warnings_are_not_errors, write_reports
from pytest_entropy_probe.judge import number
from pytest_entropy_probe.markdown import VARIABLE, append, summary
from pytest_entropy_probe.settings import SETTINGS
from pytest_entropy_probe.tables import Row, Step, by_step, criteria_table, step_of, steps_table

if TYPE_CHECKING:
    from rich.table import Table

    from entropy_probe import ProbeReport

HANDED_OVER, NOTES = "entropy_probe_reports", "entropy_probe_notes"
WIDTH = 80
_ASCII = str.maketrans({"±": "+/-", "×": "x", "δ": "d", "₁": "1", "Δ": "D"})


class Summary:
    """Collects rows as tests end; writes and shows them when the session does."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._rows: dict[str, Row] = {}
        self._states: dict[str, str] = {}
        self._headlines: dict[str, str] = {}
        self._handed_over: list[dict[str, str]] = []
        self._steps: list[Step] = []
        self._predictions: dict[str, str] = {}
        self._notes: dict[str, str] = {}
        self._troubles: list[str] = []

    def pytest_report_header(self) -> list[str]:
        chosen = [f"  {target.note}" for target in self._config.stash[SETTINGS].targets if target.note]
        return [self._what(), *chosen, *self._in_force(everything=self._config.get_verbosity() > 0)]

    def _in_force(self, *, everything: bool) -> list[str]:
        """The budget and the limits in force with where they come from; or what of them is not the default."""
        from entropy_probe_checks.thresholds import LIMITS, in_force

        config, lines = probe_config(self._config), []
        if everything or config.budget != "standard":
            lines.append(
                f"  budget {config.budget}" + (f", without {', '.join(config.left_out)}" * bool(config.left_out))
            )
        for name, (value, source) in in_force(config.model_dump(mode="json")).items():
            if everything or name not in LIMITS or source != LIMITS[name].source:
                lines.append(f"  limit {name} = {'-' if value is None else number(value)}: {source}")
        selected = self._config.getoption("markexpr", "") or ""
        asked_for = [module for module in ("test_gate", "test_benchmark") if module.removeprefix("test_") in selected]
        lines += [f"  {reason}" for module in asked_for if (reason := withheld(module, self._config))]
        return lines

    def _what(self) -> str:
        here = self._config.invocation_params.dir
        targets = self._config.stash[SETTINGS].targets
        if len(targets) == 1:
            path = targets[0].path
            what = f"{targets[0].name} ({path.relative_to(here) if path.is_relative_to(here) else path})"
        else:
            more = ", ..." if len(targets) > 5 else ""
            what = f"{len(targets)} checkpoints: {', '.join(target.name for target in targets[:5])}{more}"
        off = "" if suite_wanted(self._config) else "; a path was given, add probe-checks to run the checks"
        return f"entropy-probe {version('pytest-entropy-probe')}: {what}{off}"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call":
            return
        for found in _records(report):
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
                )

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        subjects = self._config.stash.get(SUBJECTS, {})
        judged = {subject.name: report for subject in subjects.values() if (report := subject.judged_report())}
        reports = {name: report.model_dump_json() for name, report in judged.items()}
        notes = {subject.name: said for subject in subjects.values() if (said := subject.said())}
        output: dict[str, Any] | None = getattr(self._config, "workeroutput", None)
        if output is not None:
            output[HANDED_OVER], output[NOTES] = reports, notes
            return
        self._notes |= notes
        sources = [reports, *self._handed_over]
        written = [self._write(sources), self._compare(sources)]
        if not all(written) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if os.environ.get(VARIABLE) and self._steps:
            rows = {step.name: self._rows_of(step.name) for step in self._steps}
            text = summary(self._what(), self._steps, rows, self._headlines, [*self._said(), *self._troubles])
            trouble = append(Path(os.environ[VARIABLE]), text)
            self._troubles += [trouble] if trouble else []

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        output = getattr(node, "workeroutput", {})
        self._handed_over.append(output.get(HANDED_OVER, {}))
        self._notes |= output.get(NOTES, {})
        if DROPPED in output and output[DROPPED] not in self._troubles:
            self._troubles.append(output[DROPPED])

    def _write(self, sources: list[dict[str, str]]) -> bool:
        """Write report and figure of every checkpoint that was measured; whether all that was tried succeeded."""
        settings, succeeded = self._config.stash[SETTINGS], True
        for target in settings.targets:
            texts = [source[target.name] for source in sources if target.name in source]
            if texts and self._config.get_verbosity() > 0:
                self._predictions[target.name] = _prediction(texts[0], plain=_plain())
            for path, write in (
                (settings.json_file(target.name), write_reports),
                (settings.plot_file(target.name), _write_figure),
            ):
                if path is not None and texts:
                    trouble = write(path, texts)
                    self._troubles += [trouble] if trouble else []
                    succeeded = succeeded and not trouble
                elif path is not None and target.name in self._states:
                    self._troubles.append(f"{path}: not written; there is no report of {target.name}")
        return succeeded

    def _compare(self, sources: list[dict[str, str]]) -> bool:
        """Put the checkpoints of the run in the order of their steps; whether their figure, if any, was drawn."""
        settings, reports = self._config.stash[SETTINGS], {}
        for target in settings.targets:
            if target.name in self._states:
                texts = (source[target.name] for source in sources if target.name in source)
                text, rows = next(texts, None), self._rows_of(target.name)
                report = reports[target.name] = None if text is None else _read(text)
                run = str(target.path.parent)
                self._steps.append(step_of(target.name, run, report, rows, self._states[target.name]))
        self._steps = by_step(self._steps)
        measured = {step: report for step in self._steps if (report := reports[step.name]) is not None}
        if settings.plot_path is None or len(settings.targets) == 1 or not measured:
            return True
        from entropy_probe.plots import save_steps

        series = [(step.run, step.step, report) for step, report in measured.items()]
        trouble = _draw(lambda path: save_steps(series, path), settings.plot_path / "by_step.png")
        self._troubles += [trouble] if trouble else []
        return not trouble

    def _said(self) -> list[str]:
        """The notes, one line for all checkpoints that share one."""
        names = {text: [name for name, said in self._notes.items() if said == text] for text in self._notes.values()}
        return [f"{of[0] if len(of) == 1 else f'{len(of)} checkpoints'}: {text}" for text, of in names.items()]

    def _rows_of(self, name: str) -> list[Row]:
        return [row for row in self._rows.values() if row.checkpoint == name]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The criteria of every checkpoint; of several, those that did not pass (all under -v), then the run."""
        if self._config.get_verbosity() >= 0 and self._states:
            terminalreporter.write_sep("=", "entropy probe")
            in_full = len(self._states) == 1 or self._config.get_verbosity() > 0
            for name in sorted(self._states, key=self._order):
                if self._states[name]:
                    terminalreporter.write_line(f"{name}: {self._states[name]}")
                rows = [row for row in self._rows_of(name) if row.criterion]
                shown = rows if in_full else [row for row in rows if row.status not in ("pass", "not_applicable")]
                if shown:
                    plain = _plain()
                    below = (self._headlines.get(name, ""), self._predictions.get(name, ""))
                    self._print(terminalreporter, criteria_table(name, shown, plain=plain), below if in_full else ())
            if len(self._steps) > 1:
                self._print(terminalreporter, steps_table(self._steps, plain=_plain()), width=WIDTH)
        for line in self._said():
            terminalreporter.write_line(f"entropy-probe: {line}")
        for line in self._troubles:
            terminalreporter.write_line(f"entropy-probe: {line}", red=True)

    def _order(self, name: str) -> int:
        names = [target.name for target in self._config.stash[SETTINGS].targets]
        return names.index(name) if name in names else len(names)

    def _print(self, reporter: Any, table: Table, below: Iterable[str] = (), *, width: int | None = None) -> None:
        """As wide as the terminal, 80 columns at most; or `width`, for what loses its words in less."""
        from rich.console import Console

        text = StringIO()
        console = Console(
            file=text,
            width=width or min(WIDTH, get_terminal_size((WIDTH, 24)).columns),
            force_terminal=reporter.hasmarkup,
            color_system="standard" if reporter.hasmarkup else None,
            legacy_windows=False,
        )
        console.print(table)
        for lines in filter(None, below):
            console.out(lines.translate(_ASCII) if _plain() else lines, highlight=False)
        for line in text.getvalue().encode(_encoding(), "replace").decode(_encoding()).splitlines():
            reporter.write_line(line.rstrip())


def _records(report: pytest.TestReport) -> list[dict[str, Any]]:
    """What the test recorded, one table a verdict: each begins with the checkpoint."""
    records: list[dict[str, Any]] = []
    for key, value in report.user_properties:
        if key == "probe_checkpoint":
            records.append({})
        if key.startswith("probe_") and records:
            records[-1][key] = value
    return records


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "ascii"


def _plain() -> bool:
    return not _encoding().lower().startswith("utf")


def _read(text: str) -> ProbeReport:
    from entropy_probe import ProbeReport

    return ProbeReport.model_validate_json(text)


def _write_figure(path: Path, texts: list[str]) -> str | None:
    """Draw one checkpoint's figure; `texts` are copies of its report that differ in their verdicts. The error line."""
    from entropy_probe.plots import save_figure

    return _draw(lambda path: save_figure(_read(texts[0]), path), path)


def _draw(draw: Callable[[Path], None], path: Path) -> str | None:
    """Draw into `path`. The error line: whatever a drawing library raises, the verdicts stand."""
    from entropy_probe import ProbeError

    with warnings_are_not_errors():
        try:
            draw(path)
        except ProbeError as error:
            return str(error)
        except Exception as error:
            return f"{path}: cannot be drawn ({type(error).__name__}: {error})"
    return None


def _prediction(text: str, *, plain: bool) -> str:
    """The table of prediction against realisation of a report."""
    from entropy_probe.plots import text_table

    return text_table(_read(text), plain=plain)


def _known(report: pytest.TestReport) -> str | None:
    """`xfail` for a known failure that failed, `xpass` for one that passed."""
    if hasattr(report, "wasxfail") and report.skipped:
        return "xfail"
    return "xpass" if report.failed and str(report.longrepr).startswith("[XPASS(strict)]") else None
