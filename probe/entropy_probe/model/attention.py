"""Attention of long rows in blocks of queries, so that no [heads, T, T] of weights is held or saved for a derivative.

    softmax(scale·q kᵀ + mask) v        q [B, H, T, D], k and v [B, K, S, D], H a multiple of K

torch's fused kernels hold no weights either, but have a backward pass alone. Where a derivative in forward mode or a
second derivative is asked for, torch's MATH kernel keeps the weights of every layer: T² numbers for each head, several
times. Here each block of queries meets the keys that it sees, and its weights are gone before the next:

    forward mode         the blocks one by one, on dual tensors
    reverse mode         q, k, v and the mask are saved; weights are made again, block by block
    of that once more    the same, by the derivative of a block's backward pass

`BlockedAttention` answers the calls of `F.scaled_dot_product_attention`, by whatever model. A model that multiplies
queries and keys itself (transformers' `eager`: soft-capping, sinks, some ALiBi) never calls it, and is as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from jaxtyping import Float

LONG = 1 << 21
"""Scores B·H·T·S from which a call counts as long: 16 MiB of weights in float64. Below, blocks save less than one
piece of logits takes (`model/forward.py`), at the same time or more; and all numbers stay those of torch's kernel."""
_AT_ONCE = 1 << 20  # scores of a block: 8 MiB in float64, which a core's cache still helps
_FEWEST = 16  # queries of a block, however many keys there are: fewer make thin matrix products


def is_long(scores: int) -> bool:
    """Whether a call with so many scores, B·H·T·S, is answered in blocks."""
    return scores >= LONG


def scores_of_a_block(scores: float, queries: float) -> float:
    """How many of a call's scores, with so many queries in a row, are held at once."""
    return min(scores, max(_AT_ONCE, _FEWEST * scores / queries))


class BlockedAttention(TorchFunctionMode):
    """Within it long calls of `F.scaled_dot_product_attention` hold nothing of size T·S.

    `once`: the result is differentiated in reverse mode and once, or not at all. Then torch's fused kernel serves where
    it has one for the call, as it does without this mode; else blocks do, whose every derivative up to the second is
    known. Short calls, calls with dropout, and masks that are trained are left to torch.
    """

    def __init__(self, *, once: bool) -> None:
        super().__init__()
        self._once = once
        self._usual = _enabled_kernels()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        call = _Call.of(*args, **kwargs)
        if call is None or not is_long(call.scores):
            return func(*args, **kwargs)
        if self._once:
            with sdpa_kernel(self._usual):
                if call.has_fused_kernel:
                    return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return call()


def _enabled_kernels() -> list[SDPBackend]:
    """Those that torch may choose from at this moment."""
    of_cuda = torch.backends.cuda
    enabled = {
        SDPBackend.FLASH_ATTENTION: of_cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: of_cuda.mem_efficient_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: of_cuda.cudnn_sdp_enabled(),
        SDPBackend.MATH: of_cuda.math_sdp_enabled(),
    }
    return [kernel for kernel, on in enabled.items() if on]


Limits = tuple[Tensor | None, Tensor | None]
"""What a block's scores are masked by: causally, and as the call gives it."""


@dataclass(frozen=True)
class _Mask:
    """Which keys a query sees: keys up to its own number where `causal`, and what a mask [b, h, t, S] allows (bool) or
    adds (float), each of b, h and t being 1 or full."""

    causal: bool
    given: Tensor | None

    def of(self, queries: slice, keys: int, q: Tensor) -> Limits:
        """Of some queries and the first keys, as they broadcast over [B, K, G, queries, keys]."""
        causal = given = None
        if self.causal:
            own = torch.arange(queries.start, queries.stop, device=q.device)
            causal = torch.arange(keys, device=q.device)[None, :] <= own[:, None]
        if self.given is not None:
            part = self.given[..., queries, :] if self.given.shape[-2] > 1 else self.given
            part, groups = part[..., :keys], q.shape[2]
            given = part.unflatten(1, (-1, groups)) if part.shape[1] > 1 else part[:, :, None]
        return causal, given


@dataclass(frozen=True)
class _Call:
    """One call of `F.scaled_dot_product_attention` that blocks can answer."""

    q: Float[Tensor, "B H T D"]
    k: Float[Tensor, "B K S D"]
    v: Float[Tensor, "B K S E"]
    mask: _Mask
    scale: float

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> _Call | None:
        """`None` where blocks have no answer, or not one that is torch's: then torch computes it as ever."""
        if dropout_p or any(x.dim() != 4 for x in (query, key, value)):
            return None
        (rows, heads, queries, size), (of_key, pairs, keys, _) = query.shape, key.shape
        if not rows == of_key == len(value) or key.shape[1:3] != value.shape[1:3]:
            return None
        if heads != pairs and not (enable_gqa and heads % pairs == 0):
            return None
        mask = attn_mask
        if mask is not None:
            mask = mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask
            full = (rows, heads, queries)
            fits = all(n in (1, of) for n, of in zip(mask.shape[:3], full, strict=True))
            if is_causal or mask.requires_grad or not fits or mask.shape[3] != keys:
                return None
        return cls(
            query, key, value, _Mask(is_causal, mask), size**-0.5 if scale is None else scale
        )

    @property
    def scores(self) -> int:
        return self.q.shape[0] * self.q.shape[1] * self.q.shape[2] * self.k.shape[2]

    @property
    def has_fused_kernel(self) -> bool:
        """Whether torch would choose another kernel than MATH, of those that are enabled."""
        chosen = torch._fused_sdp_choice(  # pyright: ignore[reportPrivateImportUsage]
            self.q,
            self.k,
            self.v,
            self.mask.given,
            0.0,
            self.mask.causal,
            scale=self.scale,
            enable_gqa=self.q.shape[1] != self.k.shape[1],
        )
        return chosen != int(SDPBackend.MATH.value)

    def __call__(self) -> Float[Tensor, "B H T E"]:
        """softmax(scale·q kᵀ + mask) v"""
        pairs = self.k.shape[1]
        q = self.q.unflatten(1, (pairs, -1))  # [B, K, G, T, D]: a head's G queries meet one key
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, self.k, self.v)):
            out = _Attention.apply(q, self.k, self.v, self.mask, self.scale)
        else:  # on dual tensors too
            out = _attention(q, self.k, self.v, self.mask, self.scale)
        return out.flatten(1, 2)  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]


def _blocks(q: Tensor, k: Tensor, mask: _Mask) -> Iterator[tuple[slice, int]]:
    """(queries, keys that they see: the first so many) of every block."""
    rows, pairs, groups, queries, _ = q.shape
    size = max(_FEWEST, _AT_ONCE // (rows * pairs * groups * k.shape[2]))
    for start in range(0, queries, size):
        part = slice(start, min(start + size, queries))
        yield part, min(part.stop, k.shape[2]) if mask.causal else k.shape[2]


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: _Mask, scale: float) -> Tensor:
    """[B, K, G, T, E], block by block."""
    parts = [
        _of_block(q[..., own, :], k[..., :keys, :], v[..., :keys, :], mask.of(own, keys, q), scale)
        for own, keys in _blocks(q, k, mask)
    ]
    return torch.cat(parts, -2)


def _weights(
    q: Float[Tensor, "B K G t D"], k: Float[Tensor, "B K s D"], limits: Limits, scale: float
) -> Float[Tensor, "B K Gt s"]:
    """The softmax over keys. A query that sees no key has weights 0, as with torch's kernels."""
    causal, given = limits
    scores = ((q * scale).flatten(2, 3) @ k.transpose(-1, -2)).unflatten(2, q.shape[2:4])
    if causal is not None:
        scores = scores.masked_fill(~causal, float("-inf"))
    if given is None:  # each query sees a key: all of them, or itself
        return torch.softmax(scores, -1).flatten(2, 3)
    of_bool = given.dtype is torch.bool
    scores = scores.masked_fill(~given, float("-inf")) if of_bool else scores + given.to(scores)
    sees_none = (scores == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(sees_none, 0.0), -1).masked_fill(sees_none, 0.0)
    return weights.flatten(2, 3)


def _of_block(q: Tensor, k: Tensor, v: Tensor, limits: Limits, scale: float) -> Tensor:
    return (_weights(q, k, limits, scale) @ v).unflatten(2, q.shape[2:4])


def _backward_of_block(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, limits: Limits, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v: with W the weights and g the gradient of o = W v,

    ∂v = Wᵀg,   ∂s = W∘(g vᵀ − Σ_keys W∘g vᵀ),   ∂q = scale·∂s k,   ∂k = scale·∂sᵀ q
    """
    w, g = _weights(q, k, limits, scale), gradient.flatten(2, 3)
    of_w = g @ v.transpose(-1, -2)
    of_s = w * (of_w - (w * of_w).sum(-1, keepdim=True))
    of_k = of_s.transpose(-1, -2) @ (q * scale).flatten(2, 3)
    of_q = scale * (of_s @ k).unflatten(2, q.shape[2:4])
    return of_q, of_k, w.transpose(-1, -2) @ g


class _Attention(torch.autograd.Function):
    """`_attention` that saves q, k, v and the mask alone; its gradient can be differentiated once more."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: _Mask, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v, mask.given)
        ctx.causal, ctx.scale = mask.causal, scale
        return _attention(q, k, v, mask, scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, given = ctx.saved_tensors
        return *_Backward.apply(q, k, v, gradient, _Mask(ctx.causal, given), ctx.scale), None, None  # pyright: ignore[reportGeneralTypeIssues]


class _Backward(torch.autograd.Function):
    """`_backward_of_block`, summed over the blocks."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, mask: _Mask, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(q, k, v, gradient, mask.given)
        ctx.causal, ctx.scale = mask.causal, scale
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for own, keys in _blocks(q, k, mask):
            block = q[..., own, :], k[..., :keys, :], v[..., :keys, :], gradient[..., own, :]
            found = _backward_of_block(*block, mask.of(own, keys, q), scale)
            of_q[..., own, :] = found[0]
            of_k[..., :keys, :] += found[1]
            of_v[..., :keys, :] += found[2]
        return of_q, of_k, of_v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *along: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, gradient, given = ctx.saved_tensors
        mask = _Mask(ctx.causal, given)
        found = (
            torch.empty_like(q),
            torch.zeros_like(k),
            torch.zeros_like(v),
            torch.empty_like(gradient),
        )
        for own, keys in _blocks(q, k, mask):
            block = q[..., own, :], k[..., :keys, :], v[..., :keys, :], gradient[..., own, :]
            leaves = [part.detach().requires_grad_() for part in block]
            towards = along[0][..., own, :], along[1][..., :keys, :], along[2][..., :keys, :]
            with torch.enable_grad():
                of_block = _backward_of_block(*leaves, mask.of(own, keys, q), ctx.scale)  # pyright: ignore[reportCallIssue]
                parts = torch.autograd.grad(of_block, leaves, towards)
            found[0][..., own, :] = parts[0]
            found[1][..., :keys, :] += parts[1]
            found[2][..., :keys, :] += parts[2]
            found[3][..., own, :] = parts[3]
        return *found, None, None
