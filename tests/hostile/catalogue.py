"""Hostile and broken checkpoints: what is done to a good one, and the one line that has to come of it.

`CHECKPOINTS[name]` is a `Case`: `do(folder)` damages a copy of the demo adapter, whose base model is
`folder.parent / "base"`, or of a full fine-tune of the same model. `line` is a pattern of the message; one that
loads has none, and `says` is the warning about it. What a payload would make is `folder / MARKER`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hostile.damage import (
    HUGE,
    another_base,
    another_optimizer,
    as_bin,
    big_tokenizer,
    both,
    cut,
    dcp_metadata,
    deflated_optimizer,
    differing_head,
    edited,
    first_value,
    folder_for_file,
    group,
    laughs,
    link,
    lying_header,
    lying_offsets,
    misshapen,
    nested,
    one_more,
    optimizer,
    payload,
    pipe,
    planted_module,
    shards,
    state,
    tensors,
    without_first,
    written,
    zero_b,
)


@dataclass(frozen=True)
class Case:
    """`line`: a pattern of the message, `None` for one that loads. `says`: of the warning about it."""

    do: Callable[[Path], object]
    line: str | None
    full: bool = False
    says: str = ""


_BASE = "../base/"
_WEIGHTS, _ADAPTER = "model.safetensors", "adapter_model.safetensors"
_REMOTE = {"auto_map": {"AutoModelForCausalLM": "planted.Planted", "AutoConfig": "planted.Planted"}}
_LOOP = r"(([a-z0-9_.]+)+)+!"

CHECKPOINTS: dict[str, Case] = {
    # weights
    "weights-truncated": Case(cut(_ADAPTER, -1000), r"adapter_model.safetensors: is not a readable safetensors file"),
    "weights-empty": Case(cut(_ADAPTER, 0), r"adapter_model.safetensors: is not a readable safetensors file"),
    "weights-missing": Case(lambda f: (f / _ADAPTER).unlink(), r"no weights, expected adapter_model.safetensors"),
    "weights-nan": Case(tensors(first_value(float("nan"))), r"adapter_model.safetensors: .* 1 non-finite of"),
    "weights-inf": Case(tensors(first_value(float("inf"))), r"model.safetensors: .* 1 non-finite of", full=True),
    "weights-one-missing": Case(tensors(without_first), r"model.safetensors: .* is not in the file", full=True),
    "weights-one-more": Case(tensors(one_more), r"model.safetensors: .*extra.weight has no place", full=True),
    "weights-misshapen": Case(tensors(misshapen), r"q_proj.* shape", full=True),
    "weights-another-head": Case(tensors(differing_head), r"ties .*lm_head.weight", full=True),
    "weights-shard-missing": Case(lambda f: shards(f, lost=True), r"model-00002-of-00002.*: is missing", full=True),
    "weights-sharded": Case(lambda f: shards(f, lost=False), None, full=True),
    "weights-index-garbage": Case(
        both(lambda f: shards(f, lost=False), written("model.safetensors.index.json", "[]")), r"index.json: ", full=True
    ),
    "weights-header-lies": Case(lying_header, r"model.safetensors: is not a readable", full=True),
    "weights-offsets-lie": Case(lying_offsets, r"model.safetensors: is not a readable", full=True),
    "weights-pipe": Case(pipe(_WEIGHTS), r"no weights, expected model.safetensors", full=True),
    "weights-endless": Case(link(_WEIGHTS, "/dev/zero"), r"no weights, expected model.safetensors", full=True),
    "weights-folder": Case(folder_for_file(_WEIGHTS), r"no weights, expected model.safetensors", full=True),
    "weights-loop": Case(link(_WEIGHTS, _WEIGHTS), r"no weights, expected model.safetensors", full=True),
    "bin-payload": Case(
        both(as_bin, payload("pytorch_model.bin")), r"pytorch_model.bin: .*was not executed", full=True
    ),
    "bin-plain-payload": Case(both(as_bin, payload("pytorch_model.bin", "plain")), r"pytorch_model.bin: ", full=True),
    "bin-legacy-payload": Case(both(as_bin, payload("pytorch_model.bin", "legacy")), r"pytorch_model.bin: ", full=True),
    "bin-expanded": Case(
        lambda f: as_bin(f, lambda c: {**c, "model.norm.weight": torch.zeros(1).expand(HUGE)}),
        r"pytorch_model.bin: model.norm.weight .* in storage for 1",
        full=True,
    ),
    # config.json
    "config-garbage": Case(written("config.json", "{"), r"config.json: is not readable JSON", full=True),
    "config-binary": Case(written("config.json", bytes(range(256))), r"config.json: is not readable JSON", full=True),
    "config-list": Case(written("config.json", "[1]"), r"config.json: holds a list", full=True),
    "config-deep": Case(written("config.json", nested(100_000)), r"config.json: is not readable JSON", full=True),
    "config-huge-integer": Case(
        written("config.json", '{"model_type": ' + "9" * 5000 + "}"), r"config.json: is not readable JSON", full=True
    ),
    "config-duplicate-keys": Case(
        written("config.json", '{"model_type": "qwen2", "model_type": "martian"}'),
        r"model_type is 'martian'",
        full=True,
    ),
    "config-no-type": Case(written("config.json", "{}"), r"config.json: model_type is None", full=True),
    "config-unknown-type": Case(edited("config.json", model_type="martian"), r"model_type is 'martian'", full=True),
    "config-of-no-language-model": Case(
        edited("config.json", model_type="vit"), r"transformers cannot load it", full=True
    ),
    "config-remote-code": Case(
        both(planted_module, edited("config.json", **_REMOTE)), r"config.json: asks for remote code", full=True
    ),
    "config-quantised": Case(
        edited("config.json", quantization_config={"quant_method": "x"}), r"config.json: is quantised", full=True
    ),
    "config-attention-of-the-hub": Case(
        edited("config.json", attn_implementation="kernels-community/planted"),
        r"config.json: asks for .*attn_implementation",
        full=True,
    ),
    "config-other-weights": Case(
        edited("config.json", transformers_weights="../base/model.safetensors"), r"config.json: asks for", full=True
    ),
    "config-huge-vocabulary": Case(
        edited("config.json", vocab_size=HUGE), r"config.json: asks for \d{13,} values", full=True
    ),
    "config-huge-layers": Case(
        edited("config.json", num_hidden_layers=10**9, layer_types=None, max_window_layers=0),
        r"config.json: num_hidden_layers is 1000000000",
        full=True,
    ),
    "config-huge-width": Case(
        edited("config.json", hidden_size=10**9), r"config.json: asks for \d{9,} values", full=True
    ),
    "config-infinite-width": Case(edited("config.json", hidden_size=10**40), r"transformers cannot load it", full=True),
    "config-negative-width": Case(edited("config.json", hidden_size=-64), r"transformers cannot load it", full=True),
    "config-pipe": Case(pipe("config.json"), r"has neither config.json nor adapter_config.json", full=True),
    "config-endless": Case(link("config.json", "/dev/zero"), r"has neither config.json", full=True),
    "base-config-pipe": Case(pipe(_BASE + "config.json"), r"is not on disk"),
    # tokenizer
    "tokenizer-garbage": Case(written("tokenizer.json", "{}"), r"its tokenizer"),
    "tokenizer-empty": Case(
        lambda f: [path.unlink() for path in f.glob("tokenizer*")] + [(f / "tokenizer_config.json").write_text("{}")],
        r"its tokenizer",
    ),
    "tokenizer-larger-than-the-embedding": Case(big_tokenizer, r"tokenizer.* embedding"),
    "tokenizer-remote-code": Case(
        both(planted_module, edited("tokenizer_config.json", auto_map={"AutoTokenizer": ["planted.Planted", None]})),
        r"tokenizer_config.json: asks for remote code",
    ),
    "tokenizer-class-is-a-model": Case(
        edited("tokenizer_config.json", tokenizer_class="AutoModelForCausalLM"), None, full=True
    ),
    "tokenizer-class-is-a-list": Case(edited("tokenizer_config.json", tokenizer_class=[1]), r"its tokenizer"),
    "tokenizer-pipe": Case(pipe("special_tokens_map.json"), None),
    "tokenizer-template-bomb": Case(
        written(
            "chat_template.jinja",
            "{% for i in range(99999999) %}{% for j in range(99999999) %}{% endfor %}{% endfor %}",
        ),
        None,
    ),
    "tokenizer-huge-layers": Case(
        edited("config.json", model_type="qwen2", num_hidden_layers=10**9), r"config.json: num_hidden_layers is 10000"
    ),
    "tokenizer-deep": Case(written("tokenizer_config.json", nested(100_000)), r"tokenizer"),
    # other files
    "generation-garbage": Case(
        written("generation_config.json", "{"), r"generation_config.json: is not readable", full=True
    ),
    "generation-custom": Case(
        both(planted_module, edited("generation_config.json", custom_generate="planted")), None, full=True
    ),
    "generation-pipe": Case(pipe("generation_config.json"), None, full=True),
    "trainer-state-garbage": Case(written("trainer_state.json", "{"), r"trainer_state.json: is not readable JSON"),
    "trainer-state-list": Case(written("trainer_state.json", "[]"), r"trainer_state.json: holds a list"),
    "trainer-state-odd": Case(written("trainer_state.json", '{"global_step": "x"}'), None),
    "metadata-payload": Case(dcp_metadata, r"\.metadata: asks for .*was not executed", full=True),
    "scheduler-payload": Case(payload("scheduler.pt"), None),
    "rng-payload": Case(payload("rng_state.pth", "plain"), None),
    "arguments-payload": Case(payload("training_args.bin"), None),
    # optimizer
    "optimizer-missing": Case(lambda f: (f / "optimizer.pt").unlink(), r"has no optimizer state"),
    "optimizer-truncated": Case(cut("optimizer.pt", 5000), r"optimizer.pt: cannot be read"),
    "optimizer-empty": Case(cut("optimizer.pt", 0), r"optimizer.pt: cannot be read"),
    "optimizer-text": Case(written("optimizer.pt", "hello"), r"optimizer.pt: "),
    "optimizer-payload": Case(payload("optimizer.pt"), r"optimizer.pt: .*was not executed"),
    "optimizer-plain-payload": Case(payload("optimizer.pt", "plain"), r"optimizer.pt: "),
    "optimizer-legacy-payload": Case(payload("optimizer.pt", "legacy"), r"optimizer.pt: .*was not executed"),
    "optimizer-pipe": Case(pipe("optimizer.pt"), r"has no optimizer state"),
    "optimizer-endless": Case(link("optimizer.pt", "/dev/zero"), r"has no optimizer state"),
    "optimizer-folder": Case(folder_for_file("optimizer.pt"), r"has no optimizer state"),
    "optimizer-loop": Case(link("optimizer.pt", "optimizer.pt"), r"has no optimizer state"),
    "optimizer-of-another-model": Case(another_optimizer, r"optimizer.pt: its 2 tensors in groups of \[2\]"),
    "optimizer-of-other-shapes": Case(
        state(0, exp_avg=torch.ones(2, 2), exp_avg_sq=torch.ones(2, 2)), r"optimizer.pt: .* fit no known order"
    ),
    "optimizer-list": Case(optimizer(lambda c: [1, 2]), r"optimizer.pt: holds no optimizer state_dict"),
    "optimizer-state-is-a-list": Case(optimizer(lambda c: {**c, "state": [1]}), r"optimizer.pt: holds no optimizer"),
    "optimizer-never-stepped": Case(optimizer(lambda c: c["state"].clear()), r"optimizer.pt: was never stepped"),
    "optimizer-moment-missing": Case(state(3, exp_avg_sq=None), r"optimizer.pt: .* has no `exp_avg_sq`"),
    "optimizer-moment-negative": Case(
        optimizer(lambda c: c["state"][0]["exp_avg_sq"].sub_(1.0)), r"optimizer.pt: .*`exp_avg_sq` is negative"
    ),
    "optimizer-moment-nan": Case(
        optimizer(lambda c: c["state"][0]["exp_avg"].fill_(float("nan"))), r"optimizer.pt: .*`exp_avg` is not finite"
    ),
    "optimizer-step-0": Case(state(0, step=0), r"optimizer.pt: .*`step` is 0"),
    "optimizer-step-huge": Case(state(0, step=10**5000), r"optimizer.pt: "),
    "optimizer-steps-differ": Case(state(0, step=7), None, says="steps differ: 7 to 100"),
    "optimizer-expanded": Case(
        state(0, exp_avg=torch.zeros(1).expand(HUGE)), r"optimizer.pt: .* fit no known order|in storage"
    ),
    "optimizer-all-expanded": Case(
        optimizer(lambda c: [e.update(exp_avg=torch.zeros(1).expand(HUGE)) for e in c["state"].values()] and c),
        r"optimizer.pt: ",
    ),
    "optimizer-step-expanded": Case(state(0, step=torch.ones(1).expand(HUGE)), r"optimizer.pt: "),
    "optimizer-laughs": Case(group(betas=laughs()), r"optimizer.pt: `betas` is"),
    "optimizer-deflated": Case(deflated_optimizer, r"optimizer.pt: .*packed"),
    "optimizer-names-garbage": Case(written("optimizer_param_names.json", "{"), r"optimizer_param_names.json: "),
    # adapters
    "adapter-base-missing": Case(lambda f: shutil.rmtree(f.parent / "base"), r"adapter_config.json: .* is not on disk"),
    "adapter-base-hub": Case(
        edited("adapter_config.json", base_model_name_or_path="Qwen/Qwen2.5-0.5B"), r"nothing is downloaded"
    ),
    "adapter-base-url": Case(
        edited("adapter_config.json", base_model_name_or_path="https://example.com/model"), r"nothing is downloaded"
    ),
    "adapter-base-null": Case(
        edited("adapter_config.json", base_model_name_or_path=None), r"base_model_name_or_path is"
    ),
    "adapter-base-itself": Case(
        both(edited("config.json", model_type="qwen2"), edited("adapter_config.json", base_model_name_or_path=".")),
        r"an adapter itself",
    ),
    "adapter-base-wrong": Case(another_base, r"adapter_model.safetensors: does not fit the base model"),
    "adapter-base-nul": Case(edited("adapter_config.json", base_model_name_or_path="a\0b"), r"is not on disk"),
    "adapter-base-surrogate": Case(edited("adapter_config.json", base_model_name_or_path="\udc80"), r"is not on disk"),
    "adapter-another-rank": Case(edited("adapter_config.json", r=3), r"adapter_model.safetensors: does not fit"),
    "adapter-huge-rank": Case(edited("adapter_config.json", r=10**9), r"adapter_config.json: .*rank"),
    "adapter-rank-garbage": Case(edited("adapter_config.json", rank_pattern={"[": "x"}), r"adapter"),
    "adapter-pattern-garbage": Case(edited("adapter_config.json", alpha_pattern=-1), r"adapter"),
    "adapter-huge-rank-pattern": Case(
        edited("adapter_config.json", rank_pattern={"q_proj": 10**9}), r"adapter_config.json: .*rank"
    ),
    "adapter-keys-missing": Case(tensors(without_first), r"adapter_model.safetensors: .* is not in the file"),
    "adapter-nan": Case(tensors(first_value(float("nan"))), r"adapter_model.safetensors: .* non-finite"),
    "adapter-alpha-0": Case(
        edited("adapter_config.json", lora_alpha=0), None, says="lora_alpha is 0: the adapter does"
    ),
    "adapter-b-0": Case(tensors(zero_b), None, says="every lora_B is zero: the adapter does nothing"),
    "adapter-targets-garbage": Case(edited("adapter_config.json", target_modules=[[1]]), r"adapter"),
    "adapter-targets-endless": Case(
        edited("adapter_config.json", target_modules=_LOOP), r"adapter_config.json: .*target"
    ),
    "adapter-rank-pattern-endless": Case(
        edited("adapter_config.json", rank_pattern={_LOOP: 4}), r"adapter_config.json: .*rank_pattern"
    ),
    "adapter-megatron": Case(
        both(planted_module, edited("adapter_config.json", megatron_config={"a": 1}, megatron_core="planted")),
        r"adapter_config.json: asks for .*megatron_config",
    ),
    "adapter-auto-mapping": Case(
        both(
            planted_module,
            edited("adapter_config.json", auto_mapping={"base_model_class": "Planted", "parent_library": "planted"}),
        ),
        None,
    ),
    "adapter-runtime": Case(edited("adapter_config.json", runtime_config={"ephemeral_gpu_offload": True}), None),
    "adapter-replication": Case(
        edited("adapter_config.json", layer_replication=[[0, 10**9]]),
        r"adapter_config.json: asks for .*layer_replication",
    ),
    "adapter-init": Case(
        edited("adapter_config.json", init_lora_weights="pissa_niter_1000000000"), r"init_lora_weights"
    ),
    "adapter-init-eva": Case(
        edited("adapter_config.json", init_lora_weights="eva", eva_config={"rho": "x"}), r"adapter"
    ),
    "adapter-init-loftq": Case(
        edited("adapter_config.json", init_lora_weights="loftq", loftq_config={"loftq_iter": 10**9}), r"adapter"
    ),
    "adapter-unknown-keys": Case(edited("adapter_config.json", from_the_future=1), None),
    "adapter-config-garbage": Case(written("adapter_config.json", "nonsense"), r"adapter_config.json: is not readable"),
    "adapter-not-lora": Case(edited("adapter_config.json", peft_type="IA3"), r"peft_type is 'IA3'"),
    "no-config": Case(lambda f: (f / "adapter_config.json").unlink(), r"has neither config.json"),
    "nothing": Case(lambda f: [path.unlink() for path in f.iterdir()], r"has neither"),
    "loop": Case(lambda f: (shutil.rmtree(f), f.symlink_to(f)), r"does not exist|no such folder"),
}
