"""What pydantic found, on one line: the key, what is wrong, and the nearest valid key."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from entropy_probe.errors import ConfigError, shown

_OF_PYDANTIC = re.compile(r"literal\[.*\]|list\[.*\]|number|bounds|\[key\]")
"""Parts of a location that are pydantic's own names, and no key of the configuration."""


def one_line(error: ValidationError, where: object, model: type[BaseModel]) -> ConfigError:
    """The first error of those that pydantic found in a `model`."""
    first = error.errors()[0]
    kind, location, given = first["type"], first["loc"], first["input"]
    key = ".".join(str(part) for part in location if not _OF_PYDANTIC.fullmatch(str(part)))
    if kind == "extra_forbidden":
        valid = _fields_at(location, model)
        near = difflib.get_close_matches(str(location[-1]), valid, n=1)
        remedy = f"did you mean `{near[0]}`?" if near else f"valid keys are {', '.join(valid)}"
        return ConfigError(where, f"unknown key `{key}`", remedy)
    if kind == "model_type":
        return ConfigError(where, f"`{key}` is {shown(given)}", "write it as a section of keys")
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    got = "" if kind == "value_error" else f", got {shown(given)}"
    of_key = f"`{key}`: " if key else ""  # an error of several keys names them itself
    return ConfigError(where, f"{of_key}{message}{got}", "correct the value")


def _fields_at(location: tuple[int | str, ...], section: Any) -> list[str]:
    """Valid keys of the section below `section` in which the last part of `location` stands."""
    for part in location[:-1]:
        fields = getattr(section, "model_fields", {})
        annotation = fields[part].annotation if part in fields else None
        candidates = [annotation, *get_args(annotation)]
        models = (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
        section = next(models, None)
        if section is None:
            return []
    return list(section.model_fields)
