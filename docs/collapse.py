"""Trains a run whose entropy collapses: `python docs/collapse.py --out runs/collapse`, about a minute on one core.

GRPO with LoRA from the demo's base model, through TRL as in `entropy_probe.demo.train`. The last `CHECKPOINTS` steps
are kept, in which the entropy dies. Two things differ:

* The reward takes a small price off for every character, as length penalties do: the shortest wrong answer pays best.
* The learning rate is healthy for `HEALTHY_STEPS` steps and `TOO_LARGE` times that from then on. The arithmetic is
  unlearned, the answers grow shorter, and the policy ends by saying nothing, whatever is asked: all rewards of a
  group are then the same, and no gradient brings it back. Without the price too large a rate makes the entropy explode.

`--healthy` trains the same run without the raise. Everything is seeded.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
from pathlib import Path
from typing import Any

import entropy_probe.demo
from entropy_probe.stages.responses.rewards import tag_pref
from entropy_probe.stages.responses.tasks import arithmetic

STEPS, CHECKPOINTS = 82, 10
BATCH = 64
HEALTHY_LR, HEALTHY_STEPS = 1e-3, 10
TOO_LARGE = 5.0
PRICE_OF_A_CHARACTER = 1 / 300


def priced(response: str, gold: str | None) -> float:
    """1 for the right answer, less the price of its characters."""
    return tag_pref(response, gold) - PRICE_OF_A_CHARACTER * len(response)


def reward(completions: list[str], gold: list[str], **_: Any) -> list[float]:
    """`priced` in the form that TRL calls."""
    return [priced(text, answer) for text, answer in zip(completions, gold, strict=True)]


def train(factor: float) -> None:
    """GRPO on `base`, which lies in the current folder; after the healthy steps `factor` times their learning rate."""
    # Imported here: the probe takes `priced` from this file, and needs none of it.
    import torch
    from torch.optim.lr_scheduler import LambdaLR

    from entropy_probe.demo.train import grpo_trainer

    torch.set_num_threads(1)
    trainer = grpo_trainer(
        "base",
        arithmetic("train"),
        reward,
        output_dir=".",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=HEALTHY_LR,
        save_steps=1,
        save_total_limit=CHECKPOINTS,
    )
    # The trainer saves after the scheduler's step: optimizer.pt holds the learning rate that the next step uses.
    trainer.lr_scheduler = LambdaLR(
        trainer.create_optimizer(), lambda step: factor if step >= HEALTHY_STEPS else 1.0
    )
    trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a run whose entropy collapses.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/collapse"),
        help="folder for base and the checkpoints",
    )
    parser.add_argument(
        "--healthy", action="store_true", help="keep the healthy learning rate to the end"
    )
    options = parser.parse_args()
    # adapter_config.json names the base model as it is given here, and the probe looks for it beside the checkpoints.
    base = Path(entropy_probe.demo.__file__).with_name("base")
    shutil.copytree(base, options.out / "base", copy_function=shutil.copyfile, dirs_exist_ok=True)
    with contextlib.chdir(options.out):
        train(1.0 if options.healthy else TOO_LARGE)


if __name__ == "__main__":
    main()
