"""Where figures are logged: `tensorboard:DIR`, `wandb[:PROJECT]`, `trackio[:PROJECT]`, `jsonl:FILE`.

Each through the library itself, which is imported when the first figure is logged. The step is the checkpoint's.

    sinks = [sink_of("tensorboard:logs"), sink_of("jsonl:figures.jsonl")]
    with Trackers(sinks) as trackers:
        trackers.log(Logged(run="runs/a", name="checkpoint-10", step=10, report=report))
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from entropy_probe.atomic import require_appendable, require_folder, require_writable
from entropy_probe.errors import ConfigError, ProbeError, reason
from entropy_probe.integrations.figures import PREFIX, figures
from entropy_probe.report import ProbeReport
from entropy_probe.text import number_in_json

PROJECT = "entropy-probe"
"""The project of a sink that names none."""
STEP = f"{PREFIX}step"


class Logged(NamedTuple):
    """A report of the checkpoint `name`, at `step` of the training run in the folder `run`."""

    run: str
    name: str
    step: int | None
    report: ProbeReport


@dataclass(frozen=True)
class Sink:
    """One of the kinds of tracker, and the folder, file or project that it writes to."""

    kind: str
    place: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.place}"


class Tracker(Protocol):
    """One run in a tracker."""

    def log(self, one: Logged, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def sink_of(text: str, option: str = "--log", start: Path | None = None) -> Sink:
    """`KIND:PLACE` as a sink; relative paths begin at `start`, by default the current folder. `option` is how messages
    call what was given.

    Raises `ConfigError` for another kind, a missing or unusable place, and a library that is not installed.
    """
    kind, _, place = text.partition(":")
    if kind not in _KINDS:
        forms = ", ".join(of.form for of in _KINDS.values())
        raise ConfigError(option, f"got {text!r}", f"give one of {forms}")
    of = _KINDS[kind]
    if not place and "[" not in of.form:
        raise ConfigError(option, f"{text!r} does not say where to write", f"write {of.form}")
    if of.library and find_spec(of.library) is None:
        remedy = f"pip install pytest-entropy-probe[{kind}]"
        raise ConfigError(option, f"the library {of.library} is not installed", remedy)
    if "[" in of.form:
        return Sink(kind, place or PROJECT)
    path = Path(start or "", Path(place).expanduser()).absolute()
    if kind == "jsonl":
        require_appendable(path) if path.is_file() else require_writable(path)
    else:
        require_folder(path)
    return Sink(kind, str(path))


class Trackers:
    """The trackers of several sinks. Each run has one of its own in every sink, opened when it is first logged.

    `keyed`: a tracker that can resume a run does so, under a key made of the run's folder; for a process that watches
    a run, is ended, and watches again. `several`: more than one run is logged, and TensorBoard has a folder for each.
    """

    def __init__(
        self, sinks: Iterable[Sink], *, keyed: bool = False, several: bool = False
    ) -> None:
        self._sinks = tuple(sinks)
        self._keyed, self._several = keyed, several
        self._open: dict[tuple[Sink, str], Tracker] = {}

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, one: Logged) -> None:
        """Raises `ProbeError` with the line of the first sink that failed, when the others have been tried."""
        values, troubles = figures(one.report), []
        for sink in self._sinks:
            try:
                with _understood(sink):
                    key = (sink, one.run)
                    if key not in self._open:
                        self._open[key] = _KINDS[sink.kind].open(sink, one.run, self)
                    self._open[key].log(one, values)
            except ProbeError as error:
                troubles.append(error)
        if troubles:
            raise troubles[0]

    def close(self) -> None:
        """End the runs of all trackers. Raises `ProbeError` as `log` does."""
        troubles = []
        for (sink, _), tracker in self._open.items():
            try:
                with _understood(sink):
                    tracker.close()
            except ProbeError as error:
                troubles.append(error)
        self._open.clear()
        if troubles:
            raise troubles[0]

    def name_of(self, run: str) -> str:
        return Path(run).name or "run"

    def key_of(self, run: str) -> str | None:
        """The same for a folder on every day; `None` where each process logs a run of its own."""
        whole = hashlib.sha256(str(Path(run).absolute()).encode()).hexdigest()
        return f"entropy-probe-{whole[:16]}" if self._keyed else None

    def folder_of(self, sink: Sink, run: str) -> Path:
        return Path(sink.place, self.name_of(run)) if self._several else Path(sink.place)


def log_all(sinks: Sequence[Sink], measured: Iterable[Logged]) -> None:
    """Log reports, run after run and each in the order of its steps: W&B takes no step that is smaller than the last.

    Raises `ProbeError` for a tracker that cannot be written.
    """
    ordered = sorted(measured, key=lambda one: (one.run, one.step is None, one.step or 0))
    several = len({one.run for one in ordered}) > 1
    with Trackers(sinks, several=several) as trackers:
        for one in ordered:
            trackers.log(one)


@contextlib.contextmanager
def _understood(sink: Sink) -> Iterator[None]:
    """Whatever a tracker's library raises is one line; what it prints is not shown."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except ProbeError:
        raise
    except Exception as error:
        problem = f"cannot be logged to ({type(error).__name__}: {reason(error)})"
        raise ProbeError(str(sink), problem, "mend it, or leave it out") from error


class _TensorBoard:
    """Scalars in an event file; without a step, at step 0."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event: Any = vars(event_pb2)[
            "Event"
        ]  # made when it is imported: no type checker sees it
        self._summary: Any = vars(summary_pb2)["Summary"]
        self._writer = EventFileWriter(str(folder))

    def log(self, one: Logged, values: Mapping[str, float]) -> None:
        scalars = [
            self._summary.Value(tag=name, simple_value=value) for name, value in values.items()
        ]
        summary = self._summary(value=scalars)
        self._writer.add_event(
            self._event(wall_time=time.time(), step=one.step or 0, summary=summary)
        )
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """A run of W&B. `probe/step` is the axis of every figure: it is right too where a checkpoint was written anew, and
    its step is not larger than the last, which W&B would drop."""

    def __init__(self, project: str, name: str, key: str | None) -> None:
        wandb: Any = import_module("wandb")  # not among the libraries that the type checker sees
        settings = wandb.Settings(silent=True, console="off")
        resumed: dict[str, Any] = {} if key is None else {"id": key, "resume": "allow"}
        self._run: Any = wandb.init(
            project=project,
            name=name,
            job_type="entropy-probe",
            settings=settings,
            reinit="create_new",
            **resumed,
        )
        self._run.define_metric(STEP)
        self._run.define_metric(f"{PREFIX}*", step_metric=STEP)
        self._last = -1

    def log(self, one: Logged, values: Mapping[str, float]) -> None:
        step = one.step
        known = {} if step is None else {STEP: step}
        forward = step is not None and step > self._last
        at: dict[str, Any] = {"step": step} if forward else {}
        self._run.log({**values, **known}, commit=True, **at)  # else it waits for the next step
        self._last = max(self._last, step or 0)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A run of trackio, in its local database. One run is open at a time in a process, so that each line opens its own
    again: what was logged is there at once."""

    def __init__(self, project: str, name: str, key: str | None) -> None:
        self._library: Any = import_module("trackio")
        self._project, self._name = project, name
        self._resume = "never" if key is None else "allow"

    def log(self, one: Logged, values: Mapping[str, float]) -> None:
        run = self._library.init(
            self._project,
            name=self._name,
            resume=self._resume,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self._resume = "allow"
        run.log(dict(values), step=one.step)
        self._library.finish()

    def close(self) -> None:
        """Every line is on its own."""


class _Lines:
    """A line a checkpoint: run, checkpoint, step and the figures. NaN and infinities are strings, as in report.json."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def log(self, one: Logged, values: Mapping[str, float]) -> None:
        known = {"run": one.run, "checkpoint": one.name, "step": one.step}
        line = json.dumps(
            {**known, **{name: number_in_json(value) for name, value in values.items()}}
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def close(self) -> None:
        """Every line is on its own."""


class _Kind(NamedTuple):
    """How a sink is written, the library that it needs, and how a run is opened in it."""

    form: str
    library: str
    open: Callable[[Sink, str, Trackers], Tracker]


_KINDS = {
    "tensorboard": _Kind(
        "tensorboard:DIR",
        "tensorboard",
        lambda sink, run, of: _TensorBoard(of.folder_of(sink, run)),
    ),
    "wandb": _Kind(
        "wandb[:PROJECT]",
        "wandb",
        lambda sink, run, of: _Wandb(sink.place, of.name_of(run), of.key_of(run)),
    ),
    "trackio": _Kind(
        "trackio[:PROJECT]",
        "trackio",
        lambda sink, run, of: _Trackio(sink.place, of.name_of(run), of.key_of(run)),
    ),
    "jsonl": _Kind("jsonl:FILE", "", lambda sink, run, of: _Lines(Path(sink.place))),
}
FORMS = tuple(kind.form for kind in _KINDS.values())
"""How a sink is written."""
