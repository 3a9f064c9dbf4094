"""Predictors of the entropy's change against what runs of TRL did: `python tests/skill.py` trains two, and writes the
table of docs/predictors.md."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import torch

from entropy_probe import ProbeConfig, ProbeReport, run_probe
from entropy_probe.predictor_skill import HEADINGS, RunSkill, run_skill
from reality import CONFIG, RUNS
from trl_runs import train

CHECKPOINTS, EVERY = 32, 4


def reports_of(place: Path, name: str) -> list[ProbeReport]:
    """Of every checkpoint, on responses that it sampled itself, with the batch of the trainer's next step for U."""
    prompts = place / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{a}+{b}="}) + "\n" for a in range(6) for b in range(6)))
    run = train(place / name, steps=CHECKPOINTS + 1, lr_scheduler_type="constant", **RUNS[name])
    config = ProbeConfig.from_mapping(CONFIG | {"batch": CONFIG["batch"] | {"num_prompts": 36}})
    found = []
    for step in range(1, CHECKPOINTS + 1):
        paths = (run.checkpoint(step), config, None, run.batch(step))
        found.append(run_probe(*paths, prompts=prompts, base_model=run.base(step)))
    return found


def written(name: str, skill: RunSkill) -> None:
    changes = ", ".join(f"{change:+.3f}" for change in skill.changes)
    error = sum(skill.errors) / len(skill.errors)
    print(f"\n{name}: {skill.title}; mean SE {error:.4f}; changes {changes}\n")
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for row in skill.rows():
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        for name in RUNS:
            reports = reports_of(Path(place), name)
            written(name, run_skill(reports))
            written(f"{name}, every {EVERY}th checkpoint", run_skill(reports[::EVERY]))


if __name__ == "__main__":
    main()
