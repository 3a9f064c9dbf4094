"""Scores behind prompts that are read once, against those of whole rows: the same in float64, at θ and at θ + ηv."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import architectures
import models
from counted import Sizes
from entropy_probe import ProbeConfig, run_probe
from entropy_probe.memory import counted_bytes
from entropy_probe.model import attention
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.model.prompt_cache import ReadPrompts
from entropy_probe.stages import shared_prompts
from entropy_probe.stages.derivatives import directional_derivatives
from entropy_probe.stages.memory.pass_memory import Passes, longest_rows
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.scores import Scores, policy_scores, read_rows, rows_without_graph, score, sharing
from entropy_probe.stages.shared_prompts import Sharing, read_once, together, tokens_read, worth
from test_distributed import differences

EXACT = 1e-12
"""Of the largest term: 2e-15 was the most, and the keys of another prompt give 0.1 and more."""


def mixtral() -> Any:
    config = transformers.MixtralConfig(
        **{k: v for k, v in models.ROPE.items() if k != "head_dim"}, num_local_experts=4, num_experts_per_tok=2
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


SHARED: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: models.tiny_model(name) for name in models.CONFIGS},
    "experts": mixtral,
    "LoRA": lambda: models.add_adapter(models.tiny_model("qwen2"), "qwen2"),
    "DoRA": lambda: models.add_adapter(models.tiny_model("llama"), "llama", use_dora=True),
    "LoRA of GPT-2": lambda: models.add_adapter(models.tiny_model("gpt2"), "gpt2"),
    "ALiBi": lambda: architectures.tiny_model("bloom"),
    "latent keys": lambda: architectures.tiny_model("deepseek_v3"),
    "window and sinks": lambda: architectures.tiny_model("gpt_oss"),
}


def batch(bound: BoundModel, folder: Path, seed: int = 0) -> Rollouts:
    """Prompts of 1 to 20 tokens, one of them twice; responses of 1 to 12 tokens, and some that are not there. A sliding
    window of 8 ends within a prompt, and within a response."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, min(models.VOCABULARY, bound.num_logits), (length,), generator=generator).tolist()

    prompts = [tokens(length) for length in (5, 1, 20, 2, 11)]
    prompts.append(prompts[0])
    lengths = [(4, 1, 12, 7), (1, 1, 1, 1), (3, 9, 1, 6), (12, 2, 2, 5), (8, 8, 8, 8), (1, 10, 3, 2)]
    lines = [
        {"prompt_ids": prompt, "response_ids": [tokens(n) for n in of], "rewards": [0.0, 1.0, 0.5, 1.0]}
        for prompt, of in zip(prompts, lengths, strict=True)
    ]
    file = folder / "e.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = read_rollouts(file, bound, None)
    gone = torch.tensor([3, 8, 9])
    return replace(found, gen_lens=found.gen_lens.index_fill(0, gone, 0))


def config(size: int = 8, share: str = "auto") -> ProbeConfig:
    return ProbeConfig.from_mapping({"share_prompts": share, "generation": {"tf_batch_size": size}})


def direction(bound: BoundModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.shape, generator=generator).double() for name, p in bound.registry.trainable.items()}


def moved(bound: BoundModel, eta: float) -> dict[str, torch.Tensor]:
    return dict(theta_plus_eta_v(bound.registry, direction(bound), eta, bound.dtype))


def largest_difference(found: Scores, expected: Scores) -> float:
    """Over all fields, of the size of their largest term."""
    assert {name for name, value in vars(found).items() if value is None} == {
        name for name, value in vars(expected).items() if value is None
    }
    pairs = [(value, getattr(expected, name)) for name, value in vars(found).items() if value is not None]
    assert all(ours.shape == theirs.shape for ours, theirs in pairs)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1.0)) for a, b in pairs)


SIZES = [*((name, 3) for name in SHARED), *((name, size) for name in ("qwen2", "gemma2", "gpt2") for size in (1, 8))]
"""Of a batch of rows: with 1 and 3 prompts are read one by one and in parts, with 8 all of them at once."""


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_exact(name: str, size: int, tmp_path: Path) -> None:
    bound = bind(SHARED[name](), torch.float64)
    rollouts = batch(bound, tmp_path)
    once, whole = config(size), config(size, "never")
    assert sharing(bound, rollouts, once) == Sharing()
    assert not sharing(bound, rollouts, whole).shared
    asked = {"with_features": True, "with_mean_s": True}
    assert largest_difference(score(bound, rollouts, once, **asked), score(bound, rollouts, whole, **asked)) <= EXACT
    override = moved(bound, 1e-2)
    at_theta, there = score(bound, rollouts, once), score(bound, rollouts, once, override)
    assert largest_difference(there, score(bound, rollouts, whole, override)) <= EXACT
    assert float((there.token_logp - at_theta.token_logp).abs().max()) > 1e-4  # it is another point


FORWARD_MODE = [name for name in SHARED if name != "ALiBi"]  # which has a GELU without a tangent


@pytest.mark.parametrize("blocks", [False, True], ids=["short", "in blocks"])
@pytest.mark.parametrize("name", FORWARD_MODE)
def test_derivatives_are_exact(name: str, blocks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along v, beside θ: the tangents of a prompt's keys and values are those that its responses see."""
    if blocks:
        for key, value in (("LONG", 0), ("_AT_ONCE", 0), ("_FEWEST", 3)):
            monkeypatch.setattr(attention, key, value)
    bound = bind(SHARED[name](), torch.float64)
    rollouts, v = batch(bound, tmp_path), direction(bound)
    assert sharing(bound, rollouts, config(3)) == Sharing()  # tried before calls are counted
    read: list[int] = []
    original = BoundModel.read_after
    monkeypatch.setattr(BoundModel, "read_after", lambda *a, **k: read.append(len(a[3])) or original(*a, **k))
    found, expected = (
        directional_derivatives(bound, rollouts, v, config(3, share), 1e-3, shared=True) for share in ("auto", "never")
    )
    assert read
    assert float(expected.d_logp.abs().max()) > 1e-2
    for of, value in vars(found).items():
        theirs = getattr(expected, of)
        assert float((value - theirs).abs().max()) <= EXACT * max(1.0, float(theirs.abs().max())), of


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "experts", "LoRA"])
def test_nothing_changes_at_eta_0(name: str, tmp_path: Path) -> None:
    """Bit for bit, in float32, whatever was scored between."""
    bound = bind(SHARED[name]())
    rollouts = batch(bound, tmp_path)
    before = score(bound, rollouts, config(), with_features=True)
    score(bound, rollouts.of_prompts(torch.tensor([0, 1])), config())
    after = score(bound, rollouts, config(), moved(bound, 0.0))
    assert sharing(bound, rollouts, config()).shared
    for field in ("token_logp", "token_logq", "rb_entropy", "rb_entropy_q"):
        assert torch.equal(getattr(before, field), getattr(after, field))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_numbers_of_whole_rows(dtype: str, tmp_path: Path) -> None:
    """Of a whole run: in float64 to 1e-9 of the terms, as over several processes. In float32 scores differ by rounding,
    and the slope and the entropies by less than 1e-4."""
    sizes, reports = Sizes(e=4, u=3, group=6, prompt=30, response=12), {}
    checkpoint, files = sizes.checkpoint(tmp_path), sizes.files(tmp_path / "files")
    for share in ("auto", "never"):
        given = {"share_prompts": share, "budget": "smoke", "precision": {"dtype": dtype}}
        given["true_delta_h"] = {"etas": [-0.1, 0.3]}
        report = run_probe(checkpoint, ProbeConfig.from_mapping(given), *files)
        assert report.memory is not None
        assert (report.memory.prompts_unshared is None) is (share == "auto")
        reports[share] = json.loads(report.model_dump_json(exclude={"config", "memory", "environment"}))
    if dtype == "float64":
        wrong = list(differences(reports["never"], reports["auto"]))
        # at lr, 1e-5, a change of 1e-9 is known to 1e-13
        assert [line for line in wrong if not re.match(r"\.entropy_change\[\d+\]\.ratio", line)] == []
        return
    for section, key in (("update", "delta_h1_per_lr_per_token"), ("entropy", "rb"), ("entropy", "per_token")):
        ours, theirs = (reports[share][section][key] for share in ("auto", "never"))
        assert ours == pytest.approx(theirs, rel=1e-4), key


def test_a_shared_float64_copy(tmp_path: Path) -> None:
    """Whose frozen parameters are lent to each layer as it is used."""
    model = SHARED["LoRA"]()
    lent = bind(model, torch.float64, lend_frozen=True)
    assert lent.lending is not None
    rollouts = batch(lent, tmp_path)
    assert sharing(lent, rollouts, config()).shared
    own = score(bind(model, torch.float64), rollouts, config(share="never"))
    assert largest_difference(score(lent, rollouts, config()), replace(own, before=own.before)) <= EXACT


def test_every_prompt_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 6 prompts, one of which has a response of one token alone, and no padding that is not needed."""
    bound = bind(SHARED["llama"]())
    rollouts = batch(bound, tmp_path)
    assert sharing(bound, rollouts, config()).shared
    read: list[tuple[int, ...]] = []
    original = BoundModel._called

    def called(self: BoundModel, ids: torch.Tensor, *a: Any) -> Any:
        read.append(tuple(ids.shape))
        return original(self, ids, *a)

    monkeypatch.setattr(BoundModel, "_called", called)
    monkeypatch.setattr(shared_prompts, "TOKENS", 60)
    score(bound, rollouts, config(8))
    assert read[0] == (6, 20)
    assert sum(rows * columns for rows, columns in read) == tokens_read(rollouts, 64)[0]
    assert len(read) == 2


def test_what_is_read_together(tmp_path: Path) -> None:
    rollouts = batch(bind(SHARED["llama"]()), tmp_path)
    parts = together(rollouts, 4, tokens=24)
    starts = rollouts.prompt_lens[::4]
    assert [starts[part.prompts].tolist() for part in parts] == [[1, 2, 5, 5], [11], [20]]
    rows = torch.cat([torch.cat(part.rows) for part in parts])
    assert sorted(rows.tolist()) == rollouts.gen_lens.nonzero()[:, 0].tolist()
    for part in parts:
        assert {row // 4 for row in torch.cat(part.rows).tolist()} == set(part.prompts.tolist())
        lengths = rollouts.gen_lens[torch.cat(part.rows)]
        assert torch.equal(lengths, lengths.sort().values)
        assert max(map(len, part.rows)) <= 4


def dynamic() -> Any:
    return transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            **models.ROPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        )
    ).eval()


WHOLE: dict[str, tuple[Callable[[], Any], str]] = {
    "a state": (lambda: architectures.tiny_model("mamba"), "`mamba` keeps no keys and values"),
    "states and keys": (lambda: architectures.tiny_model("jamba"), "holds more than keys and values"),
    "positions of tokens": (lambda: architectures.tiny_model("roberta"), "differ by .* from those of whole rows"),
    "a decoder of an encoder": (lambda: architectures.tiny_model("bart"), "differ by|more than keys"),
    "an adapter that tokens switch on": (
        lambda: models.add_adapter(models.tiny_model("llama"), "llama", alora_invocation_tokens=[5]),
        "tokens of the prompt switch an adapter on",
    ),
    "positions by length": (dynamic, "rope type `dynamic` depend on the length of the row"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_that_needs_whole_rows(name: str, tmp_path: Path) -> None:
    """Bit for bit as with `never`, and the reason is known."""
    bound = bind(WHOLE[name][0](), torch.float64)
    rollouts = batch(bound, tmp_path)
    found = sharing(bound, rollouts, config())
    assert found.why is not None
    assert re.search(WHOLE[name][1], found.why), found.why
    one, other = (score(bound, rollouts, config(share=share)) for share in ("auto", "never"))
    assert torch.equal(one.token_logp, other.token_logp)


def test_where_it_is_not_worth_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = bind(SHARED["llama"]())
    rollouts = batch(bound, tmp_path)
    assert worth(rollouts, 8) is None
    assert "fewer than 16 responses" in str(worth(rollouts.of_prompts(torch.arange(3)), 8))
    assert "follow different prompts" in str(worth(replace(rollouts, ids=rollouts.ids.roll(1, 0)), 8))
    tokens = torch.full_like(rollouts.gen_lens, 40)
    long = replace(rollouts, ids=torch.full((24, 41), 3), prompt_lens=tokens // 40, gen_lens=tokens)
    assert "with each prompt read once" in str(worth(long, 8))
    monkeypatch.setattr(shared_prompts, "MOST_SEEN", 100)
    assert "would be large" in str(worth(rollouts, 8))
    assert sharing(bound, rollouts, config(share="never")) == Sharing("share_prompts is `never`")
    assert bound.sharing == []  # nothing was tried


def neighbours(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, rows: original(self, (rows + 1) % len(self.mask))


def test_a_neighbours_cache_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial tells it in float32 too, and whole rows are read."""
    monkeypatch.setattr(ReadPrompts, "before", neighbours(ReadPrompts.before))
    for dtype in (torch.float32, torch.float64):
        bound = bind(SHARED["qwen2"](), dtype)
        assert "differ by" in str(sharing(bound, batch(bound, tmp_path), config()).why)


def test_a_limit_of_memory_counts_it(tmp_path: Path) -> None:
    """The bound from one and four rows, each with a prompt of its own, is not below what a batch of groups takes."""
    bound = bind(SHARED["qwen2"]())
    rollouts = batch(bound, tmp_path)
    passes = Passes(bound, bound, longest_rows((rollouts,)), config(), share_prompts=True)
    _, _, behind = itertools.islice(passes.kinds(2**40), 3)
    for size in (1, 2, 8):
        read = policy_scores(bound, config(size).generation, config(size).precision)

        def work(rows: int = rows_without_graph(rollouts, config(size).generation), read: Any = read) -> None:
            with torch.no_grad():
                for _ in read_once(bound, rollouts, rows, read):
                    pass

        assert counted_bytes(work, bound.device) <= behind(config(size), 64)


def test_keys_of_a_prompt_are_not_changed(tmp_path: Path) -> None:
    """A batch of responses leaves nothing behind for the next one."""
    bound = bind(SHARED["gemma2"](), torch.float64)
    rollouts = batch(bound, tmp_path)
    (whole,) = read_rows(bound, rollouts, torch.arange(4), lambda logits, tokens: (logits,))
    prompt = rollouts.ids[:1, : int(rollouts.prompt_lens[0])]
    held = bound.read_prompts(prompt, torch.ones_like(prompt))
    kept = [(layer.keys.clone(), layer.get_seq_length()) for layer in held.cache.layers]
    for row in (2, 0, 2):
        length = int(rollouts.gen_lens[row])
        ids = rollouts.responses[row]
        steps = torch.arange(length)
        one = torch.zeros(1, dtype=torch.long)
        of_row, given = steps * 0, torch.tensor([ids[:-1]])
        (found,) = bound.read_after(
            held, one, given, torch.ones_like(given), of_row, steps, lambda logits, _: (logits,)
        )
        torch.testing.assert_close(found, whole[row, :length], rtol=EXACT, atol=EXACT)
    for layer, (keys, length) in zip(held.cache.layers, kept, strict=True):
        assert torch.equal(layer.keys, keys)
        assert layer.get_seq_length() == length
