"""Whole runs on the bundled demo: one process, and two workers with two checkpoints."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

import forked
import kept_reports
from entropy_probe import ProbeReport
from entropy_probe.demo import checkpoint_path
from entropy_probe_checks.criteria import CRITERIA

INI = "[pytest]\nfilterwarnings = error\npython_functions = check_*\npython_files = check_*.py\n"
OWN = "def check_own(probe_report, probe_checkpoint): assert str(probe_checkpoint) == probe_report.checkpoint.path"
SMALL = """
budget: smoke
batch: {num_prompts: 4, num_update_prompts: 4}
generation: {num_return_sequences: 4, max_new_tokens: 16}
"""


@dataclass(frozen=True)
class Run:
    """A finished run: where, how it ended and what it wrote."""

    folder: Path
    code: int
    out: str
    err: str

    def properties(self) -> list[dict[str, str]]:
        """The properties of every test that judged a criterion, from the JUnit file."""
        cases = ElementTree.parse(self.folder / "junit.xml").iter("testcase")
        found = [{p.attrib["name"]: p.attrib["value"] for p in case.iter("property")} for case in cases]
        return [properties for properties in found if "probe_criterion" in properties]

    def section(self) -> str:
        """What the plugin printed at the end, without pytest's own sections after it (which CI does not shorten)."""
        return self.out.partition("= entropy probe =")[2].partition("= short test summary")[0]


def _files(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*") if "__pycache__" not in path.parts}


def _run(folder: Path, *args: str) -> Run:
    (folder / "pytest.ini").write_text(INI)
    (folder / "check_own.py").write_text(OWN)
    before = _files(checkpoint_path())
    done = forked.python("-m", "pytest", "--junitxml=junit.xml", *args, cwd=folder)
    assert _files(checkpoint_path()) == before
    return Run(folder, done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The measurement of `make acceptance`, where that has kept its report already."""
    folder = tmp_path_factory.mktemp("single")
    kept_reports.copy(kept_reports.OURS, folder / kept_reports.PLACE)
    return _run(folder, "--probe-checkpoint=demo", "--probe-json=report.json", "--probe-plot=figure.svg")


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "small.yaml").write_text(SMALL)
    args = ("--probe-checkpoint=demo", "--probe-checkpoint=again=demo", "--probe-config=small.yaml")
    return _run(folder, *args, "--probe-json=reports", "--probe-plot=figures", "--probe-seed=3", "-n2", "-v")


def test_the_demo_passes(single: Run) -> None:
    assert single.code == 0, single.out
    assert f"entropy-probe 0.1.0: demo ({checkpoint_path()})" in single.out
    # on a slow machine a line of progress, nothing else
    assert all(line.startswith("entropy-probe: demo: ") for line in single.err.split("\n") if line), single.err


def test_terminal_table(single: Run) -> None:
    """The answer, the block, and no row where all passed; every row under -v, of each of two checkpoints."""
    table = single.section()
    statuses = [properties["probe_status"] for properties in single.properties()]
    passed, without = statuses.count("pass"), statuses.count("not_applicable")
    assert passed + without == len(statuses)
    text = " ".join(table.split())
    assert re.search(r"demo: Healthy: the next step lowers the entropy by [\d.e-]+ ± [\d.e-]+ nats/token", text)
    assert f"All {passed} checks passed ({without} do not apply)." in text
    assert "entropy-probe: 2 more tests passed: the checkpoint loads and can be measured\n" in single.out
    assert f"= {passed + 2 + 1} passed, {without} skipped" in single.out.splitlines()[-1]  # one is OWN
    assert "PASS" not in table
    assert max(map(len, table.splitlines())) <= 80


def test_report_holds_the_verdicts_of_the_run(single: Run) -> None:
    report = json.loads((single.folder / "report.json").read_text())
    assert report["checkpoint"]["name"] == "demo"
    assert report["left_out"] == []
    assert report["invariance"]["num_examples"] == report["config"]["invariance"]["max_examples"] > 0
    verdicts = {verdict["criterion"]: verdict["status"] for verdict in report["verdicts"]}
    assert verdicts == {p["probe_criterion"]: p["probe_status"] for p in single.properties()}
    assert len(verdicts) > 10


@pytest.mark.parametrize(("slope", "curvature"), [(0.03, 0.0), (-0.03, 0.0), (0.0, 1.0), (0.0, -0.5), (0.0, 0.0)])
def test_prediction_has_the_power_that_it_claims(single: Run, slope: float, curvature: float) -> None:
    """A slope off by 3 % and a curvature off by a factor of 2, either way, fail `prediction`; as it is it passes."""
    report = ProbeReport.from_json(single.folder / "report.json")
    update = report.update
    assert update is not None
    assert update.curvature is not None

    def off(eta: float) -> float:
        return eta * slope * update.delta_h1_per_lr_rb + eta**2 / 2 * curvature * update.curvature

    found = report.entropy_change
    rows = [row.model_copy(update={"difference": row.difference - off(row.eta)}) for row in found]
    bent = update.model_copy(update={"curvature": update.curvature * (1 + curvature)})
    verdict = CRITERIA["prediction"](report.model_copy(update={"entropy_change": rows, "update": bent}))
    assert verdict.status == ("fail" if slope or curvature else "pass")


def test_drawn_cases_leave_nothing_behind(single: Run, distributed: Run) -> None:
    """The same cases in every process, beside no folder of anyone's."""
    for run in (single, distributed):
        assert not [path for path in run.folder.rglob(".*") if path.is_dir() and path.name != ".pytest_cache"]
    one, other = (
        json.loads((distributed.folder / "reports" / f"{name}.json").read_text()) for name in ("demo", "again")
    )
    assert one["invariance"] == other["invariance"]


def test_workers_hand_over_reports_and_verdicts(distributed: Run) -> None:
    assert distributed.code in (0, 1), distributed.out  # so small a batch may leave a criterion inconclusive
    assert "INTERNALERROR" not in distributed.out
    properties = distributed.properties()
    for name in ("demo", "again"):
        report = json.loads((distributed.folder / "reports" / f"{name}.json").read_text())
        assert report["checkpoint"]["name"] == name
        assert report["config"]["batch"]["num_prompts"] == 4
        assert report["config"]["batch"]["seed"] == 3
        assert len(report["verdicts"]) == sum(p["probe_checkpoint"] == name for p in properties) > 10
    table = distributed.section()
    assert table.index("demo\n") < table.index("again\n")
    for name in ("demo", "again"):
        for criterion in (p["probe_criterion"] for p in properties if p["probe_checkpoint"] == name):
            assert criterion[:20] in table


def test_figures_and_tables_of_prediction(single: Run, distributed: Run) -> None:
    assert (single.folder / "figure.svg").read_text().startswith("<?xml")
    assert "prediction against realisation" not in single.out
    for name in ("demo", "again"):
        assert (distributed.folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = distributed.section()
    assert table.count("prediction against realisation (nats/response)") == 2
    assert max(map(len, table.splitlines())) <= 80
