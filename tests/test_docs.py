"""README, docs, help and contract say what the code does."""

from __future__ import annotations

import ast
import datetime
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from entropy_probe import ProbeConfig, ProbeReport
from entropy_probe.__main__ import parser
from entropy_probe.layout import FORMATS
from entropy_probe_checks.criteria import CRITERIA, GATES
from entropy_probe_checks.thresholds import LIMITS
from pytest_entropy_probe.plugin import FLAGS, MARKERS, OPTIONS

ROOT = Path(__file__).parents[1]
README = "\n".join((ROOT / page).read_text() for page in ("README.md", "docs/overview.md"))
CRITERIA_PAGE = (ROOT / "docs" / "criteria.md").read_text()
NOTES_PAGE = (ROOT / "docs" / "notes.md").read_text()
ROOMS = [path.parent for path in sorted((ROOT / "probe").rglob("__init__.py")) if path.parent.name != "demo"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_option_in_the_readme_exists() -> None:
    options = {f"--probe-{key.replace('_', '-')}" for key in (*OPTIONS, *FLAGS)} | {"--probe-explain"}
    mentioned = set(re.findall(r"--probe-[a-z-]+", README))
    assert mentioned <= options
    assert {"--probe-checkpoint", "--probe-base-model", "--probe-rollouts", "--probe-prompts"} <= mentioned


def test_every_format_has_its_row() -> None:
    page = (ROOT / "docs" / "formats.md").read_text()
    assert tuple(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)) == FORMATS


def test_help_lists_every_option_and_marker(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "--help", "--markers"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--markers"], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    for key in (*OPTIONS, *FLAGS):
        assert f"--probe-{key.replace('_', '-')}" in run.stdout
    for marker in MARKERS:
        assert f"@pytest.mark.{marker}:" in listed.stdout


def test_configuration_in_the_readme_is_valid() -> None:
    block = re.search(r"For instance\n\n((?: {6}.*\n)+)", README)
    assert block is not None
    values = yaml.safe_load(block.group(1))
    ProbeConfig.from_mapping(values)
    assert set(values["limits"]) <= set(LIMITS)


def test_python_in_the_readme_names_real_things() -> None:
    for path in re.findall(r"(?<=report)\.([a-z_]+\.[a-z0-9_]+(?:\.value)?)", README):
        model = ProbeReport
        for part in path.split(".")[:-1]:
            kind = model.model_fields[part].annotation
            model = next((of for of in get_args(kind) if of is not type(None)), kind)
        assert path.split(".")[-1] in model.model_fields, path


def test_command_in_the_readme_parses() -> None:
    command = re.search(r"`entropy-probe (run .*?)`", README)
    assert command is not None
    assert parser().parse_args(command.group(1).split()).checkpoint == "runs/checkpoint-500"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z]+)`|^    make ([a-z]+)", page.read_text(), re.MULTILINE)) <= {
            pair for target in targets for pair in ((target, ""), ("", target))
        }


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_tests_named_in_the_docs_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        target = (page.parent / link).resolve()
        written = target.parent.name == "reference" or target.name == "index.md"  # with the site: test_site.py
        assert written or target.exists(), link
    for file, name in re.findall(r"`(?:tests/)?(test_\w+\.py)::(\w+)`", text):
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(), f"{file}::{name}"


def test_anchors_in_the_readme_exist() -> None:
    """Those of the pages among each other are checked where the site is built."""
    links = re.findall(r"\]\(([^)#:]+)#([^)]+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 2
    for page, anchor in links:
        headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.MULTILINE)
        assert anchor in {re.sub(r" +", "-", re.sub(r"[^\w -]", "", head.lower())) for head in headings}, anchor


def test_every_page_of_code_is_in_its_room() -> None:
    """The file tree of the README names folders and files that exist."""
    tree = README.partition("## Where things are")[2]
    for line in re.findall(r"^    ( *[\w./]+)/? {2,}", tree, re.MULTILINE):
        name = line.strip()
        places = [ROOT, ROOT / "probe" / "entropy_probe", ROOT / "probe" / "entropy_probe" / "stages"]
        assert any((place / name).exists() for place in places), name


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
def test_every_file_is_listed_in_its_room(room: Path) -> None:
    """The docstring of a package names all that is in it."""
    doc = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    files = {path.stem for path in room.glob("*.py")} | {path.parent.name for path in room.glob("*/__init__.py")}
    assert {name for name in files if not re.search(rf"\b{name}\b", doc)} <= {"__init__", "__main__"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_named_in_the_docs_exist(page: Path) -> None:
    of_others = {"ds_to_universal.py", "rewards.py"}  # DeepSpeed's; the one that the README asks you to write
    rooms = ("probe/entropy_probe", "checks/entropy_probe_checks", "tests", "docs")
    places = [ROOT, *(ROOT / room for room in rooms)]
    for name in set(re.findall(r"`((?:[\w.]+/)*\w+\.py)`", page.read_text())) - of_others:
        assert any((place / name).exists() for place in places), name


def test_nothing_speaks_of_machines_or_people() -> None:
    banned = re.compile(r"/root/|/work/|\bsession of work\b|\bissue #?\d", re.IGNORECASE)
    listing = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    for name in listing.stdout.splitlines():
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".txt", ".yaml") and name != "tests/test_docs.py" and path.is_file():
            found = banned.search(path.read_text())
            assert found is None or name == "tests/test_demo.py", f"{name}: {found}"


def test_every_criterion_has_its_row() -> None:
    """And every name in the first column of the table is a criterion."""
    table = CRITERIA_PAGE.partition("## The criteria")[2].partition("\n## ")[0]
    named = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(CRITERIA)


def test_faults_named_among_the_criteria_are_planted() -> None:
    planted = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE))
    named = set(re.findall(r"fault `(\w+)`", CRITERIA_PAGE + NOTES_PAGE))
    assert named <= planted
    assert len(named) > 50


def test_every_sentence_of_the_notes_is_held_by_something_that_exists() -> None:
    """A row says how it is held, and names a criterion, a test or a departure; *absent* has a reason."""
    rows = re.findall(r"^\| (.+?) \| (criterion|test|otherwise|absent) \| (.+) \|$", NOTES_PAGE, re.MULTILINE)
    every = re.findall(r"^\| (?!it says|---).*$", NOTES_PAGE, re.MULTILINE)
    assert len(rows) == len(every) > 150
    for sentence, how, by in rows:
        named = set(re.findall(r"(?<!fault )`(\w+)`", by))
        if how == "criterion":
            assert named & {*CRITERIA, *GATES}, sentence
        elif how != "absent":
            assert re.search(r"`\w+\.py(::\w+)?`|departure \d|as above", by), sentence
        else:
            assert len(by.split()) >= 3, sentence


DECISIONS = re.findall(r"^\* (.*(?:\n {2}.*)*)", (ROOT / "docs" / "decisions.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("text", DECISIONS, ids=lambda text: text[2:30])
def test_every_decision_has_its_date(text: str) -> None:
    """In bold what was decided, then the day on which it entered the repository: none before the first one."""
    head = re.match(r"\*\*[^*]+\*\* \((\d{4}-\d\d-\d\d)\)[ ,]", text)
    assert head is not None, text[:80]
    assert datetime.date(2026, 11, 20) <= datetime.date.fromisoformat(head[1])


def test_every_paragraph_of_the_decisions_is_one_of_them() -> None:
    """Below the first heading there is nothing but headings and decisions, so that none can stand without a date."""
    page = (ROOT / "docs" / "decisions.md").read_text()
    lines = page[page.index("\n## ") :].splitlines()
    assert [line for line in lines if line and not line.startswith(("## ", "* **", "  "))] == []
    assert len(DECISIONS) > 50


@pytest.mark.parametrize("name", ["long", "several"])
def test_tables_of_formulas_are_what_the_script_writes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import scaling

    made, begin, end = {
        "long": (scaling.long_rows, scaling.BEGIN_LONG, scaling.END_LONG),
        "several": (scaling.several, scaling.BEGIN_SEVERAL, scaling.END_SEVERAL),
    }[name]
    _, _, rest = scaling.PAGE.read_text().partition(begin)
    assert rest.partition(end)[0].strip() == made().strip()
