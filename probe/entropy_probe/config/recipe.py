"""Whose update: the gradient that a trainer makes of a batch, as parts that can be set one by one.

    Y = Σ_{n,g,t} a_ngt ∇log p_ngt + c_ngt ∇H_ngt,     a = w·(m·ρ·A − β·κ),   c = entropy_coef·w′

w is the `normaliser`; A the reward without its `baseline`, over its `scale`; m what is masked; ρ the ratio to the
sampler; κ the derivative of the KL term (`docs/recipes.md`, and `estimators/update_weights.py` for each in formulas).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from entropy_probe.config.sections import FirstOrderConfig, Section, UpdateConfig
from entropy_probe.config.sources import read_yaml
from entropy_probe.config.values import PositiveFloat, PositiveInt, Probability

Normaliser = Literal[
    "longest",
    "prompt_tokens",
    "sequence_mean",
    "batch_tokens",
    "rollout_tokens",
    "micro_batch_tokens",
    "constant",
    "sum",
]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Coefficient = Annotated[float, Field(ge=-1e3, le=1e3)]


class Recipe(Section):
    """Every part of an update. The defaults are the notes'.

    `normaliser`     of a response's tokens, in a batch of N responses: `longest` 1/(N·max_g T), `prompt_tokens`
                     G/(N·Σ_g T), `sequence_mean` 1/(N·T), `batch_tokens` 1/ΣT, `rollout_tokens` the same of all of a
                     rollout, times the share of its responses that the step takes; `micro_batch_tokens` of each
                     of M micro-batches, over M; `constant` 1/(N·constant), `sum` 1/N
    `constant`       of that normaliser; `generation.max_new_tokens` where it is null
    `micro_batch_size`  responses of a micro-batch; null is all of them. Those of a file that names none are dealt out
    `baseline`       of a reward: the `mean` of its prompt, that of the other responses, or none
    `scale`          what A is divided by: the standard deviation of its prompt's rewards (`group`), of those of the
                     other responses, of all rewards, of all A (which are centred first), or nothing. It has `ddof`, and
                     `eps` is added; `undivided_at_zero`: A stays as it is where it is zero
    `whiten`         A_t − mean over all tokens, over their standard deviation (ddof 0)
    `drop`           prompts whose rewards are all equal (`zero_std`), or responses whose A is 0, do not count: nor do
                     their tokens in the normaliser
    `mask_truncated` responses that do not end with an EOS have no weight, and their tokens do not count
    `top_entropy_quantile`  A acts on this share of the tokens of a micro-batch alone, those of the largest entropy
    `factor`         on A, the constant that clipping leaves (TRL's CISPO: its upper bound of the ratio)
    `importance`     where rollouts have `logprobs`: π/sampler of a token or a response, cut at `importance_cap`
                     (`truncate`) or 0 above it (`mask`)
    `kl_coef`        β; `kl`: what is estimated, `kl_in` the loss, the reward, or the return, which is added up from t
    `entropy_coef`   of the mean entropy of the tokens, by the normaliser or that of the tokens of a micro-batch
    `max_grad_norm`  g·min(1, max_grad_norm/(‖g‖ + 1e-6))
    """

    normaliser: Normaliser = "longest"
    constant: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None
    baseline: Literal["mean", "leave_one_out", "none"] = "mean"
    scale: Literal["none", "group", "leave_one_out", "batch", "advantages"] = "none"
    ddof: Literal[0, 1] = 1
    eps: NotNegative = 1e-4
    undivided_at_zero: bool = False
    whiten: bool = False
    drop: Literal["none", "zero_std", "zero_advantage"] = "none"
    mask_truncated: bool = False
    top_entropy_quantile: Probability = 1.0
    factor: PositiveFloat = 1.0
    importance: Literal[
        "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "none"
    importance_cap: PositiveFloat = 3.0
    kl_coef: NotNegative = 0.0
    kl: Literal["k1", "k2", "k3", "k3_ratio"] = "k3_ratio"
    kl_in: Literal["loss", "reward", "return"] = "loss"
    entropy_coef: Coefficient = 0.0
    entropy_normaliser: Literal["same", "micro_batch_tokens"] = "same"
    max_grad_norm: PositiveFloat | None = None

    @property
    def by_token(self) -> bool:
        """Whether tokens of one response may differ in weight."""
        kl = self.kl_coef > 0 and self.kl_in != "reward"
        ratio = self.importance.startswith("token")
        masked = self.top_entropy_quantile < 1.0
        return kl or ratio or masked or self.whiten or self.entropy_coef != 0

    @property
    def needs_reference(self) -> bool:
        """Whether it cannot be made without the reference model's log p."""
        return self.kl_coef > 0


_TRL: dict[str, Any] = {"scale": "group", "eps": 1e-4, "max_grad_norm": 1.0}
_TRL |= {"entropy_normaliser": "micro_batch_tokens"}
_TOKENS = {"normaliser": "batch_tokens", "max_grad_norm": 1.0}
_VERL = {**_TOKENS, "scale": "group", "eps": 1e-6}
_OPENRLHF = {**_TOKENS, "kl_coef": 0.01, "kl": "k1", "kl_in": "return"}

RECIPES: dict[str, dict[str, Any]] = {
    "notes": {},
    "trl-grpo": {**_TRL, "normaliser": "sequence_mean"},
    "trl-bnpo": {**_TRL, "normaliser": "micro_batch_tokens", "micro_batch_size": 8},
    "trl-dr_grpo": {**_TRL, "normaliser": "constant"},
    "trl-dapo": {**_TRL, "normaliser": "rollout_tokens"},
    "trl-cispo": {**_TRL, "normaliser": "rollout_tokens", "factor": 0.2},
    "trl-sapo": {**_TRL, "normaliser": "sequence_mean"},
    "trl-luspo": {**_TRL, "normaliser": "sum"},
    "trl-vespo": {**_TRL, "normaliser": "rollout_tokens"},
    "trl-rloo": {
        "normaliser": "sum",
        "baseline": "leave_one_out",
        "kl_coef": 0.05,
        "kl": "k1",
        "kl_in": "reward",
        "max_grad_norm": 1.0,
    },
    "verl-grpo": _VERL,
    "verl-dapo": _VERL,
    "verl-dr_grpo": {**_VERL, "normaliser": "constant", "scale": "none"},
    "verl-rloo": {**_TOKENS, "baseline": "leave_one_out"},
    "openrlhf-reinforce++": {**_OPENRLHF, "baseline": "none", "whiten": True},
    "openrlhf-reinforce++-baseline": {**_OPENRLHF, "whiten": True},
    "openrlhf-grpo": {**_TOKENS, "scale": "group", "eps": 1e-9},
    "openrlhf-rloo": {**_OPENRLHF, "baseline": "leave_one_out"},
    "prime-rl": {**_TOKENS, "drop": "zero_advantage"},
    "slime": {
        "normaliser": "sequence_mean",
        "scale": "group",
        "eps": 1e-6,
        "max_grad_norm": 1.0,
    },
    "nemo-rl": {
        **_TOKENS,
        "baseline": "leave_one_out",
        "scale": "leave_one_out",
        "eps": 1e-6,
        "undivided_at_zero": True,
        "kl_coef": 0.01,
        "kl": "k3_ratio",
    },
    "open-instruct": {
        **_TOKENS,
        "scale": "group",
        "ddof": 0,
        "eps": 1e-8,
        "drop": "zero_std",
        "kl_coef": 0.05,
        "kl": "k3",
    },
    "unsloth": {
        **_TRL,
        "normaliser": "micro_batch_tokens",
        "micro_batch_size": 8,
        "kl_coef": 0.001,
    },
}
"""Name → the parts that are not the notes', as each trainer has them where nothing is set (docs/recipes.md)."""

_ADVANTAGES = {
    "centered": {"baseline": "mean", "scale": "none"},
    "grpo": {"baseline": "mean", "scale": "group", "ddof": 1, "eps": 1e-4},
    "raw": {"baseline": "none", "scale": "none"},
}
_LOSSES = {
    "lmax": "longest",
    "sequence_mean": "sequence_mean",
    "token_mean": "prompt_tokens",
    "constant": "constant",
}


class RecipeConfig(Recipe):
    """A recipe by name, and the parts of it that are set. `auto` reads the checkpoint's own training settings."""

    name: str = "auto"

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, values: Any) -> Any:
        """`recipe: trl-dapo` is short for `recipe: {name: trl-dapo}`; a name that ends in .yaml is a file of parts."""
        if isinstance(values, str) and Path(values).suffix in (".yaml", ".yml"):
            return read_yaml(Path(values))
        return {"name": values} if isinstance(values, str) else values

    @model_validator(mode="after")
    def _is_known(self) -> RecipeConfig:
        if self.name != "auto" and self.name not in RECIPES:
            known = ", ".join(RECIPES)
            raise ValueError(f"no recipe is called {self.name!r}: give auto, or one of {known}")
        return self

    @property
    def parts(self) -> dict[str, Any]:
        """Those that were set."""
        return {key: getattr(self, key) for key in self.model_fields_set if key != "name"}

    def of(self, first_order: FirstOrderConfig, update: UpdateConfig) -> Recipe:
        """The recipe, where nothing is known of a trainer: `auto` is the notes'. Keys of `first_order` and `update`
        that were set replace its parts, and parts that were set replace both."""
        own = RECIPES.get(self.name, {})
        return Recipe(**{**own, **older_keys(first_order, update), **self.parts})


def older_keys(first_order: FirstOrderConfig, update: UpdateConfig) -> dict[str, Any]:
    """Parts by the keys that say the same since before there were recipes, where they were set."""
    parts: dict[str, Any] = {}
    if "advantage" in first_order.model_fields_set:
        parts |= _ADVANTAGES[first_order.advantage]
    if "loss" in first_order.model_fields_set:
        parts["normaliser"] = _LOSSES[first_order.loss]
    if "max_grad_norm" in update.model_fields_set:
        parts["max_grad_norm"] = update.max_grad_norm
    return parts


assert set(_LOSSES.values()) <= set(get_args(Normaliser))
