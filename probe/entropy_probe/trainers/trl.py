"""TRL's and Unsloth's settings, from `training_args.bin` (TRL 1.16: `GRPOConfig`, `RLOOConfig`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_probe.config import RECIPES
from entropy_probe.errors import ProbeError
from entropy_probe.trainers.found import Found, several_passes, several_steps
from entropy_probe.trainers.pickled import plain, read_arguments

_SCALES = {True: "group", False: "none", "True": "group", "False": "none"}
_MOST = 1 << 20


def found(path: Path) -> Found:
    """Raises `ProbeError` where the arguments are those of another trainer, or of a loss that is not known."""
    note = read_arguments(path)
    of = _Arguments({str(key): plain(value) for key, value in note.state.items()}, path)
    given = note.state.get("chat_template_kwargs")
    of.template = {str(k): plain(v) for k, v in given.items()} if isinstance(given, dict) else {}
    if "RLOO" in note.name or "normalize_advantages" in of.values:
        return _rloo(of)
    if "GRPO" in note.name or {"loss_type", "num_generations"} <= of.values.keys():
        return _grpo(of)
    kind = note.name.rpartition(".")[2][:60]
    raise ProbeError(
        path, f"holds settings of {kind}, for which there is no recipe", "name a recipe"
    )


class _Arguments:
    """Plain values by name; one of another type than is asked for is an error."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values, self.path = values, path
        self.template: dict[str, Any] = {}

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        return default if value is None else bool(value)

    def number(self, key: str, default: float = 0.0) -> float:
        value = self.values.get(key)
        if value is None:
            return default
        if type(value) not in (int, float):
            raise ProbeError(self.path, f"{key} is {value!r:.40}, no number", "name a recipe")
        return float(value)

    def count(self, key: str, default: int = 0) -> int:
        return int(self.number(key, default)) if abs(self.number(key, default)) < 1 << 40 else 0

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(key)
        return default if value is None else str(value)[:60]


def _grpo(of: _Arguments) -> Found:
    loss = of.text("loss_type", "grpo")
    name = f"trl-{loss}"
    if name not in RECIPES:
        raise ProbeError(
            of.path, f"has the loss {loss!r}, for which there is no recipe", "name a recipe"
        )
    parts, left = _common(of)
    scale = of.values.get("scale_rewards", "group")
    parts["scale"] = _SCALES.get(scale, scale)
    quantile = of.number("top_entropy_quantile", 1.0)
    by_micro_batch = loss == "bnpo" or of.number("entropy_coef") != 0 or quantile < 1
    if by_micro_batch:
        parts["micro_batch_size"] = of.count("per_device_train_batch_size", 8)
    if loss == "dr_grpo":
        parts["constant"] = of.count("max_completion_length") or None
    if loss == "cispo":
        parts["factor"] = min(1.0, of.number("epsilon_high", of.number("epsilon", 0.2)))
    if of.flag("mask_truncated_completions"):
        parts["mask_truncated"] = True
    if quantile < 1:
        parts["top_entropy_quantile"] = quantile
        if _processes(of) > 1:
            left.append(
                "The trainer takes top_entropy_quantile over all processes. "
                "The probe takes it over each micro-batch."
            )
    if of.number("entropy_coef") != 0:
        parts["entropy_coef"] = of.number("entropy_coef")
    if of.number("beta") != 0:
        parts["kl_coef"] = of.number("beta")
        parts["kl"] = "k3_ratio" if of.flag("use_bias_correction_kl") else "k3"
        if (of.path.parent / "ref").is_dir():
            left.append(
                "The trainer's reference model has an adapter of its own (ref/). "
                "The probe takes the base model without one."
            )
    by_sequence = of.text("importance_sampling_level") == "sequence"
    if by_sequence and parts.get("kl") == "k3_ratio":
        left.append(
            "The trainer weights the KL term by the ratio of a whole response. "
            "The probe takes the gradient of that weight token by token."
        )
    if by_sequence and quantile < 1:
        left.append(
            "The trainer uses top_entropy_quantile together with the ratio of a whole response. "
            "The probe takes the ratio of each token."
        )
    if of.flag("use_adaptive_entropy"):
        left.append(
            "The trainer adapts its entropy coefficient (use_adaptive_entropy). "
            "The probe takes the one in the settings, and not that of this step."
        )
    if of.text("multi_objective_aggregation") == "normalize_then_sum":
        left.append(
            "The trainer normalises each reward by itself (normalize_then_sum). "
            "The probe normalises their sum."
        )
    if of.flag("use_vllm"):
        _of_vllm(of, loss, parts, left, by_sequence=by_sequence)
    return _made(name, parts, of, left)


def _of_vllm(
    of: _Arguments, loss: str, parts: dict[str, Any], left: list[str], *, by_sequence: bool
) -> None:
    """The ratio of the policy to what vLLM sampled from."""
    mode = of.text("vllm_importance_sampling_mode", "sequence_mask")
    level, _, cut = mode.partition("_")
    known = level in ("token", "sequence") and cut in ("truncate", "mask")
    if of.flag("vllm_importance_sampling_correction", default=True):
        cap = of.number("vllm_importance_sampling_cap")
        cap = of.number("vllm_importance_sampling_clip_max", cap)
        if known and loss != "vespo" and not (by_sequence and level == "token"):
            parts |= {"importance": mode, "importance_cap": cap or 1e9}
        else:
            left.append(
                "The trainer corrects for the difference between vLLM's probabilities and its own. "
                "The probe has no recipe for this kind of correction, and makes none."
            )
        if of.number("vllm_importance_sampling_clip_min") > 0:
            left.append(
                "The trainer has a lower bound for the ratio of its probabilities to vLLM's. "
                "The probe has none."
            )
    if of.values.get("off_policy_mask_threshold") is not None:
        left.append(
            "The trainer leaves out responses of vLLM that are too far off-policy "
            "(off_policy_mask_threshold). The probe keeps them."
        )


def _rloo(of: _Arguments) -> Found:
    parts, left = _common(of)
    parts["kl_coef"] = of.number("beta", 0.05)
    if of.flag("normalize_advantages"):
        parts |= {"scale": "advantages", "ddof": 1, "eps": 1e-4}
    if of.flag("mask_truncated_completions"):
        parts["mask_truncated"] = True
    if of.values.get("reward_clip_range") is not None:
        left.append("The trainer clips rewards (reward_clip_range). The probe does not.")
    return _made("trl-rloo", parts, of, left)


def _common(of: _Arguments) -> tuple[dict[str, Any], list[str]]:
    parts: dict[str, Any] = {"max_grad_norm": of.number("max_grad_norm", 1.0) or None}
    left: list[str] = []
    iterations = of.count("num_iterations", 1)
    if iterations > 1:
        left.append(several_passes(f"num_iterations {iterations}"))
    accumulated = of.count("gradient_accumulation_steps", 1)
    per_rollout = of.count("steps_per_generation", accumulated)
    if per_rollout > accumulated:
        count = -(-per_rollout // accumulated)
        left.append(several_steps(count))
    elif per_rollout < accumulated:
        left.append(
            "The trainer takes several rollouts for each step, and normalises the loss of each by itself. "
            "The probe normalises the whole step at once."
        )
    for key in ("bf16", "fp16"):
        if of.flag(key):
            left.append(
                f"The trainer computes under autocast ({key}). "
                "The probe does not reproduce the rounding of that."
            )
    if of.number("neftune_noise_alpha") > 0:
        left.append(
            "The trainer adds noise to the embeddings (neftune_noise_alpha). The probe does not."
        )
    if not of.flag("disable_dropout") and (rate := _dropout(of.path.parent)):
        left.append(f"The trainer uses dropout ({rate:g}). The probe does not.")
    coefficient = of.values.get("router_aux_loss_coef")
    if coefficient or (coefficient is None and _has_experts(of.path.parent)):
        left.append("The trainer adds an auxiliary loss of the experts. The probe leaves it out.")
    if of.flag("sync_ref_model"):
        left.append(
            "The trainer's reference model follows the policy (sync_ref_model). "
            "That of the probe stays as it is."
        )
    return parts, left


def _processes(of: _Arguments) -> int:
    """The processes of the run: a rollout has as many responses over those of one process."""
    accumulated = of.count("gradient_accumulation_steps", 1)
    of_one = of.count("per_device_train_batch_size", 8) * of.count(
        "steps_per_generation", accumulated
    )
    return max(1, of.count("generation_batch_size", of_one) // of_one) if of_one > 0 else 1


def _made(name: str, parts: dict[str, Any], of: _Arguments, left: list[str]) -> Found:
    """With the policy's temperature and the prompts of a step."""
    generation = {} if "temperature" not in of.values else {"temperature": of.number("temperature")}
    if of.count("max_completion_length") > 0:
        generation["max_new_tokens"] = of.count("max_completion_length")
    for key, harmless in (("top_k", (0, -1)), ("min_p", (0.0,)), ("top_p", (1.0,))):
        if of.values.get(key) is not None and of.values[key] not in harmless:
            left.append(
                f"The trainer samples with {key} {of.number(key):g}. The probe does not take this over."
            )
    if of.number("repetition_penalty", 1.0) != 1:
        left.append("The trainer samples with a repetition penalty. The probe samples without one.")
    rows = of.count("per_device_train_batch_size") * of.count("gradient_accumulation_steps")
    group = of.count("num_generations")
    prompts = max(1, rows * _processes(of) // group) if rows > 0 and group > 0 else None
    return Found(name, of.path.name, parts, generation, of.template, prompts, tuple(left))


def _dropout(folder: Path) -> float:
    """The largest rate in the configurations of adapter and model."""
    rates = [
        value
        for config in _configurations(folder)
        for key, value in config.items()
        if ("dropout" in key or key.endswith("_pdrop")) and type(value) in (int, float)
    ]
    return max(rates, default=0.0)


def _has_experts(folder: Path) -> bool:
    """Whether the model is a mixture of experts, whose own coefficient of an auxiliary loss then counts."""
    return any("num_local_experts" in c or "num_experts" in c for c in _configurations(folder))


def _configurations(folder: Path) -> list[dict[str, Any]]:
    """adapter_config.json, and the config.json here or of the base that it names, as far as they can be read."""
    found = [_table(folder / "adapter_config.json"), _table(folder / "config.json")]
    base = found[0].get("base_model_name_or_path")
    if isinstance(base, str) and base and "\0" not in base:
        found += [_table(place / base / "config.json") for place in (Path(), folder, folder.parent)]
    inner = [config.get("text_config") for config in found]
    return found + [config for config in inner if isinstance(config, dict)]


def _table(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            return {}
        with path.open("rb") as stream:
            config = json.loads(stream.read(_MOST))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}
