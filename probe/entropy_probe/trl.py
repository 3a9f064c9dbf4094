"""The batch of every step of a TRL run, written as a rollouts file: what a checkpoint's next update was made of.

trainer = GRPOTrainer(…)
trainer.add_callback(CaptureBatch(trainer, "batches"))
trainer.train()

pytest --probe-checkpoint=run/checkpoint-500 --probe-update-rollouts=batches/after-500.jsonl -m acceptance
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from entropy_probe.atomic import write_atomically

__all__ = ["CaptureBatch"]

_MARKS = ("probe_rewards", "probe_lengths", "probe_group")


class CaptureBatch(TrainerCallback):
    """Writes `after-STEP.jsonl` for the step that follows STEP: a rollout with all its groups, of which `in_step` says
    which responses the step took, and `micro_batches` which of them together. Rewards are the weighted sums.

    It needs the trainer, whose batches no callback is given: a `GRPOTrainer` or `RLOOTrainer` in one process. What the
    trainer computes is not changed. With `every=N` it writes those after steps 0, N, 2N, … alone. A batch that such
    a file cannot hold (several rollouts in a step, tokens of tools, a reward that is None) is not written, and a
    warning says so.
    """

    def __init__(self, trainer: Any, folder: str | Path, *, every: int = 1) -> None:
        if trainer.accelerator.num_processes > 1:
            raise NotImplementedError("the batch of several processes is not captured")
        self._trainer, self._folder, self._every = trainer, Path(folder), every
        self._rewards: Tensor | None = None
        self._lengths: list[int] = []
        self._rollout: list[dict[str, Any]] = []
        self._taken: list[tuple[int, int]] = []
        self._untold = ""
        self._of_trainer = {
            name: getattr(trainer, name)
            for name in ("_generate_and_score_completions", "_calculate_rewards", "compute_loss")
        }
        trainer._generate_and_score_completions = self._generated
        trainer._calculate_rewards = self._rewarded
        trainer.compute_loss = self._with_loss

    def _rewarded(self, inputs: Any, prompts: Any, completions: Any, ids: list[list[int]]) -> Any:
        found = self._of_trainer["_calculate_rewards"](inputs, prompts, completions, ids)
        self._untold = "a step takes several rollouts" if self._taken else ""
        if bool(found.isnan().all(1).any()):
            self._untold = "a reward is None"
        weights = self._trainer.reward_weights.to(found.device)
        self._rewards = (found * weights[None, :]).nansum(1)
        self._lengths = [len(one) for one in ids]
        return found

    def _generated(self, inputs: Any) -> Any:
        """The rollout, with marks that are shuffled and split as it is."""
        found = self._of_trainer["_generate_and_score_completions"](inputs)
        if not self._trainer.model.training:
            return found
        if "tool_mask" in found:
            self._untold = "responses hold tokens of tools"
        count, device = len(found["completion_ids"]), found["completion_ids"].device
        assert self._rewards is not None
        found["probe_rewards"] = self._rewards.clone()
        found["probe_lengths"] = torch.tensor(self._lengths, device=device)
        found["probe_group"] = torch.arange(count, device=device)
        prompts, masks = found["prompt_ids"].tolist(), found["prompt_mask"].bool().tolist()
        completions = found["completion_ids"].tolist()
        self._rollout = [
            {
                "prompt": [token for token, is_own in zip(prompt, mask, strict=True) if is_own],
                "response": completion[:length],
                "reward": reward,
            }
            for prompt, mask, completion, length, reward in zip(
                prompts, masks, completions, self._lengths, self._rewards.tolist(), strict=True
            )
        ]
        return found

    def _with_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if model.training and "probe_group" in inputs:
            micro = max((m for _, m in self._taken), default=-1) + 1
            self._taken += [(row, micro) for row in inputs["probe_group"].tolist()]
        own = {key: value for key, value in inputs.items() if key not in _MARKS}
        return self._of_trainer["compute_loss"](model, own, *args, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = state.global_step - 1
        if self._untold:
            warnings.warn(
                f"the batch after step {before} is not written: {self._untold}", stacklevel=2
            )
        elif self._taken and before % self._every == 0:
            lines = "".join(json.dumps(line) + "\n" for line in self._lines(before))
            write_atomically(self._folder / f"after-{before}.jsonl", lines.encode())
        self._taken = []

    def _lines(self, step: int) -> list[dict[str, Any]]:
        group = self._trainer.num_generations
        micro, rows = dict(self._taken), self._rollout
        lines = []
        for start in range(0, len(rows), group):
            own = range(start, start + group)
            lines.append(
                {
                    "prompt_ids": rows[start]["prompt"],
                    "response_ids": [rows[i]["response"] for i in own],
                    "rewards": [rows[i]["reward"] for i in own],
                    "after_step": step,
                    "in_step": [i in micro for i in own],
                    "micro_batches": [micro.get(i, 0) for i in own],
                }
            )
        return lines
