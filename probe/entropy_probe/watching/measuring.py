"""One measurement, in a process of its own: pytest with the shipped checks, as it is started by hand.

The checkpoint is given as hard links to its files, so that the trainer may delete it meanwhile. The folder of links is
beside the checkpoint: what is found relative to it, as an adapter's base model, is found from there too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from entropy_probe.atomic import write_atomically
from entropy_probe.errors import ConfigError, ProbeError
from entropy_probe.watching import child
from entropy_probe.watching.complete import Seen

LINKED, LINKED_NEXT = ".entropy-probe-measured", ".entropy-probe-next"
"""Folders of hard links, beside the checkpoint that is measured; no trainer takes them for a checkpoint."""
PLACE = ".measuring"
"""Where a measurement writes, in the folder of the reports; what is there belongs to one that was not finished."""
_SUITE = ("probe-checks",)
"""Checks alone are run: the tests of the repository that we are in are not collected."""
PASSED, FAILED, USAGE, NOTHING_SELECTED = 0, 1, 4, 5  # exit codes of pytest


def link(folder: Path, name: str) -> Path:
    """Hard links to all files of a checkpoint in the folder `name` beside it; the checkpoint itself, where the file
    system has none, or may not be written to. Raises `FileNotFoundError` where a file is gone."""
    target = folder.with_name(name)
    try:
        shutil.rmtree(target, ignore_errors=True)
        for place, _, names in os.walk(folder):
            below = target / os.path.relpath(place, folder)
            below.mkdir(parents=True, exist_ok=True)
            for file in names:
                os.link(os.path.realpath(os.path.join(place, file)), below / file)
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, FileNotFoundError):
            raise
        return folder
    return target


def remove_leftovers(folder: Path, checkpoints: Sequence[Path]) -> None:
    """What a watcher that was killed left of a measurement, in the folder of reports and beside the checkpoints."""
    shutil.rmtree(folder / PLACE, ignore_errors=True)
    for place in {path.parent for path in checkpoints}:
        for name in (LINKED, LINKED_NEXT):
            shutil.rmtree(place / name, ignore_errors=True)


@dataclass(frozen=True)
class Job:
    """What is measured: the checkpoint `name` in `folder`, with the files that were `seen`, and the one after it."""

    name: str
    folder: Path
    seen: Seen
    next: Path | None


@dataclass(frozen=True)
class Ended:
    """How it ended: whether all passed, the report as JSON, or else why there is none. `gone`: the checkpoint was
    deleted or written to meanwhile, and nothing is known of it. `crashed`: it may be tried again."""

    passed: bool
    report: str | None
    why: str = ""
    gone: bool = False
    crashed: bool = False


class Measurement:
    """A running one. `options` are pytest's, `reports` the folder where it writes below `PLACE`."""

    def __init__(self, job: Job, options: Sequence[str], reports: Path) -> None:
        self.job = job
        self._reports = reports
        self._place = reports / PLACE
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir(parents=True)
        self._folder = link(job.folder, LINKED)
        if self._is_other():
            self.remove()
            raise FileNotFoundError(job.folder)
        given = [*options, f"--probe-checkpoint={job.name}={self._folder}"]
        if job.next is not None:
            given.append(f"--probe-next={link(job.next, LINKED_NEXT)}")
        given += [f"--probe-json={self._report}", f"--junitxml={self._junit}"]
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(  # noqa: S603 (our own)
                command(given),
                stdin=subprocess.PIPE,  # which ends with this process, and the measurement with it
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def _report(self) -> Path:
        return self._place / "report.json"

    @property
    def _junit(self) -> Path:
        return self._place / "junit.xml"

    @property
    def _said(self) -> Path:
        return self._place / "said.txt"

    @property
    def runs(self) -> bool:
        return self._process.poll() is None

    def end(self) -> None:
        """End it, and all that it has started; nothing is left behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self.remove()

    def remove(self) -> None:
        """Remove the links, and what it wrote."""
        remove_leftovers(self._reports, [self.job.folder])

    def ended(self) -> Ended:
        """What came of it. Raises `ConfigError` where the options are wrong: no checkpoint would fare better."""
        code = self._process.returncode
        if code in (USAGE, NOTHING_SELECTED):
            raise _wrong_options(self._text())
        if self._is_other():
            return Ended(False, None, gone=True)
        if code not in (PASSED, FAILED):
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            return Ended(
                False,
                None,
                f"the measurement ended with {how}: {_complaint(self._text())}",
                crashed=True,
            )
        if not self._report.is_file():
            return Ended(False, None, self._failure() or _complaint(self._text()))
        return Ended(code == PASSED, self._true_report())

    def keep(self, path: Path, report: str) -> None:
        """The report, and beside it what pytest said, under the names that stay."""
        write_atomically(path, report)
        os.replace(self._said, path.with_suffix(".txt"))

    def _is_other(self) -> bool:
        """Whether what was given to be measured is not what was seen: deleted, or written to."""
        return Seen.of(self._folder) != self.job.seen

    def _true_report(self) -> str:
        """The report, with the folders of links under the names that the trainer gave them."""
        report = json.loads(self._report.read_text(encoding="utf-8"))
        report["checkpoint"]["path"] = str(self.job.folder)
        if report.get("real_update") and self.job.next is not None:
            report["real_update"]["path"] = str(self.job.next)
        return json.dumps(report, indent=2) + "\n"

    def _failure(self) -> str:
        """The first line of the first test that failed."""
        try:
            root = ElementTree.parse(self._junit).getroot()  # noqa: S314 (pytest's own)
        except (OSError, ElementTree.ParseError):
            return ""
        failures = (of for kind in ("failure", "error") for of in root.iter(kind))
        lines = next((of.text or of.get("message", "") for of in failures), "").strip().splitlines()
        return lines[0] if lines else ""

    def _text(self) -> str:
        return self._said.read_text(encoding="utf-8", errors="replace")


def command(given: Sequence[str]) -> list[str]:
    """The process that measures, which must lead a group of its own, and ends when its standard input does."""
    return [sys.executable, child.__file__, "pytest", *_SUITE, *given]


def require_options(options: Sequence[str]) -> None:
    """Raises `ConfigError` for options that pytest would complain of, or that select no check: now, not when the first
    checkpoint comes."""
    given = [*options, "--probe-checkpoint=demo", "--collect-only", "-p", "no:cacheprovider"]
    done = subprocess.run(  # noqa: S603 (our own)
        [sys.executable, "-m", "pytest", *_SUITE, *given],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != PASSED:
        raise _wrong_options(done.stderr + done.stdout)


def _wrong_options(text: str) -> ConfigError:
    problem, _, remedy = _complaint(text).rpartition("; ")
    return ConfigError("watch", problem or remedy, remedy if problem else "give other options")


def _complaint(text: str) -> str:
    """What pytest or the plugin complained of, or said last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    ours = [number for number, line in enumerate(lines) if line.startswith("entropy-probe: ")]
    if not errors and ours:  # wrapped, up to the last line
        whole = " ".join(line for line in lines[ours[-1] :] if not line.startswith("="))
        return whole.removeprefix("entropy-probe: ")
    return next(iter(errors), lines[-1] if lines else "it said nothing")


def write_page(reports: Sequence[Path], page: Path) -> None:
    """All reports as one HTML page, by `entropy-probe report`, in a process of its own."""
    given = ["report", *map(str, reports), "--html", str(page)]
    done = subprocess.run(  # noqa: S603 (our own)
        [sys.executable, "-m", "entropy_probe", *given], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ProbeError(page, f"cannot be written ({lines[-1]})", "choose another path")
