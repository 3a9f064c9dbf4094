"""Our sampler against transformers' own `generate`.

32 rows: 4 prompts of 128 tokens with 8 responses of 48 tokens each, none of which ends early; a random Qwen2 with
hidden size 256, 6 layers and a vocabulary of 8k. `generate` samples from one copy of the prompt for every response.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from subjects import small

from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.stages.responses.sampling import Stream, sample
from entropy_probe.stages.responses.steps import left_padded

PROMPTS, GROUP, PROMPT_LENGTH, NEW_TOKENS, VOCABULARY = 4, 8, 128, 48, 8192


def random_model(device: torch.device) -> BoundModel:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        **small(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    return bind(transformers.AutoModelForCausalLM.from_config(config).eval().to(device))


def by_generate(bound: BoundModel, prompts: list[list[int]], top_p: float) -> list[list[int]]:
    config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_p=top_p,
        top_k=0,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    ids, mask = left_padded([prompt for prompt in prompts for _ in range(GROUP)], pad=0)
    model: Any = bound.language_model
    with torch.no_grad():
        output = model.generate(
            input_ids=ids.to(bound.device),
            attention_mask=mask.to(bound.device),
            generation_config=config,
        )
    return output[:, PROMPT_LENGTH:].tolist()


def by_sample(bound: BoundModel, prompts: list[list[int]], top_p: float) -> list[list[int]]:
    return sample(
        bound,
        prompts,
        num_return_sequences=GROUP,
        temperature=1.0,
        top_p=top_p,
        max_new_tokens=NEW_TOKENS,
        eos_ids=(),
        noise=Stream.of(0, len(prompts)),
        gen_batch_size=PROMPTS * GROUP,
    )


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampling(
    race: Callable[..., dict[str, float]], device: torch.device, top_p: float
) -> None:
    bound = random_model(device)
    prompts = torch.randint(
        bound.vocabulary, (PROMPTS, PROMPT_LENGTH), generator=torch.Generator().manual_seed(0)
    ).tolist()
    for way in (by_generate, by_sample):
        assert [len(response) for response in way(bound, prompts, top_p)] == [NEW_TOKENS] * (
            PROMPTS * GROUP
        )
    race(
        lambda: by_sample(bound, prompts, top_p),
        {"generate": lambda: by_generate(bound, prompts, top_p)},
        rounds=5,
        targets={"generate": 1.6} if top_p == 1.0 else None,
    )
