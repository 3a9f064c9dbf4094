"""The E batch, on which the entropy is measured, and the U batch, from which the update comes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_probe import report as r
from entropy_probe.config import ProbeConfig
from entropy_probe.errors import ConfigError, MeasurementError, printable
from entropy_probe.estimators import advantages, importance
from entropy_probe.model.forward import BoundModel
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.gradients.payloads import response_advantages
from entropy_probe.stages.memory.memory_limit import for_sampling
from entropy_probe.stages.responses import tasks
from entropy_probe.stages.responses.ids import Door, about_eos, early_eos, eos_ids
from entropy_probe.stages.responses.prompt_files import PromptFile
from entropy_probe.stages.responses.rewards import find_rewards
from entropy_probe.stages.responses.rollouts import Progress, Rollouts
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.responses.sampled_rollouts import redrawn, sample_rollouts
from entropy_probe.stages.share import Share


def redraw_for(
    bound: BoundModel, share: Share, tokenizer: Any | None, config: ProbeConfig
) -> Callable[[Mapping[str, Tensor]], Rollouts] | None:
    """What draws fresh responses of the share's own prompts, as many of each, at a mapping of parameters; `None`
    where no `fallback: resample` asks for it.

    The noise is that of the E batch: at θ a sampled batch comes again, so that what differs at θ + ηv is what the step
    changed.
    """
    if config.true_delta_h.fallback != "resample":
        return None
    rollouts = share.rollouts
    limit = _length_limit(rollouts, set(eos_ids(bound.language_model, tokenizer)), config)
    longer = with_limit(config, limit)
    generation = for_sampling(bound, int(rollouts.prompt_lens.max()), longer, later=True).generation
    seed = _seed("E", config.batch.seed)
    return lambda override: redrawn(
        bound, share.own, tokenizer, generation, seeds=[seed], override=override
    )[0]


def sampling_section(
    bound: BoundModel, e: Rollouts, tokenizer: Any | None, config: ProbeConfig
) -> r.SamplingSection:
    """Of the responses of E's first two prompts: the share that the same seed draws again, and the share that another
    seed, that of U, draws too."""
    few = e.of_prompts(torch.arange(2))
    generation = for_sampling(bound, int(few.prompt_lens.max()), config).generation
    seeds = [_seed(which, config.batch.seed) for which in "EU"]

    def same(again: Rollouts) -> float:
        equal = [a == b for a, b in zip(few.responses, again.responses, strict=True)]
        return sum(equal) / len(equal)

    own, other = map(same, redrawn(bound, few, tokenizer, generation, seeds=seeds, override={}))
    return r.SamplingSection(same_seed=own, other_seed=other)


def _length_limit(rollouts: Rollouts, ends: set[int], config: ProbeConfig) -> int:
    """`max_new_tokens` of the responses: an entropy per response is that of a policy with a certain limit.

    Responses without an end were cut at it. Where they have several lengths, or one that is not the longest, no limit
    explains them. (With stop strings they may have ended by one: then the configuration is believed.)
    """
    cut = {len(response) for response in rollouts.responses if response[-1] not in ends}
    if not cut or config.generation.stop:
        return max(config.generation.max_new_tokens, rollouts.max_gen_len)
    if cut != {rollouts.max_gen_len}:
        raise MeasurementError(
            rollouts.source,
            f"responses without EOS have {len(cut)} length{'s'[: len(cut) > 1]} (longest: {max(cut)} tokens, of all: "
            f"{rollouts.max_gen_len}), so the limit at which they were cut is not known",
            "set true_delta_h.fallback to none or psis",
        )
    return rollouts.max_gen_len


def _seed(which: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{which} {seed}".encode()).digest()[:6])


@dataclass(frozen=True)
class Unasked:
    """What nobody asked for, so that the built-in prompts, a stand-in reward and a shorter length may serve."""

    prompts: bool = False
    reward: bool = False
    length: bool = False


def with_limit(config: ProbeConfig, limit: int) -> ProbeConfig:
    """The configuration with responses of so many tokens at most."""
    generation = config.generation.model_copy(update={"max_new_tokens": limit})
    return config.model_copy(update={"generation": generation})


def draw_batches(
    bound: BoundModel,
    tokenizer: Any | None,
    config: ProbeConfig,
    rollouts: str | Path | None,
    update_rollouts: str | Path | None,
    prompts: str | Path | None,
    progress: Progress | None,
    world: World = ALONE,
    *,
    unasked: Unasked | None = None,
) -> tuple[Rollouts, Rollouts]:
    """E and U. Sampled batches have disjoint prompts and seeds of their own; one file alone serves as both.

    Of several processes each samples its share of the prompts, and all have both batches.
    """
    unasked = unasked or Unasked()
    _require_room_to_grow(config, rollouts)
    batch, template = config.batch, config.batch.chat_template_kwargs
    file_e = None
    if rollouts is not None:
        file_e = read_rollouts(rollouts, bound, tokenizer, template=template)
    if (
        rollouts is not None
        and update_rollouts is not None
        and Path(rollouts).resolve() == Path(update_rollouts).resolve()
    ):
        update_rollouts = None  # one file for both is one batch, whichever way it is said
    file_u = None
    if update_rollouts is not None:
        options = {"only_update": True, "template": template}
        file_u = read_rollouts(update_rollouts, bound, tokenizer, **options)
    if file_e is not None:
        return file_e, file_u if file_u is not None else file_e
    pool = (
        tasks.read_prompts(prompts, batch.split)
        if prompts is not None
        else tasks.dataset_prompts(batch.dataset, batch.split)
    )
    count = batch.num_prompts + (0 if file_u is not None else batch.num_update_prompts)
    drawn = tasks.draw_prompts(
        pool, count, seed=batch.seed, with_replacement=batch.with_replacement
    )
    rest: list[tasks.Prompt] = []
    if batch.target_se is not None:
        more = batch.max_prompts - batch.num_prompts
        rest = tasks.further_prompts(
            pool, count, more, seed=batch.seed, with_replacement=batch.with_replacement
        )
    no_gold = unasked.prompts or all(prompt.gold is None for prompt in drawn)
    reward = "stand_in" if unasked.reward and no_gold else batch.reward
    rewards = find_rewards(reward, batch.reward_weights)
    ends = eos_ids(bound.language_model, tokenizer)

    def door() -> Door:
        return Door(tokenizer, ends, batch.system_prompt, template)

    of_each = [] if tokenizer is None else [len(door().of_prompt(p)) for p in (*drawn, *rest)]
    longest = max(of_each, default=0)
    limit, said = None, (*_about(pool), *about_eos(bound.language_model, tokenizer))
    asked, room = config.generation.max_new_tokens, (bound.longest_row or 0) - longest
    if unasked.length and 0 < room < asked:
        limit = room
        held = f"the model holds {bound.longest_row}"
        said += (f"responses end after {room} tokens, not {asked}: {held}",)
        config = with_limit(config, room)
    elif bound.longest_row is not None and room <= 0:
        said += (f"prompts have up to {longest} tokens, and the model holds {bound.longest_row}",)
    generation = for_sampling(bound, longest, config).generation if longest else config.generation

    def sampled(which: str, own: list[tasks.Prompt], door: Door, first: int = 0) -> Rollouts:
        made = sample_rollouts(
            bound,
            tokenizer,
            own,
            generation,
            seed=_seed(which, batch.seed),
            rewards=rewards,
            door=door,
            first_prompt=first,
            stage=f"sampling {which}",
            progress=progress,
            world=world,
        )
        name = reward if isinstance(reward, str) else ", ".join(reward)
        found = (*made.found, *said)
        return replace(made, reward=name, found=found, builtin=unasked.prompts, limit=limit)

    door_e = door()
    batch_e = sampled("E", drawn[: batch.num_prompts], door_e)
    if batch.target_se is not None:

        def further(first: int, count: int) -> Rollouts | None:
            own = rest[first : first + count]
            return sampled("E", own, door_e, batch.num_prompts + first) if own else None

        batch_e = replace(batch_e, further=further)
    if file_u is not None:
        return batch_e, file_u
    return batch_e, sampled("U", drawn[batch.num_prompts :], door())


def _require_room_to_grow(config: ProbeConfig, rollouts: str | Path | None) -> None:
    batch, key = config.batch, "batch.target_se"
    if batch.target_se is None:
        return
    if rollouts is not None:
        problem = "the E batch is read from a file, to which no prompts can be added"
        raise ConfigError(key, problem, "leave out --probe-rollouts, or the target")
    if batch.max_prompts < batch.num_prompts:
        problem = f"batch.max_prompts is {batch.max_prompts}, and batch.num_prompts is {batch.num_prompts}"
        raise ConfigError(key, problem, "give a larger batch.max_prompts")
    if config.generation.top_p < 1:
        problem = "generation.top_p is below 1, and then nothing is predicted"
        raise ConfigError(key, problem, "set generation.top_p to 1, or leave out the target")


def _about(pool: Sequence[tasks.Prompt]) -> tuple[str, ...]:
    """From which column of a file the gold answers are, where it is none of that name."""
    column = pool.gold if isinstance(pool, PromptFile) else None
    return () if column in (None, "gold") else (f"gold answers are from the column `{column}`",)


def batch_section(
    rollouts: Rollouts, same_batch: bool, config: ProbeConfig, given: str, eos: Collection[int]
) -> r.BatchSection:
    """A batch in the report; `given` is the file that was asked for, or `sampled`."""
    advantage = response_advantages(rollouts, config)
    without_advantage = advantages.zero_advantage(advantage, rollouts.rewards)
    se = None
    if rollouts.num_prompts > 1:
        _, se = importance.ratio_and_se(rollouts.rewards, rollouts.present.long())
    responses = [response for response in rollouts.responses if response]
    cut = [response for response in responses if response[-1] not in eos]
    limit = config.generation.max_new_tokens
    limit_is_known = rollouts.source == "sampled" and not config.generation.stop
    return r.BatchSection(
        num_prompts=rollouts.num_prompts,
        num_responses=rollouts.num_responses,
        total_responses=len(responses),
        num_tokens=int(rollouts.gen_lens.sum()),
        source=printable(rollouts.source),
        same_batch=same_batch,
        mean_reward=float(rollouts.rewards.sum()) / len(responses),
        mean_reward_se=se,
        zero_advantage_fraction=float(without_advantage.double().mean()),
        missing_gold=rollouts.missing_gold,
        given=printable(given),
        early_eos=sum(early_eos(response, eos) is not None for response in responses),
        unended=sum(len(response) < limit for response in cut) if limit_is_known else None,
        fingerprint=fingerprint(rollouts),
        prompts_fingerprint=prompts_fingerprint(rollouts),
        advantages=_whence(rollouts),
        reward=printable(rollouts.reward),
        prompts_are_builtin=rollouts.builtin,
        found=[printable(line) for line in rollouts.found],
    )


def _whence(rollouts: Rollouts) -> str:
    if rollouts.advantages is None:
        return "recipe"
    return "weights" if rollouts.weighed else "given"


def fingerprint(rollouts: Rollouts) -> str:
    """SHA-256 of every row's token ids, with where its response begins, and of what was given beside them.

    Not of advantages by rule: they follow from the rewards, in the rounding of the machine.
    """
    starts, lengths = rollouts.prompt_lens.tolist(), rollouts.gen_lens.tolist()
    rows = [
        [start, *row[: start + length]]
        for row, start, length in zip(rollouts.ids.tolist(), starts, lengths, strict=True)
    ]
    given = None if rollouts.advantages is None else rollouts.advantages.tolist()
    content = (rows, rollouts.rewards.tolist(), given)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def prompts_fingerprint(rollouts: Rollouts) -> str:
    """SHA-256 of the token ids of every prompt: two batches with the same one differ by responses alone."""
    group = rollouts.num_responses
    firsts = zip(
        rollouts.ids[::group].tolist(), rollouts.prompt_lens[::group].tolist(), strict=True
    )
    prompts = [ids[:length] for ids, length in firsts]
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
