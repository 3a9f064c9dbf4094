"""What our sampler costs against transformers' own `generate`.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/sampling.py [pairs]

32 rows: 4 prompts of 128 tokens with 8 responses of 48 tokens each, none of which ends early; a random Qwen2 with
hidden size 256, 6 layers and a vocabulary of 8k; one thread; taken in turn, so that a machine that slows down slows
both. `generate` samples as the library used to: every row brings its own copy of the prompt. The target is 1.6.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
import transformers

from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.stages.sampling import left_padded, sample

PROMPTS, GROUP, PROMPT_LENGTH, NEW_TOKENS, VOCABULARY = 4, 8, 128, 48, 8192
TARGET = 1.6


def random_model() -> BoundModel:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return bind(transformers.AutoModelForCausalLM.from_config(config).eval())


def by_generate(bound: BoundModel, prompts: list[list[int]], top_p: float) -> None:
    config = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_p=top_p, top_k=0, max_new_tokens=NEW_TOKENS, pad_token_id=0
    )
    ids, mask = left_padded([prompt for prompt in prompts for _ in range(GROUP)], pad=0)
    model: Any = bound.language_model
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    assert output.shape == (PROMPTS * GROUP, PROMPT_LENGTH + NEW_TOKENS)


def by_sample(bound: BoundModel, prompts: list[list[int]], top_p: float) -> None:
    responses = sample(
        bound,
        prompts,
        num_return_sequences=GROUP,
        temperature=1.0,
        top_p=top_p,
        max_new_tokens=NEW_TOKENS,
        eos_ids=(),
        seed=0,
        gen_batch_size=PROMPTS * GROUP,
    )
    assert [len(response) for response in responses] == [NEW_TOKENS] * (PROMPTS * GROUP)


def seconds(function: object, *args: object) -> float:
    start = time.perf_counter()
    function(*args)  # pyright: ignore[reportCallIssue]
    return time.perf_counter() - start


def main(pairs: int) -> None:
    torch.set_num_threads(1)
    bound = random_model()
    prompts = torch.randint(VOCABULARY, (PROMPTS, PROMPT_LENGTH)).tolist()
    print(f"{PROMPTS} prompts x {GROUP} responses, {PROMPT_LENGTH} + {NEW_TOKENS} tokens, median of {pairs} pairs")
    for top_p in (1.0, 0.9):
        for function in (by_generate, by_sample):
            function(bound, prompts, top_p)  # warms up
        both = [tuple(seconds(f, bound, prompts, top_p) for f in (by_generate, by_sample)) for _ in range(pairs)]
        theirs, ours = (statistics.median(column) for column in zip(*both, strict=True))
        print(f"  top_p {top_p:<4}generate {theirs:6.3f} s   sample {ours:6.3f} s   ratio {theirs / ours:5.2f}", end="")
        print(f"   target {TARGET}" if top_p == 1.0 else "")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 7)
