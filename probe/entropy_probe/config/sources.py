"""Tables of configuration: read from YAML and from pyproject.toml, and laid over one another."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from entropy_probe.errors import ConfigError, shown
from entropy_probe.text import read_text


class _Loader(yaml.SafeLoader):
    """A loader for which `*name` repeats single values only.

    Sections that hold `*name` of such sections, in turn, would have no end.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.YAMLError("`*name` stands for a section or a list")
        return node


_OF_YAML = (
    OSError,
    UnicodeDecodeError,
    yaml.YAMLError,
    RecursionError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)
"""What PyYAML raises for texts that are no YAML, and for dates and numbers that do not exist."""


def read_yaml(path: Path) -> dict[Any, Any]:
    """The table in the file; an empty one of an empty file. Raises `ConfigError`."""
    try:
        table = yaml.load(read_text(path), _Loader)  # noqa: S506 (a SafeLoader)
    except _OF_YAML as error:
        reason = getattr(error, "problem", None) or error
        raise ConfigError(path, f"is not readable YAML ({reason})", "correct the file") from error
    if table is None:
        return {}
    if not isinstance(table, dict):
        remedy = "write sections such as `batch: {num_prompts: 16}`"
        raise ConfigError(path, f"holds a {type(table).__name__}", remedy)
    return table


def read_pyproject(path: Path) -> dict[str, Any]:
    """`[tool.entropy-probe]` of the file. Raises `ConfigError`."""
    try:
        tools = tomllib.loads(read_text(path)).get("tool", {})
        table = tools.get("entropy-probe", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(path, f"is not readable TOML ({error})", "correct the file") from error
    if "entropy-probe" not in tools:
        names = {name.replace("_", "-").lower(): name for name in tools}
        for name in difflib.get_close_matches("entropy-probe", names, n=1, cutoff=0.75):
            problem = f"nothing reads [tool.{names[name]}]"
            raise ConfigError(path, problem, "write [tool.entropy-probe]")
    if not isinstance(table, dict):
        remedy = "write [tool.entropy-probe] and keys below it"
        raise ConfigError(path, "tool.entropy-probe is not a table", remedy)
    return table


def require_text_keys(values: Any, where: object) -> None:
    """Raise `ConfigError` for a key that is a number, or nothing at all, as YAML has them.

    The keys of `max_memory` may be numbers: accelerators have them.
    """
    named = values
    if isinstance(values, dict):
        named = {key: value for key, value in values.items() if key != "max_memory"}
    rest = [named]
    while rest:
        inner = rest.pop()
        if isinstance(inner, dict):
            for key in inner:
                if not isinstance(key, str):
                    raise ConfigError(
                        where, f"the key {shown(key)} is not a text", "correct the key"
                    )
            rest.extend(inner.values())
        elif isinstance(inner, list):
            rest.extend(inner)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over` in place of its own, section by section."""
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            value = merged(below, value)
        result[key] = value
    return result


def nested(dotted: str, value: Any) -> dict[str, Any]:
    """`"batch.seed"`, 3 → `{"batch": {"seed": 3}}`."""
    table = value
    for key in reversed(dotted.split(".")):
        table = {key: table}
    return table
