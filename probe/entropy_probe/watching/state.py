"""What a watcher knows of a run: one JSON line a checkpoint, in a file that two watchers never write.

A line is appended when its checkpoint has been measured, in one write, and synced. A process that is killed at any
moment leaves whole lines, and at most one that is cut off: the next watcher removes it, and measures that checkpoint.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from entropy_probe.errors import ConfigError
from entropy_probe.text import LARGEST

NAME = "entropy-probe.jsonl"
"""The file in a run's folder. What it names is beside it, in the folder `entropy-probe`."""


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="strings")


class Fidelity(_Line):
    """The step that was predicted beside the one that was made, as `RealUpdateSection` has it."""

    cosine: float
    norm_ratio: float
    steps_between: int


class Change(_Line):
    """ΔH per token from the checkpoint `since` to this one, over so many `steps`, with its SE, `paired` by prompts
    where both have the same ones; and the change that was `predicted` there for one step."""

    since: str
    steps: int
    delta_h: float
    se: float
    paired: bool
    predicted: float | None
    predicted_se: float | None


class Record(_Line):
    """A checkpoint that was measured, or could not be: `report` is `None` then, and `answer` says why.

    checkpoint    its folder's name;   `step` and `path` of it;   `fingerprint`, by what it holds
    passed        whether every gate and criterion that was asked for passed;   `failed`: those that did not
    kind, answer  the verdict: good, unknown or bad, and in words
    figures       under the names of trackers (`integrations/figures.py`)
    fidelity      `None` where the next checkpoint was not there;   `change`: `None` for the first checkpoint
    report        path of the full report;   `seconds` that it took;   `time` when it ended, ISO 8601
    """

    checkpoint: str
    step: int
    path: str
    fingerprint: str
    passed: bool
    kind: Literal["good", "unknown", "bad"]
    answer: str
    failed: list[str]
    figures: dict[str, float]
    fidelity: Fidelity | None
    change: Change | None
    report: str | None
    seconds: float
    time: str

    def figure(self, name: str) -> float | None:
        """By its name without `probe/`."""
        return self.figures.get(f"probe/{name}")


class State:
    """The file of one run, locked while it is open: `flock` ends with the process that holds it.

    Raises `ConfigError` where another process holds it, where it cannot be written, or a line is no record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        self.repaired = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = open(path, "a+b", buffering=0)  # noqa: SIM115 (held while this is)
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
            raise ConfigError(path, problem, "give another file with --state") from error
        try:
            self._lock()
            self._read()
        except ConfigError:
            self._file.close()
            raise

    @property
    def folder(self) -> Path:
        """Where reports go, beside the file."""
        return self.path.with_suffix("")

    def append(self, record: Record) -> None:
        """The line is whole and on the disk when this returns."""
        try:
            line = (record.model_dump_json() + "\n").encode()
            written = os.write(self._file.fileno(), line)
            if written != len(line):  # a full disk
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
            raise ConfigError(self.path, problem, "free space, or give --state") from error
        self.records.append(record)

    def close(self) -> None:
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = "another watcher is at work on this run"
            raise ConfigError(self.path, problem, "end that one first, or leave it to it") from None
        except OSError as error:
            problem = f"cannot be locked ({error.strerror})"
            raise ConfigError(
                self.path, problem, "give a file on a local disk with --state"
            ) from error

    def _read(self) -> None:
        self._file.seek(0, os.SEEK_END)
        if self._file.tell() > LARGEST:
            raise ConfigError(self.path, "is too large", "give another file with --state")
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.ftruncate(self._file.fileno(), len(whole))
            self.repaired = True
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self.records.append(Record.model_validate_json(line))
            except ValidationError as error:
                problem = "is not a record of a watcher"
                raise ConfigError(f"{self.path}:{number}", problem, "remove the line") from error
