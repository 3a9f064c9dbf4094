"""Rollouts sampled from the policy, and sampled again at other parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from entropy_probe.config import GenerationConfig
from entropy_probe.errors import MeasurementError
from entropy_probe.model.forward import BoundModel
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.responses.ids import Door, eos_ids
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.rewards import Asked, Reward, Rewards, of_each, tag_pref
from entropy_probe.stages.responses.rollouts import Group, Progress, Rollouts, assembled
from entropy_probe.stages.responses.sampling import StopStrings, Stream, sample


def sample_rollouts(
    bound: BoundModel,
    tokenizer: Any | None,
    prompts: Sequence[Prompt],
    generation: GenerationConfig,
    *,
    seed: int,
    reward: Reward | None = None,
    rewards: Rewards | None = None,
    door: Door | None = None,
    first_prompt: int = 0,
    stage: str = "sampling",
    progress: Progress | None = None,
    world: World = ALONE,
) -> Rollouts:
    """Sample G responses of every prompt from q: temperature and top_p as given, nothing else.

    A response ends with its first EOS, with the token that completes a stop string, or at the
    length limit. The same seed gives the same responses whatever `gen_batch_size` is, and however
    many processes share the prompts; no global generator is used. `reward` is that of one response,
    `rewards` those of many; `door` is what makes ids of the prompts. Where `first_prompt` others of
    the same batch were sampled before, the responses are those that all together would have had.
    """
    if tokenizer is None:
        problem = "the checkpoint has none, so nothing can be sampled"
        raise MeasurementError("tokenizer", problem, "give --probe-rollouts")
    door = door or Door(tokenizer, eos_ids(bound.language_model, tokenizer))
    encoded = []
    for number, prompt in enumerate(prompts, start=first_prompt + 1):
        door.at = f"prompt {number}"
        encoded.append(door.of_prompt(prompt))
    rewards = rewards or of_each(reward or tag_pref)
    group = generation.num_return_sequences
    share = world.share(len(prompts))
    drawn = _sampled(
        bound,
        tokenizer,
        encoded[share],
        generation,
        noise=Stream.of(seed, share.stop - share.start, first_prompt + share.start),
        progress=None if progress is None else partial(progress, stage),
    )
    drawn = _of_all(drawn, share, len(prompts), group, world)
    asked = []
    of_prompts = zip(prompts, drawn, strict=True)
    for number, (prompt, responses) in enumerate(of_prompts, start=first_prompt + 1):
        door.at = f"prompt {number}"
        asked += [Asked(prompt, door.text_of(response), response) for response in responses]
    # one process asks for all of them: a reward may compare the responses of a batch
    given = world.told(rewards(asked) if world.first else None) or []
    of_all = [given[start : start + group] for start in range(0, len(given), group)]
    groups = [Group(*one) for one in zip(encoded, drawn, of_all, strict=True)]
    missing = sum(prompt.gold is None for prompt in prompts)
    return replace(assembled(groups, "sampled", missing), found=door.lines())


def _of_all(
    responses: list[list[list[int]]],
    share: slice,
    count: int,
    group: int,
    world: World,
) -> list[list[list[int]]]:
    """The responses of all prompts, from everybody's own."""
    if world.size == 1:
        return responses
    own = share.stop - share.start
    sizes = [[len(response) for response in of_prompt] for of_prompt in responses]
    sizes = torch.tensor(sizes, dtype=torch.int32).reshape(own, group)
    lengths = world.placed(sizes, share, count)
    ids = torch.zeros(own, group, int(lengths.max()), dtype=torch.int32)
    for n, of_prompt in enumerate(responses):
        for g, response in enumerate(of_prompt):
            ids[n, g, : len(response)] = torch.tensor(response)
    rows = world.placed(ids, share, count).tolist()
    return [
        [row[:length] for row, length in zip(*of_prompt, strict=True)]
        for of_prompt in zip(rows, lengths.tolist(), strict=True)
    ]


def redrawn(
    bound: BoundModel,
    rollouts: Rollouts,
    tokenizer: Any | None,
    generation: GenerationConfig,
    *,
    seeds: Sequence[int],
    override: Mapping[str, Tensor],
) -> list[Rollouts]:
    """As many fresh responses of the same prompts, from q at the parameters in `override`, with each of the seeds.

    All are drawn together. Rewards are NaN.
    """
    size_b, group = rollouts.num_prompts, rollouts.num_responses
    lengths = rollouts.prompt_lens[::group].tolist()
    firsts = rollouts.ids[::group]
    prompts = [ids[:length].tolist() for ids, length in zip(firsts, lengths, strict=True)]
    if not prompts:
        return [rollouts] * len(seeds)
    drawn = _sampled(
        bound,
        tokenizer,
        prompts * len(seeds),
        generation.model_copy(update={"num_return_sequences": group}),
        noise=[one for seed in seeds for one in Stream.of(seed, size_b, rollouts.first_prompt)],
        override=override,
    )
    nothing = [[math.nan] * group] * size_b
    found = []
    for k in range(len(seeds)):
        own = drawn[k * size_b :][:size_b]
        groups = [Group(*one) for one in zip(prompts, own, nothing, strict=True)]
        found.append(replace(assembled(groups, "resampled", 0), first_prompt=rollouts.first_prompt))
    return found


def _sampled(
    bound: BoundModel,
    tokenizer: Any | None,
    prompts: Sequence[Sequence[int]],
    generation: GenerationConfig,
    **options: Any,
) -> list[list[list[int]]]:
    """`sample` under the policy of `generation`: the responses of each prompt.

    A tokenizer finds stop strings.
    """
    stop = None
    if generation.stop:
        if tokenizer is None:
            problem = "needs a tokenizer, but the checkpoint has none"
            raise MeasurementError("generation.stop", problem, "leave it out")
        stop = StopStrings(tokenizer.decode, tuple(generation.stop))
    group = generation.num_return_sequences
    responses = sample(
        bound,
        prompts,
        num_return_sequences=group,
        temperature=generation.temperature,
        top_p=generation.top_p,
        max_new_tokens=generation.max_new_tokens,
        eos_ids=eos_ids(bound.language_model, tokenizer),
        gen_batch_size=generation.gen_batch_size,
        stop=stop,
        **options,
    )
    return [responses[n * group :][:group] for n in range(len(prompts))]
