"""Every command of every page of the site, of the README and of Contributing is run by a test, or says what it needs.

A command stands in a block, behind four spaces, behind `run:`, or in backticks. It says what it needs in a comment of
the page in front of it, `<!-- needs a trainer -->`, or in its own, `# needs a long time`. What another test runs is
asked of that test; what none runs is run here, as it stands. So a new command is run, or the test fails.
"""

from __future__ import annotations

import glob
import re
import shutil
from pathlib import Path

import pytest
import test_ci_page
import test_readme
import yaml
from test_site_commands import OURS, elsewhere, exists, shell

import forked
import kept_reports
from entropy_probe.demo import checkpoint_path
from site_pages import PAGES, ROOT, fenced, lines

NEEDS = ("a GPU", "a trainer", "a long time", "other packages")
TEXTS = PAGES | {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")}
BY_TESTS = {
    "make site": "tests/test_site.py::built",
    "python docs/benchmarks.py": "tests/test_benchmarks.py::test_pages_say",
    "pytest --probe-checkpoint=runs --probe-prompts=prompts.parquet --probe-config=probe.yaml -m acceptance": (
        "tests/plugin/test_readme.py::test_prompts_and_reward"
    ),
    "PYTHONPATH=tests python -m faults.catalogue > docs/faults.md": "tests/faults/test_faults.py::test_",
}
"""What a test runs under another name, and where."""

_PROGRAM = (
    r"(?:(?:PYTHONPATH=\S+ )?(?:pytest|entropy-probe|torchrun|python3?|make|pip install|mkdocs|shtab)(?= )|\.ci/\w+)"
)
_FENCED = re.compile(r"^(?:<!-- needs (?P<needs>[^>]*?) -->\n)?```(?P<kind>\w*)[^\n]*\n(?P<text>.*?)^```", re.M | re.S)
_BLOCK = re.compile(r"^(?:<!-- needs (?P<needs>[^>]*?) -->\n)?(?P<text>(?: {4}.*\n)+)", re.M)
_QUOTED = re.compile(rf"(?:<!-- needs (?P<needs>[^>]*?) -->\s*)?`(?P<text>{_PROGRAM}[^`]*)`")


def found(text: str) -> list[tuple[str, str]]:
    """The commands of a page, each on one line, with what it needs."""
    every = [
        (line, one["needs"] or "")
        for one in _FENCED.finditer(text)
        if one["kind"] == "sh"
        for line in lines(one["text"])
    ]
    text = _FENCED.sub("\n", text)
    for block in _BLOCK.finditer(text):
        for line in block["text"].splitlines():
            if one := re.match(rf"(?: {{4,}}|.* - run: )({_PROGRAM}.*?)(?: {{2,}}#(?: needs ([^:,(]*))?.*)?$", line):
                every.append((one[1], (one[2] or block["needs"] or "").strip()))
    quoted = _QUOTED.finditer(_BLOCK.sub("\n", text))
    return every + [(" ".join(one["text"].split()), one["needs"] or "") for one in quoted]


def run_by_others() -> list[str]:
    """The commands that the tests of the pages and CI run, as these know them."""
    (job,) = yaml.safe_load(test_ci_page.FILES[test_ci_page.WORKFLOW])["jobs"].values()
    return [
        *(
            line
            for page in OURS
            for kind, _, needs, text in fenced(page)
            if kind == "sh" and not needs
            for line in lines(text)
        ),
        *test_ci_page.COMMANDS,
        *(step["run"] for step in job["steps"] if "run" in step),
        *test_readme.commands(),
        *re.findall(r"make \w+", (ROOT / ".ci" / "run").read_text()),
    ]


def stands_for(command: str) -> re.Pattern[str]:
    """`PATH` stands for any word and `…` for any words; what follows may be left out, and where the output goes."""
    pattern = re.escape(command.partition(" > ")[0])
    pattern = re.sub(r"(?<![A-Z_\w])[A-Z]{3,}(?!\w)", r"\\S+", pattern).replace("…", ".*")
    return re.compile(rf"{pattern}(?: .*)?")


def is_run(command: str, by: list[str]) -> bool:
    return bool(elsewhere(command)) or command in BY_TESTS or any(stands_for(command).fullmatch(one) for one in by)


COMMANDS = [one for text in TEXTS.values() for one in found(text)]
LEFT = list(dict.fromkeys(one for one, needs in COMMANDS if not needs and not is_run(one, run_by_others())))
"""What is run here."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint under the names that the pages use."""
    place = tmp_path_factory.mktemp("place")
    for run in ("", "runs", "runs/a"):
        shutil.copytree(checkpoint_path().parent / "base", place / run / "base", copy_function=shutil.copyfile)
    for checkpoint in ("ckpt", "runs/checkpoint-500", "runs/a/checkpoint-10", "runs/a/checkpoint-20"):
        shutil.copytree(checkpoint_path(), place / checkpoint, copy_function=shutil.copyfile)
    for folder in ("scratch", "reports"):
        (place / folder).mkdir()
    kept_reports.copy(kept_reports.OURS, place / kept_reports.PLACE)
    done = forked.command("entropy-probe run demo --budget smoke --out report.json --evidence kept", cwd=place)
    assert done.returncode == 0, done.stderr
    shutil.copyfile(place / "report.json", place / "reports" / "checkpoint-100.json")
    return place


def test_what_a_command_needs_is_one_of_few_things() -> None:
    assert {needs for _, needs in COMMANDS} - {"", *NEEDS} == set()
    assert {test for test in BY_TESTS.values() if not exists(test)} == set()
    assert set(BY_TESTS) <= {command for command, _ in COMMANDS}


def test_commands_of_every_form_are_found() -> None:
    page = (
        "See `pytest --a`, and <!-- needs a GPU -->\n`python b.py`; `pytest` alone is none.\n\n"
        "```sh\nentropy-probe c \\\n    --d\n```\n\n    make e  # needs a long time (an hour): all of it\n    text\n\n"
        "<!-- needs a trainer -->\n    torchrun f\n\n          - run: pytest g\n"
    )
    assert found(page) == [
        ("entropy-probe c --d", ""),
        ("make e", "a long time"),
        ("torchrun f", "a trainer"),
        ("pytest g", ""),
        ("pytest --a", ""),
        ("python b.py", "a GPU"),
    ]


def test_every_command_is_run_or_says_what_it_needs() -> None:
    """What is left is run below, as it stands: it starts a program of ours, and no word of it stands for another."""
    assert [
        one for one in LEFT if not re.match(r"(pytest|entropy-probe) ", one) or stands_for(one).pattern.count(".*") > 1
    ] == []
    assert [one for one in LEFT if re.search(r"…|(?<![A-Z_\w])[A-Z]{3,}(?!\w)", one)] == []


@pytest.mark.parametrize("command", LEFT)
def test_command(place: Path, command: str) -> None:
    """As it stands, on a checkpoint of the page's name and with the smallest budget."""
    if command.startswith("pytest "):
        done = shell(place, command)
    else:
        smoke = " --budget smoke" if command.startswith("entropy-probe run ") else ""
        words = command.partition(" > ")[0].split()
        words = [word for one in words for word in (sorted(glob.glob(one, root_dir=place)) if "*" in one else [one])]
        done = forked.command(" ".join(words) + smoke, cwd=place)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
