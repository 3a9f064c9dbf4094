"""Trains the bundled demo checkpoint: `python -m entropy_probe.demo.train [--out DIR]`.

A Qwen2-shaped model of some 200 000 parameters answers `What is 17+25?` with
`<think>ones 7+5=12, tens 10+20=30, so 42</think><answer>42</answer>`:

1. `build_tokenizer`: byte-level BPE on the task's own text.
2. `supervise`: next-token training on worked answers in several styles, stopped while most answers are still wrong.
3. `reinforce`: GRPO with LoRA through TRL, stopped while most groups still mix right and wrong answers.
4. `measure` both policies on questions that neither step has seen, and `bundle` what the libraries wrote.

Everything is seeded. It takes a few minutes on one core and needs the `dev` extra (trl).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import platform
import random
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    set_seed,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from entropy_probe.config import ProbeConfig
from entropy_probe.model.forward import bind
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.rewards import tag_pref
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.sampled_rollouts import sample_rollouts
from entropy_probe.stages.responses.tasks import arithmetic, draw_prompts
from entropy_probe.stages.scores import score

SEEDS = {"supervise": 11, "stop": 12, "grpo": 13, "measure": 14}
GROUP_SIZE = 8
END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|endoftext|>"
MAX_NEW_TOKENS = 40
MERGES = 48
SUPERVISED_STOP = 0.3
SUPERVISED_MAX_STEPS = 3000
SUPERVISED_BATCH = 64
SUPERVISED_LR = 3e-3
GRPO_STEPS = 100
GRPO_BATCH = 128
GRPO_LR = 1e-3
WATCHED_PROMPTS, MEASURED_PROMPTS = 128, 500
REWARD_GAIN = 0.2
BUNDLE_BYTES = 2_000_000
SAMPLING = ProbeConfig.from_mapping(
    {
        "generation": {
            "max_new_tokens": MAX_NEW_TOKENS,
            "num_return_sequences": GROUP_SIZE,
            "gen_batch_size": 512,
        }
    }
)
# Pickles that need unrestricted unpickling, and a model card.
NOT_BUNDLED = ("training_args.bin", "rng_state.pth", "README.md")


def worked_answer(prompt: Prompt, rng: random.Random) -> str:
    """One of several ways to the right answer, in tags, up to and with the end-of-text token."""
    a, b = map(int, re.findall(r"\d+", prompt.text))
    gold = prompt.gold
    op = "+" if "+" in prompt.text else "-"
    sign = 1 if op == "+" else -1
    tens, ones = a // 10 * 10 + sign * (b // 10 * 10), a % 10 + sign * (b % 10)
    last = rng.choice(("so", "sum", "then", "is"))
    by_tens = f"tens {a // 10 * 10}{op}{b // 10 * 10}={tens}"
    by_ones = f"ones {a % 10}{op}{b % 10}={ones}"
    rounded = b // 10 * 10
    styles = (
        f"{a}{op}{b}={gold}",
        f"{b}+{a}={gold}" if sign > 0 else f"-{b}+{a}={gold}",
        f"{a} {'plus' if sign > 0 else 'minus'} {b} is {gold}",
        f"{a}{op}{rounded}={a + sign * rounded}, {last} {op}{b % 10} is {gold}",
        f"{by_tens}, {by_ones}, {last} {gold}",
        f"{by_ones}, {by_tens}, {last} {gold}",
    )
    opening = rng.choice(("", "well ", "take ", "see "))
    return f"<think>{opening}{rng.choice(styles)}</think><answer>{gold}</answer>{END}"


def build_tokenizer(prompts: list[Prompt], rng: random.Random) -> PreTrainedTokenizerFast:
    """Byte-level BPE with single digits; the four tags are plain added tokens, `END`, `PAD`, `UNKNOWN` special ones."""
    text = [prompt.text + worked_answer(prompt, rng) for prompt in prompts]
    tokenizer = Tokenizer(models.BPE())
    # Whatever tokenizer_config.json says, AutoTokenizer opens a Qwen2 model's tokenizer as Qwen2Tokenizer, which puts
    # its own normalizer, splitting and unknown token in place: with the same ones here, both readings agree.
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + MERGES, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((re.sub(r"<.*?>", "\n", line) for line in text), trainer)
    # Not special: `decode(skip_special_tokens=True)` must keep the tags, the reward reads them.
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (END, PAD, UNKNOWN)])
    special = {"eos_token": END, "pad_token": PAD, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", model_max_length=128, **special
    )


def build_model(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A Qwen2 model with tied embeddings in float32, initialised from torch's current seed."""
    eos, pad = (tokenizer.get_vocab()[token] for token in (END, PAD))
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        initializer_range=0.05,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config.eos_token_id = eos
    model.generation_config.pad_token_id = pad
    return model


def sample(model: Any, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt]) -> Rollouts:
    """`GROUP_SIZE` responses to every prompt at temperature 1, with their rewards; the same noise every time."""
    return sample_rollouts(
        bind(model), tokenizer, prompts, SAMPLING.generation, seed=SEEDS["measure"]
    )


def measure(model: Any, tokenizer: PreTrainedTokenizerBase, pool: list[Prompt]) -> dict[str, float]:
    """Mean reward, entropy, length and zero-advantage fraction over `GROUP_SIZE` responses to each prompt drawn."""
    prompts = draw_prompts(pool, MEASURED_PROMPTS, seed=SEEDS["measure"], with_replacement=False)
    rollouts = sample(model, tokenizer, prompts)
    entropy, length = score(bind(model), rollouts, SAMPLING).rb_sum, rollouts.gen_lens
    last = rollouts.ids.gather(1, (rollouts.prompt_lens + length - 1)[:, None])
    figures = {
        "reward": rollouts.rewards.mean(),
        "entropy_per_sequence": entropy.mean(),
        "entropy_per_token": entropy.sum() / length.sum(),
        "response_tokens_mean": length.float().mean(),
        "response_tokens_max": length.max(),
        "ended_fraction": (last == tokenizer.get_vocab()[END]).float().mean(),
        "zero_advantage_fraction": (rollouts.rewards.std(1) == 0).float().mean(),
    }
    return {name: round(figure.item(), 4) for name, figure in figures.items()}


def supervise(tokenizer: PreTrainedTokenizerBase, pool: list[Prompt], folder: Path) -> int:
    """Train a new model on worked answers until its sampled reward is `SUPERVISED_STOP`; save it, return the steps.

    Raises `RuntimeError` if it has not got there in `SUPERVISED_MAX_STEPS`.
    """
    set_seed(SEEDS["supervise"])
    rng = random.Random(SEEDS["supervise"])
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SUPERVISED_LR, weight_decay=0.0)
    watched = draw_prompts(pool, WATCHED_PROMPTS, seed=SEEDS["stop"], with_replacement=False)
    for step in range(1, SUPERVISED_MAX_STEPS + 1):
        drawn = rng.choices(pool, k=SUPERVISED_BATCH)
        texts = [prompt.text + worked_answer(prompt, rng) for prompt in drawn]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, prompt in enumerate(drawn):
            labels[row, : len(tokenizer(prompt.text)["input_ids"])] = -100
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = SUPERVISED_LR * min(1.0, step / 50)
        loss = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            reward = sample(model, tokenizer, watched).rewards.mean().item()
            print(
                f"supervised step {step}: loss {loss.item():.3f}, sampled reward {reward:.3f}",
                flush=True,
            )
            if reward >= SUPERVISED_STOP:
                model.save_pretrained(folder)
                return step
    raise RuntimeError(
        f"sampled reward below {SUPERVISED_STOP} after {SUPERVISED_MAX_STEPS} supervised steps"
    )


def reward_of_texts(completions: list[str], gold: list[str], **_: Any) -> list[float | None]:
    """`tag_pref` in the form that TRL calls."""
    return [tag_pref(text, answer) for text, answer in zip(completions, gold, strict=True)]


def grpo_trainer(
    base: str, pool: list[Prompt], reward: Callable[..., Any], **settings: Any
) -> GRPOTrainer:
    """GRPO with LoRA on every projection of `base`, on one core; `settings` are those of a run (`GRPOConfig`).

    `base` is relative to the current folder: it is written into adapter_config.json as it is given.
    """
    arguments = GRPOConfig(
        seed=SEEDS["grpo"],
        num_generations=GROUP_SIZE,
        max_completion_length=MAX_NEW_TOKENS,
        temperature=1.0,
        beta=0.0,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        logging_steps=10,
        save_strategy="steps",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **settings,
    )
    return GRPOTrainer(
        model=base,
        args=arguments,
        reward_funcs=reward,
        train_dataset=Dataset.from_list(
            [{"prompt": prompt.text, "gold": prompt.gold} for prompt in pool]
        ),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            r=4, lora_alpha=12, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )


def reinforce(base: str, pool: list[Prompt]) -> Path:
    """Train the demo's adapter; the folder of the only checkpoint."""
    run = {"output_dir": "grpo", "max_steps": GRPO_STEPS, "save_steps": GRPO_STEPS}
    grpo_trainer(
        base,
        pool,
        reward_of_texts,
        per_device_train_batch_size=GRPO_BATCH,
        learning_rate=GRPO_LR,
        **run,
    ).train()
    return Path("grpo") / f"checkpoint-{GRPO_STEPS}"


def bundle(base: Path, checkpoint: Path, folder: Path) -> None:
    """Copy what the libraries wrote into `folder`, without `NOT_BUNDLED`."""
    # copyfile: safetensors writes files that only their owner may read, which an installed package must not have.
    for source in (base, checkpoint):
        ignored = shutil.ignore_patterns(*NOT_BUNDLED)
        shutil.copytree(source, folder / source.name, ignore=ignored, copy_function=shutil.copyfile)


def check_bundle(folder: Path, places: set[str]) -> int:
    """The bundle's size in bytes. Raises `RuntimeError` if it is too large or names this machine or one of `places`."""
    names = [place.encode() for place in sorted(places) if len(place) > 1]
    # A host name can be two letters long, which random weights contain: it counts only as a word, in text.
    host = re.compile(rb"(?<![\w<|])" + re.escape(socket.gethostname().encode()) + rb"(?![\w|>])")
    size = 0
    for path in filter(Path.is_file, folder.rglob("*")):
        content = path.read_bytes()
        size += len(content)
        found = [name.decode() for name in names if name in content]
        if path.suffix in (".json", ".jinja", ".txt") and host.search(content):
            found.append("the host name")
        if found:
            raise RuntimeError(f"{path.relative_to(folder)} contains {', '.join(found)}")
    if size > BUNDLE_BYTES:
        raise RuntimeError(f"the bundle takes {size} bytes, at most {BUNDLE_BYTES} are allowed")
    return size


def install(folder: Path, out: Path) -> None:
    """Copy the bundle in `folder` into `out`, in place of an earlier one."""
    for old in (out / "base", *out.glob("checkpoint-*")):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(folder, out, copy_function=shutil.copyfile, dirs_exist_ok=True)


def train(out: Path) -> None:
    """Train, measure, bundle, check, and only then replace what `out` holds.

    Raises `RuntimeError` if GRPO has not raised the reward by `REWARD_GAIN`, or if `check_bundle` refuses.
    """
    torch.set_num_threads(1)
    here, out = Path.cwd(), out.resolve()
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        pool = arithmetic("train")
        build_tokenizer(pool, random.Random(SEEDS["supervise"])).save_pretrained("base")
        tokenizer = AutoTokenizer.from_pretrained("base")
        clock = [time.perf_counter()]
        supervised_steps = supervise(tokenizer, pool, Path("base"))
        clock.append(time.perf_counter())
        checkpoint = reinforce("base", pool)
        clock.append(time.perf_counter())
        splits = {"test": arithmetic("test"), "train": pool}
        model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        figures = {
            "base": {split: measure(model, tokenizer, prompts) for split, prompts in splits.items()}
        }
        policy = PeftModel.from_pretrained(model, str(checkpoint))
        figures["grpo"] = {
            split: measure(policy, tokenizer, prompts) for split, prompts in splits.items()
        }
        clock.append(time.perf_counter())

        gain = figures["grpo"]["test"]["reward"] - figures["base"]["test"]["reward"]
        if gain <= REWARD_GAIN:
            raise RuntimeError(
                f"GRPO changed the reward by {gain:+.3f}, more than {REWARD_GAIN} was expected"
            )

        steps = zip(("supervise", "grpo", "measure"), pairwise(clock), strict=True)
        record = {
            "policies": figures,
            "measured_on": {
                "dataset": "arithmetic",
                "prompts": MEASURED_PROMPTS,
                "group_size": GROUP_SIZE,
            },
            "log_vocabulary": math.log(len(tokenizer)),
            "vocabulary": len(tokenizer),
            "parameters": parameters,
            "lora_parameters": sum(
                p.numel() for name, p in policy.named_parameters() if "lora_" in name
            ),
            "steps": {"supervise": supervised_steps, "grpo": GRPO_STEPS},
            "seeds": SEEDS,
            "seconds": {name: round(end - start, 1) for name, (start, end) in steps},
            "versions": {
                name: version(name)
                for name in ("torch", "transformers", "peft", "trl", "tokenizers")
            }
            | {"python": platform.python_version()},
        }
        bundle(Path("base"), checkpoint, Path("bundle"))
        text = json.dumps(record, indent=2)
        Path("bundle", "training.json").write_text(text + "\n", encoding="utf-8")
        places = {
            str(here),
            scratch,
            str(Path(scratch).resolve()),
            str(Path.home()),
            tempfile.gettempdir(),
            str(out),
        }
        size = check_bundle(Path("bundle"), places)
        install(Path("bundle"), out)
    print(text)
    print(f"{size} bytes in {out}")


def main(arguments: list[str] | None = None) -> None:
    """Command line: `--out`, the folder that gets base, checkpoint-N and training.json (default: this package)."""
    parser = argparse.ArgumentParser(
        "python -m entropy_probe.demo.train", description="Train the demo checkpoint."
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent, help="folder for the bundle"
    )
    out = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    train(out)


if __name__ == "__main__":
    main()
