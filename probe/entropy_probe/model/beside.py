"""A model beside a live one: the same numbers in the same memory, and nothing else in common."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from entropy_probe.errors import NoCopyError
from entropy_probe.model.own_forward import with_own_forward
from entropy_probe.model.registry import unwrap

_HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]
_OF_FSDP = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
_CHECKPOINTED = "_checkpoint_wrapped_module"


def beside(model: nn.Module, held: Mapping[int, nn.Parameter] | None = None) -> nn.Module:
    """A copy of the unwrapped model whose parameters share the storage of the model's own, in eval mode.

        beside(model).weight.data_ptr() == model.weight.data_ptr()

    It costs Python objects and the buffers, which are copied. The copy's modes, hooks, configuration and `.grad` are
    its own: nothing that is set on it is seen by the live model, and it has none of the hooks that others have put on
    that. A forward that accelerate has wrapped in autocast is the model's own again; one that closes over the live
    model, as TRL's does, closes over the copy. Whoever writes into a parameter of the copy writes into the live model.
    FSDP2 is taken off the copy: its classes, and layers that are computed again. `held` are parameters for the copy by
    the `id` of the model's own, which then are not asked for. Raises `NoCopyError` for what cannot be copied.
    """
    module = unwrap(model)
    held = {id(p): _sharing(p) for p in module.parameters()} if held is None else held
    memo: dict[int, Any] = dict(held)
    spread: list[nn.Module] = []
    for part in module.modules():
        own_class = _own_class(part)
        if own_class is not type(part):
            memo[id(part)] = own_class.__new__(own_class)
            spread.append(part)
        for name in _HOOKS:
            hooks = vars(part).get(name)
            if hooks:
                memo[id(hooks)] = type(hooks)(filter(_is_of_torch, hooks.items()))
        for value in vars(part).values():
            if isinstance(value, Tensor) and value.grad_fn is not None:  # torch copies no such one
                memo[id(value)] = value.detach()
    try:
        for part in spread:
            own = {name: of for name, of in vars(part).items() if not _is_of_fsdp(name, of)}
            vars(memo[id(part)]).update(copy.deepcopy(own, memo))
        clone = copy.deepcopy(module, memo)
    except (RuntimeError, TypeError) as error:
        raise NoCopyError(
            "the live model",
            f"cannot be copied ({error})"[:200],
            "take off the model what cannot be copied, or probe its checkpoints",
        ) from error
    with_own_forward(clone, memo)
    for part in list(clone.modules()):
        for name in _OF_FSDP:
            vars(part).pop(name, None)
        for name, child in part._modules.items():
            part._modules[name] = getattr(child, _CHECKPOINTED, child)
    return clone.eval()


def name_in_copy(name: str) -> str:
    """What the copy calls a parameter of the model: without the wrappers that it does not have."""
    return name.replace(f"{_CHECKPOINTED}.", "")


def _own_class(part: nn.Module) -> type[nn.Module]:
    """The class that the module had before `fully_shard` gave it one of its own."""
    index = getattr(type(part), "_orig_cls_mro_index", 0)
    return type(part).__mro__[index]


def _is_of_fsdp(name: str, value: Any) -> bool:
    """Its state, and methods that it has put around the module's own."""
    made_in = getattr(value, "__globals__", {}).get("__name__", "")
    return name.startswith("__composable_api_") or made_in.startswith("torch.distributed.fsdp")


def _sharing(parameter: nn.Parameter) -> nn.Parameter:
    """Another parameter in the same memory; the same one where it is of a class of its own, as quantised ones are."""
    if type(parameter) is not nn.Parameter:
        return parameter
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


def _is_of_torch(item: tuple[Any, Any]) -> bool:
    """Weight and spectral norm compute the weight in a hook."""
    return type(item[1]).__module__.startswith("torch.nn.utils.")
