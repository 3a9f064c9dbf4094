"""`probe_golden` and the golden options in whole runs; but for the last ones nothing is loaded or measured."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import forked
import kept_reports
from entropy_probe import ProbeReport
from entropy_probe.golden import Golden, compare, read, write
from entropy_probe_checks.goldens import SECTIONS

ROOT = Path(__file__).parents[2]
OWN = """
import json
from pathlib import Path
import numpy as np
import pytest

VALUES = json.loads(Path("values.json").read_text())

def test_numbers(probe_golden):
    probe_golden.check("numbers", {name: np.array(value) for name, value in VALUES.items()})

def test_other():
    pass
"""
MISSING = "--probe-golden-update=missing"
CHANGED = "--probe-golden-update=changed"
ALL = "--probe-golden-update=all"


# Their start-up takes longer than these runs.
LEAN = "-p no:anyio -p no:benchmark -p no:hypothesispytest -p no:jaxtyping"


@pytest.fixture(autouse=True)
def _outside_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where golden files may be written."""
    monkeypatch.delenv("CI", raising=False)


class Project:
    """A user's repository with a test on numbers of its own, and a folder that passes for a checkpoint."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.file = pytester.path / "goldens" / "ckpt" / "numbers.json"
        pytester.makeini(f"[pytest]\naddopts = --strict-markers {LEAN}\nfilterwarnings = error\n")
        pytester.makepyfile(test_own=OWN)
        pytester.mkdir("ckpt")
        self.values(x=[1.0, 2.0], y=3.0)

    def values(self, **values: Any) -> None:
        (self.pytester.path / "values.json").write_text(json.dumps(values))

    def run(self, *args: str) -> pytest.RunResult:
        return self.pytester.runpytest_subprocess(
            "test_own.py", "--probe-checkpoint=ckpt", "--probe-golden-dir=goldens", *args
        )

    def stored(self) -> dict[str, Any]:
        return {name: field["value"] for name, field in json.loads(self.file.read_text())["fields"].items()}

    def passed(self, *args: str) -> bool:
        return self.run(*args).ret == pytest.ExitCode.OK


@pytest.fixture
def project(pytester: pytest.Pytester) -> Project:
    return Project(pytester)


def test_the_command_that_a_missing_file_prints_makes_it(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = project.run("-k", "numbers or other")
    assert missing.ret == pytest.ExitCode.TESTS_FAILED
    assert not project.file.exists()
    missing.stdout.fnmatch_lines(
        ["golden_numbers: got no golden file", "goldens/ckpt/numbers.json is not there; this makes it:"]
    )
    (command,) = {line for line in missing.outlines if line.startswith("pytest ")}
    assert shlex.split(command)[-3:] == ["-k", "numbers or other", MISSING]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    made = subprocess.run(command, shell=True, cwd=project.pytester.path, capture_output=True, text=True, check=False)  # noqa: S602
    assert made.returncode == 0, made.stdout
    assert "entropy-probe: goldens/ckpt/numbers.json: 2 fields written" in made.stdout
    assert project.passed()
    meta = json.loads(project.file.read_text())["meta"]
    assert set(meta) == {"device", "dtype", "versions"}
    assert {"torch", "python", "entropy_probe"} < set(meta["versions"])


def test_each_mode(project: Project) -> None:
    assert not project.passed(CHANGED)  # which makes no file
    assert project.passed(MISSING)
    before = project.file.read_bytes(), project.file.stat().st_mtime_ns
    assert project.passed(MISSING)
    assert project.passed(CHANGED)
    assert project.passed(ALL)
    assert before == (project.file.read_bytes(), project.file.stat().st_mtime_ns)

    project.values(x=[1.0, 2.5], z=4.0)
    failed = project.run()
    assert before[0] == project.file.read_bytes()
    failed.stdout.fnmatch_lines(
        [
            "golden_numbers: inf > 1",
            "field[[]index[]] *expected *got *difference *allowed",
            "y*a value  missing *-",
            "z*missing  a value *-",
            "x[[]1[]] *2 *2.5 *0.5 *3e-07",
            "if what was got is right: --probe-golden-update=all",
            "*golden_numbers *inf *1 *FAIL*",
        ]
    )
    assert max(map(len, failed.outlines[-20:])) <= 80
    assert not project.passed(MISSING)
    assert project.stored() == {"x": [1.0, 2.0], "y": 3.0, "z": 4.0}
    assert not project.passed(CHANGED)
    assert project.stored() == {"x": [1.0, 2.5], "y": 3.0, "z": 4.0}
    assert project.passed(ALL)
    assert project.stored() == {"x": [1.0, 2.5], "z": 4.0}


def test_tolerances_edited_by_hand_count_and_stay(project: Project) -> None:
    project.run(MISSING)
    table = json.loads(project.file.read_text())
    table["fields"]["x"] |= {"atol": 1.0, "source": "by hand"}
    by_hand = json.dumps(table)
    project.file.write_text(by_hand)
    project.values(x=[1.0, 2.9], y=3.0)
    assert project.passed(CHANGED)
    assert project.file.read_text() == by_hand
    assert project.passed(ALL)
    assert project.stored()["x"] == [1.0, 2.9]
    field = json.loads(project.file.read_text())["fields"]["x"]
    assert (field["atol"], field["source"]) == (1.0, "by hand")


def test_an_unreadable_file_and_a_bad_value_fail_with_a_line(project: Project) -> None:
    project.file.parent.mkdir(parents=True)
    project.file.write_text("{")
    for args in ((), (ALL,)):
        result = project.run(*args)
        result.stdout.fnmatch_lines([f"{project.file}: is not JSON *; correct it, or delete it *"])
        assert project.file.read_text() == "{"
    project.pytester.makepyfile(test_own="def test_own(probe_golden): probe_golden.check('x', {'a': 1j})")
    project.run().stdout.fnmatch_lines(["golden field 'a': is complex, *; give *"])


def test_an_update_is_refused_under_ci(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    refused = project.run(MISSING)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["ERROR: --probe-golden-update: CI is set, *; give --probe-golden-update-in-ci too"])
    assert not project.file.exists()
    assert project.passed(MISSING, "--probe-golden-update-in-ci")
    assert project.passed()


@pytest.mark.parametrize(
    "option", ["--probe-golden-dir=ckpt/goldens", "--probe-json=ckpt/r.json", "--probe-golden-dir=link"]
)
def test_nothing_goes_into_a_checkpoint(project: Project, option: str) -> None:
    (project.pytester.path / "link").symlink_to(project.pytester.path / "ckpt")
    result = project.run(option, MISSING)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        [f"ERROR: {option.partition('=')[0]}: * is in the checkpoint *; give a path outside of it"]
    )
    assert list((project.pytester.path / "ckpt").iterdir()) == []


def test_the_marker_selects_what_compares(project: Project) -> None:
    project.pytester.makepyfile(
        test_own=OWN + "\n@pytest.mark.golden\ndef test_marked(probe_golden, request):\n"
        "    assert len(list(request.node.iter_markers('golden'))) == 1\n"
    )
    result = project.run("-m", "golden", MISSING)
    result.assert_outcomes(passed=2, deselected=1)


def test_without_a_checkpoint_or_a_folder_it_skips(project: Project) -> None:
    alone = project.pytester.runpytest_subprocess("-rs", "test_own.py")
    alone.stdout.fnmatch_lines(["SKIPPED*needs a checkpoint: *--probe-checkpoint=PATH"])
    alone.assert_outcomes(passed=1, skipped=1)
    nowhere = project.pytester.runpytest_subprocess("-rs", "test_own.py", "--probe-checkpoint=ckpt")
    nowhere.stdout.fnmatch_lines(["SKIPPED*needs golden files: *--probe-golden-dir=DIR"])


TWICE = """
import pytest

@pytest.mark.parametrize("k", [0, 1])
def test_many(probe_golden, k):
    probe_golden.check("same", {"k": 1})

def test_one(probe_golden):
    probe_golden.check("once", {"k": 1})
    probe_golden.check("once", {"k": 1})

@pytest.mark.parametrize("name", ["../out", "..", "a/b", ""])
def test_name(probe_golden, name):
    probe_golden.check(name, {"k": 1})

def test_two(probe_golden):
    probe_golden.check("first", {"k": 1})
    probe_golden.check("second", {"k": 1})
"""


def test_a_file_belongs_to_one_test_and_lies_in_its_folder(project: Project) -> None:
    project.pytester.makepyfile(test_own=TWICE)
    result = project.run(MISSING)
    result.assert_outcomes(passed=2, failed=6)
    for line in (
        "golden 'same': was already compared by test_own.py::test_many?ckpt-0?; give every check a name of its own",
        "golden 'once': was already compared by test_own.py::test_one?ckpt?; give every check a name of its own",
        "golden '../out': is not the name of a file; use letters, *",
    ):
        result.stdout.fnmatch_lines([line])
    written = {path.relative_to(project.pytester.path).as_posix() for path in project.pytester.path.rglob("*.json")}
    assert written == {"values.json"} | {f"goldens/ckpt/{name}.json" for name in ("first", "once", "same", "second")}
    result.stdout.no_fnmatch_line("*During handling*")
    for name in ("golden_first", "golden_second"):  # two verdicts of one test
        result.stdout.fnmatch_lines([f"*{name} *PASS*"])
    outside = project.pytester.runpytest_subprocess(
        *("test_own.py", "-k", "two", "--probe-checkpoint=..=ckpt", "--probe-golden-dir=goldens/deep", MISSING)
    )
    outside.stdout.fnmatch_lines(["checkpoint '..': is not the name of a folder; give --probe-checkpoint=NAME=PATH"])


WHOLE = """
def test_kept(probe_golden):
    probe_golden.check("kept", {"k": 1})

def test_sometimes(probe_golden):
    probe_golden.check("sometimes", {"k": 1})
"""
# The shipped checks would measure: here all of them are withheld, as those of an absent option are.
NO_SHIPPED = """
from pytest_entropy_probe.collection import collect

collect.withheld = lambda module, config: "not here"
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_obsolete_files_are_named_after_complete_runs_only(project: Project, workers: str) -> None:
    pytester = project.pytester
    pytester.makepyfile(test_own=WHOLE)
    folder = project.file.parent
    options = ("--probe-checkpoint=ckpt", "--probe-golden-dir=goldens", "-n", workers, "-pno:cacheprovider")
    pytester.makeconftest(NO_SHIPPED)

    def named(*args: str) -> list[str]:
        result = pytester.runpytest_subprocess(*options, *args)
        return [line for line in result.outlines if "no check of this run uses it" in line]

    assert named(MISSING) == []
    (folder / "old.json").write_text("{}")
    (folder / ".kept.json.123").write_text("{")
    (folder / "notes.txt").write_text("")
    (folder.parent / "another").mkdir()
    (folder.parent / "another" / "x.json").write_text("{}")
    line = "entropy-probe: goldens/ckpt/old.json: no check of this run uses it; delete it, or bring its check back"
    assert named() == [line]
    assert named("-kkept") == []
    assert (folder / "old.json").exists()
    if workers == "2":  # where a run takes long
        return
    assert pytester.runpytest_subprocess(*options, "-kkept or sometimes").ret == pytest.ExitCode.OK
    for incomplete in ("test_own.py", "--deselect=test_own.py::test_kept", "--ignore=x", "--co"):
        assert named(incomplete) == [], incomplete
    (folder / "kept.json").unlink()
    assert named("-x") == []  # the first fails, the second never runs


def test_the_demo_beside_its_own_numbers_and_others(tmp_path: Path) -> None:
    """One number of one file is off by 1e-3 of itself, and the file says that it is of another checkpoint."""
    demo = ROOT / "golden" / "demo"
    folder = Path(shutil.copytree(demo, tmp_path / "golden" / "demo"))
    kept_reports.copy(kept_reports.OURS, tmp_path / kept_reports.PLACE)
    table = json.loads((folder / "first_order.json").read_text())
    table["fields"]["row_means"]["value"][3] *= 1 + 1e-3
    table["meta"]["fingerprint"] = "0" * 64
    (folder / "first_order.json").write_text(json.dumps(table))
    args = [
        *("--probe-checkpoint=demo", "--probe-golden-dir=golden", "--probe-config=golden/demo/probe.yaml"),
        *(f"--probe-rollouts={demo}/e.jsonl", f"--probe-update-rollouts={demo}/u.jsonl"),
        *("--probe-json=report.json", "-m", "golden", "probe-checks"),
    ]
    done = forked.python("-m", "pytest", *args, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    report = ProbeReport.from_json(tmp_path / "report.json")
    verdicts = {verdict.criterion: verdict for verdict in report.verdicts}
    assert set(verdicts) == {f"golden_{name}" for name in SECTIONS}
    assert {name for name, verdict in verdicts.items() if verdict.status == "fail"} == {"golden_first_order"}
    failed = verdicts["golden_first_order"]
    assert isinstance(failed.value, float)
    assert failed.value > failed.limit == 1.0
    lines = failed.hint.splitlines()
    assert lines[0].startswith("other fingerprint: golden 000000000000..., here ")
    assert [line.partition(" ")[0] for line in lines[1:3]] == ["field[index]", "row_means[3]"]
    assert lines[3:] == ["if what was got is right: --probe-golden-update=changed"]
    assert max(map(len, lines)) <= 80
    reason = SECTIONS["two_batch"](report.model_copy(update={"two_batch": None}))
    assert reason == "one batch serves as both; give --probe-update-rollouts too"

    gram = {"row_means": [math.nan] * 16, "diag_sum": math.nan, "bars_dot": math.nan}
    nowhere = report.model_copy(update={"first_order": report.first_order.model_copy(update=gram)})
    fields = SECTIONS["first_order"](nowhere)
    assert isinstance(fields, dict)
    write(tmp_path / "nan.json", Golden({}, fields))
    stored = read(tmp_path / "nan.json")
    assert stored is not None
    assert not compare(stored.fields, fields).differences
    healthy = SECTIONS["first_order"](report)
    assert isinstance(healthy, dict)
    assert set(gram) <= {d.where.partition("[")[0] for d in compare(stored.fields, healthy).differences}
