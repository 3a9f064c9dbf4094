"""The JSON Schema: it is that of what is written, says something of every field, and turns down what is no report."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from pydantic import BaseModel

import entropy_probe.schema as schema_module
from entropy_probe import ProbeConfig, ProbeReport, report, run_probe
from entropy_probe.__main__ import main
from entropy_probe.config import SequenceConfig, recipe, sections
from entropy_probe.demo import checkpoint_path
from entropy_probe.schema import UNITS, config_fields, config_schema, described, report_fields, report_schema
from entropy_probe_checks.criteria import CRITERIA

ROOT = Path(__file__).parents[1]
HELD = ROOT / "probe" / "entropy_probe" / "schema" / "report.schema.json"


def objects(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every table of a schema that has fields of its own."""
    found = {"": schema} | schema["$defs"]
    return {name: table for name, table in found.items() if "properties" in table}


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    """The report of a run on the bundled checkpoint, as its file has it."""
    golden = ROOT / "golden" / "demo"
    config = ProbeConfig.load(golden / "probe.yaml")
    made = run_probe(checkpoint_path(), config, golden / "e.jsonl", golden / "u.jsonl")
    judged = [criterion(made) for criterion in CRITERIA.values()]
    return json.loads(made.model_copy(update={"verdicts": judged}).model_dump_json())


def validate(content: dict[str, Any], schema: dict[str, Any] | None = None) -> None:
    Draft202012Validator(report_schema() if schema is None else schema).validate(content)


def test_the_file_in_the_package_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert HELD.read_text() == capsys.readouterr().out, (
        "entropy-probe schema > probe/entropy_probe/schema/report.schema.json"
    )
    assert main(["schema", "config"]) == 0
    assert json.loads(capsys.readouterr().out) == config_schema()


@pytest.mark.parametrize("schema", [report_schema, config_schema])
def test_every_field_has_a_unit_and_a_sentence(schema: Any) -> None:
    Draft202012Validator.check_schema(schema())
    for table, content in objects(schema()).items():
        for name, field in content["properties"].items():
            where = f"{table}.{name}"
            assert field["unit"] in UNITS, where
            assert field["description"].endswith("."), where
            assert len(field["description"].split()) >= 2, where


def test_a_field_without_a_description_is_named() -> None:
    class Odd(report._Section):
        strange: float

    with pytest.raises(KeyError, match=r"Odd\.strange has no unit and description: add it to entropy_probe/schema/"):
        described(Odd, "strange")


def test_nothing_is_described_that_is_not_there() -> None:
    """A field that was renamed or removed leaves no line behind."""
    known = [*vars(report).values(), *vars(sections).values(), *vars(recipe).values(), SequenceConfig, ProbeConfig]
    classes = {cls.__name__: cls for cls in known if isinstance(cls, type) and issubclass(cls, BaseModel)}
    said: list[tuple[str, str]] = []
    for table in (report_fields.FIELDS, config_fields.FIELDS):
        said += [(model, name) for model, name, _ in schema_module._read(table)]
    assert len(said) == len(set(said))
    for model, name in said:
        assert name in classes[model].__annotations__, f"{model}.{name}"


def test_reports_of_the_demo_are_valid(demo: dict[str, Any]) -> None:
    validate(demo)


def test_numbers_that_are_not_finite_are_valid(demo: dict[str, Any]) -> None:
    for text in ("NaN", "Infinity", "-Infinity"):
        demo = copy.deepcopy(demo)
        demo["update"]["norm"] = text
        ProbeReport.model_validate_json(json.dumps(demo))
        validate(demo)


def test_what_is_no_report_is_turned_down(demo: dict[str, Any]) -> None:
    """A field that is missing, one too many, one of another type: at the top and within a section."""
    poisons: list[Callable[[dict[str, Any]], object]] = [
        lambda r: r.pop("entropy"),
        lambda r: r.update(entropie=1),
        lambda r: r["update"].pop("norm"),
        lambda r: r["update"].update(norm="large"),
        lambda r: r["batch"].update(num_prompts=1.5),
        lambda r: r["verdicts"].append({"criterion": "ess"}),
        lambda r: r["entropy_change"][0].update(in_range="yes"),
    ]
    for poison in poisons:
        wrong = copy.deepcopy(demo)
        poison(wrong)
        with pytest.raises(ValidationError):
            validate(wrong)


@pytest.mark.parametrize("file", ["golden/demo/probe.yaml", "docs/collapse.yaml"])
def test_configurations_of_this_repository_are_valid(file: str) -> None:
    validate(yaml.safe_load((ROOT / file).read_text()), config_schema())


def test_configurations_are_judged_as_the_reader_judges_them() -> None:
    for good in ({"recipe": "trl-dapo"}, {"memory_limit": "8GiB"}, {"limits": {"entropy": {"min": 0.05}, "ess": 1}}):
        ProbeConfig.from_mapping(good)
        validate(good, config_schema())
    for bad in ({"batch": {"num_prompts": 1}}, {"batches": {}}, {"generation": {"top_p": 0}}, {"budget": "large"}):
        with pytest.raises(Exception, match="configuration"):
            ProbeConfig.from_mapping(bad)
        with pytest.raises(ValidationError):
            validate(bad, config_schema())
