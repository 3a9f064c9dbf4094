"""The sections of a configuration: frozen models in which an unknown key is an error."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from entropy_probe.config.complaint import one_line
from entropy_probe.config.values import (
    AtLeastTwo,
    Count,
    DType,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
    TargetSE,
    Text,
)
from entropy_probe.errors import shown

reading: ContextVar[bool] = ContextVar("reading", default=False)
"""Whether a whole configuration is being read: its reader says where in it a value stands."""


class Section(BaseModel):
    """A frozen model. Made by hand, it raises `ConfigError` on one line as a configuration does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            if reading.get():
                raise
            raise one_line(error, type(self).__name__, type(self)) from error


def as_given(section: Any) -> Any:
    """What the user set of a section, as a table."""
    if isinstance(section, BaseModel):
        return section.model_dump(exclude_unset=True)
    return section


class GenerationConfig(Section):
    """How responses are sampled; a response ends with the token that completes a `stop` string.

    `do_sample` is always true: a greedy response has no probability to weight. Nothing reads it.
    """

    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0
    top_p: Probability = 1.0
    max_new_tokens: PositiveInt = 200
    stop: list[Text] = []
    do_sample: Literal[True] = True
    num_return_sequences: PositiveInt = 8
    gen_batch_size: PositiveInt = 32
    tf_batch_size: PositiveInt = 8
    rb_requires_grad: bool = False


class FuncOverrideSection(Section):
    """A spelling of `precision.dtype`. The other keys are fixed, and nothing reads them.

    θ and v are always upcast before the addition, and autocast is always off.
    """

    autocast: Literal[False] = False
    cast_params: Literal[True] = True
    dtype: DType = "float32"


class TeacherForcingSection(Section):
    """A spelling of `precision.dtype`. The other keys are fixed, and nothing reads them.

    Autocast is always off, and logits are always in float32 or wider.
    """

    autocast: Literal[False] = False
    dtype: DType = "float32"
    cast_logits_fp32: Literal[True] = True


_SPELLINGS = ("func_override", "tf_nograd", "tf_withgrad")


class PrecisionSection(Section):
    """`dtype` is that of θ, v, θ + ηv and of every forward.

    The three sections spell the same: after validation each has this dtype. A report's configuration
    shows it there, so that digests of configurations stay what they were.
    """

    allow_tf32: bool = False
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    deterministic_probe: bool = True
    entropy_fp64: bool = True
    func_override: FuncOverrideSection = FuncOverrideSection()
    tf_nograd: TeacherForcingSection = TeacherForcingSection()
    tf_withgrad: TeacherForcingSection = TeacherForcingSection()
    dtype: Annotated[DType, Field(exclude=True)] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _spelt_out(cls, values: Any) -> Any:
        """`dtype` in each section; where it is not given, the sections' own in its place."""
        if not isinstance(values, dict):
            return values
        sections = {name: as_given(values.get(name, {})) for name in _SPELLINGS}
        if not all(isinstance(section, dict) for section in sections.values()):
            return values
        if "dtype" not in values:
            spelt = sections["func_override"].get("dtype", "float32")
            return {**values, "dtype": spelt}
        dtype = values["dtype"]
        if dtype not in get_args(DType):
            return values
        for name, section in sections.items():
            if section.get("dtype", dtype) != dtype:
                both = f"dtype is {dtype!r} and {name}.dtype is {shown(section['dtype'])}"
                raise ValueError(f"{both}: give one of them")
        spelt_out = {name: {**section, "dtype": dtype} for name, section in sections.items()}
        return {**values, **spelt_out}

    @model_validator(mode="after")
    def _one_dtype(self) -> PrecisionSection:
        dtypes = {self.func_override.dtype, self.tf_nograd.dtype, self.tf_withgrad.dtype}
        if len(dtypes) > 1:
            raise ValueError("func_override, tf_nograd and tf_withgrad must have the same dtype")
        return self


class BatchConfig(Section):
    """The prompts of the E batch (`num_prompts`) and of the U batch.

    Both are drawn from one dataset with one seed. `dataset`: arithmetic, jsonl:PATH,
    gsm8k_r1_template[:PATH], an entry point's name or module:function.
    `reward`: tag_pref, stand_in, an entry point's name or module:function; or a list of them, whose
    sum with `reward_weights` counts. `system_prompt` goes before every prompt; `chat_template_kwargs`
    are more arguments of the tokenizer's chat template.

    With a `target_se` more prompts of E are drawn, up to `max_prompts`, until the standard error of the change that is
    predicted for the next step is so many nats per token; `2se`: half of that change, as the U batch puts it.
    """

    num_prompts: AtLeastTwo = 16
    num_update_prompts: AtLeastTwo = 16
    dataset: str = "arithmetic"
    reward: str | list[str] = "tag_pref"
    reward_weights: list[float] | None = None
    system_prompt: str | None = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    split: Literal["train", "test"] = "train"
    with_replacement: bool = False
    seed: Count = 0
    target_se: TargetSE | None = None
    max_prompts: AtLeastTwo = 256


class FirstOrderConfig(Section):
    """`estimator` is that of X; `baseline` is what Rao-Blackwell estimates subtract (`estimators/baselines.py`): X by
    `rb`, slope, curvature and change. `auto` is `hk_group`."""

    mode: Literal["exact", "block"] = "exact"
    num_blocks: AtLeastTwo = 8
    advantage: Literal["centered", "grpo", "raw"] = "centered"
    loss: Literal["lmax", "sequence_mean", "token_mean", "constant"] = "lmax"
    estimator: Literal["naive", "rb"] = "naive"
    baseline: Literal["auto", "none", "hk", "hk_ema", "hk_ridge", "hk_group"] = "auto"
    missing_state: Literal["raise", "identity"] = "raise"
    lr: PositiveFloat | None = None
    max_gradient_gib: PositiveFloat = 8.0
    max_pairs_gib: NonNegativeFloat = 1.0


class TrueDeltaHConfig(Section):
    """The sweep over η, and how much its importance weights may differ from one. `auto` is
    ± three η from the step down, `fine` ± five."""

    etas: Literal["auto", "fine"] | list[Annotated[float, Field(ge=-1e3, le=1e3)]] = "auto"
    clip_log_weight: PositiveFloat | None = None
    normalize: Literal["per_sequence", "per_token"] = "per_sequence"
    min_ess_fraction: Probability = 0.5
    max_pareto_k: PositiveFloat = 0.7
    fallback: Literal["none", "psis", "resample"] = "none"


class UpdateConfig(Section):
    """Clipping of the gradient, which a checkpoint does not record."""

    max_grad_norm: PositiveFloat | None = None


class InvarianceConfig(Section):
    """How many cases are drawn, on which padding, batch, pieces, η = 0 and scaling are tried."""

    max_examples: Count = 5
