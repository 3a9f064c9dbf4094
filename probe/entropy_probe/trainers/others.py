"""Settings that trainers leave as YAML or JSON: verl (`.hydra/config.yaml`), NeMo RL, prime-rl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from entropy_probe.errors import ProbeError
from entropy_probe.text import read_json
from entropy_probe.trainers.found import (
    UNTIL_REWARDS_DIFFER,
    Found,
    several_passes,
    several_steps,
)

_MOST = 1 << 16  # bytes; the largest of these trainers write some 30 KB
_VERL_LOSSES = {
    "token-mean": {"normaliser": "batch_tokens"},
    "seq-mean-token-sum": {"normaliser": "sum"},
    "seq-mean-token-mean": {"normaliser": "sequence_mean"},
    "seq-mean-token-sum-norm": {"normaliser": "constant"},
}
_KL = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def verl(path: Path) -> Found | None:
    """Keys of verl 0.7's `ppo_trainer.yaml`."""
    config = _yaml(path)
    actor = _at(config, "actor_rollout_ref", "actor")
    if not isinstance(actor, Mapping):
        return None
    estimator = _at(config, "algorithm", "adv_estimator") or "gae"
    left: list[str] = []
    name = "verl-rloo" if estimator == "rloo" else "verl-grpo"
    if estimator not in ("grpo", "rloo"):
        left.append(
            f"The trainer's advantages are those of {str(estimator)[:40]}. "
            "The probe takes those of GRPO."
        )
    parts: dict[str, Any] = {"max_grad_norm": actor.get("grad_clip") or None}
    aggregated = str(actor.get("loss_agg_mode", "token-mean"))
    parts |= _VERL_LOSSES.get(aggregated, {})
    if aggregated not in _VERL_LOSSES:
        left.append(
            f"The trainer adds up its loss by loss_agg_mode {aggregated[:40]}. "
            "The probe takes the mean over tokens."
        )
    if _at(config, "algorithm", "filter_groups", "enable") is True:
        left.append(UNTIL_REWARDS_DIFFER)
    if parts.get("normaliser") == "constant":
        parts["constant"] = _at(config, "data", "max_response_length")
    if estimator == "grpo" and _at(config, "algorithm", "norm_adv_by_std_in_grpo") is False:
        parts["scale"] = "none"
    if actor.get("entropy_coeff"):
        parts["entropy_coef"] = actor["entropy_coeff"]
    if actor.get("use_kl_loss"):
        kind = str(actor.get("kl_loss_type", "low_var_kl"))
        parts |= {"kl_coef": actor.get("kl_loss_coef") or 0.0, "kl": _KL.get(kind, "k3")}
        if kind not in _KL:
            left.append(
                f"The trainer's estimator of the KL term is {kind[:40]}. The probe takes k3."
            )
    mode = _at(actor, "policy_loss", "loss_mode")
    if mode not in (None, "vanilla", "gspo", "kl_cov", "geo_mean"):  # at ratio 1 these are one
        left.append(
            f"The trainer's policy loss is {str(mode)[:40]}. The probe takes the plain policy gradient."
        )
    if _at(config, "algorithm", "use_kl_in_reward"):
        left.append("The trainer subtracts a KL term from the reward. The probe leaves it out.")
    rollout, step = _at(config, "data", "train_batch_size"), actor.get("ppo_mini_batch_size")
    if type(rollout) is int and type(step) is int and rollout > step > 0:
        left.append(several_steps(-(-rollout // step)))
    if actor.get("ppo_epochs") not in (None, 1):
        left.append(several_passes("ppo_epochs"))
    temperature = _at(config, "actor_rollout_ref", "rollout", "temperature")
    return _made(name, ".hydra/config.yaml", parts, temperature, step, left)


def nemo_rl(path: Path) -> Found | None:
    """Keys of NeMo RL's `examples/configs/grpo_math_1B.yaml`."""
    config = _yaml(path)
    grpo, loss = _at(config, "grpo"), _at(config, "loss_fn")
    if not isinstance(grpo, Mapping) or not isinstance(loss, Mapping):
        return None
    parts: dict[str, Any] = {"max_grad_norm": _at(config, "policy", "max_grad_norm") or None}
    parts["kl_coef"] = loss.get("reference_policy_kl_penalty") or 0.0
    if grpo.get("use_leave_one_out_baseline") is False:
        parts |= {"baseline": "mean", "scale": "group"}
    if grpo.get("normalize_rewards") is False:
        parts["scale"] = "none"
    if loss.get("token_level_loss") is False:
        parts["normaliser"] = "sequence_mean"
    temperature = _at(config, "policy", "generation", "temperature")
    prompts = grpo.get("num_prompts_per_step")
    kind = loss.get("reference_policy_kl_type", "k3")
    if kind in ("k1", "k2"):
        parts["kl"] = kind
    left = []
    if grpo.get("use_dynamic_sampling") is True:
        left.append(UNTIL_REWARDS_DIFFER)
    if grpo.get("overlong_filtering") is True:
        parts["mask_truncated"] = True
    if loss.get("use_importance_sampling_correction") is True:
        left.append(
            "The trainer corrects for the difference between its sampler's probabilities and its own. "
            "The probe does not."
        )
    rows = [
        prompts,
        grpo.get("num_generations_per_prompt"),
        _at(config, "policy", "train_global_batch_size"),
    ]
    if all(type(count) is int for count in rows) and rows[0] * rows[1] > rows[2] > 0:
        left.append(several_steps("several"))
    return _made("nemo-rl", path.name, parts, temperature, prompts, left)


def prime_rl(path: Path) -> Found | None:
    """`optim.max_norm` of the trainer's file, `sampling.temperature` of the orchestrator's beside it."""
    config, beside = read_json(path), path.with_name("orchestrator.json")
    if not isinstance(_at(config, "optim"), Mapping) or not beside.is_file():
        return None
    parts = {"max_grad_norm": _at(config, "optim", "max_norm") or None}
    temperature = _at(read_json(beside), "sampling", "temperature")
    return _made("prime-rl", "configs/trainer.json", parts, temperature, None, [])


def _made(
    name: str,
    source: str,
    parts: Mapping[str, Any],
    temperature: Any,
    prompts: Any,
    left: list[str],
) -> Found:
    generation = {"temperature": float(temperature)} if type(temperature) in (int, float) else {}
    count = prompts if type(prompts) is int and prompts > 0 else None
    return Found(name, source, parts, generation, prompts=count, not_reproduced=tuple(left))


def _yaml(path: Path) -> Any:
    with path.open("rb") as stream:
        data = stream.read(_MOST + 1)
    if len(data) > _MOST:
        raise ProbeError(path, "is too large for a file of settings", "its settings are not read")
    try:
        return yaml.load(data.decode("utf-8"), _Unmerged)  # noqa: S506 (a SafeLoader)
    except Exception as error:  # of tags, numbers and dates too
        problem = f"is not YAML ({type(error).__name__})"
        raise ProbeError(path, problem, "its settings are not read") from error


class _Unmerged(yaml.SafeLoader):
    """Merged tables may be of merged tables, and take a time that doubles with each."""

    def flatten_mapping(self, node: Any) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("tables are merged")


def _at(table: Any, *keys: str) -> Any:
    for key in keys:
        table = table.get(key) if isinstance(table, Mapping) else None
    return table
