"""Every text-generation architecture of the installed transformers, made tiny, and what a run says of it.

    python tests/architectures.py RESULTS.jsonl [TYPE ...]     measures them, a process and a time limit each
    python tests/architectures.py RESULTS.jsonl --table        writes the table of docs/formats.md from the results

Each is saved as its trainer would leave it, with AdamW's state after a step, and loaded, sampled, scored and measured
at the smoke budget; or it is refused, which must be one line. Types that are in the file of results are not run again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from entropy_probe import ProbeConfig, ProbeError, run_probe

SECONDS = 240
CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
WRAPPERS = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
VOCABULARY = 67
WIDTH = 32
PROMPTS = ("1+2", "is 3 a 4?", "what is 5-6+7?", "8")

# The first pattern that a key matches in full decides.
_SIZES: list[tuple[str, Any]] = [
    (r"(pad|bos|eos|decoder_start|sep|cls|mask|unk)_token_id", lambda k: {"b": 1, "e": 2, "p": 0}.get(k[0], 3)),
    (r"\w*(token_id|token_index)s?", 5),
    (r"(\w+_)?vocab(ulary)?(_\w+)?|shape_vocab_size", VOCABULARY),
    (r"num_kv_shared_layers", 0),
    (r"(num|n)_(\w+_)?(layers?|blocks)|\w*(en|de)coder_layers|depth|num_layers_per_stack", 2),
    (r"num_key_value_heads|num_kv_heads|kv_n_heads|\w+_num_key_value_heads|num_query_groups", 2),
    (r"linear_num_(key|value)_heads|num_heads|n_heads?|\w*attention_heads|linear_num_heads|attention_heads", 4),
    (r"swa_num_attention_heads|index_n_heads|num_attention_heads", 4),
    (r"(num_local|n_routed|num|moe_num)_experts|num_experts|zero_expert_num|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts|index_topk_blocks", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups|o_groups|mamba_ngroups", 1),
    (r"(\w+_)?head_dim|head_size|d_kv|d_head|kv_channels|attention_head_size|query_pre_attn_scalar|dim_head", 8),
    (r"\w*rotary_dim|qk_rope_head_dim", 4),
    (r"qk_nope_head_dim", 4),
    (r"\w*lora_rank|laurel_rank|gated_norm_rank|\w*_dt_rank|time_step_rank|adapter_rank|hc_lowrank", 8),
    (
        r"hidden_size_per_layer_input|lru_width|\w*hidden_size|d_model|n_embd|emb_dim|embedding_dim|embedding_size",
        WIDTH,
    ),
    (r"hidden_size_global", WIDTH),
    (r"word_embed_proj_dim|\w*embed_dim|hidden_dim|dim|attention_hidden_size|\w*input_size|out_hidden_size", WIDTH),
    (r"input_embedding_size|output_embedding_size|backbone_hidden_size|projection_dim|\w*output_dim", WIDTH),
    (r"\w*intermediate_size(_mlp)?|\w*ffn_dim|n_inner|ffn_hidden_size|dff|dim_ff|d_ff|d_inner|mlp_dim", 48),
    (r"feed_forward_size|expert_ffn_hidden_size|ffn_round_up_to_multiple_of", 48),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length|max_\w+_positions", 256),
    (r"sliding_window(_size)?|attention_window_size|attention_chunk_size|window_size|index_topk|keep_window_size", 64),
    (r"\w*state_size|mamba_d_state|ssm_state_size", 8),
    (r"(mamba_)?chunk_size", 16),
    (r"patch_size", 4),
    (r"image_size|crop_size", 16),
    (r"num_(position_embeddings|channels)", None),
]
# Where a shape follows from several numbers, or a list says something of every layer.
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_LATENT = {
    "head_dim": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "qk_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
_OWN: dict[str, dict[str, Any]] = {
    **{
        name: _LATENT
        for name in (
            *("axk2", "bailing_hybrid", "deepseek_v32", "glm4_moe_lite"),
            *("glm_moe_dsa", "kimi_linear"),
        )
    },
    **{name: {**_LATENT, "head_dim": 4} for name in ("axk1", "deepseek_v3", "longcat_flash", "youtu")},
    "deepseek_v2": {**_LATENT, "head_dim": 4, "num_experts_per_tok": 2},
    **{name: {**_LATENT, "per_layer_config": None} for name in ("dots3_note_text",)},
    "qwen4_exp_text": {"indexer_budget": 64, "indexer_compress_ratio": 4},
    "minicpm3": {**_LATENT, "dim_model_base": 32},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "bamba": {**_MAMBA2, "num_hidden_layers": 2, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "blt": {"patcher_config": {"hidden_size": 32}},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE)},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0}},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
    },
    "zamba2": {
        "num_mem_blocks": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_headdim": 8,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "xlnet": {"attn_type": "uni"},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [8, 24]},
}


def shrunk(given: dict[str, Any]) -> dict[str, Any]:
    """The configuration with small sizes; lists with an entry for every layer have as many as there are layers now."""
    layers = [
        v for k, v in given.items() if re.fullmatch(r"(num|n)_(hidden_)?layers?|num_blocks", k) and isinstance(v, int)
    ]
    kept = kinds_of(given.get("layer_types") or given.get("layers_block_type"))
    count = len(kept)
    found = {}
    for key, value in given.items():
        if key == "per_layer_config":
            continue
        if isinstance(value, dict) and key not in ("rope_parameters", "rope_scaling", "id2label", "label2id"):
            found[key] = shrunk(value)
        elif isinstance(value, list) and layers and len(value) == layers[0]:
            found[key] = [value[i] for i in kept]
        elif isinstance(value, bool) or not isinstance(value, int):
            found[key] = value
        else:
            size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, key)), None)
            size = size(key) if callable(size) else size
            found[key] = value if size is None else (size if key.endswith(("_id", "_index")) else min(value, size))
            if layers and value == layers[0] and size == 2:
                found[key] = count
    return found


def kinds_of(types: list[str] | None) -> list[int]:
    """Places of layers, one of each kind; two at least."""
    if not types:
        return [0, 1]
    first = sorted({kind: i for i, kind in reversed(list(enumerate(types)))}.values())
    return first if len(first) > 1 else [0, 1]


def tiny_config(name: str) -> Any:
    kind = CONFIG_MAPPING[name]
    own = _OWN.get(name, {})
    try:
        given = kind().to_dict()
    except Exception:  # it has no default
        given = {}
    for key in ("per_layer_config", "transformers_version", "model_type", "dtype", "architectures"):
        given.pop(key, None)
    given |= {key: True for key in ("is_decoder", "causal") if key in given}  # as a language model is trained
    return kind(**merged(shrunk(given), own))


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = dict(one)
    for key, value in other.items():
        nested = isinstance(value, dict) and isinstance(one.get(key), dict)
        both[key] = merged(one[key], value) if nested else value
    return both


def tiny_model(name: str) -> Any:
    torch.manual_seed(0)
    auto = transformers.AutoModelForCausalLM if name in CAUSAL else transformers.AutoModelForImageTextToText
    model = auto.from_config(tiny_config(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def step(model: Any) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(3, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(1))
    output = model(ids, use_cache=False)
    logits = output.logits if hasattr(output, "logits") else output[0]
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()
    return optimizer


def outcome(name: str, folder: Path) -> dict[str, Any]:
    """`not built`, `measured`, `refused` or `traceback`, with what was said."""
    from healthy import letters

    try:
        model = tiny_model(name)
        size = sum(p.numel() for p in model.parameters())
        if size > 2e7:
            raise ValueError(f"{size} parameters")
        optimizer = step(model)
        letters(VOCABULARY - 5).save_pretrained(folder)
        model.save_pretrained(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        del model, optimizer
    except Exception as error:
        said = traceback.extract_tb(error.__traceback__)[-1]
        return {
            "outcome": "not built",
            "said": f"{type(error).__name__}: {error}"[:300],
            "at": f"{said.filename}:{said.lineno}",
        }
    config = ProbeConfig.from_mapping(
        {
            "batch": {"num_prompts": 2, "num_update_prompts": 2},
            "generation": {"num_return_sequences": 2, "max_new_tokens": 6},
            "budget": "smoke",
        }
    )
    try:
        asked = folder / "prompts.jsonl"
        asked.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
        report = run_probe(folder, config, prompts=asked)
    except ProbeError as error:
        return {"outcome": "refused", "said": str(error)}
    except Exception as error:
        return {
            "outcome": "traceback",
            "said": f"{type(error).__name__}: {error}"[:500],
            "trace": traceback.format_exc()[-1500:],
        }
    from entropy_probe_checks.criteria import CRITERIA

    verdicts = {n: criterion(report) for n, criterion in CRITERIA.items()}
    red = {n: f"{v.value} {v.hint[:120]}" for n, v in verdicts.items() if v.status in ("fail", "inconclusive")}
    cache = getattr(report, "cache", None)
    found: dict[str, Any] = {"outcome": "measured", "red": red}
    if cache is not None:
        found |= {"read": cache.read, "why": cache.why}
        for name in ("over_cache", "instead"):
            worst = getattr(cache, name)
            found[name] = None if worst is None else [worst.worst, worst.bound, worst.example]
    return found


def forked(name: str) -> dict[str, Any]:
    """`outcome` in a process of its own, which ends after `SECONDS`."""
    begun = time.time()
    with tempfile.TemporaryDirectory() as place:
        result = Path(place, "result.json")
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(SECONDS)
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
                try:
                    found = outcome(name, Path(place, "ckpt"))
                except Exception:
                    found = {"outcome": "broken", "said": traceback.format_exc()}
                result.write_text(json.dumps(found))
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if result.is_file():
            found = json.loads(result.read_text())
        else:
            found = {"outcome": "no end", "said": f"signal {os.WTERMSIG(status)}"}
    return {"type": name, "seconds": round(time.time() - begun, 1), **found}


def main(results: Path, names: list[str]) -> None:
    known = {json.loads(line)["type"] for line in results.read_text().splitlines()} if results.is_file() else set()
    wrappers = [name for name in WRAPPERS if name not in CAUSAL]
    with tempfile.TemporaryDirectory() as place:  # what it imports, every process that is forked has then
        outcome("gpt2", Path(place))
    for name in names or [*CAUSAL, *wrappers]:
        if name not in known:
            with results.open("a") as file:
                file.write(json.dumps(forked(name)) + "\n")


PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
_BEGIN, _END = "<!-- architectures -->\n", "<!-- end of architectures -->\n"
_KINDS = {
    "over the cache": "sampled over the model's cache",
    "with prompts of one length at a time": "the same, prompts of one length at a time: padding enters the cache",
    "from whole rows": "sampled from whole rows: there is no cache, or none that can be used",
    "refused": "refused in one line",
    "not built": "not tried: no tiny model was made of its default configuration",
}


def table(results: list[dict[str, Any]]) -> str:
    """Types by what happens to them, and by the criteria that are not passed on a random model of theirs."""
    places: dict[str, list[str]] = {kind: [] for kind in _KINDS}
    failed: dict[str, list[str]] = {}
    for found in results:
        places[found.get("read", found["outcome"])].append(f"`{found['type']}`")
        for name in found.get("red", {}):
            failed.setdefault(name, []).append(f"`{found['type']}`")
    lines = [f"With transformers {transformers.__version__}:", "", "| what happens | types |", "|---|---|"]
    lines += [f"| {_KINDS[kind]} | {', '.join(sorted(types))} |" for kind, types in places.items() if types]
    lines += ["", "| not passed on a random model | types |", "|---|---|"]
    lines += [f"| {name} | {', '.join(sorted(types))} |" for name, types in sorted(failed.items())]
    return "\n".join(lines) + "\n"


def write_table(results: Path) -> None:
    found = [json.loads(line) for line in results.read_text().splitlines()]
    before, rest = PAGE.read_text().split(_BEGIN)
    PAGE.write_text(before + _BEGIN + table(found) + _END + rest.split(_END)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(50)
    if sys.argv[2:] == ["--table"]:
        write_table(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
