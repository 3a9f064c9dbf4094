"""Checkpoints of Qwen2.5's sizes with random weights, and responses that are their own, drawn without a forward pass.

The layers add so little to the embeddings (`LITTLE`) that the next token hangs on the last one alone, but for a
thousandth of a nat: q(x | y) = softmax(head · norm(embedding of y)). So a response of T tokens is a chain of T products
with the output layer, for all rows at once, and `on_policy` cannot tell it from one that the model sampled. What a pass
costs does not depend on the weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import tokenizers
import torch
import transformers
from torch import Tensor

# hidden, intermediate, layers, heads, key-value heads, vocabulary: Qwen2.5's, and tiny ones
SHAPES = {
    "0.5b": (896, 4864, 24, 14, 2, 151_936),
    "1.5b": (1536, 8960, 28, 12, 2, 151_936),
    "small": (64, 128, 2, 4, 2, 512),
}
EOS = 1
LITTLE = 1e-3
LOGIT = 8.0
"""Logit of a token after itself, as a tied embedding makes it; those of all others are small. Which share of the
probability it takes depends on the vocabulary."""


@dataclass(frozen=True)
class Made:
    """A folder as Trainer leaves it, and the policy q as a table: states [V, h] times the output layer [V, h]."""

    folder: Path
    states: Tensor
    head: Tensor

    @torch.no_grad()
    def drawn(
        self, path: Path, *, prompts: int, group: int, prompt: int, length: int, seed: int
    ) -> Path:
        """A rollouts file of responses that end at the EOS or after `length` tokens, with rewards of 0 and 1."""
        random = torch.Generator(self.head.device).manual_seed(seed)
        device, vocabulary = self.head.device, len(self.head)
        asked = torch.randint(2, vocabulary, (prompts, prompt), generator=random, device=device)
        last = asked[:, -1].repeat_interleave(group)
        columns = []
        for _ in range(length):
            q = (self.states[last] @ self.head.T).softmax(-1)
            last = torch.multinomial(q, 1, generator=random)[:, 0]
            columns.append(last)
        rows = torch.stack(columns, 1).tolist()
        responses = [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]
        rewards = torch.rand(len(rows), generator=random, device=device).round().tolist()
        with path.open("w", encoding="utf-8") as lines:
            for n, ids in enumerate(asked.tolist()):
                of = slice(n * group, (n + 1) * group)
                line = {"prompt_ids": ids, "response_ids": responses[of], "rewards": rewards[of]}
                lines.write(json.dumps(line) + "\n")
        return path


def words(size: int) -> Any:
    """A tokenizer of as many words as the model has tokens."""
    names = ["<pad>", "<eos>", *(f"w{k}" for k in range(size - 2))]
    ids = {name: k for k, name in enumerate(names)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="w0"))  # noqa: S106
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    named = {"eos_token": "<eos>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **named)


def made(shape: str, folder: Path, device: torch.device, *, lora: bool) -> Made:
    """bf16 weights (an adapter's are float32), and AdamW after two steps on random tokens."""
    torch.manual_seed(0)
    hidden, inner, layers, heads, pairs, vocabulary = SHAPES[shape]
    config = transformers.MistralConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        sliding_window=None,
    )
    with torch.device(device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(LITTLE)
        model.model.norm.weight.fill_(LOGIT / (config.initializer_range * hidden))
    tokenizer, target = words(vocabulary), folder / "checkpoint"
    network = model
    if lora:
        base = folder / "base"
        model.to(torch.bfloat16).save_pretrained(base)
        tokenizer.save_pretrained(base)
        adapter = peft.LoraConfig(r=16, target_modules="all-linear")
        network = peft.get_peft_model(model.float(), adapter)
        network.peft_config["default"].base_model_name_or_path = str(base)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5 if lora else 1e-6)
    for _ in range(2):
        ids = torch.randint(2, vocabulary, (4, 64), device=device)
        network(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (network if lora else network.to(torch.bfloat16)).save_pretrained(target)
    tokenizer.save_pretrained(target)
    torch.save(optimizer.state_dict(), target / "optimizer.pt")
    head = model.lm_head.weight.detach().float()
    states = model.model.norm.float()(head).detach()
    return Made(target, states, head)
