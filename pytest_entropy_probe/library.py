"""The calls into `entropy_probe`.

Each imports what it needs when it is made: torch is imported by those alone that load, prepare,
measure or draw.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from entropy_probe import ProbeError

if TYPE_CHECKING:
    from entropy_probe import Checkpoint, ProbeConfig, ProbeReport
    from entropy_probe.answer import Answer
    from entropy_probe.pipeline.prepared import Prepared
    from entropy_probe.predictor_skill import RunSkill
    from entropy_probe.processes.world import World
    from entropy_probe.report import BaselineSection
    from pytest_entropy_probe.settings import Settings

    Progress = Callable[[str, int, int], None]


@contextmanager
def warnings_are_not_errors() -> Iterator[None]:
    """The user's warning filters, with `error` read as `default`.

    A library's warning is no verdict on a checkpoint. Deprecations inside the libraries that are
    measured with are not the user's to act on, and are not shown.
    """
    with warnings.catch_warnings():
        read_as = {"error": "default"}
        filters: Any = [(read_as.get(action, action), *rest) for action, *rest in warnings.filters]
        warnings.resetwarnings()
        warnings.filters.extend(filters)  # pyright: ignore[reportAttributeAccessIssue]
        for category in (DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield


@contextmanager
def usage_errors(option: str = "") -> Iterator[None]:
    """What the library finds wrong with an option, or the configuration, ends with exit code 4."""
    try:
        yield
    except ProbeError as error:
        raise pytest.UsageError(f"{option}: {error}" if option else str(error)) from error


def demo_path() -> Path:
    """The folder behind the name `demo`."""
    from entropy_probe.demo import checkpoint_path

    with usage_errors():
        return checkpoint_path()


def newest_checkpoint(path: Path) -> tuple[Path, str]:
    """The checkpoint itself, or the newest of a run, with a note that says so.

    What cannot be told is left for loading to complain about.
    """
    from entropy_probe.layout import find_layout

    try:
        layout = find_layout(path)
    except ProbeError:
        return path, ""
    return layout.folder, layout.note


def read_config(settings: Settings) -> ProbeConfig:
    """The resolved configuration, with limits that criteria know."""
    from entropy_probe import ProbeConfig
    from entropy_probe_checks.thresholds import require_known

    with usage_errors(), warnings_are_not_errors():
        config = ProbeConfig.load(settings.config_file, settings.pyproject, settings.overrides)
        has_baseline = settings.baseline is not None
        require_known(config.limits, config.allow_inconclusive, has_baseline=has_baseline)
    return config


def require_device(config: ProbeConfig) -> None:
    """Say before anything is loaded that the device is not there; torch is not imported for the CPU."""
    if config.device != "cpu":
        from entropy_probe.model.device import usable_device

        with usage_errors():
            usable_device(config.device)


def plan_of(path: Path, settings: Settings, config: ProbeConfig) -> tuple[str, bool]:
    """What `entropy-probe plan` says of a checkpoint, and whether it fits. Nothing is loaded."""
    from entropy_probe.cost.plan import plan
    from entropy_probe.options import PROMPT_TOKENS

    with usage_errors(), warnings_are_not_errors():
        found = plan(path, config, PROMPT_TOKENS, settings.base_model)
    return found.text(), found.fits


def recipe_lines(path: Path, settings: Settings, config: ProbeConfig) -> list[str]:
    """Whose update the checkpoint's is, as far as its files tell without loading it."""
    from entropy_probe.layout import find_layout
    from entropy_probe.trainers.resolved import resolved

    samples = settings.rollouts is None and settings.update_rollouts is None
    try:
        known = find_layout(path).is_adapter or config.reference_model is not None
        _, recipe = resolved(config, path, has_reference=known, samples_update=samples)
    except (ProbeError, OSError):  # found again, and said, where it is measured
        return []
    return recipe.lines()


def answer(
    report: ProbeReport | None, judged: Sequence[tuple[str, str, bool]], state: str
) -> Answer:
    """What a report and its verdicts, (criterion, status, whether it is a gate), come to."""
    from entropy_probe import answer

    return answer.answer(report, [answer.Checked(*one) for one in judged], state)


def read_baseline(path: Path) -> BaselineSection:
    """What gates compare with."""
    from entropy_probe import ProbeReport
    from entropy_probe_checks.criteria.gate import baseline_of

    with usage_errors("--probe-baseline"), warnings_are_not_errors():
        return baseline_of(ProbeReport.from_json(path))


def load(path: Path, settings: Settings, config: ProbeConfig, world: World) -> Checkpoint:
    from entropy_probe.loading import load_configured

    with world.together():
        world.at("load")
        return load_configured(path, settings.base_model, config, world)


def prepare(
    checkpoint: Checkpoint,
    settings: Settings,
    config: ProbeConfig,
    world: World,
    progress: Progress,
) -> Prepared:
    from entropy_probe.pipeline import prepared

    return prepared.prepare(
        checkpoint,
        config,
        settings.rollouts,
        settings.update_rollouts,
        prompts=settings.prompts,
        next_checkpoint=settings.next,
        progress=progress,
        world=world,
    )


def measure(prepared: Prepared, name: str, progress: Progress) -> ProbeReport | None:
    """The report; `None` in a process that is not rank 0."""
    from entropy_probe import run

    return run.measure(prepared, name=name, progress=progress)


def read_report(text: str) -> ProbeReport:
    from entropy_probe import ProbeReport

    return ProbeReport.model_validate_json(text)


def whole_report(texts: Sequence[str]) -> ProbeReport:
    """The report of which `texts` are copies that differ in their verdicts, with all of these."""
    reports = [read_report(text) for text in texts]
    verdicts = {v.criterion: v for report in reports for v in report.verdicts}
    return reports[0].model_copy(update={"verdicts": list(verdicts.values())})


def write_evidence(folder: Path, name: str, report: ProbeReport) -> str:
    """The error line, if any."""
    from entropy_probe.evidence import evidence_file

    try:
        if report.evidence is not None:
            report.evidence.to_file(evidence_file(folder, name))
    except ProbeError as error:
        return f"the evidence is not written: {error}"
    return ""


def write_reports(path: Path, texts: Sequence[str]) -> str | None:
    """Write one checkpoint's report; `texts` are copies of it that differ in their verdicts.

    The error line, if any.
    """
    with warnings_are_not_errors():
        try:
            whole_report(texts).to_json(path)
        except ProbeError as error:
            return str(error)
    return None


def write_figure(path: Path, texts: Sequence[str]) -> str | None:
    """Draw one checkpoint's figure; `texts` are as in `write_reports`. The error line, if any."""
    from entropy_probe.plots import save_figure

    return _draw(lambda: save_figure(read_report(texts[0]), path), path)


def write_steps(path: Path, series: Sequence[tuple[str, int | None, ProbeReport]]) -> str | None:
    """Draw the checkpoints (run, step, report) by step. The error line, if any."""
    from entropy_probe.plots import save_steps

    return _draw(lambda: save_steps(list(series), path), path)


def log_figures(
    settings: Settings, series: Sequence[tuple[str, str, int | None, ProbeReport]]
) -> str | None:
    """Log the checkpoints (run, name, step, report) where --probe-log says. The error line, if any."""
    from entropy_probe.integrations.trackers import Logged, log_all

    with warnings_are_not_errors():
        try:
            log_all(settings.log, [Logged(*one) for one in series])
        except ProbeError as error:
            return str(error)
    return None


def skills_of_runs(
    series: Sequence[tuple[str, int | None, ProbeReport]],
) -> list[RunSkill | str]:
    """The predictors of each run of four checkpoints or more against its changes; or why there is no telling."""
    from entropy_probe.predictor_skill import FEWEST, run_skill

    runs: dict[str, list[ProbeReport]] = {}
    for run, step, report in series:
        if step is not None:
            runs.setdefault(run, []).append(report)
    found: list[RunSkill | str] = []
    for reports in runs.values():
        try:
            found += [run_skill(reports)] if len(reports) >= FEWEST else []
        except ProbeError as error:
            found.append(str(error))
    return found


def _draw(draw: Callable[[], None], path: Path) -> str | None:
    """The error line: whatever a drawing library raises, the verdicts stand."""
    with warnings_are_not_errors():
        try:
            draw()
        except ProbeError as error:
            return str(error)
        except Exception as error:
            return f"{path}: cannot be drawn ({type(error).__name__}: {error})"
    return None


def prediction(text: str, *, plain: bool) -> str:
    """The table of prediction against realisation of a report."""
    from entropy_probe.plots import text_table

    return text_table(read_report(text), plain=plain)


def limits_in_force(
    config: ProbeConfig,
    *,
    everything: bool,
) -> Mapping[str, tuple[float | str | None, str]]:
    """Limit → value and where it comes from; or those alone that are not the default."""
    from entropy_probe_checks.thresholds import LIMITS, in_force

    return {
        name: (value, source)
        for name, (value, source) in in_force(config.model_dump(mode="json")).items()
        if everything or name not in LIMITS or source != LIMITS[name].source
    }
