"""A training run of a tiny model with three checkpoints, and their reports, measured once a process."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

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
    """Of the three checkpoints, each on its own responses to the same prompts: the seeds differ."""
    folder = Path(tempfile.mkdtemp())
    write(folder)
    made = []
    for step in STEPS:
        values = pages._small(4) | {"batch": pages._small(4)["batch"] | {"seed": step}}
        config = ProbeConfig.from_mapping(values)
        made.append(run_probe(folder / f"checkpoint-{step}", config, prompts=prompts(folder)))
    return tuple(made)
