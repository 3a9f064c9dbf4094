"""The float64 forward is float64 to the end, on every architecture; padding and wrappers change nothing."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import models
from entropy_probe.errors import ConfigError, OverrideError
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.overrides import build_functional_params_named, theta_plus_eta_v
from entropy_probe.model.precision import TrueFloat64, maybe_cast_logits_fp32, str_to_dtype, threads_for
from entropy_probe.model.registry import Registry, checksum, unwrap

ARCHITECTURES = list(models.CONFIGS)
RMS_NORM = ["llama", "qwen2", "qwen3", "mistral", "gemma2"]
ETA_MAIN, ETA_TINY = 1e-5, 1e-10


def random_direction(model: torch.nn.Module, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in model.named_parameters()}


def normalised_ratio(logits_at) -> float:
    """(‖Δlogits‖ tiny/‖Δlogits‖ main)/(η_tiny/η_main)."""
    base = logits_at(0.0)
    moved = [float((logits_at(eta) - base).norm()) for eta in (ETA_TINY, ETA_MAIN)]
    return moved[0] / moved[1] / (ETA_TINY / ETA_MAIN)


def some_ids(rows: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(3, models.VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_follow_eta_over_five_decades(architecture: str, implementation: str) -> None:
    model = models.tiny_model(architecture)
    if architecture == "gemma2" and implementation == "sdpa":
        pytest.skip("Gemma-2 has no SDPA path: its soft-capped attention is eager only")
    model.set_attn_implementation(implementation)
    bound = bind(model, torch.float64)
    v = random_direction(bound.module)

    @torch.no_grad()
    def logits_at(eta: float) -> torch.Tensor:
        return bound.logits(some_ids(), override=theta_plus_eta_v(bound.registry, v, eta, torch.float64))

    assert logits_at(0.0).dtype is torch.float64
    # The quadratic term adds at most about η_main·‖v‖-sized curvature: 1e-3 here.
    assert abs(normalised_ratio(logits_at) - 1) < 1e-2


@pytest.mark.parametrize("architecture", RMS_NORM)
def test_plain_double_is_not_float64(architecture: str) -> None:
    """What the true-float64 context is for: without it the tiny step drowns in float32 rounding."""
    model = models.tiny_model(architecture).double()
    registry = Registry.of(model)
    v = random_direction(model)

    @torch.no_grad()
    def logits_at(eta: float) -> torch.Tensor:
        mapping = theta_plus_eta_v(registry, v, eta, torch.float64)
        return torch.func.functional_call(model, mapping, (some_ids(),), {"use_cache": False}).logits

    assert normalised_ratio(logits_at) > 1.5


def test_float64_operations_keep_float64() -> None:
    x, positions = torch.rand(3, dtype=torch.float64), torch.arange(3)
    with TrueFloat64():
        results = [
            x.float(),
            x.to(torch.float32),
            x.to(dtype=torch.float32),
            x.to("cpu", torch.float32),
            x.to(torch.zeros(1)),
            x.type_as(torch.zeros(1)),
            x.type(torch.float32),
            torch.softmax(x, -1, dtype=torch.float32),
            torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32),
            x.sum(dtype=torch.float32),
            positions.float(),
            positions.to(torch.float32),
        ]
        assert torch.rand(2).float().dtype is torch.float32
    assert {r.dtype for r in results} == {torch.float64}
    assert torch.equal(results[0], x)


def scored(bound: BoundModel, rows: list[list[int]], side: str) -> list[torch.Tensor]:
    """log p of every token but the first of every row, with the rows alone, padded left or padded right."""
    if side == "alone":
        return [
            torch.log_softmax(bound.logits(torch.tensor([r]))[0, :-1].double(), -1)[range(len(r) - 1), r[1:]]
            for r in rows
        ]
    width = max(map(len, rows)) + 2
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    starts = [width - len(r) if side == "left" else 0 for r in rows]
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    # right padding is scored both without a mask (the causal path) and with one
    logits = bound.logits(ids, mask=None if side == "right" else mask).double()
    logp = torch.log_softmax(logits, -1)
    return [logp[i, s + torch.arange(len(r) - 1), r[1:]] for i, (r, s) in enumerate(zip(rows, starts, strict=True))]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@torch.no_grad()
def test_padding_does_not_change_scores(architecture: str, dtype: torch.dtype, tolerance: float) -> None:
    """1e-12: a few hundred float64 ulps of |log p| < 30; 2e-5: as many float32 ulps."""
    bound = bind(models.tiny_model(architecture), dtype)
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, models.VOCABULARY, (n,), generator=generator).tolist() for n in (12, 5, 9, 2)]
    alone = scored(bound, rows, "alone")
    for side in ("right", "right with mask", "left"):
        for got, expected in zip(scored(bound, rows, side), alone, strict=True):
            assert (got - expected).abs().max() < tolerance, side


@torch.no_grad()
def test_without_positions_left_padding_is_wrong_on_gpt2() -> None:
    """The fault that position ids prevent, so that the test above is known to see it."""
    bound = bind(models.tiny_model("gpt2"), torch.float64)
    ids = some_ids(1, 6)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(9) >= 3).long()[None]
    naive = bound.module(padded, attention_mask=mask, use_cache=False).logits[:, 3:]
    assert (naive - bound.logits(ids)).abs().max() > 1e-2


@torch.no_grad()
def test_forward_turns_off_autocast_dropout_and_cache() -> None:
    model = models.tiny_model("gpt2")
    model.train()
    bound = bind(model)
    ids = some_ids()
    expected = bind(models.tiny_model("gpt2")).logits(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = bound.logits(ids)
    assert torch.equal(got, expected)
    assert all(module.training for module in model.modules())


def test_logits_at_kept_positions_equal_those_of_the_whole() -> None:
    for architecture in ARCHITECTURES:
        bound = bind(models.tiny_model(architecture), torch.float64)
        with torch.no_grad():
            whole, kept = bound.logits(some_ids()), bound.logits(some_ids(), keep=slice(4, 9))
        assert torch.allclose(whole[:, 4:9], kept, rtol=0, atol=1e-13)


def test_wrappers_are_unwrapped_once_and_lora_stays() -> None:
    model = models.add_adapter(models.tiny_model("llama"), "llama")
    compiled = torch.compile(model)
    assert unwrap(compiled) is model
    assert unwrap(torch.nn.DataParallel(model)) is model
    registry = Registry.of(compiled)
    assert all("lora_" in name for name in registry.trainable)
    assert not any(getattr(m, "merged", False) for m in registry.module.modules())


def test_tied_weights_have_one_name_and_move_together() -> None:
    bound = bind(models.tiny_model("gpt2"), torch.float64)
    assert "lm_head.weight" not in bound.registry.parameters
    name = "transformer.wte.weight"
    direction = torch.randn_like(bound.registry.parameters[name])
    with torch.no_grad():
        got = bound.logits(some_ids(), override=theta_plus_eta_v(bound.registry, {name: direction}, 0.1, torch.float64))
        moved = copy.deepcopy(bound.module)
        moved.transformer.wte.weight.add_(direction, alpha=0.1)
        assert moved.lm_head.weight is moved.transformer.wte.weight
        expected = bind(moved, torch.float64).logits(some_ids())
        assert torch.allclose(got, expected, rtol=0, atol=1e-13)  # add_ fuses the product, the mapping rounds it


def test_direction_must_fit_the_model() -> None:
    model = models.add_adapter(models.tiny_model("llama"), "llama")
    registry = Registry.of(model)
    name = next(iter(registry.trainable))
    frozen = next(n for n in registry.parameters if n not in registry.trainable)
    for v, message in (
        ({"nowhere": torch.zeros(1)}, "no such parameter"),
        ({frozen: torch.zeros_like(registry.parameters[frozen])}, "frozen"),
        ({name: torch.zeros(1)}, "has shape"),
    ):
        with pytest.raises(OverrideError, match=message):
            theta_plus_eta_v(registry, v, 1e-3, torch.float64)
        with pytest.raises(OverrideError, match=message):
            build_functional_params_named(model, v, 1e-3)
    bound = bind(model)
    with pytest.raises(OverrideError, match="no such name"):
        bound.logits(some_ids(), override={"nowhere": torch.zeros(1)})


def test_functional_params_keep_everything_but_v() -> None:
    model = models.add_adapter(models.tiny_model("llama"), "llama")
    name = next(n for n, p in model.named_parameters() if p.requires_grad)
    before = checksum(model)
    direction = torch.ones_like(dict(model.named_parameters())[name])
    params, buffers = build_functional_params_named(model, {name: direction}, 0.5)
    for key, parameter in model.named_parameters():
        expected = parameter + 0.5 if key == name else parameter
        assert torch.equal(params[key], expected)
    assert set(buffers) == {n for n, _ in model.named_buffers()}
    wide, _ = build_functional_params_named(model, None, force_param_dtype=torch.float64)
    assert {p.dtype for p in wide.values()} == {torch.float64}
    assert checksum(model) == before


def test_addition_happens_after_the_upcast() -> None:
    """In bf16 a step of 1e-5 on weights of 1 is lost; here it survives."""
    model = torch.nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    v = {"weight": torch.ones(2, 2)}
    params, _ = build_functional_params_named(model, v, 1e-5)
    assert torch.allclose(params["weight"] - 1, torch.tensor(1e-5), rtol=1e-2)


def test_checksum_sees_every_kind_of_change() -> None:
    model = models.tiny_model("llama")
    seen = {checksum(model)}
    parameter = next(model.parameters())
    for change in (
        lambda: parameter.data.view(-1)[0].add_(1e-3),
        lambda: parameter.requires_grad_(False),
        lambda: setattr(parameter, "grad", torch.zeros_like(parameter)),
        lambda: next(iter(model.buffers())).mul_(2),
        lambda: model.model.layers[0].train(),
    ):
        change()
        seen.add(checksum(model))
    assert len(seen) == 6


def test_dtype_names_and_threads() -> None:
    assert str_to_dtype("torch.float64") is torch.float64
    with pytest.raises(ConfigError, match="choose one of"):
        str_to_dtype("float8")
    assert maybe_cast_logits_fp32(torch.ones(1, dtype=torch.bfloat16)).dtype is torch.float32
    before = torch.get_num_threads()
    with threads_for(1000) as threads:
        assert threads == torch.get_num_threads() == 1
    with threads_for(10**9) as threads:
        assert threads == before
    assert torch.get_num_threads() == before
    assert math.isfinite(before)
