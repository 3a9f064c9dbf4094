"""The site: nothing is missing from the reference, no link is dead, figures and sentences are what they should be."""

from __future__ import annotations

import argparse
import html
import json
import os
import re
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

import entropy_probe
import forked
from entropy_probe import ProbeConfig, ProbeReport, run_probe
from entropy_probe.__main__ import parser
from entropy_probe.config import RECIPES
from entropy_probe.demo import checkpoint_path
from entropy_probe.step_report import StepReport
from entropy_probe_checks.criteria import CRITERIA, GATES
from entropy_probe_checks.thresholds import LIMITS
from pytest_entropy_probe import fixtures
from pytest_entropy_probe.names import FLAGS, MARKERS, OPTIONS
from site_pages import DOCS, PAGES, ROOMS, ROOT, prose

sys.path.insert(0, str(DOCS / "site"))
import written_pages

WRITTEN = written_pages.pages()
PLAIN = [page for page in PAGES if page == "index.md" or page.startswith(("start/", "concepts/"))]
CONCEPTS = ["entropy", "next-step", "u-statistic", "importance", "verdict"]
FILES = ("bin", "jsonl", "json", "pt", "py", "yaml", "parquet")
NAMES_OF_THE_NOTES = (
    "build_functional_params_named",
    "teacher_force_logprobs",
    "generate_batched",
    "compute_update_vector_adamw",
    "entropy_change_two_batch_vector",
    "debug_zero_check",
    "str_to_dtype",
    "apply_global_precision",
    "maybe_cast_logits_fp32",
    "compute_from_logits",
)


def built(place: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    """`mkdocs build` into a folder."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", place],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    done = built(place)
    assert done.returncode == 0, done.stderr
    return place


# The build


def test_no_page_asks_the_network(site: Path) -> None:
    """Scripts, styles, fonts and pictures are the site's own; links for the reader to follow may lead elsewhere."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 40
    loaded = re.compile(r'(?:src|(?<=<link )[^>]*href)=["\']?(https?:)?//', re.IGNORECASE)
    for page in pages:
        assert not loaded.search(page.read_text()), page
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", style.read_text()), style


def test_every_page_has_one_title_and_lists_its_parts(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert text.count("<h1") == 1, page
        parts = re.findall(r'<h2 id="([^"]+)"', text)
        assert {part for part in parts if f'href="#{part}" class="md-nav__link"' not in text} == set(), page


def test_every_page_is_in_the_navigation() -> None:
    nav = re.findall(r"([\w/-]+\.md)", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    assert sorted(nav) == sorted({*PAGES, *WRITTEN})


def test_a_dead_link_stops_the_build(tmp_path: Path) -> None:
    """With the settings of the site, on two pages."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("# First\n\n[good](second.md#there)\n")
    (docs / "second.md").write_text("# Second\n\n## There\n")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    for key in ("nav", "hooks", "plugins", "exclude_docs", "extra_css"):
        del settings[key]
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(settings | {"docs_dir": str(docs), "plugins": []}))
    assert built(tmp_path / "site", tmp_path / "mkdocs.yml").returncode == 0
    dead = ("gone.md", "index.md#gone", "../outside.md", "/gone.html", "gone.svg")
    (docs / "second.md").write_text("# Second\n\n## There\n\n" + " ".join(f"[dead]({link})" for link in dead))
    done = built(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode == 1
    assert {link for link in dead if f"'{link}'" not in done.stderr} == set()


# What the reference must have


def subcommands() -> dict[str, list[str]]:
    """Of every subcommand the options that are shown."""
    (commands,) = (one for one in parser()._actions if isinstance(one, argparse._SubParsersAction))
    return {
        name: [
            action.option_strings[-1]
            for action in command._actions
            if action.option_strings and action.help != argparse.SUPPRESS and action.dest != "help"
        ]
        for name, command in commands.choices.items()
    }


def test_every_option_is_there() -> None:
    page = WRITTEN["reference/options.md"]
    named = {key.replace("_", "-") for key in (*OPTIONS, *FLAGS)} | {"explain"}
    assert {name for name in named if not re.search(rf"^\| `--probe-{name}[=`]", page, re.MULTILINE)} == set()
    assert {key for key in (*OPTIONS, *FLAGS) if f"| `probe_{key}` |" not in page} == set()
    sections = dict(re.findall(r"^### entropy-probe (\w+)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(subcommands())
    for name, flags in subcommands().items():
        assert flags == re.findall(r"^\| `(--?[a-z][\w-]*)", sections[name], re.MULTILINE), name


def keys(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")


def test_every_key_of_the_configuration_is_there() -> None:
    page = WRITTEN["reference/configuration.md"]
    there = set(re.findall(r"^\| `([\w.]+)` \|", page, re.MULTILINE))
    default = ProbeConfig().model_dump()
    assert {key for key in keys(default) if key not in there} == set()
    assert {"precision.dtype", "recipe.kl_coef", "true_delta_h.etas"} <= there
    assert {name for name in RECIPES if f"`{name}`" not in page} == set()


def models(of: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The class, and those of its fields."""
    yield of
    for field in of.model_fields.values():
        yield from models_within(field.annotation)


def models_within(kind: Any) -> Iterator[type[BaseModel]]:
    """Those that an annotation names."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield from models(kind)
    for part in get_args(kind):
        yield from models_within(part)


REPORTS = {"reference/report.md": (ProbeReport, 25), "reference/step.md": (StepReport, 10)}


@pytest.mark.parametrize("path", REPORTS)
def test_every_field_of_the_report_is_there(path: str) -> None:
    page, (report, least) = WRITTEN[path], REPORTS[path]
    assert len(set(models(report))) > least
    for model in set(models(report)):
        name = "The report" if model is report else model.__name__
        section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        assert section is not None, name
        rows = re.findall(r"^\| `(\w+)` \| .+ \| .+ \| .+\. \|$", section[1], re.MULTILINE)
        assert rows == list(model.model_fields), name


def test_every_criterion_is_there() -> None:
    page = WRITTEN["reference/criteria.md"]
    sections = dict(re.findall(r"^### `(\w+)` .*?\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == {*CRITERIA, *GATES, *LIMITS}
    for name, text in sections.items():
        criterion = (CRITERIA | GATES)[name]
        assert criterion.measures in text, name
        assert criterion.meaning in text, name
        assert name in GATES or LIMITS[name].source in text, name


def test_every_marker_and_fixture_is_there() -> None:
    page = WRITTEN["reference/pytest.md"]
    named = {*MARKERS, *(name for name in vars(fixtures) if name.startswith("probe_"))}
    assert {name for name in named if not re.search(rf"^\| `{name}` \| \S", page, re.MULTILINE)} == set()
    assert {"probe_report", "acceptance"} <= named


def test_every_variable_of_the_environment_is_there() -> None:
    """Those that are ours, by their beginning."""
    packages = ("probe", "pytest_entropy_probe", "checks")
    code = "".join(path.read_text() for package in packages for path in (ROOT / package).rglob("*.py"))
    named = set(re.findall(r"[\"'](ENTROPY_PROBE_[A-Z_]+)[\"']", code))
    assert named
    assert {name for name in named if f"| `{name}` |" not in WRITTEN["reference/pytest.md"]} == set()


def imported_on_pages() -> set[str]:
    """What README and the pages import from our packages, with its module."""
    text = "\n".join([(ROOT / "README.md").read_text(), *PAGES.values()])
    found = re.findall(r"^ *from (entropy_probe[\w.]*) import ([\w, ]+)$", text, re.MULTILINE)
    return {f"{module}.{name.strip()}" for module, names in found for name in names.split(",")}


def test_every_public_name_is_there(site: Path) -> None:
    """In the page as it was built: a name that mkdocstrings does not find has no heading."""
    page = (site / "reference" / "api.html").read_text()
    headings = set(re.findall(r'<h\d id="([\w.]+)"', page))
    last = {heading.rpartition(".")[2] for heading in headings}
    assert {name for name in entropy_probe.__all__ if f"entropy_probe.{name}" not in headings} == set()
    assert "entropy_probe.integrations.transformers.EntropyProbeCallback" in imported_on_pages()
    assert imported_on_pages() - headings == set()
    assert {name for name in (*NAMES_OF_THE_NOTES, "CaptureBatch", "to_json", "from_json") if name not in last} == set()


MISSING = {
    "an option of pytest": ("test_every_option_is_there", "options", r"^\| `--probe-recipe=.*\n"),
    "an ini key": ("test_every_option_is_there", "options", r"`probe_recipe`"),
    "an option of a command": ("test_every_option_is_there", "options", r"^\| `--interval .*\n"),
    "an option that another command has too": (
        "test_every_option_is_there",
        "options",
        r"(?s)(?<=### entropy-probe watch\n)(.*?)(?-s:^\| `--prompts .*\n)",
    ),
    "a command": ("test_every_option_is_there", "options", r"(?s)^### entropy-probe watch\n.*?(?=^##)"),
    "a key of the configuration": (
        "test_every_key_of_the_configuration_is_there",
        "configuration",
        r"^\| `batch.seed` .*\n",
    ),
    "a recipe": ("test_every_key_of_the_configuration_is_there", "configuration", r"`nemo-rl`"),
    "a field": ("test_every_field_of_the_report_is_there", "report", r"^\| `momentum_share` .*\n"),
    "a section": ("test_every_field_of_the_report_is_there", "report", r"^## RecipeSection\n"),
    "a field of a step": ("test_every_field_of_the_report_is_there", "step", r"^\| `came` .*\n"),
    "a criterion": ("test_every_criterion_is_there", "criteria", r"(?s)^### `ess` .*?(?=^##)"),
    "a gate": ("test_every_criterion_is_there", "criteria", r"(?s)^### `zero_advantage` .*?(?=^##)"),
    "the reason of a limit": ("test_every_criterion_is_there", "criteria", re.escape(LIMITS["x_coverage"].source)),
    "a marker": ("test_every_marker_and_fixture_is_there", "pytest", r"^\| `zero_check` .*\n"),
    "a fixture": ("test_every_marker_and_fixture_is_there", "pytest", r"^\| `probe_golden` .*\n"),
    "a variable": ("test_every_variable_of_the_environment_is_there", "pytest", r"^\| `ENTROPY_PROBE_TIMEOUT` .*\n"),
}


@pytest.mark.parametrize("kind", MISSING)
def test_a_name_without_a_place_is_seen(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind, taken out of the page that was written."""
    test, page, pattern = MISSING[kind]
    path = f"reference/{page}.md"
    text, count = re.subn(
        pattern, lambda found: found[1] if found.lastindex else "", WRITTEN[path], count=1, flags=re.MULTILINE
    )
    assert count == 1
    assert text != WRITTEN[path]
    monkeypatch.setitem(WRITTEN, path, text)
    given = {"path": path} if path in REPORTS else {}
    with pytest.raises(AssertionError):
        globals()[test](**given)


@pytest.mark.parametrize("name", ["run_probe", "integrations.transformers.EntropyProbeCallback", "trl.CaptureBatch"])
def test_a_public_name_without_a_place_is_seen(name: str, site: Path, tmp_path: Path) -> None:
    page = (site / "reference" / "api.html").read_text()
    assert f'id="entropy_probe.{name}"' in page
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "api.html").write_text(page.replace(f'id="entropy_probe.{name}"', 'id="gone"'))
    with pytest.raises(AssertionError):
        test_every_public_name_is_there(tmp_path)


def test_a_name_that_is_new_in_the_code_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no page was written since."""
    for table, test in ((OPTIONS, test_every_option_is_there), (MARKERS, test_every_marker_and_fixture_is_there)):
        with monkeypatch.context() as new:
            new.setitem(table, "nowhere", next(iter(table.values())))
            with pytest.raises(AssertionError):
                test()


def test_the_code_that_the_reference_reads_is_what_it_says() -> None:
    for name, module in written_pages.ELSEWHERE.items():
        assert hasattr(__import__(module, fromlist=[name]), name)
    for name, members in written_pages.MEMBERS.items():
        owner = getattr(entropy_probe, name, None) or getattr(
            __import__(written_pages.ELSEWHERE.get(name, "entropy_probe"), fromlist=[name]), name
        )
        assert all(hasattr(owner, member) for member in members), name


def test_a_shell_completes_the_command(tmp_path: Path) -> None:
    """As the page of options says: the script is bash, and knows the subcommands."""
    line = re.search(r"`source <\((shtab [^`]*)\)`", WRITTEN["reference/options.md"])
    assert line is not None
    done = forked.command(line[1], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ask = "COMP_WORDS=(entropy-probe sch); COMP_CWORD=1; _shtab_entropy_probe; echo ${COMPREPLY[@]}"
    (tmp_path / "complete.sh").write_text(f"{done.stdout}\n{ask}\n")
    answer = subprocess.run(["bash", "complete.sh"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert answer.stdout.split() == ["schema"]


@pytest.mark.parametrize("page", sorted(PAGES))
def test_options_and_fields_that_a_page_names_exist(page: str) -> None:
    real = {f"--probe-{key.replace('_', '-')}" for key in (*OPTIONS, *FLAGS)} | {"--probe-explain"}
    assert set(re.findall(r"--probe-[a-z-]+", PAGES[page])) <= real
    if not page.startswith(ROOMS):
        return
    groups = {"entropy_probe.datasets", "entropy_probe.rewards"}
    configured = {*keys(ProbeConfig().model_dump()), "precision.dtype", *groups}
    for name in re.findall(r"`([a-z_0-9]+(?:\.[a-z_0-9]+)+)`", PAGES[page]):
        section, _, field = name.partition(".")
        of_report = ProbeReport.model_fields.get(section)
        fields = (
            {one for model in models_within(of_report.annotation) for one in model.model_fields} if of_report else ()
        )
        assert name in configured or field in fields or Path(name).suffix[1:] in FILES, name


# Words and figures


@pytest.mark.parametrize("page", PLAIN)
def test_sentences_are_short_where_a_newcomer_reads(page: str) -> None:
    long = [one for one in prose(page) if len(re.findall(r"[\w'-]+", one)) > 30]
    assert long == []


def test_long_sentences_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    words = " ".join(["word"] * 30)
    monkeypatch.setitem(PAGES, "start/long.md", f"# Head\n\n* {words}.\n* One {words}\n  more.\n\n| a | b {words} |\n")
    assert [len(one.split()) for one in prose("start/long.md")] == [1, 30, 32, 1, 31]


@pytest.fixture(scope="module")
def drawn() -> dict[str, Any]:
    return json.loads((DOCS / "concepts" / "figures.json").read_text())


@pytest.mark.parametrize("name", CONCEPTS)
def test_every_concept_has_one_figure(name: str) -> None:
    (figure,) = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", PAGES[f"concepts/{name}.md"])
    assert figure[1] == f"{name}.svg"
    assert len(figure[0].split()) >= 8
    file = DOCS / "concepts" / figure[1]
    assert file.stat().st_size < 40_000
    assert ElementTree.parse(file).getroot().tag.endswith("svg")


def test_numbers_in_the_text_are_those_of_the_figures(drawn: dict[str, Any]) -> None:
    of = {name: drawn[name] for name in ("entropy", "next-step", "u-statistic", "importance")}
    one, step, u, weights = of.values()
    minus = "−"
    said = {
        "entropy": [f"{one['tokens']} tokens", f"{one['response']:.2f} nats", f"{one['per_token']:.3f} nats per token"],
        "next-step": [
            f"{minus}{-step['predicted']:.4f} nats per response",
            f"{minus}{-step['realised']:.4f} ± {step['se']:.4f}",
        ],
        "u-statistic": [
            f"{u['units']} prompts",
            f"{u['diagonal']:.0f} on average",
            f"the mean is {u['with_diagonal']:.0f}",
            f"{minus}{-u['u_cross']:.0f} ± {u['se']:.0f}",
        ],
        "importance": [
            f"ESS/N is {weights['ess_1']:.3f}",
            f"all {weights['responses']:.0f} responses",
            f"it is {weights['ess_10']:.2f}",
            f"{weights['ess_30']:.2f}. Below",
        ],
    }
    for name, numbers in said.items():
        text = " ".join(PAGES[f"concepts/{name}.md"].split())
        for number in numbers:
            assert number in text, f"{name}: {number}"
    status = drawn["verdict"]
    assert status["pareto_k_healthy"] == "not_applicable"
    assert (status["ess_large"], status["pareto_k_large"], status["on_policy_other"]) == ("inconclusive",) * 2 + (
        "fail",
    )
    assert {value for name, value in status.items() if name.endswith("_healthy")} == {"pass", "not_applicable"}


def test_the_figures_are_those_of_the_bundled_checkpoint(drawn: dict[str, Any]) -> None:
    """Measured again, at two of the steps: on stored responses and in float64 every machine gets the same."""
    golden = ROOT / "golden" / "demo"
    given = {"budget": "smoke", "precision": {"dtype": "float64"}, "true_delta_h": {"etas": [0.0, 1e-3, 1e-2]}}
    config = ProbeConfig.from_mapping(given | {"invariance": {"max_examples": 0}})
    report = run_probe(checkpoint_path(), config, golden / "e.jsonl", golden / "u.jsonl")
    assert report.next_step is not None
    assert report.first_order is not None
    far = report.entropy_change[-1]
    again = {
        ("demo", "per_token"): report.entropy.per_token.value,
        ("next-step", "predicted"): report.next_step.predicted,
        ("next-step", "realised"): report.next_step.realised[0],
        ("u-statistic", "u_cross"): report.first_order.u_cross,
        ("u-statistic", "se"): report.first_order.se_plugin,
        ("u-statistic", "diagonal"): report.first_order.diag_sum / report.first_order.num_units,
        ("importance", "ess_1"): report.next_step.unclipped_ess_fraction,
        ("importance", "ess_10"): far.unclipped_ess_fraction,
    }
    for (figure, name), value in again.items():
        assert drawn[figure][name] == pytest.approx(value, rel=1e-6), name  # float64, through 4 layers


def test_the_picture_of_the_layers_is_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if "entropy_probe.run" in str(one.get("layers")))
    picture = (DOCS / "contributing" / "layers.svg").read_text()
    said = re.findall(r"<text[^>]*>([^<]*)</text>", picture) + re.findall(r"<tspan[^>]*>([^<]*)</tspan>", picture)
    named = set(re.findall(r"\w+", " ".join(said)))
    modules = [name.strip().removeprefix("entropy_probe.") for layer in layers for name in layer.split("|")]
    assert set(modules) <= named, "python docs/site/figures.py layers"


def test_the_words_of_the_last_lines_are_explained() -> None:
    """What a run ends with stands in the table of the page that explains it."""
    explained = set(re.findall(r"^\| \*\*(\S+)\*\* \|", PAGES["start/reading.md"], re.MULTILINE))
    lines = re.findall(r">([^<]*)</text>", html.unescape((DOCS / "run.svg").read_text()))
    labels = {line.split()[0] for line in lines if re.match(r"\S{1,8}[\u00a0 ]+\S", line) and line[8] in "\u00a0 "}
    assert labels - {"$"} == explained
    answers = set(re.findall(r'"([A-Z][a-z]+(?: [a-z]+)*)"', (ROOT / "probe/entropy_probe/answer.py").read_text()))
    told = set(re.findall(r"\*([A-Z][^*]+)\*", PAGES["start/reading.md"]))
    told |= {"The one check passed", "The one limit holds", "Both"}  # what ends a sentence, and begins none
    assert answers - told == set()
