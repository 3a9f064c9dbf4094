"""What the next step does to the entropy, predicted from a checkpoint, against what the trainer's own step did:
`python tests/reality.py` trains two runs with TRL and writes the table of docs/recipes.md."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from entropy_probe import ProbeConfig, run_probe
from trl_runs import Run, train

CONFIG: dict[str, Any] = {
    "budget": "smoke",
    "true_delta_h": {"normalize": "per_token"},
    "batch": {"num_prompts": 24, "reward": "trl_runs:probe_reward"},
    "generation": {"num_return_sequences": 8, "max_new_tokens": 12},
    "invariance": {"max_examples": 0},
}
RUNS: dict[str, dict[str, Any]] = {
    "full": {"learning_rate": 4e-3, "gradient_accumulation_steps": 2},
    "LoRA": {"learning_rate": 2e-2, "gradient_accumulation_steps": 2, "lora": True},
}
STEPS = 16


@dataclass(frozen=True)
class Point:
    """Nats per token: the change along the step that was made, and what was predicted of it."""

    real: float
    predicted: float
    se: float

    @property
    def z(self) -> float:
        return (self.real - self.predicted) / self.se


def points(run: Run, recipe: str, prompts: Path) -> list[Point]:
    found = []
    for step in range(1, STEPS):
        config = ProbeConfig.from_mapping(CONFIG | {"recipe": recipe})
        report = run_probe(
            run.checkpoint(step), config, None, run.batch(step), prompts=prompts, base_model=run.base(step)
        )
        real, change = report.real_update, report.next_step
        assert real is not None
        assert change is not None
        assert change.predicted is not None
        assert change.predicted_se is not None
        se = math.hypot(real.delta_h_per_token_se, change.predicted_se)
        found.append(Point(real.delta_h_per_token, change.predicted, se))
    return found


def line(name: str, recipe: str, of: list[Point]) -> str:
    correlation = statistics.correlation([p.real for p in of], [p.predicted for p in of])
    signs = sum(p.real * p.predicted > 0 for p in of)
    within = sum(abs(p.z) <= 2 for p in of)
    rms = math.sqrt(statistics.fmean(p.z**2 for p in of))
    return f"| {name} | `{recipe}` | {len(of)} | {within} | {rms:.2f} | {correlation:.3f} | {signs} |"


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print("| run | recipe | checkpoints | within 2 SE | rms z | correlation per token | right signs |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        prompts = Path(place) / "prompts.jsonl"
        lines = [json.dumps({"prompt": f"{a}+{b}="}) + "\n" for a in range(6) for b in range(6)]
        prompts.write_text("".join(lines))
        for name, options in RUNS.items():
            run = train(Path(place) / name, steps=STEPS + 1, lr_scheduler_type="constant", **options)
            for recipe in ("auto", "notes"):
                print(line(name, recipe, points(run, recipe, prompts)), flush=True)


if __name__ == "__main__":
    main()
