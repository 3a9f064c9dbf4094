"""A model beside a live one: the same numbers in the same memory, and nothing else in common."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from entropy_probe.errors import NoCopyError
from entropy_probe.model.own_forward import with_own_forward
from entropy_probe.model.registry import unwrap

_HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def beside(model: nn.Module) -> nn.Module:
    """A copy of the unwrapped model whose parameters share the storage of the model's own, in eval mode.

        beside(model).weight.data_ptr() == model.weight.data_ptr()

    It costs Python objects and the buffers, which are copied. The copy's modes, hooks, configuration and `.grad` are
    its own: nothing that is set on it is seen by the live model, and it has none of the hooks that others have put on
    that. A forward that accelerate has wrapped in autocast is the model's own again; one that closes over the live
    model, as TRL's does, closes over the copy. Whoever writes into a parameter of the copy writes into the live model.
    Raises `NoCopyError` for what cannot be copied.
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
    with_own_forward(clone, memo)
    return clone.eval()


def _sharing(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter in the same memory; the same one where it is of a class of its own, as quantised ones are."""
    if type(parameter) is not nn.Parameter:
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


def _is_of_torch(item: tuple[Any, Any]) -> bool:
    """Weight and spectral norm compute the weight in a hook."""
    return type(item[1]).__module__.startswith("torch.nn.utils.")
