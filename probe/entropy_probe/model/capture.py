"""Weighted sums of per-row gradients from one forward and one backward pass.

For rows i with log-probabilities S_i and any weights w_ki, the sums over the rows of every prompt n

    Σ_{i in n} w_ki ∇S_i

need one backward pass of Σ_i S_i: a layer's gradient is Σ_t δ_it a_itᵀ over the tokens of a row, so the weights can
enter when its inputs a and output gradients δ meet. While the mode is active, an operation that uses a trainable tensor
in a known way gets the tensor detached, and its a and δ are contracted as δ arrives. What the mode does not know is
left in autograd's graph: whatever gradient still arrives at a parameter there is taken prompt by prompt and added, so
no use of a parameter is lost.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from entropy_probe.errors import MeasurementError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

_Receiver = Callable[[Tensor, Any], None]
"""Takes the gradient of an operation's result, and what was kept for it."""
Sums = Sequence[Sequence[Tensor]] | Tensor
"""`sums[k][n]`: Σ over the rows of prompt n with the weights w_k, in the shape of what the gradient belongs to."""

# A product with fewer columns than this is computed for all w_k at once: one for each takes 3 to 6 times as long where
# the small side is 8 (LoRA). Wider ones are added where they belong as they are computed.
_THIN = 64


@dataclass
class _Weight:
    """A trainable tensor, or one made of such tensors alone, and Σ_i w_ki ∂S_i/∂tensor as `total[k][n]`."""

    tensor: Tensor
    is_parameter: bool
    version: int
    total: Sums | None = None


class Capture(TorchFunctionMode):
    """Collects `sums()` while a forward runs within it, for P prompts with the same number of rows each.

    `weights` [K, R] belong to the rows in the order of the batch, the rows of a prompt standing together. `rows_of`
    says which row each position of a flattened input belongs to; `None` where inputs are [R, L, ...]. `fell_back` holds
    the names of parameters whose gradient, or a part of it, was taken prompt by prompt. Sums are added to `into`, by
    name, where it is given; else they are [K, P, ...].
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        weights: Float[Tensor, "K R"],
        num_prompts: int,
        into: Mapping[str, Sums] | None = None,
    ) -> None:
        super().__init__()
        self._parameters = dict(parameters)
        self._weights = weights
        self._num_prompts = num_prompts
        given = into or {}
        self._known = {
            id(p): _Weight(p, True, p._version, given.get(name)) for name, p in parameters.items()
        }
        self._tap = torch.zeros((), requires_grad=True, device=weights.device)
        self._listening = True
        self._before_piece: set[int] = set()
        self.fell_back: set[str] = set()
        self.shape: tuple[int, int] | None = None
        self.rows_of: Int[Tensor, " r"] | None = None

    def sums(self, values: Float[Tensor, " R"], *, last: bool = True) -> dict[str, Sums]:
        """Σ_{i in n} w_ki ∂S_i/∂θ by name, where `values` are S; zero where S does not depend on a parameter.

        `last`: nothing else of the same forward will be asked for, after `turned_to` other weights.
        """
        if values.requires_grad:
            self._differentiated(values, torch.arange(len(values), device=values.device), [])
        self._pull_back(set(), last=last)
        self._listening = False
        return {
            name: self._total(self._known[id(tensor)]) for name, tensor in self._parameters.items()
        }

    def turned_to(
        self, weights: Float[Tensor, "K R"], num_prompts: int, into: Mapping[str, Sums] | None
    ) -> None:
        """Sums of the same forward with other weights, of other prompts, are what `sums` is asked for next."""
        self._weights, self._num_prompts, self._listening = weights, num_prompts, True
        for weight in self._known.values():
            weight.total = None
        for name, tensor in self._parameters.items():
            self._known[id(tensor)].total = (into or {}).get(name)

    def piece(self, values: Float[Tensor, " r"], rows: Int[Tensor, " r"], states: Tensor) -> Tensor:
        """∂Σ values/∂states, where `values` are terms of S of the given rows that depend on the rest of the graph
        through `states` alone: what the parameters between the two add to the sums is collected. To be called after
        the block of `positions` in which they were made, whose tensors are let go."""
        (gradient,) = self._differentiated(values, rows, [states])
        self._pull_back(self._before_piece)
        return gradient

    def _differentiated(
        self, values: Tensor, rows: Tensor, inputs: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """∂Σ values/∂inputs. Layers that are known take their part as the gradient passes; a parameter that it still
        reaches gets its part prompt by prompt."""
        tensors = list(self._parameters.values())
        gradients = torch.autograd.grad(
            values.sum(), [*inputs, self._tap, *tensors], retain_graph=True, allow_unused=True
        )
        reached = zip(self._parameters, gradients[len(inputs) + 1 :], strict=True)
        names = [name for name, gradient in reached if gradient is not None]
        if names:
            self.fell_back.update(names)
            plain = [self._parameters[name] for name in names]
            self._listening = False
            prompt_of = self._prompt_of(rows)
            for k, p in itertools.product(range(len(self._weights)), prompt_of.unique().tolist()):
                weighted = (self._weights[k, rows] * values)[prompt_of == p].sum()
                found = torch.autograd.grad(weighted, plain, retain_graph=True, allow_unused=True)
                for tensor, gradient in zip(plain, found, strict=True):
                    if gradient is not None:
                        self._total(self._known[id(tensor)])[k][p].add_(gradient)
            self._listening = True
        return gradients[: len(inputs)]

    def _prompt_of(self, rows: Tensor) -> Tensor:
        return rows // (self._weights.shape[1] // self._num_prompts)

    def _total(self, weight: _Weight) -> Sums:
        if weight.total is None:
            weight.total = weight.tensor.new_zeros(
                len(self._weights), self._num_prompts, *weight.tensor.shape
            )
        return weight.total

    def _each(self) -> Iterator[tuple[int, int]]:
        return itertools.product(range(len(self._weights)), range(self._num_prompts))

    def _pull_back(self, kept: Collection[int], *, last: bool = True) -> None:
        """Gradients of tensors that were made of parameters, but of those `kept`, go on to these, prompt by prompt."""
        tensors = list(self._parameters.values())
        made = [
            key
            for key, weight in self._known.items()
            if not weight.is_parameter and key not in kept
        ]
        for weight in [self._known.pop(key) if last else self._known[key] for key in made]:
            if weight.total is None:
                continue
            if weight.tensor._version != weight.version:
                raise MeasurementError(
                    "gradients",
                    "the model changes a tensor that is made of its parameters in place",
                    "write that operation without a change in place",
                )
            for k, p in self._each():
                gradients = torch.autograd.grad(
                    weight.tensor, tensors, weight.total[k][p], retain_graph=True, allow_unused=True
                )
                for tensor, gradient in zip(tensors, gradients, strict=True):
                    if gradient is not None:
                        self._total(self._known[id(tensor)])[k][p].add_(gradient)

    # The forward

    @contextmanager
    def positions(self, rows: Int[Tensor, " r"]) -> Iterator[None]:
        """Within the block inputs are [1, r, ...], and position j belongs to row `rows[j]`."""
        before, self.rows_of = self.rows_of, rows
        self._before_piece = set(self._known)
        try:
            with self:
                yield
        finally:
            self.rows_of = before

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((*args, *kwargs.values())))
        of_batch = any(self.is_of_batch(tensor) for tensor in tensors)
        out = None
        uses_weight = torch.is_grad_enabled() and any(
            self.weight(tensor) is not None for tensor in tensors
        )
        if uses_weight and of_batch and func in _RULES:
            out = _applied(_RULES[func], self, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        if of_batch:
            self.mark(*_tensors((out,)))
        elif uses_weight and all(
            self.weight(tensor) is not None for tensor in tensors if tensor.requires_grad
        ):
            for made in _tensors((out,)):
                if made.requires_grad and id(made) not in self._known:
                    self._known[id(made)] = _Weight(made, False, made._version)
        return out

    def mark(self, *tensors: Tensor) -> None:
        """Note that these tensors were made of the batch: constants of the same shape are no activations."""
        for tensor in tensors:
            tensor._of_capture = self  # pyright: ignore[reportAttributeAccessIssue]

    def is_of_batch(self, tensor: Tensor) -> bool:
        return getattr(tensor, "_of_capture", None) is self

    def weight(self, tensor: object) -> _Weight | None:
        """What is known of a tensor that is a parameter or made of parameters, and has not been changed since."""
        known = self._known.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return known if known is not None and known.tensor._version == known.version else None

    def is_activation(self, x: object) -> bool:
        """Whether `x` was made of the batch, and its leading dimensions are rows and positions."""
        if not isinstance(x, Tensor) or not self.is_of_batch(x) or self.shape is None:
            return False
        leading = (1, len(self.rows_of)) if self.rows_of is not None else self.shape
        return x.dim() >= 2 and tuple(x.shape[:2]) == leading

    def is_flat_activation(self, x: object) -> bool:
        """The same with rows and positions in one dimension, row after row."""
        if (
            not isinstance(x, Tensor)
            or not self.is_of_batch(x)
            or self.shape is None
            or self.rows_of is not None
        ):
            return False
        return x.dim() == 2 and len(x) == self.shape[0] * self.shape[1]

    @contextmanager
    def again(self, activations: Sequence[Tensor]) -> Iterator[None]:
        """Within the block a part of the forward runs a second time on these, as `model/recompute.py` has it: it saves
        what the first run saved, and the tensors that it makes of parameters are nobody's."""
        before = set(self._known)
        try:
            self.mark(*activations)
            with self:
                yield
        finally:
            for key in self._known.keys() - before:
                del self._known[key]

    def tapped(self, out: Tensor, kept: Tensor | None, *receivers: _Receiver) -> Tensor:
        """`out`, whose gradient goes to each of the `receivers` while the capture listens, with what is `kept` for
        them: as autograd keeps it, so that it can be made again instead."""
        return _Tap.apply(out, kept, self._tap, self, receivers)  # pyright: ignore[reportReturnType]

    def received(self, gradient: Tensor, kept: Any, receivers: Sequence[_Receiver]) -> None:
        for receive in receivers if self._listening else ():
            receive(gradient, kept)

    # The backward

    def rows(self) -> Tensor:
        """The row of every position, flattened."""
        if self.rows_of is not None:
            return self.rows_of
        assert self.shape is not None
        return torch.arange(self.shape[0], device=self._weights.device).repeat_interleave(
            self.shape[1]
        )

    def add_outer(self, weight: _Weight, left: Tensor, right: Tensor, rows: Tensor) -> None:
        """total[k][n] += Σ_{positions of n} w_k · left ⊗ right, from left [M, a] and right [M, b]."""
        total, scale = self._total(weight), self._weights[:, rows].to(left)
        small_left = left.shape[1] <= right.shape[1]
        for p, part in self._prompts(rows):
            small, other = (left[part], right[part]) if small_left else (right[part], left[part])
            scaled = scale[:, part, None] * small  # [K, M, small]
            if small.shape[1] < _THIN:
                products = scaled.transpose(1, 2).reshape(-1, len(small)) @ other
                for k, product in enumerate(products.reshape(len(scale), small.shape[1], -1)):
                    total[k][p].add_(product if small_left else product.T)
            else:
                for k, of_k in enumerate(scaled):
                    total[k][p].addmm_(*((of_k.T, other) if small_left else (other.T, of_k)))

    def _prompts(self, rows: Tensor) -> Iterator[tuple[int, slice]]:
        """Each prompt that has any of these positions, and where they stand."""
        per_prompt = self._weights.shape[1] // self._num_prompts
        ends = torch.searchsorted(
            rows, per_prompt * torch.arange(self._num_prompts + 1, device=rows.device)
        ).tolist()
        return (
            (p, slice(start, end))
            for p, (start, end) in enumerate(itertools.pairwise(ends))
            if start < end
        )

    def add_broadcast(self, weight: _Weight, values: Tensor, rows_of: Tensor | None) -> None:
        """total[k][n] += Σ_{rows i of n} w_k · values_i, summed to the weight's shape, from values [R, L, ...], or
        [1, r, ...] with position j of row `rows_of[j]`."""
        if rows_of is not None:
            by_row = values.new_zeros(self._weights.shape[1], *values.shape[2:])
            values = by_row.index_add_(0, rows_of.to(values.device), values[0])[:, None]
        shape = torch.Size(_aligned(weight.tensor, values)[1:])
        summed = [
            dim for dim in range(1, values.dim()) if shape[dim - 1] == 1 and values.shape[dim] > 1
        ]
        by_row = (values.sum(summed, keepdim=True) if summed else values).reshape(
            self._num_prompts, -1, shape.numel()
        )
        w = self._weights.to(by_row).reshape(len(self._weights), self._num_prompts, -1)
        added = torch.einsum("kpg,pgd->kpd", w, by_row)
        for k, p in self._each():
            self._total(weight)[k][p].add_(added[k, p].reshape(weight.tensor.shape))

    def row_shape(self, weight: Tensor, x: Tensor) -> torch.Size | None:
        """The weight's shape against one row [L, ...] of `x`; `None` where it does not broadcast over the rows."""
        if weight.dim() > x.dim():
            return None
        aligned = _aligned(weight, x)
        fits = all(own in (1, full) for own, full in zip(aligned, x.shape, strict=True))
        over_rows = aligned[0] == 1 and (self.rows_of is None or aligned[1] == 1)
        return torch.Size(aligned[1:]) if fits and over_rows else None

    def add_at(self, weight: _Weight, ids: Tensor, values: Tensor, rows: Tensor) -> None:
        """total[k][n][id] += Σ_{positions of n with this id} w_k · values, from ids [M] and values [M, d]."""
        total = self._total(weight)
        for k, of_row in enumerate(self._weights):
            scaled = of_row[rows, None].to(values) * values
            for p, part in self._prompts(rows):
                total[k][p].index_add_(0, ids[part], scaled[part])


class _Tap(torch.autograd.Function):
    """The identity; its backward hands the gradient to the receivers. `tap` makes it a part of every backward pass."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, kept: Tensor | None, tap: Tensor, capture: Capture, receivers: Any
    ) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.capture, ctx.receivers, ctx.device = capture, receivers, tap.device
        ctx.mark_dirty(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (kept,) = ctx.saved_tensors
        ctx.capture.received(gradient, kept, ctx.receivers)
        return gradient, None, torch.zeros((), device=ctx.device), None, None


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(tuple(value))


def _aligned(weight: Tensor, x: Tensor) -> tuple[int, ...]:
    """The weight's shape with as many dimensions as `x`, as broadcasting sees it."""
    return (1,) * (x.dim() - weight.dim()) + tuple(weight.shape)


_signature = functools.cache(inspect.signature)


def _applied(
    rule: Callable[..., Tensor | None],
    capture: Capture,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor | None:
    """The rule's result; `None` where it does not take such arguments."""
    try:
        bound = _signature(rule).bind(capture, *args, **kwargs)
    except TypeError:
        return None
    return rule(*bound.args, **bound.kwargs)


# Rules: operation → what to do; `None` where it is not of the form that the rule knows


def _linear(capture: Capture, x: Any, weight: Any, bias: Any = None) -> Tensor | None:
    own, own_bias = capture.weight(weight), capture.weight(bias)
    if not capture.is_activation(x) or x.dim() != 3 or weight.dim() != 2:
        return None
    rows, rows_of, kept = capture.rows(), capture.rows_of, None

    receivers: list[_Receiver] = []
    if own is not None:
        kept = x.detach().reshape(-1, x.shape[-1])
        receivers.append(
            lambda gradient, kept: capture.add_outer(own, gradient.flatten(0, -2), kept, rows)
        )
    if own_bias is not None:
        receivers.append(lambda gradient, _: capture.add_broadcast(own_bias, gradient, rows_of))
    used = weight.detach() if own is not None else weight
    return capture.tapped(
        F.linear(x, used, bias if own_bias is None else bias.detach()), kept, *receivers
    )


def _addmm(capture: Capture, bias: Any, x: Any, weight: Any, **options: Any) -> Tensor | None:
    own, own_bias = capture.weight(weight), capture.weight(bias)
    shape = capture.shape
    if (
        options
        or shape is None
        or not capture.is_flat_activation(x)
        or weight.dim() != 2
        or bias.dim() != 1
    ):
        return None
    rows, kept = capture.rows(), x.detach() if own is not None else None

    receivers: list[_Receiver] = []
    if own is not None:
        receivers.append(lambda gradient, kept: capture.add_outer(own, kept, gradient, rows))
    if own_bias is not None:
        receivers.append(
            lambda gradient, _: capture.add_broadcast(own_bias, gradient.reshape(*shape, -1), None)
        )
    used = weight.detach() if own is not None else weight
    return capture.tapped(
        torch.addmm(bias if own_bias is None else bias.detach(), x, used), kept, *receivers
    )


def _embedding(
    capture: Capture,
    ids: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    own = capture.weight(weight)
    if own is None or max_norm is not None or scale_grad_by_freq or sparse:
        return None
    if not capture.is_activation(ids) or ids.dim() != 2:
        return None
    rows, flat_ids = capture.rows(), ids.reshape(-1)
    padding = padding_idx if padding_idx is None or padding_idx >= 0 else len(weight) + padding_idx

    def receive(gradient: Tensor, _: None) -> None:
        values = gradient.reshape(-1, gradient.shape[-1])
        if padding is not None:  # as in torch: the padding token's vector gets no gradient
            values = values.masked_fill((flat_ids == padding)[:, None], 0.0)
        capture.add_at(own, flat_ids, values, rows)

    return capture.tapped(F.embedding(ids, weight.detach()), None, receive)


def _layer_norm(
    capture: Capture, x: Any, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor | None:
    own, own_bias = capture.weight(weight), capture.weight(bias)
    if not capture.is_activation(x) or x.dim() < 3:
        return None
    kept, rows_of = x.detach() if own is not None else None, capture.rows_of

    receivers: list[_Receiver] = []
    if own is not None:
        receivers.append(
            lambda gradient, kept: capture.add_broadcast(
                own, gradient * F.layer_norm(kept, shape, None, None, eps), rows_of
            )
        )
    if own_bias is not None:
        receivers.append(lambda gradient, _: capture.add_broadcast(own_bias, gradient, rows_of))
    used = weight if own is None else weight.detach()
    used_bias = bias if own_bias is None else bias.detach()
    return capture.tapped(F.layer_norm(x, shape, used, used_bias, eps), kept, *receivers)


def _elementwise(capture: Capture, one: Any, other: Any) -> tuple[_Weight, Tensor] | None:
    """(the weight, the activation) of a product or a sum of the two."""
    for weight, x in ((one, other), (other, one)):
        own = capture.weight(weight)
        if own is None or not capture.is_activation(x) or x.dim() < 3:
            continue
        if capture.row_shape(weight, x) is not None:
            return own, x
    return None


def _mul(capture: Capture, one: Any, other: Any) -> Tensor | None:
    found = _elementwise(capture, one, other)
    if found is None:
        return None
    own, x = found
    kept, rows_of = x.detach(), capture.rows_of
    out = x * own.tensor.detach()
    return capture.tapped(
        out, kept, lambda gradient, kept: capture.add_broadcast(own, gradient * kept, rows_of)
    )


def _add(capture: Capture, one: Any, other: Any) -> Tensor | None:
    found = _elementwise(capture, one, other)
    if found is None:
        return None
    own, x = found
    rows_of = capture.rows_of
    return capture.tapped(
        x + own.tensor.detach(),
        None,
        lambda gradient, _: capture.add_broadcast(own, gradient, rows_of),
    )


_RULES: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _mul),
    **dict.fromkeys((Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add), _add),
}
