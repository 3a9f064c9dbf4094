"""θ + ηv as a mapping of names to tensors, without touching the module."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from entropy_probe.errors import OverrideError
from entropy_probe.model.registry import Registry


def theta_plus_eta_v(
    registry: Registry, v: Mapping[str, Tensor], eta: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """`{name: θ.to(dtype) + η·v.to(dtype)}` for the names in v only, on each parameter's own device, detached.

    Both are upcast before the addition: in bf16 an update of 1e-5 relative size disappears. Raises `OverrideError` for
    a name that is unknown or frozen and for a shape that differs.
    """
    registry.require_trainable(v)
    mapping = {}
    for name, direction in v.items():
        parameter = registry.parameters[name].detach()
        if direction.shape != parameter.shape:
            raise OverrideError(
                f"direction v[{name!r}]",
                f"has shape {tuple(direction.shape)}, the parameter {tuple(parameter.shape)}",
                "compute v on this model",
            )
        mapping[name] = torch.add(
            parameter.to(dtype), direction.to(device=parameter.device, dtype=dtype), alpha=eta
        )
    return mapping


def build_functional_params_named(
    model: nn.Module,
    v_named: Mapping[str, Tensor] | None,
    eta: float = 0.0,
    *,
    detach_params: bool = True,
    detach_buffers: bool = True,
    force_param_dtype: torch.dtype | None = None,
    force_buffer_dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(params, buffers) of θ + ηv for `torch.func.functional_call` on the unwrapped model.

    Every parameter is in `params`: those in `v_named` as θ + ηv, the others as they are. `force_param_dtype` is the
    dtype of the addition and of every entry; without it each parameter keeps its dtype, but never below float32 where
    v is added. Buffers are a snapshot for the explicit diagnostic path; the default path does not pass them on.
    """
    registry = Registry.of(model)
    params: dict[str, Tensor] = {}
    for name, parameter in registry.parameters.items():
        tensor = parameter.detach() if detach_params else parameter
        params[name] = tensor if force_param_dtype is None else tensor.to(force_param_dtype)
    for name, direction in (v_named or {}).items():
        registry.require_trainable([name])
        base = registry.parameters[name]
        compute = force_param_dtype or torch.promote_types(base.dtype, torch.float32)
        if detach_params:
            params.update(theta_plus_eta_v(registry, {name: direction}, eta, compute))
        else:
            params[name] = base.to(compute) + eta * direction.to(device=base.device, dtype=compute)
    buffers = {}
    for name, buffer in registry.module.named_buffers():
        tensor = buffer.detach() if detach_buffers else buffer
        cast = force_buffer_dtype is not None and tensor.is_floating_point()
        buffers[name] = tensor.to(force_buffer_dtype) if cast else tensor
    return params, buffers
