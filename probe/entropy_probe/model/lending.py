"""Parameters lent for the length of a forward: each has a home, and is copied to where, and in the dtype in which, a
layer uses it.

    block(x)  ≡  functional_call(block, {name: p.to(device, dtype) for name, p in block's own}, x.to(device))

whatever stands in the block at that moment: its parameters, or what `functional_call` put there (θ+ηv, dual tensors,
tensors with a graph). `.to` is differentiable, and the tensor itself where nothing changes. A graph that is recorded
refers to the home of a lent frozen tensor, which is lent again when the backward pass asks for it.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from entropy_probe.model.disk import give_back, is_on_disk

_OWN_PAGES = 1 << 18
"""Bytes from which a copy has pages of its own."""


@dataclass(frozen=True)
class Lending:
    """What is lent as one (`units`: modules by name, and where each works), in which dtype; token ids and results are
    on the device `main`, to which the parts in `returning` bring theirs. `skipped`: arguments that stay where they are,
    such as key-value caches.
    """

    dtype: torch.dtype
    main: torch.device
    units: dict[str, torch.device]
    returning: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    saved: Saved = field(default_factory=lambda: Saved(), compare=False)

    @classmethod
    def of(cls, module: nn.Module, dtype: torch.dtype, main: torch.device | None = None) -> Lending:
        """Of decoder layers (`_no_split_modules`) as a whole, since DoRA and others read a weight outside of its own
        module; outside of these, of modules with tensors of their own, and of adapters' layers. A model that does not
        name its layers is lent as a whole.

        A unit works where its tensors are on an accelerator; else on `main` (default: where its first tensor is).
        """
        inner = getattr(module, "get_base_model", None)
        base: Any = inner() if callable(inner) else module
        units = {
            name: _works_on(part, main) for name, part in _units(module, set(base_blocks(base)))
        }
        names = {part: name for name, part in module.named_modules()}
        head = getattr(base, "get_output_embeddings", lambda: None)()
        backbone = base._modules.get(getattr(base, "base_model_prefix", None) or "")
        returning = tuple(names[part] for part in (backbone, head, base) if part in names)
        skipped = tuple(getattr(base, "_skip_keys_device_placement", None) or ())
        return cls(dtype, main or next(module.parameters()).device, units, returning, skipped)

    @property
    def on_one_device(self) -> bool:
        return set(self.units.values()) <= {self.main}

    def needed(self, module: nn.Module) -> bool:
        """Whether anything of the module has another device or dtype than that in which it is used, or is on disk."""
        return not self.on_one_device or any(
            is_on_disk(p)
            or (p.is_floating_point() and p.dtype != self.dtype)
            or p.device != self.main
            for p in module.parameters()
        )

    def lent(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as the unit in which `name` stands would use it."""
        unit = max((unit for unit in self.units if _within(name, unit)), key=len, default=None)
        device = self.main if unit is None else self.units[unit]
        return tensor.to(
            device=device, dtype=self.dtype if tensor.is_floating_point() else tensor.dtype
        )

    @contextmanager
    def __call__(self, module: nn.Module, *, record: bool) -> Iterator[None]:
        """Within the block a forward of the module, or of a part of it, is lent what it uses.

        `record`: graphs refer to homes. Whatever happens inside, everything is back in its place afterwards.
        """
        loans = _Loans(self, record=record)
        with ExitStack() as stack:
            stack.callback(loans.end)
            for name, device in self.units.items():
                part = module.get_submodule(name)
                before, after = loans.taking(device), loans.giving_back
                stack.callback(part.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(
                    part.register_forward_hook(after, always_call=True, prepend=True).remove
                )
            for name in () if self.on_one_device else self.returning:
                handle = module.get_submodule(name).register_forward_hook(
                    self._to_main, prepend=name not in self.units
                )
                stack.callback(handle.remove)
            if record:
                stack.enter_context(self.recording())
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        """For a backward pass whose own graph is recorded: it too refers to homes."""
        self.saved.purge()
        try:
            with saved_tensors_hooks(self.saved.pack, self.saved.unpack):
                yield
        finally:
            self.saved.cool()

    def sent(self, values: Any, device: torch.device) -> Any:
        from accelerate.utils import send_to_device

        return send_to_device(values, device, skip_keys=list(self.skipped))

    def _to_main(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self.sent(output, self.main)


class _Loan(NamedTuple):
    table: dict[str, Any]
    name: str
    own: Tensor
    lent: Tensor


class _Loans:
    """What is lent at the moment, unit by unit; units may stand in one another."""

    def __init__(self, lending: Lending, *, record: bool) -> None:
        self._lending = lending
        self._record = record
        self._open: list[tuple[nn.Module, list[_Loan]]] = []

    def taking(
        self, device: torch.device
    ) -> Callable[[nn.Module, Any, Any], tuple[Any, Any] | None]:
        """Pre-hook of a unit that works on this device."""

        def take(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            loans: list[_Loan] = []
            self._open.append((module, loans))
            lent: dict[int, Tensor] = {}  # a tensor with two names stays one
            for table, name, own, dtype in self._lent_of(module, device):
                if id(own) not in lent:
                    lent[id(own)] = _copy(own, device, dtype)
                table[name] = now = lent[id(own)]
                loans.append(_Loan(table, name, own, now))
                if self._record and not own.requires_grad:
                    self._lending.saved.note(now, own)
            if self._lending.on_one_device:
                return None
            return self._lending.sent(args, device), self._lending.sent(kwargs, device)

        return take

    def _lent_of(
        self, module: nn.Module, device: torch.device
    ) -> list[tuple[dict[str, Any], str, Tensor, torch.dtype]]:
        """(table, name, tensor, dtype) of what is used elsewhere, in another dtype, or read from disk."""
        found = []
        with (
            torch._C.DisableTorchFunction()
        ):  # a mode would look at each question for a tensor's device
            for part in module.modules():
                for table, cast in ((part._parameters, True), (part._buffers, False)):
                    for name, own in table.items():
                        if own is None:
                            continue
                        dtype = (
                            self._lending.dtype if cast and own.is_floating_point() else own.dtype
                        )
                        if (own.device, own.dtype) != (device, dtype) or is_on_disk(own):
                            found.append((table, name, own, dtype))
        return found

    def giving_back(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of a unit, after an error too."""
        if self._open and self._open[-1][0] is module:
            self._back(self._open.pop()[1])

    def end(self) -> None:
        """What an interrupt has left: torch calls no hook after one."""
        while self._open:
            self._back(self._open.pop()[1])

    def _back(self, loans: list[_Loan]) -> None:
        for table, name, own, lent in reversed(loans):
            if table.get(name) is lent:  # else somebody has put something else there since
                table[name] = own
            give_back(own)


class _Reference(NamedTuple):
    """A view of a lent tensor: what it was lent from, and how the view lies in it."""

    home: Tensor
    version: int
    device: torch.device
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Kept(NamedTuple):
    tensor: Tensor
    version: int


class Saved:
    """How autograd keeps what a backward pass will need: of a lent frozen tensor its home, of others the data.

    Lent tensors are known by their storage. A weak reference to it is held, so that none is mistaken for one that came
    into being at the same address.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[StorageWeakRef, Tensor, torch.device, torch.dtype]] = {}
        self._warm: Tensor | None = None

    def note(self, lent: Tensor, home: Tensor) -> None:
        storage = lent.untyped_storage()
        self._known[storage._cdata] = StorageWeakRef(storage), home, lent.device, lent.dtype

    def purge(self) -> None:
        """Forget what is gone."""
        self._known = {key: entry for key, entry in self._known.items() if not entry[0].expired()}

    def cool(self) -> None:
        if self._warm is not None:
            give_back(self._warm)
        self._warm = None

    def pack(self, tensor: Tensor) -> _Reference | _Kept:
        found = None
        if tensor.layout is torch.strided:
            found = self._known.get(tensor.untyped_storage()._cdata)
        if found is None or found[0].expired() or found[3] != tensor.dtype:
            return _Kept(tensor.detach(), tensor._version)  # the tensor itself would never be freed
        _, home, device, dtype = found
        where = tensor.size(), tensor.stride(), int(tensor.storage_offset())
        return _Reference(home, home._version, device, dtype, *where)

    def unpack(self, packed: _Reference | _Kept) -> Tensor:
        kept = packed.tensor if isinstance(packed, _Kept) else packed.home
        if kept._version != packed.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation"
            )
        if isinstance(packed, _Kept):
            return kept
        if self._warm is not packed.home:
            self.cool()
            self._warm = packed.home if is_on_disk(packed.home) else None
        lent = _copy(packed.home.detach(), packed.device, packed.dtype)
        self.note(lent, packed.home)
        return lent.as_strided(packed.size, packed.stride, packed.offset)


def _copy(own: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`own.to(device, dtype)`; of a frozen tensor in memory on pages of its own, which go back to the system with it.

    In the heap, copies that come and go with every layer leave holes: a model of 160 MB grew by 310 MB, and by 40 so.
    """
    size = own.numel() * dtype.itemsize
    plain = type(own) in (Tensor, nn.Parameter) and not own.requires_grad and own.is_contiguous()
    changes = own.dtype != dtype and own.device.type == device.type == "cpu"
    if not (plain and changes and size >= _OWN_PAGES and hasattr(mmap, "MAP_ANONYMOUS")):
        return own.to(device=device, dtype=dtype)
    if forward_ad.unpack_dual(own).tangent is not None:
        return own.to(device=device, dtype=dtype)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype).view(own.shape).copy_(own)


def base_blocks(base: nn.Module) -> list[str]:
    """The class names of layers that must not be divided, as transformers names them."""
    return sorted(getattr(base, "_no_split_modules", None) or ())


def _within(name: str, unit: str) -> bool:
    return not unit or name == unit or name.startswith(f"{unit}.")


def _works_on(part: nn.Module, main: torch.device | None) -> torch.device:
    devices = [tensor.device for tensor in (*part.parameters(), *part.buffers())]
    accelerator = next((device for device in devices if device.type not in ("cpu", "meta")), None)
    return accelerator or main or devices[0]


def _units(module: nn.Module, blocks: set[str], name: str = "") -> Iterator[tuple[str, nn.Module]]:
    own = any(p is not None for p in module._parameters.values()) or (
        not module._modules and bool(module._buffers)
    )
    if own or not blocks or type(module).__name__ in blocks or _is_adapted(module):
        yield name, module
        return
    for child_name, child in module.named_children():
        yield from _units(child, blocks, f"{name}.{child_name}" if name else child_name)


def _is_adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
