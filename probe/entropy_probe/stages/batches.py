"""The E batch, on which the entropy is measured, and the U batch, from which the update comes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from entropy_probe.config import ProbeConfig
from entropy_probe.model.forward import BoundModel
from entropy_probe.stages import tasks
from entropy_probe.stages.rewards import find_reward
from entropy_probe.stages.rollouts import Progress, Rollouts, read_rollouts, redrawn, sample_rollouts


def resample(
    bound: BoundModel, rollouts: Rollouts, tokenizer: Any | None, config: ProbeConfig, override: Mapping[str, Tensor]
) -> Rollouts:
    """Fresh responses of the same prompts, as many of each, with the parameters in `override` replaced; no rewards."""
    seed = _seed("resampled", config.batch.seed)
    return redrawn(bound, rollouts, tokenizer, config.generation, seed=seed, override=override)


def _seed(which: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{which} {seed}".encode()).digest()[:6])


def draw_batches(
    bound: BoundModel,
    tokenizer: Any | None,
    config: ProbeConfig,
    rollouts: str | Path | None,
    update_rollouts: str | Path | None,
    prompts: str | Path | None,
    progress: Progress | None,
) -> tuple[Rollouts, Rollouts]:
    """E and U. Sampled batches have disjoint prompts and seeds of their own; one file alone serves as both."""
    batch = config.batch
    file_e = None if rollouts is None else read_rollouts(rollouts, bound, tokenizer)
    if (
        rollouts is not None
        and update_rollouts is not None
        and Path(rollouts).resolve() == Path(update_rollouts).resolve()
    ):
        update_rollouts = None  # one file for both is one batch, whichever way it is said
    file_u = None if update_rollouts is None else read_rollouts(update_rollouts, bound, tokenizer)
    if file_e is not None:
        return file_e, file_u if file_u is not None else file_e
    reward = find_reward(batch.reward)
    pool = tasks.read_prompts(prompts) if prompts is not None else tasks.dataset_prompts(batch.dataset, batch.split)
    count = batch.num_prompts + (0 if file_u is not None else batch.num_update_prompts)
    drawn = tasks.draw_prompts(pool, count, seed=batch.seed, with_replacement=batch.with_replacement)

    def sampled(which: str, own: list[tasks.Prompt]) -> Rollouts:
        return sample_rollouts(
            bound,
            tokenizer,
            own,
            config.generation,
            seed=_seed(which, batch.seed),
            reward=reward,
            stage=f"sampling {which}",
            progress=progress,
        )

    batch_e = sampled("E", drawn[: batch.num_prompts])
    return batch_e, file_u if file_u is not None else sampled("U", drawn[batch.num_prompts :])
