"""The JSON Schema of the report and of the configuration: every field with its type, its unit and a sentence.

report_fields  what every field of the report is;   config_fields  the same of the configuration
step_fields    the same of the report of a step that was probed during training

Types come from the classes in `report.py` and `config/`, so that the schema cannot say another type than what is
written. `report.schema.json` beside this file is the schema of the report as a file:

    entropy-probe schema > probe/entropy_probe/schema/report.schema.json
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, JsonSchemaValue

from entropy_probe.config import ProbeConfig
from entropy_probe.report import SCHEMA_VERSION, ProbeReport
from entropy_probe.schema import config_fields, report_fields, step_fields
from entropy_probe.schema.report_fields import UNITS
from entropy_probe.step_report import STEP_SCHEMA_VERSION, StepReport

__all__ = ["UNITS", "Described", "config_schema", "described", "report_schema", "step_schema"]

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_NOT_FINITE = ["NaN", "Infinity", "-Infinity"]
_AS_TEXT = ("recipe", "memory_limit")
"""Keys that a text may stand for: the name of a recipe, a size such as 8GiB."""


@dataclass(frozen=True)
class Described:
    """What one field is: its unit, one of `UNITS`, and a sentence."""

    unit: str
    text: str


def _read(table: str) -> Iterator[tuple[str, str, Described]]:
    """Class, field, what it is: of every line of a table; a line that is indented further goes on with the last."""
    model = ""
    for line in filter(None, re.sub(r"\n {4,}", " ", table).splitlines()):
        if not line.startswith(" "):
            model = line
            continue
        name, unit, text = re.split(r" {2,}", line.strip(), maxsplit=2)
        yield model, name, Described(unit, text)


_TABLE: dict[tuple[str, str], Described] = {
    (model, name): found
    for table in (report_fields.FIELDS, config_fields.FIELDS, step_fields.FIELDS)
    for model, name, found in _read(table)
}


def described(model: type[BaseModel], field: str) -> Described:
    """Of a field of a class in `report.py` or `config/`, or of the class that it is inherited from.

    `KeyError` where nothing is said of it: the message names the table.
    """
    for cls in model.__mro__:
        if found := _TABLE.get((cls.__name__, field)):
            return found
    where = f"{model.__name__}.{field}"
    raise KeyError(f"{where} has no unit and description: add it to entropy_probe/schema/")


class _Described(GenerateJsonSchema):
    """pydantic's own schema, in which every field has `unit` and `description`, and numbers may be NaN or infinite."""

    def model_schema(self, schema: Any) -> JsonSchemaValue:
        made = super().model_schema(schema)
        for name, field in made.get("properties", {}).items():
            found = described(schema["cls"], name)
            field.pop("title", None)
            field["unit"] = found.unit
            field["description"] = found.text
        return made

    def float_schema(self, schema: Any) -> JsonSchemaValue:
        made = super().float_schema(schema)
        if self.mode == "validation":  # of a configuration, whose numbers are finite
            return made
        return {"anyOf": [made, {"enum": _NOT_FINITE}]}


def report_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of report.json."""
    name = f"entropy probe report, schema_version {SCHEMA_VERSION}"
    return _schema(ProbeReport, "serialization", name)


def step_schema() -> dict[str, Any]:
    """The JSON Schema of the report of one step that was probed during training."""
    name = f"entropy probe report of a step, schema_version {STEP_SCHEMA_VERSION}"
    return _schema(StepReport, "serialization", name)


def config_schema() -> dict[str, Any]:
    """The JSON Schema of the configuration, as editors take it for a probe.yaml."""
    made = _schema(ProbeConfig, "validation", "entropy probe configuration")
    for key in _AS_TEXT:
        field = made["properties"][key]
        kinds = field.pop("anyOf", None) or [{"$ref": field.pop("$ref")}]
        field["anyOf"] = [{"type": "string"}, *kinds]
    return made


def _schema(model: type[BaseModel], mode: JsonSchemaMode, title: str) -> dict[str, Any]:
    made = model.model_json_schema(schema_generator=_Described, mode=mode)
    return {"$schema": _DIALECT, **made, "title": title}
