"""Second moments that belong to another tensor are seen, and those that belong to their own are left alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import models
from entropy_probe import ProbeConfig, load_checkpoint
from entropy_probe.demo import checkpoint_path
from entropy_probe.estimators.moments import exchange_evidence, log_correlations
from entropy_probe.model.checkpoint import AdamState
from entropy_probe.model.registry import spread_over
from entropy_probe.pipeline.prepared import prepare
from entropy_probe.stages.gradients.payloads import payloads
from entropy_probe.stages.gradients.unit_gradients import unit_gradients
from entropy_probe.stages.moments import moments_match
from entropy_probe.stages.scores import score

GENERATOR = torch.Generator().manual_seed(0)


def noisy(like: torch.Tensor, noise: float) -> torch.Tensor:
    return like * (noise * torch.randn(like.shape, generator=GENERATOR, dtype=torch.float64)).exp()


@pytest.mark.parametrize("zeros", [False, True])
def test_correlations_are_those_of_the_entries_at_which_both_are_positive(zeros: bool) -> None:
    a, b = (torch.rand(3, 40, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
    if zeros:
        a[0, :5] = b[1, 3:9] = 0.0
    z, count = log_correlations(a, b)
    for i in range(3):
        for j in range(3):
            there = (a[i] > 0) & (b[j] > 0)
            expected = torch.corrcoef(torch.stack([a[i][there].log(), b[j][there].log()]))[0, 1].atanh()
            assert float(z[i, j]) == pytest.approx(float(expected), abs=1e-12)
            assert int(count[i, j]) == int(there.sum())


def test_evidence_is_symmetric_and_changes_sign_with_an_exchange() -> None:
    """Exchanged moments: the evidence of that pair is what it was with the other sign. Constant or few entries: 0."""
    squares = torch.rand(3, 200, generator=GENERATOR, dtype=torch.float64) + 0.1
    moments = noisy(squares, 0.3)
    own = exchange_evidence(squares, moments)
    assert torch.equal(own, own.T)
    assert bool((own.diagonal() == 0).all())
    assert float(own[0, 1]) < -5
    exchanged = exchange_evidence(squares, moments[[1, 0, 2]])
    assert float(exchanged[0, 1]) == pytest.approx(-float(own[0, 1]))
    assert bool((exchange_evidence(squares[:, :5], moments[:, :5]) == 0).all())
    assert bool((exchange_evidence(torch.ones_like(squares), moments) == 0).all())


def test_large_tensors_need_more_than_a_small_gain() -> None:
    """With any number of entries, correlations 0.1 apart say nothing: entries share rows and columns."""
    common = torch.randn(1, 100_000, generator=GENERATOR, dtype=torch.float64)
    squares = (common + 0.3 * torch.randn(2, 100_000, generator=GENERATOR, dtype=torch.float64)).exp()
    moments = squares[[1, 0]].log() + 0.8 * torch.randn(2, 100_000, generator=GENERATOR, dtype=torch.float64)
    assert 0 < float(exchange_evidence(squares, moments.exp())[0, 1]) < 5


def test_exchanged_states_of_the_demo_are_named() -> None:
    """All states where they belong: no pair above 2. Two exchanged LoRA factors: that pair, above the limit."""
    checkpoint = load_checkpoint(checkpoint_path())
    prepared = prepare(checkpoint, ProbeConfig())
    u, config = prepared.update_rollouts, prepared.config
    scores = score(prepared.model, u, config)
    alone = models.alone(prepared.model, u, config)
    y = unit_gradients(prepared.model, alone, config, *payloads(u, scores, config)).y
    found, _ = moments_match(checkpoint.adam, y)
    assert found.exchanged is not None
    assert found.exchanged < 2
    assert found.num_undecided < found.num_pairs / 3
    prefix = "base_model.model.model.layers"
    one, other = (f"{prefix}.{n}.mlp.gate_proj.lora_A.default.weight" for n in (0, 3))
    states: dict[str, AdamState] = {**checkpoint.adam, one: checkpoint.adam[other], other: checkpoint.adam[one]}
    exchanged, _ = moments_match(states, y)
    assert exchanged.exchanged is not None
    assert exchanged.exchanged > 5
    assert exchanged.exchanged_pair is not None
    assert set(exchanged.exchanged_pair) == {one, other}


KINDS: dict[str, dict[str, Any] | None] = {"full": None, "lora": {}, "dora": {"use_dora": True}}
MATRICES = {
    "full": ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"),
    "lora": tuple(f"base_model.model.model.layers.{n}.mlp.down_proj.lora_A.default.weight" for n in (0, 1)),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_exchanged_matrices_are_seen_and_small_vectors_are_named(tmp_path: Path, kind: str) -> None:
    """Trained and measured on random text. 40 entries and more tell; two norms of 24 exchanged stay below the limit."""
    lora = KINDS[kind]
    model = models.tiny_model("llama")
    if lora is not None:
        model.save_pretrained(tmp_path / "base")
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        model = models.add_adapter(base, "llama", **lora)
        model.peft_config["default"].base_model_name_or_path = "base"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    models.train_steps(model, optimizer, steps=60)
    checkpoint = load_checkpoint(models.save_checkpoint(tmp_path / "ckpt", model, optimizer))
    rollouts = models.random_rollouts(tmp_path / "e.jsonl", prompts=24, responses=4, seed=3)
    prepared = prepare(checkpoint, ProbeConfig(), rollouts)
    u, config = prepared.update_rollouts, prepared.config
    y = unit_gradients(
        prepared.model,
        models.alone(prepared.model, u, config),
        config,
        *payloads(u, score(prepared.model, u, config), config),
    ).y
    healthy, _ = moments_match(checkpoint.adam, y)
    assert healthy.exchanged is not None
    assert healthy.exchanged < 2.5
    one, other = MATRICES["full" if lora is None else "lora"]

    def exchanged(one: str, other: str) -> Any:
        return moments_match({**checkpoint.adam, one: checkpoint.adam[other], other: checkpoint.adam[one]}, y)[0]

    found = exchanged(one, other)
    assert found.exchanged > 5
    assert set(found.exchanged_pair) == {one, other}
    if lora is None:
        norms = {"model.layers.0.input_layernorm.weight", "model.layers.0.post_attention_layernorm.weight"}
        assert norms <= set(healthy.undecided)
        assert exchanged(*norms).exchanged < 5
        sizes = [checkpoint.adam[name].exp_avg.numel() for name in healthy.undecided]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize("size", [0, 1, 5, 4096, 4097, 2**24 + 3, 20_480_000, 233_570_304])
def test_entries_are_spread_over_the_whole_tensor(size: int) -> None:
    """Embeddings of real models have more than 2²⁴ entries, from which on float32 does not hold every whole number."""
    some = spread_over(size, 4096).tolist()
    assert len(some) == min(size, 4096)
    assert some == sorted(set(some))
    if size:
        assert (some[0], some[-1]) == (0, size - 1)
        steps = {b - a for a, b in pairwise(some)}
        assert max(steps, default=1) - min(steps, default=1) <= 1


def test_nothing_to_compare() -> None:
    state = AdamState(torch.zeros(4), torch.rand(4), None, 1.0, 1e-3, (0.9, 0.999), 1e-8, 0.0)
    y = {name: torch.rand(2, 4, generator=GENERATOR) for name in "ab"}
    assert moments_match({"a": state}, y)[0].exchanged is None
    assert moments_match({"a": state, "b": replace(state, step=0.0)}, y)[0].exchanged is None
    assert moments_match({"a": state, "b": state}, {**y, "b": torch.zeros(2, 4)})[0].num_pairs == 0
