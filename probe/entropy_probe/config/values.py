"""The types of single values: probabilities, devices, sizes in bytes, bounds."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ByteSize,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
)

from entropy_probe.errors import shown

DType = Literal["float32", "float64"]
PositiveInt = Annotated[int, Field(ge=1)]
AtLeastTwo = Annotated[int, Field(ge=2)]
Count = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(min_length=1)]

_Bound = Literal["min", "max", "fall", "rise", "fall_se", "rise_se", "noise"]
_Number = Annotated[FiniteFloat, Tag("number")]
_Table = Annotated[dict[_Bound, FiniteFloat], Tag("bounds")]


def _kind(limit: Any) -> str:
    return "bounds" if isinstance(limit, Mapping) else "number"


Limit = Annotated[_Number | _Table, Discriminator(_kind)]

# `ByteSize` alone reads the beginning of a text, whatever follows, and bits too.
_SIZE = re.compile(r"\d{1,18}(\.\d{1,9})?\s*([kmgt]?b|[kmgt]ib)?", re.ASCII | re.IGNORECASE)
_BYTES = TypeAdapter(ByteSize)
_LEAST, _TOO_MUCH = 1 << 20, 1 << 60


def size_in_bytes(given: Any) -> int | None:
    """Bytes, from a number or a text such as `8GiB` or `800 MB`; `None` for what is no size."""
    text = str(given).strip()
    if isinstance(given, bool) or not _SIZE.fullmatch(text):
        return None
    return int(_BYTES.validate_python(text))


def _is_target_se(given: Any) -> Any:
    try:
        value = given if given == OF_THE_CHANGE else float(given)
    except (TypeError, ValueError):
        value = None
    sensible = value == OF_THE_CHANGE or (value is not None and 0 < value < math.inf)
    if isinstance(given, bool) or not sensible:
        raise ValueError(
            f"{shown(given)} is not a standard error: give nats per token above 0, or {OF_THE_CHANGE}"
        )
    return value


OF_THE_CHANGE = "2se"
"""As a target: half of the predicted change, which is then two standard errors."""
TargetSE = Annotated[float | Literal["2se"], BeforeValidator(_is_target_se)]


def _is_memory_limit(given: Any) -> Any:
    size = size_in_bytes(given) or 0
    if not _LEAST <= size < _TOO_MUCH:
        raise ValueError(f"{shown(given)} is not a size of 1 MiB or more: give one such as 8GiB")
    return size


def _is_device(name: str) -> str:
    if not re.fullmatch(r"(cpu|mps|(cuda|xpu)(:\d+)?)", name):
        raise ValueError(f"{name!r} is not a device: give cpu, cuda or cuda:N")
    return name


RULES = ("auto", "balanced", "balanced_low_0", "sequential")
"""Rules by which accelerate makes a device map."""


def _home(value: Any) -> str | None:
    """0, "0" and "cuda:0" → "cuda:0"; `None` for what is neither a device nor `disk`."""
    text = str(value)
    known = re.fullmatch(r"\d+|cpu|disk|mps|(cuda|xpu|npu)(:\d+)?", text)
    if isinstance(value, bool) or not known:
        return None
    return f"cuda:{text}" if text.isdecimal() else text


def _is_device_map(value: Any) -> Any:
    if value is None or value in RULES:
        return value
    if not isinstance(value, Mapping) or not value:
        expected = f"one of {', '.join(RULES)}, or a map of module names to devices"
        raise ValueError(f"got {shown(value)}, expected {expected}")
    homes = {str(name): _home(home) for name, home in value.items()}
    for name, home in homes.items():
        if home is None:
            mapped = shown(value[name])
            raise ValueError(f"{name!r} is mapped to {mapped}, expected cpu, disk, cuda:N or N")
    return homes


def _is_max_memory(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        expected = "a map of devices to sizes, such as {0: 20GiB, cpu: 60GiB}"
        raise ValueError(f"got {shown(value)}, expected {expected}")
    for key, size in value.items():
        if _home(key) is None:
            raise ValueError(f"{shown(key)} is not a device: give N, cuda:N, cpu or disk")
        if size_in_bytes(size) is None:
            raise ValueError(f"{key} has {shown(size)}, expected bytes, or a size such as 20GiB")
    return {_home(key): int(size) if str(size).isdecimal() else size for key, size in value.items()}


Device = Annotated[str, AfterValidator(_is_device)]
DeviceMap = Annotated[str | dict[str, str] | None, BeforeValidator(_is_device_map)]
MaxMemory = Annotated[dict[str, int | str] | None, BeforeValidator(_is_max_memory)]
MemoryLimit = Annotated[int, BeforeValidator(_is_memory_limit)]
