"""The watcher: looks at the folders of runs, measures each new complete checkpoint once, and keeps what it found.

while it is not ended:
    look at every checkpoint's folder;  one is settled when it did not change for an interval, and is whole
    measure the oldest settled one that the state has no line of, in a process of its own
    append its line, show it, log it, post it
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from entropy_probe.answer import answer, checked
from entropy_probe.differences import entropy_per_token
from entropy_probe.errors import ConfigError, ProbeError
from entropy_probe.integrations.figures import figures
from entropy_probe.integrations.trackers import Logged, Trackers
from entropy_probe.layout import OPTIMIZER_FILES, listed, numbered, one_level_below
from entropy_probe.report import ProbeReport
from entropy_probe.watching import measuring, webhook
from entropy_probe.watching.complete import Seen, fingerprint, what_is_missing
from entropy_probe.watching.screen import Screen, Shown
from entropy_probe.watching.state import NAME, Change, Fidelity, Record, State

_TICK = 0.2
"""Seconds between two looks at a running measurement."""
_TRIES = 2
"""How often a measurement is begun that ends in a crash."""


@dataclass(frozen=True)
class Plan:
    """How it is watched. `options` are pytest's, for every measurement; `interval` in seconds."""

    options: Sequence[str] = ()
    interval: float = 30.0
    once: bool = False
    exit_first: bool = False
    with_next: bool = False
    page: Path | None = None
    webhook: str | None = None


@dataclass
class _Folder:
    """A checkpoint's folder: what was seen in it, since when, and what is known of it as it is."""

    step: int
    path: Path
    seen: Seen
    since: float
    digest: str = ""
    missing: str = ""
    tries: int = 0

    @property
    def is_settled(self) -> bool:
        return bool(self.digest)


@dataclass
class Run:
    """A training run's folder, what the state says of it, and the checkpoints that are there now."""

    path: Path
    state: State
    folders: dict[Path, _Folder] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, state: Path | None = None) -> Run:
        """Raises `ConfigError` for what is no run's folder, or another watcher's."""
        place = path.expanduser()
        if not place.is_dir():
            raise ConfigError(
                path, "no such folder", "give the folder into which the trainer saves checkpoints"
            )
        if any((place / name).is_file() for name in OPTIMIZER_FILES):
            problem = "is a checkpoint itself"
            raise ConfigError(
                path, problem, "give the folder above it, or measure it with `entropy-probe run`"
            )
        run = cls(place.absolute(), State((state or place / NAME).expanduser().absolute()))
        measuring.remove_leftovers(
            run.state.folder, [folder for _, folder in numbered(run.path)] or [run.path / "_"]
        )
        return run

    def name_of(self, folder: Path) -> str:
        return "-".join(folder.relative_to(self.path).parts)

    @property
    def records(self) -> list[Record]:
        """The last line of each checkpoint, in the order of steps."""
        last = {record.checkpoint: record for record in self.state.records}
        return sorted(last.values(), key=lambda record: (record.step, record.checkpoint))

    def is_measured(self, folder: _Folder) -> bool:
        name = self.name_of(folder.path)
        known = {(record.checkpoint, record.fingerprint) for record in self.state.records}
        return (name, folder.digest) in known


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM ends a watch as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Watcher:
    """Watches runs until it is ended, or once. `now` is a clock in seconds."""

    def __init__(
        self,
        runs: Sequence[Run],
        plan: Plan,
        screen: Screen,
        trackers: Trackers,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._runs, self._plan, self._screen, self._trackers = list(runs), plan, screen, trackers
        self._now = now
        self._running: tuple[Run, str, float] | None = None

    def watch(self) -> int:
        """1 where a checkpoint of these runs has failed, also one of an earlier watcher's; else 0.

        An interrupt (Ctrl-C) ends it; without `once` nothing else does but a failure, where `exit_first` is set.
        """
        try:
            for run in self._runs:
                if run.state.repaired:
                    self._say(run, "a line that was cut off is removed from the state", "warning")
                if not numbered(run.path):
                    self._say_what_is_below(run)
            self._passes()
        except KeyboardInterrupt:
            self._screen.say("ended; it goes on from here when it is started again")
        finally:
            self._show()
            try:
                self._trackers.close()
            except ProbeError as error:
                self._screen.say(str(error), "warning")
        failed = any(not record.passed for run in self._runs for record in run.records)
        return 1 if failed else 0

    def _passes(self) -> None:
        looked = self._look()
        while True:
            waiting = looked + self._plan.interval
            if not self._plan.once or self._is_unsettled():
                while self._now() < waiting:
                    self._show(next_look=waiting)
                    time.sleep(min(_TICK, max(0.0, waiting - self._now())))
                looked = self._look()
            while (found := self._next()) is not None:
                ended = self._measure(*found)
                if ended is not None and not ended.passed and self._plan.exit_first:
                    return
                if not self._plan.once and self._now() >= looked + self._plan.interval:
                    looked = self._look()
            if self._plan.once:
                return

    def _is_unsettled(self) -> bool:
        return any(not of.is_settled for run in self._runs for of in run.folders.values())

    def _look(self) -> float:
        """At every folder; the time at which it was begun."""
        began = self._now()
        for run in self._runs:
            there = {path: step for step, path in numbered(run.path)}
            for path in [path for path in run.folders if path not in there]:
                self._forget(run, run.folders.pop(path))
            for path, step in there.items():
                seen = Seen.of(path)
                known = run.folders.get(path)
                if known is None or known.seen != seen:
                    run.folders[path] = _Folder(step, path, seen, began)
                elif not known.is_settled and began - known.since >= self._plan.interval:
                    self._settle(run, known)
        self._show()
        return began

    def _settle(self, run: Run, folder: _Folder) -> None:
        """It did not change for an interval: it is whole, or it is said what it lacks."""
        missing = what_is_missing(folder.path)
        if missing:
            if missing != folder.missing:
                self._say(run, f"{run.name_of(folder.path)}: is not complete: {missing}")
            folder.missing = missing
            return
        try:
            digest = fingerprint(folder.path, folder.seen)
        except OSError:  # it is being deleted
            return
        folder.digest, folder.missing = digest, ""
        names = {record.checkpoint for record in run.state.records}
        name = run.name_of(folder.path)
        if name in names and not run.is_measured(folder):
            self._say(run, f"{name}: was written anew")

    def _forget(self, run: Run, folder: _Folder) -> None:
        """Its folder is gone."""
        if folder.is_settled and not run.is_measured(folder):
            self._say(
                run, f"{run.name_of(folder.path)}: was deleted before it was measured", "warning"
            )

    def _next(self) -> tuple[Run, _Folder, Path | None] | None:
        """The settled checkpoint that is measured next, the smallest step of a run first, and the one after it."""
        for run in self._runs:
            settled = sorted(
                (of for of in run.folders.values() if of.is_settled),
                key=lambda of: (of.step, of.path),
            )
            for number, folder in enumerate(settled):
                if run.is_measured(folder):
                    continue
                after = next((of for of in settled[number + 1 :] if of.step > folder.step), None)
                if self._plan.with_next and after is None:
                    continue
                near = after is not None and (self._plan.with_next or after.step == folder.step + 1)
                return run, folder, after.path if after is not None and near else None
        return None

    def _measure(self, run: Run, folder: _Folder, after: Path | None) -> measuring.Ended | None:
        """Measure it, and keep what was found; `None` where nothing was."""
        name, began = run.name_of(folder.path), self._now()
        folder.tries += 1
        job = measuring.Job(name, folder.path, folder.seen, after)
        try:
            measurement = measuring.Measurement(job, self._plan.options, run.state.folder)
        except FileNotFoundError:
            self._lose(run, folder, "was deleted before it was measured")
            return None
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
            raise ConfigError(
                run.state.folder, problem, "give another place with --state"
            ) from error
        self._running = run, name, began
        self._say(run, f"{name}: is measured", "running")
        try:
            self._await(measurement)
            ended = measurement.ended()
            if ended.gone:
                gone = "deleted" if not folder.path.exists() else "written to"
                self._lose(run, folder, f"was {gone} while it was measured, and does not count")
                return None
            if ended.crashed and folder.tries < _TRIES:
                self._say(run, f"{name}: {ended.why}; it is tried once more", "warning")
                return None
            self._keep(run, folder, measurement, ended, self._now() - began)
        finally:
            measurement.end()
            self._running = None
        return ended

    def _await(self, measurement: measuring.Measurement) -> None:
        looked = self._now()
        while measurement.runs:
            if not self._plan.once and self._now() - looked >= self._plan.interval:
                looked = self._look()
            self._show()
            time.sleep(_TICK)

    def _lose(self, run: Run, folder: _Folder, why: str) -> None:
        """Nothing is known of it; if it is there, it is looked at as one that is new."""
        run.folders.pop(folder.path, None)
        self._say(run, f"{run.name_of(folder.path)}: {why}", "warning")

    def _keep(
        self,
        run: Run,
        folder: _Folder,
        measurement: measuring.Measurement,
        ended: measuring.Ended,
        seconds: float,
    ) -> None:
        name = run.name_of(folder.path)
        path, report = None, None
        if ended.report is not None:
            report = ProbeReport.model_validate_json(ended.report)
            taken = {record.report for record in run.state.records}
            path = run.state.folder / f"{name}.json"
            if str(path) in taken:  # of a checkpoint that was written anew
                path = path.with_name(f"{name}-{folder.digest[:8]}.json")
            measurement.keep(path, ended.report)
        record = record_of(name, folder.step, folder.path, folder.digest, report, ended)
        before = [of for of in run.records if of.step < folder.step and of.report is not None]
        record = record.model_copy(
            update={
                "change": change_since(before[-1], report, folder.step)
                if before and report
                else None,
                "report": None if path is None else str(path),
                "seconds": round(seconds, 3),
            }
        )
        run.state.append(record)
        kind = "good" if record.passed else "bad"
        where = "" if path is None else f" ({path})"
        self._say(
            run, f"{name}: {'passed' if record.passed else 'FAILED'}. {record.answer}{where}", kind
        )
        self._tell(run, record, report)

    def _tell(self, run: Run, record: Record, report: ProbeReport | None) -> None:
        """Trackers, page and webhook: what fails is a warning, the line is kept."""
        plan = self._plan
        if report is not None:
            self._try(
                run,
                lambda: self._trackers.log(
                    Logged(str(run.path), record.checkpoint, record.step, report)
                ),
            )
        if plan.page is not None:
            page = plan.page
            reports = [
                Path(of.report)
                for each in self._runs
                for of in each.records
                if of.report is not None
            ]
            if reports:
                self._try(run, lambda: measuring.write_page(reports, page))
        if plan.webhook is not None:
            url = plan.webhook
            body = json.dumps({"run": str(run.path), **json.loads(record.model_dump_json())})
            self._try(run, lambda: webhook.post(url, body))

    def _try(self, run: Run, action: Callable[[], None]) -> None:
        try:
            action()
        except ProbeError as error:
            self._say(run, str(error), "warning")

    def _say_what_is_below(self, run: Run) -> None:
        """A run may have saved nothing yet; or the folder holds runs, and is watched for nothing."""
        names = [place.relative_to(run.path).parts for place in one_level_below(run.path)]
        below = list(dict.fromkeys(run.path / parts[0] for parts in names if len(parts) > 1))
        text = f"{run.path} has no checkpoint-N, step-N or global_step_N"
        if below:
            text += f"; to watch the runs in it, give their folders: {listed(run.path, below)}"
        if below or self._plan.once:
            self._say(run, text, "warning")

    def _say(self, run: Run, text: str, kind: str = "") -> None:
        several = len(self._runs) > 1
        self._screen.say(f"{run.path.name}/{text}" if several else text, kind)

    def _show(self, next_look: float | None = None) -> None:
        now, shown = self._now(), []
        for run in self._runs:
            running = None
            if self._running is not None and self._running[0] is run:
                running = self._running[1], now - self._running[2]
            waiting = [
                (run.name_of(of.path), of.missing or ("" if of.is_settled else "is being written"))
                for of in sorted(run.folders.values(), key=lambda of: of.step)
                if not (of.is_settled and run.is_measured(of))
            ]
            shown.append(Shown(str(run.path), run.records, running, waiting))
        self._screen.show(shown, None if next_look is None else max(0.0, next_look - now))


def record_of(
    name: str,
    step: int,
    path: Path,
    digest: str,
    report: ProbeReport | None,
    ended: measuring.Ended,
) -> Record:
    """What the first screen says of the checkpoint: the answer to its verdicts, and its figures."""
    verdicts = [] if report is None else report.verdicts
    said = answer(report, checked(verdicts), ended.why)
    allowed = [] if report is None else report.config["allow_inconclusive"]
    bad = [
        v.criterion
        for v in verdicts
        if v.status == "fail" or (v.status == "inconclusive" and v.criterion not in allowed)
    ]
    real = None if report is None else report.real_update
    return Record(
        checkpoint=name,
        step=step,
        path=str(path),
        fingerprint=digest,
        passed=ended.passed,
        kind=said.kind,
        answer=str(said),
        failed=[] if ended.passed else bad,
        figures={} if report is None else figures(report),
        fidelity=None
        if real is None
        else Fidelity(
            cosine=real.cosine, norm_ratio=real.norm_ratio, steps_between=real.steps_between
        ),
        change=None,
        report=None,
        seconds=0.0,
        time=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def change_since(before: Record, report: ProbeReport, step: int) -> Change | None:
    """How far the entropy came since the checkpoint before, beside what that predicted; `None` without its report."""
    try:
        earlier = ProbeReport.from_json(Path(before.report or ""))
    except ProbeError:  # it was removed
        return None
    found = entropy_per_token(earlier, report)
    return Change(
        since=before.checkpoint,
        steps=step - before.step,
        delta_h=found.value,
        se=found.se,
        paired=found.paired,
        predicted=before.figure("delta_h_predicted"),
        predicted_se=before.figure("delta_h_se"),
    )
