"""TRL's and Unsloth's settings, from `training_args.bin` (TRL 1.16: `GRPOConfig`, `RLOOConfig`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropy_probe.config import RECIPES
from entropy_probe.trainers.found import Found
from entropy_probe.trainers.pickled import plain, read_arguments

_SCALES = {True: "group", False: "none", "True": "group", "False": "none"}
_IMPORTANCE = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def found(path: Path) -> Found | None:
    """`None` where the arguments are those of another trainer than GRPO and RLOO."""
    note = read_arguments(path)
    arguments = {str(key): plain(value) for key, value in note.state.items()}
    kind = str(note.args[0].name if isinstance(note.args, tuple) and note.args else note.name)
    kind = kind.rpartition(".")[2] or note.name.rpartition(".")[2]
    if "RLOO" in kind or "normalize_advantages" in arguments:
        return _rloo(arguments, path)
    if "GRPO" in kind or ("loss_type" in arguments and "num_generations" in arguments):
        return _grpo(arguments, path)
    return None


def _grpo(of: Mapping[str, Any], path: Path) -> Found | None:
    loss = of.get("loss_type") or "grpo"
    name = f"trl-{loss}"
    if name not in RECIPES:
        return None
    parts, left = _common(of, path)
    scale = of.get("scale_rewards", "group")
    parts["scale"] = _SCALES.get(scale, scale)
    if loss == "bnpo" or of.get("entropy_coef") or (of.get("top_entropy_quantile") or 1.0) < 1:
        parts["micro_batch_size"] = of.get("per_device_train_batch_size")
    if loss == "dr_grpo":
        parts["constant"] = of.get("max_completion_length")
    if loss == "cispo":
        upper = of.get("epsilon_high")
        parts["factor"] = min(1.0, of.get("epsilon", 0.2) if upper is None else upper)
    for key in ("mask_truncated_completions", "top_entropy_quantile", "entropy_coef"):
        if of.get(key):
            parts[key.removesuffix("_completions")] = of[key]
    if of.get("beta"):
        parts |= {"kl_coef": of["beta"]}
        parts["kl"] = "k3_ratio" if of.get("use_bias_correction_kl", True) else "k3"
    by_sequence = of.get("importance_sampling_level") == "sequence"
    if by_sequence and of.get("beta") and parts.get("kl") == "k3_ratio":
        left.append("KL weighted by a response's ratio: the gradient of the weight")
    if by_sequence and parts.get("top_entropy_quantile", 1.0) < 1:
        left.append("top_entropy_quantile with the ratio of a response")
    if of.get("use_adaptive_entropy"):
        left.append("adaptive entropy coefficient: its value at this step")
    if of.get("multi_objective_aggregation") == "normalize_then_sum":
        left.append("rewards normalised one by one (normalize_then_sum)")
    if of.get("use_vllm") and of.get("vllm_importance_sampling_correction"):
        mode = of.get("vllm_importance_sampling_mode")
        if mode in _IMPORTANCE and loss != "vespo":
            parts["importance"] = mode
            parts["importance_cap"] = of.get("vllm_importance_sampling_clip_max") or 1e9
        else:
            left.append("importance correction of vLLM's sampler")
    if of.get("use_vllm") and of.get("off_policy_mask_threshold") is not None:
        left.append("off-policy mask of responses that vLLM sampled")
    return _made(name, parts, of, path, left)


def _rloo(of: Mapping[str, Any], path: Path) -> Found:
    parts, left = _common(of, path)
    parts["kl_coef"] = of.get("beta") or 0.0
    if of.get("normalize_advantages"):
        parts |= {"scale": "advantages", "ddof": 1, "eps": 1e-4}
    if of.get("mask_truncated_completions"):
        parts["mask_truncated"] = True
    if of.get("reward_clip_range") is not None:
        left.append("rewards are clipped")
    return _made("trl-rloo", parts, of, path, left)


def _common(of: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], list[str]]:
    parts: dict[str, Any] = {"max_grad_norm": of.get("max_grad_norm") or None}
    left: list[str] = []
    iterations = of.get("num_iterations") or 1
    if iterations > 1:
        left.append(f"passes after the first over a rollout (num_iterations {iterations}): ratio 1")
    per_step, accumulated = of.get("steps_per_generation"), of.get("gradient_accumulation_steps")
    if per_step and accumulated and per_step > accumulated:
        count = -(-per_step // accumulated)
        left.append(f"{count} steps a rollout: after the first the ratio is not 1")
    for key in ("bf16", "fp16"):
        if of.get(key):
            left.append(f"rounding of autocast ({key})")
    if not of.get("disable_dropout") and (rate := _dropout(path.parent)):
        left.append(f"dropout in training ({rate:g})")
    coefficient = of.get("router_aux_loss_coef")
    if coefficient or (coefficient is None and _has_experts(path.parent)):
        left.append("auxiliary loss of experts")
    if of.get("sync_ref_model"):
        left.append("reference model that follows the policy")
    return parts, left


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
    return found


def _table(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            config = json.loads(stream.read(1 << 20))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _made(
    name: str, parts: dict[str, Any], of: Mapping[str, Any], path: Path, left: list[str]
) -> Found:
    """With the policy's temperature and the prompts of a step, of one process."""
    generation = {key: of[key] for key in ("temperature",) if isinstance(of.get(key), float)}
    for key, harmless in (("top_k", (None, 0, -1)), ("min_p", (None, 0.0)), ("top_p", (None, 1.0))):
        if of.get(key) not in harmless:
            left.append(f"{key} {of[key]} in sampling")
    if of.get("repetition_penalty") not in (None, 1.0):
        left.append("repetition penalty in sampling")
    sizes = [
        of.get(key)
        for key in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_generations",
        )
    ]
    prompts = None
    if all(type(size) is int and size > 0 for size in sizes):
        rows, accumulated, group = sizes
        prompts = max(1, rows * accumulated // group)  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]
    return Found(name, path.name, parts, generation, prompts, tuple(left))
