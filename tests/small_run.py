"""A training run of a tiny model with three checkpoints, and their reports, measured once a process."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import safetensors.torch

import healthy
import pages
from entropy_probe import ProbeConfig, ProbeReport, run_probe

STEPS = (10, 20, 30)
YAML = """\
budget: smoke
batch: {num_prompts: 4, num_update_prompts: 4, reward: "pages:length"}
generation: {num_return_sequences: 4, max_new_tokens: 6}
invariance: {max_examples: 0}
"""


@cache
def checkpoint() -> Path:
    """A checkpoint of a tiny Llama as TRL's trainer leaves it."""
    return healthy.supervised("llama", Path(tempfile.mkdtemp()) / "healthy", 0)


def write(folder: Path, steps: tuple[int, ...] = STEPS) -> Path:
    """The run: the same checkpoint under each step, with prompts beside it."""
    for step in steps:
        at = folder / f"checkpoint-{step}"
        shutil.copytree(checkpoint(), at)
        state = at / "trainer_state.json"
        known = json.loads(state.read_text()) if state.exists() else {}
        state.write_text(json.dumps({**known, "global_step": step}))
    return folder


def prompts(folder: Path) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}+{n}=", "gold": str(2 * n)}) + "\n" for n in range(8)))
    return path


@cache
def reports() -> tuple[ProbeReport, ...]:
    """Of the three checkpoints, each with larger weights than the last, on its own responses to the same prompts."""
    folder = Path(tempfile.mkdtemp())
    write(folder)
    config, made = ProbeConfig.from_mapping(pages._small(4)), []
    for k, step in enumerate(STEPS):
        file = folder / f"checkpoint-{step}" / "model.safetensors"
        larger = {name: (1 + 0.1 * k) * weight for name, weight in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(larger, file, {"format": "pt"})
        made.append(run_probe(file.parent, config, prompts=prompts(folder)))
    return tuple(made)
