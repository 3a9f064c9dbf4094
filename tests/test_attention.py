"""Attention in blocks of queries against torch's MATH kernel: values, forward mode, reverse mode, reverse mode twice.

Blocks have three queries here, and every call counts as long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from entropy_probe.model import attention
from entropy_probe.model.attention import BlockedAttention

ROWS, SIZE = 2, 5
# Sums of some ten products of numbers of size 1 in two orders, three of them in a row: ten roundings were seen.
ROUNDING = 1e-14


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("LONG", 0), ("_AT_ONCE", 0), ("_FEWEST", 3)):
        monkeypatch.setattr(attention, name, value)


@dataclass(frozen=True)
class Call:
    heads: int = 4
    pairs: int = 4
    queries: int = 11
    keys: int = 11
    options: str = "causal"

    def tensors(self) -> tuple[Tensor, ...]:
        random = torch.Generator().manual_seed(0)
        shapes = [(self.heads, self.queries), (self.pairs, self.keys), (self.pairs, self.keys)]
        return tuple(torch.randn(ROWS, *shape, SIZE, generator=random, dtype=torch.float64) for shape in shapes)

    @property
    def arguments(self) -> dict[str, Any]:
        seen = torch.ones(self.queries, self.keys, dtype=torch.bool).tril()
        random = torch.Generator().manual_seed(1)
        added = torch.randn(1, self.heads, self.queries, self.keys, generator=random, dtype=torch.float64)
        padded = torch.stack([seen, seen & (torch.arange(self.keys) >= 4)])[:, None]  # its first queries see nothing
        given: dict[str, dict[str, Any]] = {
            "causal": {"is_causal": True},
            "all": {},
            "scaled": {"is_causal": True, "scale": 0.7},
            "window": {"attn_mask": seen & ~seen.tril(-4)},
            "padded": {"attn_mask": padded},
            "by head": {"attn_mask": added},
            "minus infinity": {"attn_mask": added.masked_fill(~padded, float("-inf"))},
            "of keys": {"attn_mask": (torch.arange(self.keys) % 3 > 0)[None, None, None]},
        }
        return given[self.options] | ({"enable_gqa": True} if self.heads != self.pairs else {})


CALLS = [
    *(
        Call(options=of)
        for of in ("causal", "all", "scaled", "window", "padded", "by head", "minus infinity", "of keys")
    ),
    *(Call(pairs=2, options=of) for of in ("causal", "window", "padded", "by head")),
    Call(pairs=1),
    *(Call(queries=q, keys=k, options=of) for q, k in ((7, 13), (13, 7)) for of in ("causal", "all")),
    Call(queries=2, keys=2),
]


def derivatives(call: Call) -> dict[str, Tensor]:
    """o, its derivative in forward mode, the gradients of ⟨o, c⟩, and the gradients of the length of these."""
    tensors, random = call.tensors(), torch.Generator().manual_seed(2)
    along = [torch.randn(x.shape, generator=random, dtype=x.dtype) for x in tensors]
    c = torch.randn(ROWS, call.heads, call.queries, SIZE, generator=random, dtype=torch.float64)
    attend: Callable[..., Tensor] = lambda *of: F.scaled_dot_product_attention(*of, **call.arguments)  # noqa: E731
    with torch.no_grad(), forward_ad.dual_level():
        dual = [forward_ad.make_dual(x, d) for x, d in zip(tensors, along, strict=True)]
        value, tangent = forward_ad.unpack_dual(attend(*dual))
    leaves = [x.clone().requires_grad_() for x in tensors]
    first = torch.autograd.grad((attend(*leaves) * c).sum(), leaves, create_graph=True)
    length = sum((g * d).sum() + (g**3).sum() for g, d in zip(first, along, strict=True))
    assert isinstance(length, Tensor)
    second = torch.autograd.grad(length, leaves)
    assert tangent is not None
    named = {"value": value, "tangent": tangent}
    for order, found in (("first", first), ("second", second)):
        named |= {f"{order} of {name}": g.detach() for name, g in zip("qkv", found, strict=True)}
    return named


def differences(call: Call) -> dict[str, float]:
    with sdpa_kernel(SDPBackend.MATH):
        expected = derivatives(call)
        with BlockedAttention(once=False):
            found = derivatives(call)
    return {name: float((found[name] - x).abs().max() / (1 + x.abs().max())) for name, x in expected.items()}


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_derivative(call: Call) -> None:
    assert {name: off for name, off in differences(call).items() if not off <= ROUNDING} == {}


@pytest.mark.parametrize("slip", ["no scale", "one key less", "gradient of weights", "mask of another block"])
def test_a_slip_is_seen(monkeypatch: pytest.MonkeyPatch, slip: str) -> None:
    weights, backward, blocks = attention._weights, attention._backward_of_block, attention._blocks
    of = attention._Mask.of
    slips: dict[str, tuple[Any, str, Any]] = {
        "no scale": (attention, "_weights", lambda q, k, limits, scale: weights(q, k, limits, 1.0)),
        "one key less": (
            attention,
            "_blocks",
            lambda q, k, mask: ((own, max(keys - 1, 1)) for own, keys in blocks(q, k, mask)),
        ),
        "gradient of weights": (
            attention,
            "_backward_of_block",
            lambda q, k, v, g, limits, scale: backward(q, k, v * (1 + 1e-6), g, limits, scale),
        ),
        "mask of another block": (
            attention._Mask,
            "of",
            lambda mask, own, keys, q: of(mask, slice(own.start + 1, own.stop + 1), keys, q),
        ),
    }
    monkeypatch.setattr(*slips[slip])
    assert max(differences(Call(options="causal")).values()) > ROUNDING


def test_once_is_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, also where the MATH kernel is asked for around it; blocks where torch has no fused kernel."""
    tensors = Call().tensors()
    fused = F.scaled_dot_product_attention(*tensors, is_causal=True)
    with BlockedAttention(once=True) as mode, sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(F.scaled_dot_product_attention(*tensors, is_causal=True), fused)
        assert not torch.equal(F.scaled_dot_product_attention(*tensors, is_causal=True, dropout_p=1e-9), fused)
        asked = []
        monkeypatch.setattr(attention._Call, "__call__", lambda call: asked.append(call))
        F.scaled_dot_product_attention(*tensors, is_causal=True)
        assert asked == []
        mode._usual = [SDPBackend.MATH]  # pyright: ignore[reportAttributeAccessIssue]
        F.scaled_dot_product_attention(*tensors, is_causal=True)
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("tensors", "options"),
    [
        (Call().tensors(), {"dropout_p": 0.5}),
        (tuple(x[0] for x in Call().tensors()), {}),
        (Call(pairs=1).tensors(), {}),
        (Call().tensors(), {"attn_mask": torch.zeros(11, 11, dtype=torch.float64, requires_grad=True)}),
        (Call().tensors(), {"attn_mask": torch.zeros(11, 1, dtype=torch.float64)}),
    ],
    ids=["dropout", "three dimensions", "broadcast heads", "a trained mask", "a mask of one key"],
)
def test_what_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, tensors: tuple[Tensor, ...], options: dict[str, Any]
) -> None:
    monkeypatch.setattr(attention._Call, "__call__", lambda call: pytest.fail("answered in blocks"))
    with BlockedAttention(once=False), sdpa_kernel(SDPBackend.MATH):
        assert F.scaled_dot_product_attention(*tensors, **options).shape == tensors[0].shape


def test_short_calls_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONG", ROWS * 4 * 11 * 11 + 1)
    monkeypatch.setattr(attention._Call, "__call__", lambda call: pytest.fail("answered in blocks"))
    with BlockedAttention(once=False):
        F.scaled_dot_product_attention(*Call().tensors(), is_causal=True)
