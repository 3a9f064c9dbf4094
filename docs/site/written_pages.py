"""The pages of the reference that are written from the code: path below docs/ → Markdown.

Nothing here is a text of its own where the code has one: help of options, docstrings of criteria and fixtures, the
tables in `entropy_probe/schema/`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel

import entropy_probe
from entropy_probe.__main__ import parser
from entropy_probe.budgets import BUDGETS
from entropy_probe.config import RECIPES, ProbeConfig
from entropy_probe.options import KEYS
from entropy_probe.schema import UNITS, config_schema, report_schema, step_schema
from entropy_probe_checks.bounds import COUNTS
from entropy_probe_checks.criteria import CRITERIA, GATES
from entropy_probe_checks.criteria.verdicts import Criterion
from entropy_probe_checks.thresholds import LIMITS
from pytest_entropy_probe import fixtures
from pytest_entropy_probe.names import MARKERS
from pytest_entropy_probe.plugin import pytest_addoption

ROOT = Path(__file__).parents[2]
WRITTEN = "<!-- written by docs/site/written_pages.py when the site is built -->\n\n"

ELSEWHERE = {
    "build_functional_params_named": "entropy_probe.model.overrides",
    "compute_update_vector_adamw": "entropy_probe.stages.update",
    "entropy_change_two_batch_vector": "entropy_probe.stages.entropy_change",
    "str_to_dtype": "entropy_probe.model.precision",
    "apply_global_precision": "entropy_probe.model.precision",
    "maybe_cast_logits_fp32": "entropy_probe.model.precision",
    "DistributionDiagnostics": "entropy_probe.estimators.token_stats",
    "CaptureBatch": "entropy_probe.trl",
    "EntropyProbeCallback": "entropy_probe.integrations.transformers",
    "measure_step": "entropy_probe.live",
    "ProbedStep": "entropy_probe.live",
    "whole": "entropy_probe.live",
    "run_skill": "entropy_probe.predictor_skill",
    "checkpoint_path": "entropy_probe.demo",
    "World": "entropy_probe.processes.world",
}
"""Public names that are not in `entropy_probe` itself → where they are imported from."""

MEMBERS = {
    "ProbeReport": [
        "to_json",
        "from_json",
        "next_step",
        "doubts",
        "not_chosen",
        "evidence",
        "no_second_moment",
    ],
    "ProbeConfig": ["load", "from_mapping"],
    "GenerationConfig": [],
    "World": ["of_torchrun", "close"],
    "CaptureBatch": [],
    "EntropyProbeCallback": [],
    "ProbedStep": ["after"],
    "DistributionDiagnostics": ["compute_from_logits"],
}
"""Of these classes not every method is for users."""


def pages() -> dict[str, str]:
    """Every page that is written from the code."""
    made = {
        "reference/configuration.md": configuration(),
        "reference/options.md": options(),
        "reference/report.md": report(),
        "reference/step.md": step(),
        "reference/criteria.md": criteria(),
        "reference/pytest.md": in_pytest(),
        "reference/api.md": api(),
    }
    return {path: WRITTEN + text for path, text in made.items()} | {
        "contributing/index.md": contributing()
    }


def table(heads: tuple[str, ...], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> str:
    """A Markdown table; a bar within a cell is no border."""
    lines = [heads, ("---",) * len(heads), *rows]
    return (
        "\n".join(
            f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines
        )
        + "\n"
    )


def kind(schema: Mapping[str, Any], place: str = "") -> str:
    """The type of a field in words; `place` is the page that has the tables of its sections."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}]({place}#{name.lower()})"
    if "const" in schema:
        return f"`{schema['const']}`".lower()
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    if "anyOf" in schema or "oneOf" in schema:
        parts = [kind(one, place) for one in schema.get("anyOf") or schema["oneOf"]]
        return " or ".join(dict.fromkeys(one for one in parts if "NaN" not in one))
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"{len(schema['prefixItems'])} numbers"
        return f"list: {kind(schema['items'], place)}"
    if schema.get("type") == "object":
        of = schema.get("additionalProperties", True)
        return f"by name: {kind(of, place)}" if isinstance(of, Mapping) and of else "table"
    names = {
        "number": "number",
        "integer": "whole number",
        "string": "text",
        "boolean": "flag",
        "null": "null",
    }
    return names.get(schema.get("type", ""), "anything") + bounds(schema)


def bounds(schema: Mapping[str, Any]) -> str:
    """What a number must keep to."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    said = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if key in schema]
    return f" {', '.join(said)}" if said else ""


def shown(value: Any) -> str:
    """A default as it is written in YAML."""
    plain = {None: "null", True: "true", False: "false"}
    return f"`{plain[value]}`" if value is None or isinstance(value, bool) else f"`{value}`"


# The configuration


def configuration() -> str:
    schema = config_schema()
    defined = schema["$defs"]
    parts = [
        "# Configuration\n",
        "`--probe-config=probe.yaml`, or the table `[tool.entropy-probe]` in pyproject.toml. "
        "The command line stands over the file, the file over pyproject.toml, and all of them"
        " over the budget. A key that is not listed here is an error. `entropy-probe schema "
        "config` prints this page as a JSON Schema, which editors take for YAML files.\n",
        "## The top level\n",
        _keys(ProbeConfig, schema["properties"], defined),
    ]
    for name, field in schema["properties"].items():
        section = _section_of(field)
        if section:
            parts += [
                f"## `{name}`\n",
                _first(defined[section]),
                _keys_of(section, defined, f"{name}."),
            ]
        for inner, of in defined[section]["properties"].items() if section else ():
            if deeper := _section_of(of):
                parts += [f"### `{name}.{inner}`\n", _first(defined[deeper])]
                parts += [_keys_of(deeper, defined, f"{name}.{inner}.")]
    parts += ["## Budgets\n", "What each budget sets, under whatever you set yourself.\n"]
    rows = []
    for name, budget in BUDGETS.items():
        values = [
            f"`{section}.{key}: {value}`"
            for section, of in budget.values.items()
            for key, value in of.items()
        ]
        rows.append(
            (
                f"`{name}`",
                ", ".join(values) or "the defaults",
                ", ".join(budget.left_out) or "nothing",
            )
        )
    parts.append(table(("budget", "sets", "leaves out"), rows))
    parts += [
        "## Recipes\n",
        "Names for `recipe`, beside `auto`. [Whose update](../recipes.md) says what each "
        "sets, and what the parts mean.\n",
        ", ".join(f"`{name}`" for name in RECIPES) + ".\n",
    ]
    return "\n".join(parts)


def _section_of(field: Mapping[str, Any]) -> str:
    """The class of a field that is a section of its own; empty for a value."""
    kinds = [field, *field.get("anyOf", ())]
    return next((one["$ref"].rpartition("/")[2] for one in kinds if "$ref" in one), "")


def _first(defined: Mapping[str, Any]) -> str:
    """The first paragraph of a class's docstring; where it is long its first sentence."""
    text = " ".join(defined.get("description", "").split("\n\n")[0].split())
    if len(text.split()) > 60:
        text = re.split(r"(?<=\.) ", text)[0]
    return f"{text}\n"


def _keys_of(section: str, defined: Mapping[str, Any], prefix: str) -> str:
    return _keys(None, defined[section]["properties"], defined, prefix)


def _keys(
    model: type[BaseModel] | None,
    properties: Mapping[str, Any],
    defined: Mapping[str, Any],
    prefix: str = "",
) -> str:
    rows = []
    for name, field in properties.items():
        if _section_of(field) and field.get("unit") == "section":
            values, default = "section", "see below"
        else:
            values = kind(field)
            default = (
                shown(field["default"])
                if "default" in field
                else "`{}`"
                if "by name" in values
                else "`[]`"
            )
        set_by = [
            f"`--probe-{key.replace('_', '-')}`"
            for key, dotted in KEYS.items()
            if dotted == prefix + name
        ]
        text = field["description"] + (f" Option: {set_by[0]}." if set_by else "")
        rows.append((f"`{prefix}{name}`", values, default, text))
    return table(("key", "values", "default", "what it is"), rows)


# Options


class _OfPytest:
    """Stands for pytest's parser, and takes down the options and keys that the plugin adds."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str]] = []
        self.keys: set[str] = set()

    def getgroup(self, name: str, description: str) -> _OfPytest:
        return self

    def addoption(
        self, name: str, *, metavar: str = "", help: str, dest: str = "", **_: Any
    ) -> None:
        shown = f"{name}={metavar}" if metavar else name
        self.rows.append((f"`{shown}`", f"`{dest}`" if dest else "", _sentence(help)))

    def addini(self, name: str, *_: Any, **__: Any) -> None:
        self.keys.add(name)


def options() -> str:
    taken = _OfPytest()
    pytest_addoption(cast(Any, taken))
    parts = [
        "# Options and commands\n",
        "## Options of pytest\n",
        "Each is also a key of pytest's own configuration, in pytest.ini or under "
        "`[tool.pytest.ini_options]`, by the name in the second column. Without "
        "`--probe-checkpoint` nothing of this is active.\n",
        table(("option", "ini key", "what it does"), taken.rows),
    ]
    main = parser()
    parts += [
        "## The command entropy-probe\n",
        "It measures without pytest. `entropy-probe --version` prints the version. `python -m"
        " entropy_probe` is the same command, and under `torchrun` it is the one to use.\n",
        "With `pip install shtab`, the line `source <(shtab --shell=bash"
        " entropy_probe.__main__.parser)` in `~/.bashrc` makes the shell complete it;"
        " `--shell=zsh` does so for zsh.\n",
    ]
    (commands,) = (one for one in main._actions if isinstance(one, argparse._SubParsersAction))
    helps = {one.dest: one.help for one in commands._choices_actions}
    for name, command in commands.choices.items():
        parts += [f"### entropy-probe {name}\n", _sentence(helps[name] or "") + "\n"]
        rows = [
            _argument(one)
            for one in command._actions
            if one.help != argparse.SUPPRESS and one.dest != "help"
        ]
        parts.append(table(("argument", "what it does"), rows))
    parts += [
        "## Exit codes\n",
        table(
            ("code", "pytest", "entropy-probe"),
            [
                ("0", "every verdict passed", "all is well"),
                (
                    "1",
                    "a verdict failed, or a checkpoint cannot be loaded",
                    "it cannot be loaded, measured or believed",
                ),
                ("4", "an option, a path or a configuration makes no sense", "the same"),
                ("5", "nothing was selected", ""),
                ("141", "", "the reader of a pipe is gone"),
            ],
        ),
    ]
    return "\n".join(parts)


def _argument(action: argparse.Action) -> tuple[str, str]:
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else ""
    value = "" if action.nargs == 0 else (action.metavar or choices or action.dest.upper())
    if not action.option_strings:
        return f"`{value if isinstance(value, str) else action.dest}`", _sentence(
            action.help or action.dest
        )
    needed = " Required." if action.required else ""
    return f"`{' '.join(filter(None, (action.option_strings[-1], str(value))))}`", _sentence(
        action.help or ""
    ) + needed


def _sentence(text: str) -> str:
    """A text of help as a sentence."""
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith(".") else ".")


# The report


def report() -> str:
    schema = report_schema()
    parts = [
        "# Fields of the report\n",
        "`--probe-json=report.json`, `entropy-probe run … --out report.json`, or in Python a "
        "`ProbeReport`. The file is JSON. NaN and the infinities, which JSON lacks, are "
        "written as the texts `NaN`, `Infinity` and `-Infinity`. A field that is null was not"
        " measured. `entropy-probe schema` prints this page as a JSON Schema (draft 2020-12);"
        " the package has it as `entropy_probe/schema/report.schema.json`.\n",
        "[Notation](../notation.md) explains the symbols, and [criteria](../criteria.md) says"
        " which criterion judges a field.\n",
        *_tables(schema),
        "## Units\n",
        table(("unit", "what it is"), [(f"`{unit}`", text) for unit, text in UNITS.items()]),
    ]
    return "\n".join(parts)


def step() -> str:
    parts = [
        "# Fields of the report of a step\n",
        "The callback of [the training loop](../howto/in-the-loop.md) writes one such file for each"
        " step that it measures, and `measure_step` gives one as an object. `entropy-probe schema"
        " step` prints this page as a JSON Schema. The units are those of [the report of a"
        " checkpoint](report.md#units).\n",
        *_tables(step_schema()),
    ]
    return "\n".join(parts)


def _tables(schema: Mapping[str, Any]) -> list[str]:
    """The fields of a report, then those of each of its sections."""
    parts = ["## The report\n", _fields(schema["properties"])]
    for name, places in _in_order(schema).items():
        more = ", …" if len(places) > 3 else ""
        parts += [
            f"## {name}\n",
            f"At {', '.join(f'`{place}`' for place in places[:3])}{more}\n",
            _first(schema["$defs"][name]),
            _fields(schema["$defs"][name]["properties"]),
        ]
    return parts


def _in_order(schema: Mapping[str, Any]) -> dict[str, list[str]]:
    """Sections in the order in which the report names them, each with its places, such as `update.estimators[NAME]`."""
    found: dict[str, list[str]] = {}

    def visit(properties: Mapping[str, Any], place: str) -> None:
        for field, of in properties.items():
            index = (
                "[NAME]"
                if "additionalProperties" in str(of)
                else "[N]"
                if "items" in str(of)
                else ""
            )
            for name in re.findall(r"#/\$defs/(\w+)", str(of)):
                found.setdefault(name, []).append(f"{place}{field}{index}")
                visit(schema["$defs"][name]["properties"], f"{place}{field}{index}.")

    visit(schema["properties"], "")
    return found


def _fields(properties: Mapping[str, Any]) -> str:
    rows = [
        (f"`{name}`", kind(of), of["unit"], of["description"]) for name, of in properties.items()
    ]
    return table(("field", "type", "unit", "what it is"), rows)


# Criteria


def criteria() -> str:
    parts = [
        "# Criteria and their limits\n",
        "What `pytest --probe-explain=all` prints: of every criterion what it measures, its "
        "limit and the reason for it, and what a failure usually means. [The "
        "criteria](../criteria.md) has one table of all: which field of the report each one "
        "judges, and when it is skipped or stays open.\n",
    ]
    family = ""
    for criterion in (CRITERIA | GATES).values():
        if criterion.family != family:
            family = criterion.family
            parts += [f"## Family {family}\n", f"`-m {family}`: {MARKERS[family]}.\n"]
        parts.append(_criterion(criterion))
    return "\n".join(parts)


def _criterion(criterion: Criterion) -> str:
    name = criterion.name
    if name in GATES:
        bound = (
            "`max` alone"
            if name in COUNTS
            else "`min`, `max`, `fall`, `rise`, `fall_se`, `rise_se`, `noise`"
        )
        limit = (
            f"none: the gate is off until `limits.{name}` sets one of {bound} ([gates](../ci.md))."
        )
    else:
        found = LIMITS[name]
        value = "" if found.value is None else f"{found.value:g}. "
        limit = f"{value}{found.source}." + (f" Set it with `{found.key}`." if found.key else "")
    lines = [
        f"### `{name}` {{#{name}}}\n",
        f"{criterion.measures}\n",
        f"**Limit:** {limit}\n",
        f"**A failure means:** {criterion.meaning}\n",
    ]
    without = [f"`{budget}`" for budget, of in BUDGETS.items() if criterion.part in of.left_out]
    if without:
        lines.append(f"Not asked under the budget {', '.join(without)}.\n")
    if criterion.needs_second_moment:
        lines.append("Asked only where the optimizer is Adam.\n")
    return "\n".join(lines)


# pytest


def in_pytest() -> str:
    found = [(name, of) for name, of in vars(fixtures).items() if name.startswith("probe_")]
    return "\n".join(
        [
            "# Markers and fixtures\n",
            "## Markers\n",
            "`-m NAME` selects the checks of a family; names combine, as in `-m 'acceptance "
            "or gate'`. Every check has an id "
            "`probe-checks/test_<family>.py::test_<criterion>[<checkpoint>]`.\n",
            table(
                ("marker", "what it selects"),
                [(f"`{name}`", _sentence(text)) for name, text in MARKERS.items()],
            ),
            "## Fixtures\n",
            "For your own tests. All but `probe_golden` live as long as the session, and are "
            "made at first use. A test that asks for one is skipped where no checkpoint is "
            "given, and runs once for each checkpoint where several are.\n",
            table(("fixture", "what it is"), [(f"`{name}`", _doc(of)) for name, of in found]),
            "## Names for entry points\n",
            "A package registers its own datasets under `entropy_probe.datasets`, and its own"
            " rewards under `entropy_probe.rewards`; `batch.dataset` and `batch.reward` then "
            "take them by name.\n",
            "## Environment variables\n",
            table(
                ("variable", "what it does"),
                [
                    (
                        "`CI`",
                        "Where it is set, golden files are written only with "
                        "`--probe-golden-update-in-ci`.",
                    ),
                    (
                        "`GITHUB_STEP_SUMMARY`",
                        "The file to which a summary in Markdown is added, which GitHub shows.",
                    ),
                    (
                        "`ENTROPY_PROBE_TIMEOUT`",
                        "Seconds without a sign of life after which a process counts as dead (60).",
                    ),
                ],
            ),
        ]
    )


def _doc(fixture: Any) -> str:
    function = getattr(fixture, "__wrapped__", None) or fixture._get_wrapped_function()
    return " ".join((function.__doc__ or "").split())


# Python


def api() -> str:
    parts = [
        "# Python\n",
        "Names that are imported from `entropy_probe` itself. They are loaded at first use, "
        "so that `import entropy_probe` imports neither torch nor pydantic.\n",
    ]
    parts += [_object(f"entropy_probe.{name}", name) for name in entropy_probe.__all__]
    parts += ["## Names from other modules\n"]
    parts += [_object(f"{module}.{name}", name) for name, module in ELSEWHERE.items()]
    return "\n".join(parts)


def _object(path: str, name: str) -> str:
    chosen = ""
    if name in MEMBERS:
        chosen = f"    options:\n      members: {MEMBERS[name] or 'false'}\n"
    return f"::: {path}\n{chosen}"


# Contributing


def contributing() -> str:
    """CONTRIBUTING.md, as it stands."""
    return (ROOT / "CONTRIBUTING.md").read_text()
