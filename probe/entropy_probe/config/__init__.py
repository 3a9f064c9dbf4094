"""Configuration: defaults < budget < pyproject < YAML < command line, one frozen model per section.

`ProbeConfig.load` is the only reader. Unknown keys and impossible values raise `ConfigError` on one
line that names the key and, for a misspelt key, the nearest valid one.

values     the types of single values: sizes, devices, bounds
sections   the sections
recipe     whose update: the parts of a trainer's gradient, and recipes by name
sources    tables read from files, laid over one another
complaint  what pydantic found, on one line
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from entropy_probe.budgets import BUDGETS, Name, Part
from entropy_probe.config.complaint import one_line
from entropy_probe.config.recipe import RECIPES, Recipe, RecipeConfig
from entropy_probe.config.sections import (
    BatchConfig,
    FirstOrderConfig,
    FuncOverrideSection,
    GenerationConfig,
    InvarianceConfig,
    PrecisionSection,
    Section,
    TeacherForcingSection,
    TrueDeltaHConfig,
    UpdateConfig,
    as_given,
    reading,
)
from entropy_probe.config.sources import (
    merged,
    nested,
    read_pyproject,
    read_yaml,
    require_text_keys,
)
from entropy_probe.config.values import (
    RULES,
    Device,
    DeviceMap,
    Limit,
    MaxMemory,
    MemoryLimit,
    Text,
    size_in_bytes,
)

__all__ = [
    "JUDGES",
    "MEANS",
    "RECIPES",
    "RULES",
    "BatchConfig",
    "FirstOrderConfig",
    "FuncOverrideSection",
    "GenerationConfig",
    "InvarianceConfig",
    "PrecisionSection",
    "ProbeConfig",
    "Recipe",
    "RecipeConfig",
    "SequenceConfig",
    "TeacherForcingSection",
    "TrueDeltaHConfig",
    "UpdateConfig",
]

JUDGES = ("limits", "allow_inconclusive")
"""Sections that judge a report and have no part in its measurement."""
MEANS = (
    "memory_limit", "recompute", "share_prompts", "sharding", "device_map", "max_memory", "offload_folder",
)  # fmt: skip
"""Keys that say how a measurement finds room, and not what is measured."""

_Config = TypeVar("_Config", bound="SequenceConfig")


class SequenceConfig(Section):
    """What sampling and scoring need: the two sections that `SequenceProcessor` takes."""

    generation: GenerationConfig = GenerationConfig()
    precision: PrecisionSection = PrecisionSection()

    @classmethod
    def from_mapping(
        cls: type[_Config],
        values: dict[Any, Any],
        where: object = "configuration",
    ) -> _Config:
        """The configuration in a table; an error names the key, and `where` it stands."""
        require_text_keys(values, where)
        token = reading.set(True)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise one_line(error, where, cls) from error
        finally:
            reading.reset(token)


def _has_groups(generation: GenerationConfig) -> GenerationConfig:
    if generation.num_return_sequences < 2:
        reason = "a response's baseline comes from the others"
        raise ValueError(f"num_return_sequences must be at least 2: {reason}")
    return generation


class ProbeConfig(SequenceConfig):
    """The resolved configuration of one run.

    The values of the `budget` (`budgets.py`) stand where nothing else is given. `device_map` says
    where the parts of a model that outgrows one device are, as accelerate decides within
    `max_memory`, or by module name (docs/scaling.md). `memory_limit`, in bytes or as 8GiB, is kept
    by smaller batches (`stages/memory/memory_limit.py`), and by decoder layers that are run again
    in gradients, where `recompute` allows it (`model/recompute.py`). `share_prompts` is whether scoring
    reads a prompt once for all its responses (`stages/shared_prompts.py`). `sharding` is what several processes hold:
    a model each, and the gradients of their own prompts (`prompt`), or all of it together, once (`parameter`).
    `limits` holds the thresholds that differ
    from their defaults, and the bounds of gates, which are off without.
    """

    budget: Name = "standard"
    device: Device = "cpu"
    memory_limit: MemoryLimit | None = None
    recompute: Literal["auto", "never", "always"] = "auto"
    share_prompts: Literal["auto", "never"] = "auto"
    sharding: Literal["auto", "prompt", "parameter"] = "auto"
    device_map: DeviceMap = None
    max_memory: MaxMemory = None
    offload_folder: Text | None = None
    generation: Annotated[GenerationConfig, AfterValidator(_has_groups)] = GenerationConfig()
    batch: BatchConfig = BatchConfig()
    first_order: FirstOrderConfig = FirstOrderConfig()
    true_delta_h: TrueDeltaHConfig = TrueDeltaHConfig()
    update: UpdateConfig = UpdateConfig()
    recipe: RecipeConfig = RecipeConfig()
    reference_model: Text | None = None
    invariance: InvarianceConfig = InvarianceConfig()
    limits: dict[str, Limit] = Field(default_factory=dict)
    allow_inconclusive: list[str] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _over_budget(cls, values: Any) -> Any:
        name = values.get("budget", "standard") if isinstance(values, dict) else None
        if not isinstance(name, str) or name not in BUDGETS:
            return values
        under = BUDGETS[name].values
        over = {key: as_given(value) if key in under else value for key, value in values.items()}
        return merged(under, over)

    @model_validator(mode="after")
    def _map_with_its_options(self) -> ProbeConfig:
        if self.max_memory is not None and self.device_map is None:
            raise ValueError("`max_memory` is given without `device_map`, which it belongs to")
        if self.sharding == "parameter" and self.device_map is not None:
            raise ValueError(
                "`device_map` is given with `sharding: parameter`, which holds the model in memory"
            )
        return self

    @cached_property
    def whose_update(self) -> Recipe:
        """The recipe by name, older keys and parts; `auto` is the notes' until a checkpoint says more."""
        return self.recipe.of(self.first_order, self.update)

    @property
    def left_out(self) -> tuple[Part, ...]:
        """The parts of the measurement that the budget leaves out."""
        return BUDGETS[self.budget].left_out

    @property
    def placement(self) -> dict[str, Any]:
        """What `load_checkpoint` takes of it by these names; sizes in bytes."""
        sizes = self.max_memory
        in_bytes = sizes and {device: size_in_bytes(size) for device, size in sizes.items()}
        return {
            "device_map": self.device_map,
            "max_memory": in_bytes,
            "offload_folder": None if self.device_map is None else self.offload_folder,
        }

    @classmethod
    def load(
        cls,
        file: Path | None = None,
        pyproject: Path | None = None,
        overrides: dict[str, Any] | None = None,
    ) -> ProbeConfig:
        """Merge `[tool.entropy-probe]` of `pyproject`, the YAML `file` and dotted `overrides`.

        The last one wins.
        """
        values: dict[str, Any] = {}
        for path, read in ((pyproject, read_pyproject), (file, read_yaml)):
            if path is not None:
                table = read(path)
                cls.from_mapping(table, where=path)  # so that an error names the file it stands in
                values = merged(values, table)
        for dotted, value in (overrides or {}).items():
            values = merged(values, nested(dotted, value))
        return cls.from_mapping(values, where="configuration")
