"""Configuration: one frozen model per section, read from defaults < budget < pyproject < YAML < command line.

`ProbeConfig.load` is the only reader. Unknown keys and impossible values raise `ConfigError` on one line that
names the key and, for a misspelt key, the nearest valid one.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from entropy_probe.budgets import BUDGETS, Name, Part
from entropy_probe.errors import ConfigError, shown
from entropy_probe.text import read_text

DType = Literal["float32", "float64"]
PositiveInt = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Bounds = dict[Literal["min", "max", "fall", "rise", "fall_se", "rise_se", "noise"], FiniteFloat]
Only = Literal[True]
Never = Literal[False]


def _kind(limit: Any) -> str:
    return "bounds" if isinstance(limit, Mapping) else "number"


_Number = Annotated[FiniteFloat, Tag("number")]
_Table = Annotated[Bounds, Tag("bounds")]


_PREFIXES = [*enumerate("kmgt", 1)]
_UNITS = {"b": 1, **{f"{letter}{i}b": base**k for i, base in (("", 1000), ("i", 1024)) for k, letter in _PREFIXES}}


def _bytes(size: Any) -> Any:
    """A number of bytes, from itself or from a text such as `8GiB` or `800 MB`."""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kmgt]?i?b)?", str(size).strip().lower(), re.ASCII)
    number = int(float(found[1]) * _UNITS[found[2] or "b"]) if found and not isinstance(size, bool) else 0
    if not 1 << 20 <= number < 1 << 60:
        raise ValueError(f"{shown(size)} is no size of 1 MiB or more: give one such as 8GiB")
    return number


def _is_device(name: str) -> str:
    if not re.fullmatch(r"(cpu|mps|(cuda|xpu)(:\d+)?)", name):
        raise ValueError(f"{name!r} is no device: give cpu, cuda or cuda:N")
    return name


RULES = ("auto", "balanced", "balanced_low_0", "sequential")
_BYTES = re.compile(r"\d+|\d+(\.\d+)?([KMGT]i?B)")


def _home(value: Any) -> str | None:
    """0, "0" and "cuda:0" → "cuda:0"; `None` for what is neither a device nor `disk`."""
    text = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"\d+|cpu|disk|mps|(cuda|xpu|npu)(:\d+)?", text):
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
            raise ValueError(f"{name!r} is mapped to {shown(value[name])}, expected cpu, disk, cuda:N or N")
    return homes


def _is_max_memory(value: Any) -> Any:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"got {shown(value)}, expected a map of devices to sizes, such as {{0: 20GiB, cpu: 60GiB}}")
    for key, size in value.items():
        if _home(key) is None:
            raise ValueError(f"{shown(key)} is no device: give N, cuda:N, cpu or disk")
        if isinstance(size, bool) or not _BYTES.fullmatch(str(size)):
            raise ValueError(f"{key} has {shown(size)}, expected bytes, or a size such as 20GiB")
    return {_home(key): int(size) if str(size).isdecimal() else size for key, size in value.items()}


DeviceMap = Annotated[str | dict[str, str] | None, BeforeValidator(_is_device_map)]
MaxMemory = Annotated[dict[str, int | str] | None, BeforeValidator(_is_max_memory)]


JUDGES = ("limits", "allow_inconclusive")
"""Sections that judge a report and have no part in its measurement."""
MEANS = ("memory_limit", "device_map", "max_memory", "offload_folder")
"""Keys that say how a measurement finds room, and not what is measured."""
_reading: ContextVar[bool] = ContextVar("_reading", default=False)
"""Whether `from_mapping` is at work: it says where in the whole a value stands."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            if _reading.get():
                raise
            raise _one_line(error, type(self).__name__, type(self)) from error


class GenerationConfig(_Section):
    """How responses are sampled; a response ends with the token that completes one of the `stop` strings.

    `do_sample` is always true: a greedy response has no probability to weight.
    """

    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    top_p: Probability = 1.0
    max_new_tokens: PositiveInt = 200
    stop: list[Annotated[str, Field(min_length=1)]] = []
    do_sample: Only = True
    num_return_sequences: PositiveInt = 8
    gen_batch_size: PositiveInt = 32
    tf_batch_size: PositiveInt = 8
    rb_requires_grad: bool = False


def _has_groups(generation: GenerationConfig) -> GenerationConfig:
    if generation.num_return_sequences < 2:
        raise ValueError("num_return_sequences must be at least 2: a response's baseline comes from the others")
    return generation


class FuncOverrideSection(_Section):
    """The dtype of θ, v, θ+ηv and of the forward. Both are upcast before the addition, and autocast stays off."""

    autocast: Never = False
    cast_params: Only = True
    dtype: DType = "float32"


class TeacherForcingSection(_Section):
    autocast: Never = False
    dtype: DType = "float32"
    cast_logits_fp32: Only = True


class PrecisionSection(_Section):
    allow_tf32: bool = False
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    deterministic_probe: bool = True
    entropy_fp64: bool = True
    func_override: FuncOverrideSection = FuncOverrideSection()
    tf_nograd: TeacherForcingSection = TeacherForcingSection()
    tf_withgrad: TeacherForcingSection = TeacherForcingSection()

    @model_validator(mode="after")
    def _one_dtype(self) -> PrecisionSection:
        dtypes = {self.func_override.dtype, self.tf_nograd.dtype, self.tf_withgrad.dtype}
        if len(dtypes) > 1:
            raise ValueError("func_override, tf_nograd and tf_withgrad must have the same dtype")
        return self


class BatchConfig(_Section):
    """The prompts of the E batch (`num_prompts`) and of the U batch, drawn from one dataset with one seed.

    `dataset`: arithmetic, jsonl:PATH, gsm8k_r1_template[:PATH], an entry point's name or module:function.
    `reward`: tag_pref, an entry point's name or module:function.
    """

    num_prompts: Annotated[int, Field(ge=2)] = 16
    num_update_prompts: Annotated[int, Field(ge=2)] = 16
    dataset: str = "arithmetic"
    reward: str = "tag_pref"
    split: Literal["train", "test"] = "train"
    with_replacement: bool = False
    seed: Seed = 0


class FirstOrderConfig(_Section):
    """`estimator` is that of X; `baseline` is what `rb` subtracts (`estimators/baselines.py`)."""

    mode: Literal["exact", "block"] = "exact"
    num_blocks: Annotated[int, Field(ge=2)] = 8
    advantage: Literal["centered", "grpo", "raw"] = "centered"
    loss: Literal["lmax", "sequence_mean", "token_mean", "constant"] = "lmax"
    estimator: Literal["naive", "rb"] = "naive"
    baseline: Literal["none", "hk", "hk_ema", "hk_ridge"] = "hk"
    missing_state: Literal["raise", "identity"] = "raise"
    lr: PositiveFloat | None = None
    max_gradient_gib: PositiveFloat = 8.0


class TrueDeltaHConfig(_Section):
    etas: Literal["auto"] | list[Annotated[float, Field(ge=-1e3, le=1e3)]] = "auto"
    clip_log_weight: PositiveFloat | None = None
    normalize: Literal["per_sequence", "per_token"] = "per_sequence"
    min_ess_fraction: Probability = 0.5
    max_pareto_k: PositiveFloat = 0.7
    fallback: Literal["none", "psis", "resample"] = "none"


class UpdateConfig(_Section):
    max_grad_norm: PositiveFloat | None = None


class InvarianceConfig(_Section):
    """`max_examples` cases are drawn on which padding, batch, pieces, η = 0 and scaling are tried; 0: none."""

    max_examples: Annotated[int, Field(ge=0)] = 5


_Config = TypeVar("_Config", bound="SequenceConfig")


class SequenceConfig(_Section):
    """What sampling and scoring need: the two sections that `SequenceProcessor` takes."""

    generation: GenerationConfig = GenerationConfig()
    precision: PrecisionSection = PrecisionSection()

    @classmethod
    def from_mapping(cls: type[_Config], values: dict[Any, Any], where: object = "configuration") -> _Config:
        _require_text_keys(values, where)
        token = _reading.set(True)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise _one_line(error, where, cls) from error
        finally:
            _reading.reset(token)


class ProbeConfig(SequenceConfig):
    """The resolved configuration of one run; `limits` holds the thresholds that differ from their defaults, and the
    bounds of gates, which are off without.

    The values of the `budget` (`budgets.py`) stand where nothing else is given. `device_map`: where the parts of a
    model that outgrows one device are, as accelerate decides within `max_memory`, or by module name (docs/scaling.md).
    `memory_limit`, in bytes or as 8GiB, is kept by smaller batches (`stages/memory_limit.py`).
    """

    budget: Name = "standard"
    device: Annotated[str, AfterValidator(_is_device)] = "cpu"
    memory_limit: Annotated[int, BeforeValidator(_bytes)] | None = None
    device_map: DeviceMap = None
    max_memory: MaxMemory = None
    offload_folder: Annotated[str, Field(min_length=1)] | None = None
    generation: Annotated[GenerationConfig, AfterValidator(_has_groups)] = GenerationConfig()
    batch: BatchConfig = BatchConfig()
    first_order: FirstOrderConfig = FirstOrderConfig()
    true_delta_h: TrueDeltaHConfig = TrueDeltaHConfig()
    update: UpdateConfig = UpdateConfig()
    invariance: InvarianceConfig = InvarianceConfig()
    limits: dict[str, Annotated[_Number | _Table, Discriminator(_kind)]] = {}
    allow_inconclusive: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _over_budget(cls, values: Any) -> Any:
        name = values.get("budget", "standard") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in BUDGETS:
            return values
        under = BUDGETS[name].values
        return _merge(under, {key: _given(value) if key in under else value for key, value in values.items()})

    @model_validator(mode="after")
    def _map_with_its_options(self) -> ProbeConfig:
        alone = [key for key in ("max_memory", "offload_folder") if getattr(self, key) is not None]
        if alone and self.device_map is None:
            raise ValueError(f"`{alone[0]}` is given without `device_map`, which it belongs to")
        return self

    @property
    def left_out(self) -> tuple[Part, ...]:
        """The parts of the measurement that the budget leaves out."""
        return BUDGETS[self.budget].left_out

    @property
    def placement(self) -> dict[str, Any]:
        """What `load_checkpoint` takes of it by these names."""
        return {"device_map": self.device_map, "max_memory": self.max_memory, "offload_folder": self.offload_folder}

    @classmethod
    def load(
        cls, file: Path | None = None, pyproject: Path | None = None, overrides: dict[str, Any] | None = None
    ) -> ProbeConfig:
        """Merge `[tool.entropy-probe]` of `pyproject`, the YAML `file` and dotted `overrides`; the last one wins."""
        values: dict[str, Any] = {}
        for path, read in ((pyproject, _read_pyproject), (file, _read_yaml)):
            if path is not None:
                table = read(path)
                cls.from_mapping(table, where=path)  # so that an error names the file it stands in
                values = _merge(values, table)
        for dotted, value in (overrides or {}).items():
            table: Any = value
            for key in reversed(dotted.split(".")):
                table = {key: table}
            values = _merge(values, table)
        return cls.from_mapping(values, where="configuration")


class _Loader(yaml.SafeLoader):
    """Repeats single values at most: a section in place of `*name`, of such sections in turn, has no end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise yaml.YAMLError("`*name` stands for a section or a list")
        return node


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        table = yaml.load(read_text(path), _Loader)  # noqa: S506 (a SafeLoader)
    except (
        OSError,
        UnicodeDecodeError,
        yaml.YAMLError,
        RecursionError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        reason = getattr(error, "problem", None) or error
        raise ConfigError(path, f"is not readable YAML ({reason})", "correct the file") from error
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise ConfigError(path, f"holds a {type(table).__name__}", "write sections such as `batch: {num_prompts: 16}`")
    return table


def _read_pyproject(path: Path) -> dict[str, Any]:
    try:
        table = tomllib.loads(read_text(path)).get("tool", {}).get("entropy-probe", {})
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(path, f"is not readable TOML ({error})", "correct the file") from error
    if not isinstance(table, dict):
        raise ConfigError(path, "tool.entropy-probe is not a table", "write [tool.entropy-probe] and keys below it")
    return table


def _require_text_keys(values: Any, where: object) -> None:
    """YAML has keys that are numbers, or nothing at all. Accelerators have numbers."""
    rest = [
        {key: value for key, value in values.items() if key != "max_memory"} if isinstance(values, dict) else values
    ]
    while rest:
        inner = rest.pop()
        if isinstance(inner, dict):
            for key in inner:
                if not isinstance(key, str):
                    raise ConfigError(where, f"the key {shown(key)} is no text", "correct the key")
            rest.extend(inner.values())
        elif isinstance(inner, list):
            rest.extend(inner)


def _given(section: Any) -> Any:
    """What the user set of a section, as a table."""
    return section.model_dump(exclude_unset=True) if isinstance(section, BaseModel) else section


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _fields_at(location: tuple[int | str, ...], section: Any) -> list[str]:
    """Names of the valid keys of the section below `section` in which the last part of `location` stands."""
    for part in location[:-1]:
        annotation = section.model_fields[part].annotation if part in getattr(section, "model_fields", {}) else None
        candidates = [annotation, *get_args(annotation)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if section is None:
            return []
    return list(section.model_fields)


def _one_line(error: ValidationError, where: object, model: type[BaseModel]) -> ConfigError:
    first = error.errors()[0]
    of_pydantic = r"literal\[.*\]|list\[.*\]|number|bounds|\[key\]"
    key = ".".join(str(part) for part in first["loc"] if not re.fullmatch(of_pydantic, str(part)))
    if first["type"] == "extra_forbidden":
        valid = _fields_at(first["loc"], model)
        near = difflib.get_close_matches(str(first["loc"][-1]), valid, n=1)
        remedy = f"did you mean `{near[0]}`?" if near else f"valid keys are {', '.join(valid)}"
        return ConfigError(where, f"unknown key `{key}`", remedy)
    if first["type"] == "model_type":
        return ConfigError(where, f"`{key}` is {shown(first['input'])}", "write it as a section of keys")
    message = first["msg"].removeprefix("Value error, ")
    got = "" if first["type"] == "value_error" else f", got {shown(first['input'])}"
    of_key = f"`{key}`: " if key else ""  # what is wrong with several keys together names them itself
    return ConfigError(where, f"{of_key}{message[0].lower()}{message[1:]}{got}", "correct the value")
