"""Parameters of which every process has a part, as FSDP2 (`fully_shard`) keeps them: DTensors.

What is computed from a shard alone needs no other process (`local`). What needs whole tensors is put together in memory
that all processes of one machine see, where each writes its own part (`together`, `written_once`). On several machines
it is gathered in the first process, one tensor after the other, while all take part (`whole`, `gathered`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from entropy_probe.errors import MeasurementError
from entropy_probe.memory import available_bytes
from entropy_probe.model.beside import beside
from entropy_probe.model.placement import IN_MEMORY, place
from entropy_probe.model.registry import unwrap
from entropy_probe.processes import of_training
from entropy_probe.processes.world import World

_OF_A_STEP = 2
"""What a measurement holds beside θ that is as long as what is trained: the step, and its sum with θ."""


def is_spread(tensor: Tensor) -> TypeGuard[Any]:
    """Whether it is a DTensor. Without that module, whose import takes most of a second, there is none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes have only a part each of some parameter."""
    return any(map(is_spread, resharded(model).parameters()))


def resharded(model: nn.Module) -> nn.Module:
    """The unwrapped model, with the parameters in place that its optimizer knows: FSDP2 may have left whole ones there
    for its next forward, which then asks for them again."""
    module = unwrap(model)
    for part in module.modules():
        if hasattr(type(part), "_get_fsdp_state"):
            part.reshard()  # pyright: ignore[reportCallIssue]
    return module


def local(tensor: Tensor) -> Tensor:
    """This process's own part."""
    return tensor.to_local() if is_spread(tensor) else tensor


def copies(parameter: Tensor) -> int:
    """How many processes hold each of its entries. Raises where not every process has a part of it."""
    if not is_spread(parameter):
        return of_training.size()
    mesh = parameter.device_mesh
    if mesh.size() != of_training.size():
        problem = f"has a tensor on {mesh.size()} of {of_training.size()} processes"
        raise MeasurementError("the model", problem, "probe its checkpoints")
    replicated = (k for k, placed in enumerate(parameter.placements) if placed.is_replicate())
    return math.prod(mesh.size(k) for k in replicated)


def spread_as(parameter: Tensor, part: Tensor) -> Tensor:
    """The tensor of which this is the part that `local` gives of `parameter`."""
    if not is_spread(parameter):
        return part
    return type(parameter).from_local(
        part.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def gathered(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The whole tensors by name, on the CPU, in the first process; nothing in the others, which hold one at a time.

    All processes call this with the same names in the same order.
    """
    found: dict[str, Tensor] = {}
    trouble: Exception | None = None
    for name, tensor in tensors:
        full = tensor.full_tensor() if is_spread(tensor) else tensor
        if of_training.is_first() and trouble is None:
            try:
                found[name] = full.detach().to("cpu", copy=True)  # never the live memory
            except Exception as error:  # the others are still there: go on with them to the end
                trouble = error
                found.clear()
        del full

    def say() -> None:
        if trouble is not None:
            raise trouble

    try:
        of_training.agreed(say)
    finally:
        trouble = None  # its traceback would hold what was gathered
    return found


def written_once(
    tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype], world: World
) -> dict[str, Tensor]:
    """The whole tensors by name, once, in memory that all processes of `world` see: each writes its own part, and
    nothing is sent. All processes call this with the same names in the same order."""
    found: dict[str, Tensor] = {}
    parts = {n: _own_part(t) if is_spread(t) else (world.first, ()) for n, t in tensors.items()}
    for dtype in dict.fromkeys(dtypes.values()):
        shapes = {n: tuple(t.shape) for n, t in tensors.items() if dtypes[n] is dtype}
        found |= world.zeros(shapes, dtype)
    trouble: Exception | None = None
    for name, tensor in tensors.items():
        part = parts[name]
        # spread in a way that torch alone knows: all take part
        full = tensor.full_tensor() if part is None else None  # pyright: ignore[reportAttributeAccessIssue]
        try:
            if full is not None and world.first:
                found[name].copy_(full.detach())
            elif part is not None and part[0]:
                found[name][part[1]].copy_(local(tensor.detach()))
        except Exception as error:  # the others are still there: go on with them to the end
            trouble = trouble or error
        del full
    if trouble is not None:
        raise trouble
    world.wait()
    return found


def _own_part(tensor: Any) -> tuple[bool, tuple[slice, ...]] | None:
    """Whether this process writes its part of a DTensor, as one of those that have it does, and where that is in the
    whole; `None` where it is not a plain block."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements
    if any(type(placed) not in (Replicate, Shard) for placed in placements):
        return None
    sizes, starts = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    coordinate = mesh.get_coordinate()
    writes = not any(k and p.is_replicate() for k, p in zip(coordinate, placements, strict=True))
    return writes, tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))


def together(model: nn.Module, world: World, *, wide: bool = False) -> tuple[nn.Module, World]:
    """A module of the model's own class, without FSDP2, in each process, all with the same parameters in memory that is
    there once; and the processes as they hold it. What is trained is in float32 at least. All processes of `world` call
    this, in `World.together`; `wide` where a copy in float64 will be asked for too. Raises `ProbeError`.

    Where the accelerator of every process has room, each has the module there. Else a layer is lent to it as it is
    used, which is slower: the bus carries the model once for every batch of rows, and for every token that is sampled.
    """
    module = resharded(model)
    _require_possible(module, gathers=False, wide=wide)
    parameters = dict(module.named_parameters())
    dtypes = {
        n: torch.promote_types(p.dtype, torch.float32) if p.requires_grad else p.dtype
        for n, p in parameters.items()
    }
    found = written_once(parameters, dtypes, world)
    held = {
        id(p): nn.Parameter(found[name], requires_grad=p.requires_grad)
        for name, p in parameters.items()
    }
    made, device = beside(module, held), next(iter(parameters.values())).device
    if not world.any(not _has_room(device, _held(module, wide=wide))):
        return made.to(device), world.in_one_copy(one_copy=False)
    if device.type == "cpu":  # where FSDP2 keeps parameters there it leaves buffers on the device
        return made.to(device), world
    place(made, IN_MEMORY, device)
    return made, world


def _has_room(device: torch.device, size: int) -> bool:
    """Whether an accelerator has so many bytes for what each process then holds by itself."""
    free = None if device.type == "cpu" else available_bytes(device)
    return free is not None and free > size


def whole(model: nn.Module) -> nn.Module | None:
    """A module of the model's own class with all of its parameters, without FSDP2, in the first process; `None` in the
    others. All processes call this. A model of which each process has everything is returned as it is.

    It is where the live model is, if that has room for what a measurement holds, and else in the CPU's memory, from
    where each layer is lent to the device as it is used. Raises `ProbeError`, in all processes alike.
    """
    module = unwrap(model)
    if not is_sharded(module):
        return module
    of_training.agreed(lambda: _require_possible(module, gathers=True, wide=False))
    parameters = dict(module.named_parameters())
    found = gathered((name, parameter.detach()) for name, parameter in parameters.items())

    def made() -> nn.Module | None:
        if not of_training.is_first():
            return None
        held = {
            id(parameter): nn.Parameter(found.pop(name), requires_grad=parameter.requires_grad)
            for name, parameter in parameters.items()
        }
        return _placed(beside(module, held), next(iter(parameters.values())).device)

    return of_training.agreed(made)


def _placed(module: nn.Module, device: torch.device) -> nn.Module:
    # where FSDP2 keeps the parameters on the CPU it leaves buffers on the device, and all is measured here
    if device.type == "cpu":
        return module.to(device)
    free = available_bytes(device)
    if free is not None and free > _held(module):
        return module.to(device)
    place(module, IN_MEMORY, device)
    return module


def _require_possible(module: nn.Module, *, gathers: bool, wide: bool) -> None:
    """Raise where tensors cannot be brought together, before anything is sent: later an error would leave others
    waiting. Whoever gathers them holds one at a time on the device."""
    parameters = list(module.parameters())
    for parameter in parameters:
        copies(parameter)  # raises for one that some process has no part of
    if any(hasattr(part, "quant_state") for part in (*parameters, *module.modules())):
        problem = "is quantised, and its packed weights cannot be brought together"
        raise MeasurementError("the model", problem, "probe the checkpoints instead")
    cpu = torch.device("cpu")
    device = parameters[0].device if gathers else cpu
    needed = {device: max(2 * _bytes([parameter]) for parameter in parameters)}
    if of_training.is_first():
        needed[cpu] = needed.get(cpu, 0) + _held(module, wide=wide)
    for of, size in needed.items():
        free = available_bytes(of)
        if free is not None and free < size:
            problem = f"has {free / 2**30:.1f} GiB free on {of}, and needs {size / 2**30:.1f}"
            where = f"process {torch.distributed.get_rank()}" if gathers else "memory"
            raise MeasurementError(where, problem, "probe the checkpoints instead")
    if device.type != "cpu":  # free memory may lie in pieces that are too small
        torch.empty(needed[device], dtype=torch.uint8, device=device)


def _held(module: nn.Module, *, wide: bool = False) -> int:
    """Bytes of the model, and of what a measurement makes that is as long as its trained part; `wide` with the model
    and θ + ηv in float64, and the step for it."""
    parameters = list(module.parameters())
    trained = [p for p in parameters if p.requires_grad]
    size = _bytes(parameters) + _OF_A_STEP * _bytes(trained)
    if wide:
        size += 8 * (sum(p.numel() for p in parameters) + 2 * sum(p.numel() for p in trained))
    return size


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Of what is trained in float32 at least, which is what is measured in; what is frozen is lent as it is."""
    return sum(t.numel() * max(t.element_size(), 4 * t.requires_grad) for t in tensors)


def require_one_layout(name: str, tensors: Mapping[str, Any], parameter: Tensor) -> None:
    """Raise where a tensor of the optimizer is spread otherwise than the parameter."""
    if not is_spread(parameter):
        return
    for what, tensor in tensors.items():
        if is_spread(tensor) and tuple(tensor.placements) != tuple(parameter.placements):
            problem = f"keeps {what} of {name} as {tensor.placements}, and the model {parameter.placements}"
            raise MeasurementError("the optimizer", problem, "probe the checkpoints instead")
