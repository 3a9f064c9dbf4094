"""How far the probe's next update is from the one that TRL made: `python tests/fidelity.py` writes the table of
docs/recipes.md."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe import ProbeConfig, load_checkpoint
from entropy_probe.pipeline.measured import Measured, Models, measured
from entropy_probe.pipeline.prepared import Prepared, prepare
from entropy_probe.stages.update import UpdateDirection, compute_update_vector_adamw, learning_rate
from trl_runs import Run, train


@dataclass(frozen=True)
class Fidelity:
    """1 − cosine, and ratio of norms − 1, of the clipped gradient and of the step."""

    gradient_turned: float
    gradient_longer: float
    step_turned: float
    step_longer: float
    not_reproduced: list[str]


def fidelity(run: Run, step: int, **config: Any) -> Fidelity:
    """Of the update after checkpoint `step`, with its own batch as U."""
    prepared, of = _measured(run, step, config)
    adam = of.checkpoint.adam
    direction = compute_update_vector_adamw(of.bound.registry, adam, of.ascent, of.config.whose_update.max_grad_norm)
    given = {_plain(name): -gradient.double() for name, gradient in run.gradients[step].items()}
    own = {
        _plain(n): direction.clip_factor * y.double().reshape(of.bound.registry.parameters[n].shape)
        for n, y in of.ascent.items()
    }
    stepped, made = _step(run, step, of, direction)
    assert prepared.recipe is not None
    return Fidelity(*compared(own, given), *compared(stepped, made), prepared.recipe.not_reproduced)


def _measured(run: Run, step: int, config: dict[str, Any]) -> tuple[Prepared, Measured]:
    loaded = load_checkpoint(run.checkpoint(step), run.base(step))
    batch = run.batch(step)
    e = batch if len(batch.read_text().splitlines()) > 1 else _of_all_steps(run)
    prepared = prepare(loaded, ProbeConfig.from_mapping(config), e, batch)
    models = Models.of(loaded, prepared.model, prepared.config)
    e, u = prepared.rollouts, prepared.update_rollouts
    return prepared, measured(loaded, models, e, u, prepared.config, prepared.clock)


def _of_all_steps(run: Run) -> Path:
    """An E batch: what an update of one prompt does not need, and the rest does."""
    keys = ("prompt_ids", "response_ids", "rewards")
    lines = [json.loads(file.read_text().splitlines()[0]) for file in sorted(run.batch(0).parent.glob("after-*.jsonl"))]
    found = run.folder / "e.jsonl"
    found.write_text("".join(json.dumps({key: line[key] for key in keys}) + "\n" for line in lines))
    return found


def _step(run: Run, step: int, of: Measured, direction: UpdateDirection) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    lr, _ = learning_rate(of.checkpoint.adam, None)
    base = run.base(step)
    after = dict(load_checkpoint(run.checkpoint(step + 1), base).model.named_parameters())
    before = dict(of.checkpoint.model.named_parameters())
    made = {n: (after[n].detach().double() - before[n].detach().double()) / lr for n in direction.v}
    return direction.v, made


def _plain(name: str) -> str:
    return name.replace(".default", "")


def compared(own: dict[str, Tensor], other: dict[str, Tensor]) -> tuple[float, float]:
    """(1 − cosine, ratio of norms − 1)."""
    assert own.keys() == other.keys(), own.keys() ^ other.keys()
    a = torch.cat([own[n].double().flatten() for n in own])
    b = torch.cat([other[n].double().flatten() for n in own])
    unit = a / a.norm() - b / b.norm()
    return float(unit.square().sum() / 2), float(a.norm() / b.norm()) - 1


LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
SETTINGS: dict[str, dict[str, Any]] = {
    **{
        f"{loss}, {scale}": {"loss_type": loss, "scale_rewards": scale, "max_grad_norm": 1e9}
        for loss in LOSSES
        for scale in ("group", "batch", "none")
    },
    "lora": {"lora": True},
    "lora, beta": {"lora": True, "beta": 0.04},
    "beta": {"beta": 0.04},
    "beta, plain k3": {"beta": 0.04, "use_bias_correction_kl": False},
    "entropy_coef": {"entropy_coef": 0.01},
    "top_entropy_quantile": {"top_entropy_quantile": 0.2},
    "both, bnpo": {"top_entropy_quantile": 0.2, "entropy_coef": 0.01, "loss_type": "bnpo"},
    "mask_truncated_completions": {"mask_truncated_completions": True},
    "mask_truncated_completions, bnpo": {"mask_truncated_completions": True, "loss_type": "bnpo", "entropy_coef": 0.01},
    "temperature 0.7": {"temperature": 0.7},
    "max_grad_norm 1e9": {"max_grad_norm": 1e9},
    "max_grad_norm 0.05": {"max_grad_norm": 0.05},
    "accumulation 4": {"gradient_accumulation_steps": 4},
    "accumulation 4, bnpo": {"gradient_accumulation_steps": 4, "loss_type": "bnpo", "entropy_coef": 0.01},
    "weight decay 0.1": {"weight_decay": 0.1},
    "two learning rates": {"rates": (1e-3, 1e-4)},
    "GSPO": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "GSPO, dapo": {"importance_sampling_level": "sequence"},
    "first of two windows": {"steps_per_generation": 2, "step": 2},
    "first of two windows, grpo": {"steps_per_generation": 2, "loss_type": "grpo", "step": 2},
    "first of two windows, bnpo": {
        "steps_per_generation": 4, "gradient_accumulation_steps": 2, "loss_type": "bnpo", "step": 2
    },
    "cispo, epsilon_high 5": {"loss_type": "cispo", "epsilon_high": 5.0},
    "luspo, beta": {"loss_type": "luspo", "beta": 0.04},
    "one prompt": {"per_device_train_batch_size": 4, "max_grad_norm": 1e9},
    "8 generations": {"num_generations": 8, "per_device_train_batch_size": 16},
    "other betas, eps": {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
    "delta": {"delta": 1.5},
    "RLOO": {"rloo": True, "max_grad_norm": 1e9},
    "RLOO, lora": {"rloo": True, "lora": True},
    "RLOO, mask_truncated": {"rloo": True, "mask_truncated_completions": True, "beta": 0.3, "max_grad_norm": 1e9},
    "RLOO, normalised": {"rloo": True, "normalize_advantages": True, "beta": 0.0, "max_grad_norm": 1e9},
    # what the recipe says that it does not reproduce
    "second of two windows": {"steps_per_generation": 2},
    "num_iterations 2, second pass": {"num_iterations": 2},
    "lora_dropout 0.1": {"lora": True, "dropout": 0.1},
    "bf16 autocast": {"bf16": True},
}  # fmt: skip
"""Options of `train`; `step`: after which checkpoint (1)."""


def of_setting(place: Path, name: str) -> Fidelity:
    options = dict(SETTINGS[name])
    step = options.pop("step", 1)
    run = train(place, steps=step + 2, **options)
    has_kl = options.get("beta", 0.05 if options.get("rloo") else 0.0) > 0
    with_reference = has_kl and not options.get("lora")
    return fidelity(run, step, **({"reference_model": str(run.folder / "base")} if with_reference else {}))


def main() -> None:
    """The table, in Markdown."""
    print("| setting | 1 − cosine of g | norm of g | 1 − cosine of v | norm of v | not reproduced |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for number, name in enumerate(SETTINGS):
            found = of_setting(Path(place) / str(number), name)
            row = (found.gradient_turned, found.gradient_longer, found.step_turned, found.step_longer)
            shown = " | ".join(f"{x:.1e}" if k % 2 == 0 else f"{x:+.1e}" for k, x in enumerate(row))
            print(f"| {name} | {shown} | {' '.join(found.not_reproduced)} |", flush=True)


if __name__ == "__main__":
    main()
