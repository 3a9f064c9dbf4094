"""Moments that are stored in 8 bits: a code for each value, a map from codes to numbers, and a scale for each block.

So bitsandbytes and torchao write them. Their next step is made from the values that the codes stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

_HIDDEN = "__bnb_optimizer_quant_state__"  # what bitsandbytes hides from FSDP
_OF_ADAM = {"state1": "exp_avg", "state2": "exp_avg_sq"}
OF_BLOCKS = {"step", *_OF_ADAM, "qmap1", "qmap2", "absmax1", "absmax2"}
"""The keys of a state of bitsandbytes' Adam."""
_MOMENTS = (*_OF_ADAM.values(), "max_exp_avg_sq")
QUANTISED = "quantised"
"""The key of a state under which the blocks of its moments are; `Blocks` comes from no file."""


@dataclass(frozen=True)
class Blocks:
    """values = qmap[codes]·absmax of the block; blocks of `size` values, in the order of the flattened tensor."""

    codes: Tensor
    absmax: Tensor
    qmap: Tensor
    size: int

    @property
    def values(self) -> Float[Tensor, "*shape"]:
        return self._scaled(self.qmap)

    @property
    def rounding(self) -> Float[Tensor, "*shape"]:
        """How far each value may be from the one that was rounded to it: half the way to its neighbours."""
        gaps = self.qmap.diff() / 2
        nothing = gaps.new_zeros(1)
        return self._scaled(torch.maximum(torch.cat([nothing, gaps]), torch.cat([gaps, nothing])))

    @property
    def num_lost(self) -> int:
        """How many values are rounded to 0 beside others in their block that are not."""
        return int((self._scaled((self.qmap == 0).float()) > 0).sum())

    def _scaled(self, by_code: Tensor) -> Tensor:
        values = by_code.index_select(0, self.codes.flatten().int())
        whole = len(values) // self.size
        values[: whole * self.size].view(-1, self.size).mul_(self.absmax[:whole, None])
        values[whole * self.size :].mul_(self.absmax[-1])
        return values.view(self.codes.shape)


def unpacked(entry: dict[str, Any]) -> dict[str, Any]:
    """A state of bitsandbytes' or torchao's Adam with `exp_avg` and `exp_avg_sq`; any other as it is.

    What bitsandbytes hides from FSDP in a dictionary stands beside the rest.
    """
    if isinstance(hidden := entry.get(_HIDDEN), dict):
        entry = {key: value for key, value in entry.items() if key != _HIDDEN} | hidden
    if {"step", *_OF_ADAM} <= entry.keys() <= OF_BLOCKS and not _stacked(entry):
        rest = {"step": entry["step"]}
        found = {moment: _of_bitsandbytes(entry, key[-1]) for key, moment in _OF_ADAM.items()}
    else:
        rest, found = entry, {m: _of_torchao(entry[m]) for m in _MOMENTS if m in entry}
    if not found or any(moment is None for moment in found.values()):
        return entry
    blocks = {moment: of for moment, of in found.items() if isinstance(of, Blocks)}
    values = {name: of.values if isinstance(of, Blocks) else of for name, of in found.items()}
    return rest | values | ({QUANTISED: blocks} if blocks else {})


def _stacked(entry: dict[str, Any]) -> bool:
    """AdEMAMix has two first moments in one tensor."""
    one, two = entry["state1"], entry["state2"]
    both = isinstance(one, Tensor) and isinstance(two, Tensor)
    return both and one.shape == (2, *two.shape)


def with_moments(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same with every state `unpacked`."""
    state = {
        key: unpacked(entry) if isinstance(entry, dict) else entry
        for key, entry in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def are_blocks(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(of, Blocks) for of in value.values())


def _of_bitsandbytes(entry: dict[str, Any], k: str) -> Tensor | Blocks | None:
    moment = entry[f"state{k}"]
    if not isinstance(moment, Tensor) or moment.dtype is not torch.uint8:
        return moment if isinstance(moment, Tensor) else None
    # blocks of 2048 values before its version 0.45
    return _blocks(moment, entry.get(f"absmax{k}"), entry.get(f"qmap{k}"), (256, 2048))


def _of_torchao(moment: Any) -> Tensor | Blocks | None:
    """torchao's own class, or what stands for it, is known by its parts."""
    codes, scale, qmap = (getattr(moment, part, None) for part in ("codes", "scale", "qmap"))
    if not isinstance(codes, Tensor):
        return moment if type(moment) in (Tensor, torch.nn.Parameter) else None
    if not isinstance(scale, Tensor) or not len(scale) or codes.shape != moment.shape:
        return None
    return _blocks(codes, scale, qmap, (codes.numel() // len(scale),))


def _blocks(codes: Tensor, absmax: Any, qmap: Any, sizes: tuple[int, ...]) -> Blocks | None:
    """`None` where the parts do not fit together."""
    parts = (codes, absmax, qmap)
    if any(type(part) is not Tensor or part.layout is not torch.strided for part in parts):
        return None
    if codes.dtype is not torch.uint8 or qmap.shape != (256,) or absmax.ndim != 1:
        return None
    if not (absmax.is_floating_point() and qmap.is_floating_point()) or not codes.numel():
        return None
    size = next((n for n in sizes if n and -(-codes.numel() // n) == len(absmax)), None)
    if size is None or not bool((qmap.diff() >= 0).all()):
        return None
    held = codes.untyped_storage().nbytes()
    return Blocks(codes, absmax.float(), qmap.float(), size) if codes.numel() <= held else None
