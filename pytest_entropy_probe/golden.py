"""Golden files: `probe_golden` compares, and writes where `--probe-golden-update` says so.

    def test_logits(probe_golden, probe_model):
        probe_golden.check("logits", {"logits": probe_model.logits(ids)}, rtol=1e-6)

`<golden-dir>/<checkpoint>/<check>.json` holds the numbers (`entropy_probe.golden`), one file a
check, so that two processes never write the same one. Nothing is written without the option:

    missing   makes files, and adds fields that a file lacks
    changed   replaces the values that are out of tolerance, in files that are there
    all       replaces every value, makes files, drops fields that are no more

A test whose numbers were written passes where all that the file now holds is in tolerance. Files
that were written are named at the end of the run; after a complete one, so are files that no check
used. None is ever deleted.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from entropy_probe import ProbeError, Verdict, __version__
from entropy_probe.config import JUDGES, MEANS
from entropy_probe.golden import (
    MODES,
    Field,
    Golden,
    compare,
    explain,
    new_field,
    read,
    update,
    write,
)
from pytest_entropy_probe.golden_files import PLUGIN, GoldenFiles
from pytest_entropy_probe.judge import conclude
from pytest_entropy_probe.library import warnings_are_not_errors
from pytest_entropy_probe.settings import SETTINGS
from pytest_entropy_probe.shown.records import record
from pytest_entropy_probe.subject import Subject, probe_config

if TYPE_CHECKING:
    from entropy_probe import ProbeReport
    from entropy_probe_checks.goldens import GoldenSection

_NAME = re.compile(r"[\w.+-]+")
_LIBRARIES = ("numpy", "peft", "torch", "transformers")


class ProbeGolden:
    """Compares the numbers of one test with golden files."""

    def __init__(
        self,
        request: pytest.FixtureRequest,
        subject: Subject,
        files: GoldenFiles,
    ) -> None:
        self.nodeid = request.node.nodeid
        self._request = request
        self._subject = subject
        self._files = files

    def check(
        self,
        name: str,
        fields: Mapping[str, Any],
        *,
        rtol: float | None = None,
        atol: float | None = None,
    ) -> None:
        """Fail unless every number is within tolerance of `<golden-dir>/<checkpoint>/<name>.json`.

        `fields`: name → number, text, bool, None, array, tensor, or lists of them. `rtol` and
        `atol` go into the file with new fields, in place of the defaults for their dtype
        (`entropy_probe.golden.new_field`). What the file has is what counts, and stays when values
        are updated: edit it there.
        """
        __tracebackhide__ = True
        with _one_line():
            new = {key: new_field(key, value, rtol, atol) for key, value in fields.items()}
        self.compare(name, Golden(self.meta(), new))

    def compare(self, name: str, got: Golden) -> None:
        """The same for fields that have their tolerances, and a `meta` of their own."""
        __tracebackhide__ = True
        with _one_line():
            verdict = self._verdict(name, got)
        self.conclude(verdict)

    def conclude(self, verdict: Verdict) -> None:
        """Record the verdict, and end the test where it does not pass."""
        __tracebackhide__ = True
        self._subject.verdicts[verdict.criterion] = verdict
        record(self._request, self._subject, verdict)
        conclude(verdict, allowed=False)

    def take(self, name: str) -> Path:
        """The file of a check, which belongs to this test alone from now on.

        Raises `ProbeError` where it cannot.
        """
        if not _NAME.fullmatch(name) or name in (".", ".."):
            allowed = "use letters, digits, `.`, `_`, `+` and `-`"
            raise ProbeError(f"golden {name!r}", "is not the name of a file", allowed)
        if any(part in ("", ".", "..") for part in self._subject.name.split("/")):
            raise ProbeError(
                f"checkpoint {self._subject.name!r}",
                "is not the name of a folder",
                "give --probe-checkpoint=NAME=PATH",
            )
        folder = self._request.config.stash[SETTINGS].golden_dir
        assert folder is not None
        path = folder / self._subject.name / f"{name}.json"
        owner = self._files.owners.get(path)
        if owner is not None and (owner is self or owner.nodeid != self.nodeid):
            taken = f"was already compared by {owner.nodeid}"
            raise ProbeError(f"golden {name!r}", taken, "give every check a name of its own")
        self._files.owners[path] = self  # a test that is run again takes its files over
        return path

    def meta(self, report: ProbeReport | None = None) -> dict[str, Any]:
        """What the numbers are made with; the fingerprint, where the checkpoint was measured."""
        config = probe_config(self._request.config)
        report = report or self._subject.report
        of_ours = {"entropy_probe": __version__, "python": platform.python_version()}
        meta: dict[str, Any] = {
            "versions": {**of_ours, **_versions()},
            "dtype": config.precision.dtype,
            "device": config.device,
        }
        return meta if report is None else {**meta, "fingerprint": report.checkpoint.fingerprint}

    def _verdict(self, name: str, got: Golden) -> Verdict:
        """Compare with the file, after what the option has written into it."""
        path, mode = self.take(name), self._request.config.stash[SETTINGS].golden_update
        shown = self._files.shown(path)
        stored = before = read(path)
        if mode in MODES:
            stored, changed = update(before, got, mode)
            if stored is not None and stored is not before and write(path, stored):
                fields = "1 field" if changed == 1 else f"{changed} fields"
                self._files.written.append(f"{shown}: {fields} written")
        answer: dict[str, Any] = {"criterion": f"golden_{name}", "family": "golden"}
        if stored is None:
            hint = f"{shown} is not there; this makes it:\n{self._files.command}"
            return Verdict(**answer, status="fail", value="no golden file", limit=None, hint=hint)
        found = compare(stored.fields, got.fields)
        if not found.differences:
            return Verdict(**answer, status="pass", value=found.worst, limit=1.0, hint="")
        remedy = f"if what was got is right: --probe-golden-update={_remedy(stored, got)}"
        hint = f"{explain(stored, got, found)}\n{remedy}"
        return Verdict(**answer, status="fail", value=found.worst, limit=1.0, hint=hint)


def _remedy(stored: Golden, got: Golden) -> str:
    """The first mode that leaves no difference."""
    for mode in MODES:
        after, _ = update(stored, got, mode)
        if after and _agree(after.fields, got.fields):
            return mode
    raise AssertionError("--probe-golden-update=all leaves no difference")


def _agree(expected: Mapping[str, Field], got: Mapping[str, Field]) -> bool:
    return not compare(expected, got).differences


@contextmanager
def _one_line() -> Iterator[None]:
    """What a user can act on ends the test with one line."""
    __tracebackhide__ = True
    try:
        yield
    except ProbeError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def golden_of(request: pytest.FixtureRequest, subject: Subject) -> ProbeGolden:
    """What the fixture `probe_golden` is in one test; skips where there are no golden files."""
    if request.config.stash[SETTINGS].golden_dir is None:
        pytest.skip("needs golden files: run pytest with --probe-golden-dir=DIR")
    files = request.config.pluginmanager.get_plugin(PLUGIN)
    assert isinstance(files, GoldenFiles)
    return ProbeGolden(request, subject, files)


def judge_section(golden: ProbeGolden, section: GoldenSection, report: ProbeReport) -> None:
    """Compare one section of the report with its golden file, and end the test."""
    __tracebackhide__ = True
    with warnings_are_not_errors():
        fields = section(report)
    if not isinstance(fields, str):
        meta = golden.meta(report) | _of_run(report)
        golden.compare(section.name, Golden(meta, fields))
        return
    with _one_line():
        golden.take(section.name)
    golden.conclude(
        Verdict(
            criterion=f"golden_{section.name}",
            family="golden",
            status="not_applicable",
            value=None,
            limit=None,
            hint=fields,
        )
    )


_NEWER = {
    "batch": {
        "reward_weights": None,
        "system_prompt": None,
        "chat_template_kwargs": {},
        "target_se": None,
        "max_prompts": 256,
    },
    "first_order": {"max_pairs_gib": 1.0},
}
"""By section, what older golden files know nothing of, as it is where it changes no number."""


def _of_run(report: ProbeReport) -> dict[str, Any]:
    """Digests of the responses, and of the configuration that has a part in the numbers."""
    left_out = {*JUDGES, *MEANS}
    if report.recipe.name == "notes" and not report.recipe.changed:
        left_out |= {"recipe", "reference_model"}  # files of before there were recipes are of it
    config = {key: value for key, value in report.config.items() if key not in left_out}
    for section, newer in _NEWER.items():
        config[section] = {
            key: value
            for key, value in config[section].items()
            if key not in newer or value != newer[key]
        }
    return {
        "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        "responses": {"e": report.batch.fingerprint, "u": report.update_batch.fingerprint},
    }
