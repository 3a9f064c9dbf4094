"""What is seen: header, tables per checkpoint, report.json, the figure; and the hand-over from xdist workers.

The table is built from the properties of test reports, which reach the controller whichever process ran the test.
Registered only when a checkpoint is given.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Any

import pytest

from pytest_entropy_probe.collect import DROPPED, suite_wanted
from pytest_entropy_probe.fixtures import SUBJECTS, probe_config, warnings_are_not_errors, write_reports
from pytest_entropy_probe.judge import number
from pytest_entropy_probe.settings import SETTINGS

if TYPE_CHECKING:
    from rich.table import Table

HANDED_OVER = "entropy_probe_reports"
WIDTH = 80
_ASCII = str.maketrans({"±": "+/-", "×": "x", "δ": "d", "₁": "1", "Δ": "D"})
_SHOWN = {
    "pass": ("PASS", "green"),
    "fail": ("FAIL", "bold red"),
    "inconclusive": ("INCONCLUSIVE", "yellow"),
    "not_applicable": ("N/A", "dim"),
    "xfail": ("XFAIL", "yellow"),
    "xpass": ("XPASS", "bold red"),
}


@dataclass(frozen=True)
class Row:
    """One criterion's verdict on one checkpoint."""

    checkpoint: str
    criterion: str
    status: str
    value: float | str | None
    limit: float | str | None

    @property
    def margin(self) -> str:
        """How far inside the limit, as a factor: 12x is twelve times better than asked, 0.5x misses it by two."""
        if not isinstance(self.value, float) or not isinstance(self.limit, float):
            return "-"
        if self.limit == 0:
            return "exact" if self.value == 0 and self.status == "pass" else "-"
        above = self.value > self.limit
        is_lower_limit = above == (self.status == "pass")
        above_zero = self.value >= 0 and self.limit > 0
        if not above_zero or not math.isfinite(self.value) or self.status not in ("pass", "fail"):
            return "-"
        if self.value == 0:
            return "0x" if is_lower_limit else "exact"
        factor = self.value / self.limit if is_lower_limit else self.limit / self.value
        return ">9999x" if factor > 9999 else f"{factor:.0f}x" if factor >= 10 else f"{factor:.2g}x"


class Summary:
    """Collects rows as tests end; writes and shows them when the session does."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._rows: dict[str, Row] = {}
        self._states: dict[str, str] = {}
        self._headlines: dict[str, str] = {}
        self._handed_over: list[dict[str, str]] = []
        self._predictions: dict[str, str] = {}
        self._notes: list[str] = []

    def pytest_report_header(self) -> list[str]:
        return [self._what(), *self._in_force(everything=self._config.get_verbosity() > 0)]

    def _in_force(self, *, everything: bool) -> list[str]:
        """The budget and the limits in force with where they come from; or what of them is not the default."""
        from entropy_probe_checks.thresholds import LIMITS, in_force

        config, lines = probe_config(self._config), []
        if everything or config.budget != "standard":
            lines.append(
                f"  budget {config.budget}" + (f", without {', '.join(config.left_out)}" * bool(config.left_out))
            )
        for name, (value, source) in in_force(config.model_dump(mode="json")).items():
            if everything or source != LIMITS[name].source:
                lines.append(f"  limit {name} = {'-' if value is None else number(value)}: {source}")
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
        found: dict[str, Any] = {key: value for key, value in report.user_properties if key.startswith("probe_")}
        checkpoint = found.get("probe_checkpoint")
        if checkpoint is None:
            return
        self._states[checkpoint] = found.get("probe_state", "")
        if "probe_headline" in found:
            self._headlines[checkpoint] = found["probe_headline"]
        if "probe_criterion" in found:
            self._rows[report.nodeid] = Row(
                checkpoint,
                found["probe_criterion"],
                _known(report) or found["probe_status"],
                found.get("probe_value"),
                found.get("probe_limit"),
            )

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        subjects = self._config.stash.get(SUBJECTS, {})
        judged = {subject.name: report for subject in subjects.values() if (report := subject.judged_report())}
        reports = {name: report.model_dump_json() for name, report in judged.items()}
        output: dict[str, Any] | None = getattr(self._config, "workeroutput", None)
        if output is not None:
            output[HANDED_OVER] = reports
            return
        if not self._write([reports, *self._handed_over]) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        output = getattr(node, "workeroutput", {})
        self._handed_over.append(output.get(HANDED_OVER, {}))
        if DROPPED in output and output[DROPPED] not in self._notes:
            self._notes.append(output[DROPPED])

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
                    self._notes += [trouble] if trouble else []
                    succeeded = succeeded and not trouble
                elif path is not None and target.name in self._states:
                    self._notes.append(f"{path}: not written; there is no report of {target.name}")
        return succeeded

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._config.get_verbosity() >= 0 and self._states:
            terminalreporter.write_sep("=", "entropy probe")
            for name in sorted(self._states, key=self._order):
                if self._states[name]:
                    terminalreporter.write_line(f"{name}: {self._states[name]}")
                rows = [row for row in self._rows.values() if row.checkpoint == name]
                if rows:
                    self._show(name, rows, terminalreporter)
        for line in self._notes:
            terminalreporter.write_line(f"entropy-probe: {line}", red=True)

    def _order(self, name: str) -> int:
        names = [target.name for target in self._config.stash[SETTINGS].targets]
        return names.index(name) if name in names else len(names)

    def _show(self, name: str, rows: list[Row], reporter: Any) -> None:
        from rich.console import Console

        text = StringIO()
        console = Console(
            file=text,
            width=min(WIDTH, get_terminal_size((WIDTH, 24)).columns),
            force_terminal=reporter.hasmarkup,
            color_system="standard" if reporter.hasmarkup else None,
            legacy_windows=False,
        )
        plain = _plain()
        console.print(_table(name, rows, plain=plain))
        headline = self._headlines.get(name, "")
        if headline:
            console.out(headline.translate(_ASCII) if plain else headline, highlight=False)
        if name in self._predictions:
            console.out(self._predictions[name], highlight=False)
        for line in text.getvalue().encode(_encoding(), "replace").decode(_encoding()).splitlines():
            reporter.write_line(line.rstrip())


def _encoding() -> str:
    return getattr(sys.stdout, "encoding", None) or "ascii"


def _plain() -> bool:
    return not _encoding().lower().startswith("utf")


def _write_figure(path: Path, texts: list[str]) -> str | None:
    """Draw one checkpoint's figure; `texts` are copies of its report that differ in their verdicts. The error line.

    Whatever a drawing library raises, the verdicts stand.
    """
    from entropy_probe import ProbeError, ProbeReport
    from entropy_probe.plots import save_figure

    with warnings_are_not_errors():
        try:
            save_figure(ProbeReport.model_validate_json(texts[0]), path)
        except ProbeError as error:
            return str(error)
        except Exception as error:
            return f"{path}: cannot be drawn ({type(error).__name__}: {error})"
    return None


def _prediction(text: str, *, plain: bool) -> str:
    """The table of prediction against realisation of a report."""
    from entropy_probe import ProbeReport
    from entropy_probe.plots import text_table

    return text_table(ProbeReport.model_validate_json(text), plain=plain)


def _known(report: pytest.TestReport) -> str | None:
    """`xfail` for a known failure that failed, `xpass` for one that passed."""
    if hasattr(report, "wasxfail") and report.skipped:
        return "xfail"
    return "xpass" if report.failed and str(report.longrepr).startswith("[XPASS(strict)]") else None


def _table(name: str, rows: list[Row], *, plain: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=name, title_justify="left", box=box.ASCII2 if plain else box.ROUNDED, title_style="bold")
    table.add_column("criterion", overflow="fold")
    for heading in ("value", "limit", "margin"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("status", no_wrap=True)
    for row in rows:
        shown, style = _SHOWN.get(row.status, (row.status, ""))
        value, limit = ("-" if cell is None else number(cell) for cell in (row.value, row.limit))
        table.add_row(Text(row.criterion), Text(value), Text(limit), Text(row.margin), Text(shown, style))
    return table
