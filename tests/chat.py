"""Tokenizers of bytes with real chat templates, a tiny chat model, and a run of TRL's trainer on messages."""

from __future__ import annotations

import copy
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from trl import GRPOConfig, GRPOTrainer

SPECIAL = {
    "qwen2_5": ("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>", "<pad>"),
}
ENDS = {"qwen2_5": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}
BEGINS = {"llama3": "<|begin_of_text|>", "gemma": "<bos>"}
PADS = {"qwen2_5": "<|endoftext|>", "gemma": "<pad>"}


def tokenizer(template: str | None = "qwen2_5", **more: Any) -> Any:
    """Every byte is a token, after the special ones; `template` is one that TRL ships."""
    family = template or "qwen2_5"
    names = [*SPECIAL[family], *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({name: k for k, name in enumerate(names)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL[family]])
    if family in BEGINS:
        bos = BEGINS[family]
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=None, special_tokens=[(bos, made.token_to_id(bos))]
        )
    own = {"eos_token": ENDS[family], "pad_token": PADS.get(family, ENDS[family]), "bos_token": BEGINS.get(family)}
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **(own | more))
    if template is not None:
        found.chat_template = resources.files("trl").joinpath(f"chat_templates/{template}.jinja").read_text()
    return found


def tiny_model(own: Any, seed: int = 0, **more: Any) -> Any:
    """Of as many tokens as the tokenizer has."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(own),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "eos_token_id": own.eos_token_id,
        "pad_token_id": own.pad_token_id,
        "bos_token_id": own.bos_token_id,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | more)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
    return model


def reward(prompts: list[Any], completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """TRL's form: the share of the response's characters that the answer has."""
    assert all(isinstance(prompt, list) for prompt in prompts)
    texts = [completion[0]["content"] for completion in completions]
    return [sum(c in own for c in text) / (len(text) + 1) for text, own in zip(texts, answer, strict=True)]


def longer_than_the_mean(completions: list[str], **_: Any) -> list[float]:
    """What a reward says that compares the responses of a batch, in the demo's arithmetic."""
    mean = sum(map(len, completions)) / len(completions)
    return [float(len(text) > mean) + len(text) / 100 for text in completions]


def excess_over_the_mean(completions: list[str], **_: Any) -> list[float]:
    """How much longer each is than the others of its batch."""
    mean = sum(map(len, completions)) / len(completions)
    return [len(text) - mean for text in completions]


QUESTIONS = [
    {
        "prompt": [
            {"role": "system", "content": "Answer in one word."},
            {"role": "user", "content": f"What comes after {n}? é"},
        ],
        "answer": "abcdefghijklmnopq"[n:] + "0123456789",
    }
    for n in range(16)
]


def questions(split: str) -> list[dict[str, Any]]:
    return QUESTIONS


def run_of_trl(folder: Path, *, steps: int = 2, seed: int = 0) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """A run that saves every step, each of all questions; what it logged, and the prompts' ids as it had them."""
    own = tokenizer()
    model = tiny_model(own, seed)
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 16 * 4,
        "num_generations": 4,
        "max_completion_length": 10,
        "max_steps": steps,
        "save_steps": 1,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": [],
        "log_completions": True,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(**settings),
        train_dataset=Dataset.from_list(QUESTIONS),
        processing_class=copy.deepcopy(own),
    )
    seen: list[list[int]] = []
    original = trainer._tokenize_prompts

    def tokenised(prompts: Any) -> Any:
        found = original(prompts)
        seen.extend(list(ids) for ids in found[0])
        return found

    trainer._tokenize_prompts = tokenised
    trainer.train()
    return trainer.state.log_history, seen
