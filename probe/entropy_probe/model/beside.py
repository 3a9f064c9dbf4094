"""A model beside a live one: the same numbers in the same memory, and nothing else in common."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from entropy_probe.errors import MeasurementError, NoCopyError
from entropy_probe.model.registry import unwrap

_HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def beside(model: nn.Module) -> nn.Module:
    """A copy of the unwrapped model whose parameters share the storage of the model's own, in eval mode.

        beside(model).weight.data_ptr() == model.weight.data_ptr()

    It costs Python objects and the buffers, which are copied. The copy's modes, hooks, configuration and `.grad` are
    its own: nothing that is set on it is seen by the live model, and it has none of the hooks that others have put on
    that. A forward that accelerate has wrapped in autocast is the model's own again. Whoever writes into a parameter of
    the copy writes into the live model. Raises `NoCopyError` for what cannot be copied, `MeasurementError` for a part
    whose `forward` is bound to the live model.
    """
    module = unwrap(model)
    memo: dict[int, Any] = {id(p): _sharing(p) for p in module.parameters()}
    for part in module.modules():
        for name in _HOOKS:
            hooks = vars(part).get(name)
            if hooks:
                memo[id(hooks)] = type(hooks)(filter(_is_of_torch, hooks.items()))
        for value in vars(part).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:  # torch copies no such one
                memo[id(value)] = value.detach()
    try:
        clone = copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as error:
        raise NoCopyError(
            "the live model",
            f"cannot be copied ({error})"[:200],
            "take off the model what cannot be copied, or probe its checkpoints",
        ) from error
    for name, part in clone.named_modules():
        _own_forward(part, name)
    return clone.eval()


def _sharing(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter in the same memory; the same one where it is of a class of its own, as quantised ones are."""
    if type(parameter) is not nn.Parameter:
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


def _is_of_torch(item: tuple[Any, Any]) -> bool:
    """Weight and spectral norm compute the weight in a hook."""
    return type(item[1]).__module__.startswith("torch.nn.utils.")


def _own_forward(part: nn.Module, name: str) -> None:
    """Without accelerate's autocast around it, which would be switched on again at every call."""
    own = vars(part)
    original = own.pop("_original_forward", None)
    if original is not None and own.pop("forward", None) is not None:
        own["forward"] = original
    forward = own.get("forward")
    if forward is None:
        return
    if not isinstance(forward, MethodType) or forward.__self__ is not part:
        raise MeasurementError(
            f"module {name or type(part).__name__}",
            "has a `forward` that is bound to the live model",
            "set it as a method, types.MethodType(function, module)",
        )
    if forward.__func__ is type(part).forward:
        del own["forward"]


def same_memory(one: nn.Module, other: nn.Module) -> bool:
    """Whether all parameters of both lie in the same memory."""
    names = dict(other.named_parameters())
    return all(
        isinstance(p, Tensor) and p.data_ptr() == names[name].data_ptr()
        for name, p in one.named_parameters()
        if not isinstance(p, torch.nn.parameter.UninitializedParameter)
    )
