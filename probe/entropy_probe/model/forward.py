"""`BoundModel`: a module bound to one registry and one dtype. The network is called here and nowhere else."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entropy_probe.errors import MeasurementError, OverrideError
from entropy_probe.model.precision import forward_context, has_detached_norm
from entropy_probe.model.registry import Registry, unwrap


@dataclass(frozen=True)
class BoundModel:
    """One module for the registry, the mapping and the forward, with the dtype in which all three work.

    `overridden` collects the names that any mapping replaced during the run.
    """

    registry: Registry
    dtype: torch.dtype
    overridden: set[str] = field(default_factory=set)

    @property
    def module(self) -> nn.Module:
        return self.registry.module

    @cached_property
    def device(self) -> torch.device:
        return next(iter(self.registry.parameters.values())).device

    @cached_property
    def language_model(self) -> nn.Module:
        """The causal language model inside a PEFT wrapper; adapters stay in place and active."""
        base = getattr(self.module, "get_base_model", None)
        return base() if callable(base) else self.module  # pyright: ignore[reportReturnType]

    @cached_property
    def takes_logits_to_keep(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.language_model.forward).parameters

    @cached_property
    def autograd_is_derivative(self) -> bool:
        """False where the module detaches a part of itself (DoRA)."""
        return not has_detached_norm(self.module)

    def logits(
        self,
        ids: Int[Tensor, "N L"],
        *,
        mask: Int[Tensor, "N L"] | None = None,
        keep: slice = slice(None),
        override: Mapping[str, Tensor] | None = None,
        true_derivative: bool = False,
    ) -> Float[Tensor, "N K V"]:
        """Logits at the positions `keep`, at θ or with the parameters in `override` replaced.

        Without `mask` the rows are right-padded: the causal path needs none, since padding stands after every scored
        token. With `mask` positions count real tokens only, so that left padding changes no score. Buffers are never
        overridden. `true_derivative`: the derivative of the function itself, in forward or reverse mode.
        """
        mapping = dict(override or {})
        self._record(mapping)
        through_detach = true_derivative and not self.autograd_is_derivative
        context = forward_context(self.dtype, forward_mode=true_derivative, through_detach=through_detach)
        try:
            with self._evaluating(), context:
                arguments = self._arguments(ids, mask, keep)
                output = torch.func.functional_call(self.module, mapping, (ids,), arguments)
        except IndexError as error:
            raise MeasurementError(
                "rollouts", f"the model cannot score rows of {ids.shape[1]} tokens ({error})", "give shorter ones"
            ) from error
        return self._kept(output, keep)

    def direct_logits(self, ids: Int[Tensor, "N L"], *, keep: slice = slice(None)) -> Float[Tensor, "N K V"]:
        """The same logits at θ by calling the module itself: what the zero check compares with."""
        with self._evaluating(), forward_context(self.dtype):
            output = self.module(ids, **self._arguments(ids, None, keep))
        return self._kept(output, keep)

    def next_logits(
        self, ids: Int[Tensor, "N L"], mask: Int[Tensor, "N M"], cache: Any | None = None
    ) -> tuple[Float[Tensor, "N V"], Any]:
        """Logits of the token that follows the last column, and the key-value cache, which now holds `ids` too.

            logits(rows, mask=mask, keep=slice(-1, None))[:, 0]      where rows [N, M] end in ids

        `cache` holds the M − L columns before `ids`; it is extended in place, and None stands for an empty one.
        Without a graph.
        """
        with self._evaluating(), forward_context(self.dtype), torch.no_grad():
            keep = slice(-1, None)
            arguments = self._arguments(ids, mask, keep) | {"use_cache": True, "past_key_values": cache}
            try:
                output = self.module(ids, **arguments)
            except IndexError as error:
                raise MeasurementError(
                    "sampling", f"the model cannot hold rows of {mask.shape[1]} tokens ({error})", "sample shorter ones"
                ) from error
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            raise MeasurementError("sampling", "the model keeps no key-value cache", "give --probe-rollouts")
        return self._kept(output, keep)[:, 0], cache

    def _arguments(self, ids: Tensor, mask: Tensor | None, keep: slice) -> dict[str, Any]:
        arguments: dict[str, Any] = {"use_cache": False}
        if mask is not None:
            arguments["attention_mask"] = mask
            arguments["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if self.takes_logits_to_keep and keep != slice(None):
            arguments["logits_to_keep"] = torch.arange(ids.shape[1], device=ids.device)[keep]
        return arguments

    def _kept(self, output: Any, keep: slice) -> Tensor:
        logits = output.logits if hasattr(output, "logits") else output[0]
        return logits if self.takes_logits_to_keep else logits[:, keep]

    def _record(self, mapping: Mapping[str, Tensor]) -> None:
        self.overridden.update(mapping)
        unknown = next((name for name in mapping if name not in self.registry.parameters), None)
        if unknown is not None and unknown not in self.registry.buffer_names:
            raise OverrideError(f"override[{unknown!r}]", "the model has no such parameter", "use named_parameters()")

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        training = [module for module in self.module.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def bind(model: nn.Module, dtype: torch.dtype = torch.float32) -> BoundModel:
    """Bind the unwrapped model if it already is of `dtype`; else a copy of it, floating buffers included."""
    module = unwrap(model)
    _refuse_unswappable(module)
    floating = {p.dtype for p in module.parameters() if p.is_floating_point()}
    if floating == {dtype}:
        return BoundModel(Registry(module), dtype)
    clone = copy.deepcopy(module)
    for parameter in clone.parameters():
        parameter.grad = None
    return BoundModel(Registry(clone.to(dtype)), dtype)


def _refuse_unswappable(module: nn.Module) -> None:
    """Refuse a tied parameter inside a ParameterDict or ParameterList.

    torch's `functional_call` swaps such a one in and does not put the original back (seen with peft's
    `trainable_token_indices` on tied embeddings).
    """
    names_of: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
    for tied in names_of.values():
        for name in tied if len(tied) > 1 else ():
            owner = module.get_submodule(name.rpartition(".")[0])
            if isinstance(owner, nn.ParameterDict | nn.ParameterList):
                raise OverrideError(
                    f"parameter {name}",
                    f"is tied, in a {type(owner).__name__}: it cannot be replaced without changing the model",
                    "untie the embeddings",
                )
