"""Reading logits a few positions at a time gives what the whole logits give: values, derivatives, overrides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import models
from entropy_probe.errors import OverrideError
from entropy_probe.model.forward import BoundModel, bind

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(3, models.VOCABULARY, (4, 11), generator=GENERATOR)
ROWS = torch.tensor([0, 0, 1, 1, 1, 3, 3, 2, 2, 2, 0])
COLUMNS = torch.tensor([3, 9, 0, 4, 5, 10, 2, 7, 8, 9, 0])


def variants(architecture: str) -> dict[str, Callable[[], Any]]:
    def adapter(**lora: Any) -> Any:
        return models.add_adapter(models.tiny_model(architecture), architecture, **lora)

    head = "lm_head"
    return {
        "full": lambda: models.tiny_model(architecture),
        "lora": adapter,
        "dora": lambda: adapter(use_dora=True),
        "saved head": lambda: adapter(modules_to_save=[head]),
    }


CASES = [(a, v) for a in models.CONFIGS for v in ("full", "lora")] + [
    (a, v) for a in ("llama", "qwen2") for v in ("dora", "saved head")
]


def squared_logsumexp(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
    return logits.logsumexp(-1) ** 2, logits.sin()


def whole(bound: BoundModel, **options: Any) -> tuple[Tensor, ...]:
    return squared_logsumexp(bound.logits(IDS, **options)[ROWS, COLUMNS], slice(0, len(ROWS)))


@pytest.fixture(params=CASES, ids=lambda c: f"{c[0]} {c[1]}")
def bound(request: pytest.FixtureRequest) -> BoundModel:
    architecture, variant = request.param
    model = variants(architecture)[variant]()
    return bind(model, torch.float64)


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_values_and_gradients(bound: BoundModel, rows_at_once: int) -> None:
    """To rounding in float64: the sums over a head's inputs may be ordered differently for one row and for eleven."""
    assert bound._split is not None
    parameters = list(bound.registry.trainable.values())
    gradients, values = [], []
    for outputs in (
        whole(bound),
        bound.read_logits(IDS, ROWS, COLUMNS, squared_logsumexp, rows_at_once=rows_at_once),
    ):
        loss = outputs[0].sum() + outputs[1][::2].sum()
        first = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        again = torch.autograd.grad(loss, parameters, allow_unused=True)
        torch.testing.assert_close(again, first, rtol=0, atol=0)
        values.append(outputs)
        gradients.append([torch.zeros(()) if g is None else g for g in first])
    torch.testing.assert_close(values[1], values[0], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-11, atol=1e-11)


def test_overrides_reach_backbone_and_output_layer(bound: BoundModel) -> None:
    """Every parameter replaced at once, tied ones included, with a graph to the replacement."""
    override = {
        name: (p.detach() + 0.01 * torch.randn(p.shape, generator=GENERATOR, dtype=p.dtype)).requires_grad_()
        for name, p in bound.registry.parameters.items()
    }
    still = whole(bound)[0]
    expected, got = (
        whole(bound, override=override),
        bound.read_logits(IDS, ROWS, COLUMNS, squared_logsumexp, override=override, rows_at_once=3),
    )
    assert float((expected[0] - still).detach().abs().max()) > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)
    both = [torch.autograd.grad(o[0].sum(), list(override.values()), allow_unused=True) for o in (expected, got)]
    for a, b in zip(*both, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", [("gemma2", "full"), ("llama", "saved head"), ("llama", "dora")], ids=str)
def test_forward_mode_and_second_derivatives(case: tuple[str, str]) -> None:
    bound = bind(variants(case[0])[case[1]](), torch.float64)
    parameters = bound.registry.trainable
    direction = {n: torch.randn(p.shape, generator=GENERATOR, dtype=p.dtype) for n, p in parameters.items()}

    def tangent(function: Callable[..., tuple[Tensor, ...]]) -> Tensor:
        with torch.no_grad(), forward_ad.dual_level():
            dual = {n: forward_ad.make_dual(p.detach(), direction[n]) for n, p in parameters.items()}
            return forward_ad.unpack_dual(function(override=dual, true_derivative=True)[0]).tangent.clone()

    def second(function: Callable[..., tuple[Tensor, ...]]) -> Tensor:
        value = function(true_derivative=True)[0].sum()
        first = torch.autograd.grad(value, list(parameters.values()), create_graph=True)
        along = sum((g * direction[n]).sum() for n, g in zip(parameters, first, strict=True))
        return torch.cat([g.flatten() for g in torch.autograd.grad(along, list(parameters.values()))])

    def pieces(**options: Any) -> tuple[Tensor, ...]:
        return bound.read_logits(IDS, ROWS, COLUMNS, squared_logsumexp, rows_at_once=3, **options)

    for derivative in (tangent, second):
        expected = derivative(lambda **options: whole(bound, **options))
        assert float(expected.abs().max()) > 1e-2
        torch.testing.assert_close(derivative(pieces), expected, rtol=1e-10, atol=1e-10)


class LargestTensor(TorchDispatchMode):
    """The number of entries of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            self.numel = max(self.numel, value.numel() if isinstance(value, Tensor) else 0)
        return out


@pytest.mark.parametrize("grad", [False, True])
def test_whole_logits_are_never_made(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default, at a vocabulary where one piece is not enough; backwards too."""
    monkeypatch.setitem(models.ROPE, "vocab_size", 50_000)
    bound = bind(models.tiny_model("qwen2"))
    for parameter in bound.module.parameters():
        parameter.requires_grad_(parameter.numel() < 1000)
    ids = torch.randint(3, 50_000, (4, 40), generator=GENERATOR)
    rows, columns = (i.flatten() for i in torch.meshgrid(torch.arange(4), torch.arange(40), indexing="ij"))
    tiny = sum(p.numel() for p in bound.registry.parameters.values())
    assert bound._split is not None
    with torch.set_grad_enabled(grad), LargestTensor() as largest:
        values = bound.read_logits(ids, rows, columns, lambda logits, part: (logits.logsumexp(-1),))
        if grad:
            torch.autograd.grad(values[0].sum(), list(bound.registry.trainable.values()))
    assert 50_000 * 64 == largest.numel < 50_000 * 4 * 40 < 2 * tiny * 10
    with torch.no_grad():
        expected = bound.logits(ids)[rows, columns].logsumexp(-1)
    torch.testing.assert_close(values[0].detach(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "comes_apart"),
    [
        *(
            (kind, True)
            for kind in ("cohere", "granite", "gemma3_text", "gpt_neox", "bloom", "falcon", "gptj", "mamba")
        ),
        *(("mixtral", True), ("gpt_oss", True), ("opt", False)),
    ],
)
def test_other_architectures(kind: str, comes_apart: bool) -> None:
    """Scaled logits, parallel blocks, experts, a bias in the head, no attention; OPT calls a part of its backbone."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    own = {
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
        "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
        "bloom": {"n_layer": 2, "n_head": 4},
        "granite": {"logits_scaling": 4.0},
        "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
        "gpt_oss": {"num_key_value_heads": 2, "num_local_experts": 4},
    }
    common = {"vocab_size": models.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(kind, **{**common, **sizes, **own.get(kind, {})})
    torch.manual_seed(0)
    bound = bind(transformers.AutoModelForCausalLM.from_config(config).eval())
    assert (bound._split is not None) == comes_apart
    with torch.no_grad():
        got = bound.read_logits(IDS, ROWS, COLUMNS, squared_logsumexp, rows_at_once=3)
        torch.testing.assert_close(got, whole(bound), rtol=1e-5, atol=1e-6)


def test_models_that_do_not_come_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backbone by the usual name, a `forward` of the instance's own, a model that works on what lies in between."""
    model: Any = models.tiny_model("llama")
    expected = whole(bind(model))

    def reads(model: Any) -> None:
        bound = bind(model)
        assert bound._split is None
        got = bound.read_logits(IDS, ROWS, COLUMNS, squared_logsumexp, rows_at_once=3)
        torch.testing.assert_close(got, whole(bound), rtol=0, atol=0)

    own = model.forward
    model.forward = lambda *a, **k: own(*a, **k)
    reads(model)
    del model.forward
    monkeypatch.setattr(type(model), "base_model_prefix", "trunk")
    reads(model)
    monkeypatch.undo()
    original = type(model).forward

    def by_ids(self: Any, input_ids: Any, **k: Any) -> Any:
        out = original(self, input_ids, **k)
        if out.logits.shape[:2] == input_ids.shape:
            out.logits = out.logits + input_ids[..., None]
        return out

    monkeypatch.setattr(type(model), "forward", by_ids)
    reads(model)
    monkeypatch.undo()
    torch.testing.assert_close(whole(bind(model)), expected, rtol=0, atol=0)


def test_live_model_keeps_no_trace() -> None:
    model: Any = models.tiny_model("llama")
    before = dict(vars(model)), dict(model._modules), dict(model.model._forward_hooks)
    bound = bind(model)
    bound.read_logits(IDS, ROWS, COLUMNS, squared_logsumexp, rows_at_once=3)

    def fails(logits: Tensor, part: slice) -> tuple[Tensor, ...]:
        raise KeyError

    with pytest.raises(KeyError):
        bound.read_logits(IDS, ROWS, COLUMNS, fails)
    with pytest.raises(IndexError):
        bound.read_logits(IDS, ROWS + 9, COLUMNS, squared_logsumexp)
    assert before == (dict(vars(model)), dict(model._modules), dict(model.model._forward_hooks))


def test_override_of_another_form() -> None:
    bound = bind(models.tiny_model("llama"))
    name, value = next(iter(bound.registry.parameters.items()))
    for override, message in (
        ({name: value.detach().double()}, r"float64, the model works with \(67, 24\) float32"),
        ({name: value.detach()[1:]}, r"is \(66, 24\) float32, the model works with \(67, 24\)"),
        ({"nonsense": value.detach()}, "has no such name"),
    ):
        with pytest.raises(OverrideError, match=message):
            bound.logits(IDS, override=override)
