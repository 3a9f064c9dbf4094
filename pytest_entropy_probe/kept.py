"""Reports of finished measurements, with their evidence, in pytest's cache: other limits measure nothing again.

An entry is named by the digest of all that the measurement depends on (`entropy_probe.inputs`) and
holds its own digest and that of its evidence in front: what was cut short or changed, or is no
report of this version, is dropped and measured again. No torch is imported where a report is kept.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from entropy_probe import ProbeError
from entropy_probe.atomic import write_atomically
from entropy_probe.errors import CheckpointError
from entropy_probe.evidence import Evidence
from entropy_probe.inputs import digest
from entropy_probe.processes import torchrun
from entropy_probe.report import ProbeReport
from pytest_entropy_probe.settings import SETTINGS

if TYPE_CHECKING:
    from entropy_probe import ProbeConfig

FOLDER = "entropy-probe"
MOST = 100
"""Entries that are kept; the oldest go first. One takes some 100 kB, and its evidence a few MB."""
_EVIDENCE = ".safetensors"
NOT_KEPT = "the report is not kept for other limits"
RECALLED = "report from pytest's cache (--probe-no-cache)"


@dataclass(frozen=True)
class Kept:
    """Where the report of one measurement is kept."""

    file: Path

    def read(self) -> tuple[ProbeReport | None, str]:
        """The report, if there is one, and what the user should know."""
        try:
            stated, _, text = self.file.read_text(encoding="utf-8").partition("\n")
        except FileNotFoundError:
            return None, ""
        except (OSError, UnicodeDecodeError):
            stated = text = ""
        with suppress(ValueError, OSError, ProbeError):
            evidence = self._evidence.read_bytes() if self._evidence.is_file() else b""
            if stated and stated == f"{_digest(text.encode())} {_digest(evidence)}":
                report = ProbeReport.model_validate_json(text)
                if evidence:
                    report = report.with_evidence(Evidence.from_file(self._evidence))
                return report, RECALLED
        self._drop(self.file)
        what = f"its report in pytest's cache was damaged ({self.file.name})"
        return None, f"measured again: {what}"

    def write(self, report: ProbeReport) -> str:
        """Keep the report. What the user should know, if it can't be kept."""
        text, evidence = report.model_dump_json(), b""
        try:
            if report.evidence is not None:
                evidence = report.evidence.to_bytes()
                write_atomically(self._evidence, evidence)
            stated = f"{_digest(text.encode())} {_digest(evidence)}"
            write_atomically(self.file, f"{stated}\n{text}")
        except ProbeError as error:
            return f"{NOT_KEPT}: {error}"
        with suppress(OSError):  # another process removes them too; what is no file stays
            entries = sorted(self.file.parent.glob("*.json"), key=_changed, reverse=True)
            for old in entries[MOST:]:
                self._drop(old)
        return ""

    @property
    def _evidence(self) -> Path:
        return self.file.with_suffix(_EVIDENCE)

    def _drop(self, entry: Path) -> None:
        for path in (entry, entry.with_suffix(_EVIDENCE)):
            with suppress(OSError):  # what cannot be removed is written over
                path.unlink()


def kept_report(
    config: pytest.Config, checkpoint: Path, probe_config: ProbeConfig
) -> tuple[Kept | None, str]:
    """Where the report is kept. `None` where nothing is to be kept, or not all is known that the measurement depends
    on, with what the user should know then."""
    settings, cache = config.stash[SETTINGS], getattr(config, "cache", None)
    if settings.no_cache or cache is None:
        return None, ""
    try:
        name = digest(
            checkpoint,
            probe_config,
            settings.rollouts,
            settings.update_rollouts,
            prompts=settings.prompts,
            next_checkpoint=settings.next,
            base_model=settings.base_model,
            processes=torchrun.size(),
        )
        return Kept(cache.mkdir(FOLDER) / f"{name}.json"), ""
    except CheckpointError:  # loading says what is wrong
        return None, ""
    except OSError as error:
        return None, f"{NOT_KEPT}: {error.filename}: cannot be written ({error.strerror})"
    except ProbeError as error:
        return None, f"{NOT_KEPT}: {error.where}: {error.problem}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _changed(path: Path) -> float:
    return path.stat().st_mtime
