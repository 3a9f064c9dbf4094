"""A copied module calls itself, and not the module that it was copied from.

`copy.deepcopy` copies no functions. Where somebody has put a `forward` on a module that closes over that module, as TRL
and accelerate do, the copy would go on to call the original: with its parameters, in its mode.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn


def with_own_forward(clone: nn.Module, memo: dict[int, Any]) -> None:
    """Put right what `copy.deepcopy` leaves as it was: functions, with the modules that they close over. `memo` is that
    of the copy."""
    for part in clone.modules():
        _own_forward(part, memo)


def _own_forward(part: nn.Module, memo: dict[int, Any]) -> None:
    """A `forward` that somebody has put on the module: without accelerate's autocast around it, which would be switched
    on again at every call, and with the copy in it wherever the live model stands in its closure, as in TRL's."""
    own = vars(part)
    original = own.pop("_original_forward", None)
    if original is not None and own.pop("forward", None) is not None:
        own["forward"] = original
    forward = own.get("forward")
    if isinstance(forward, MethodType) and forward.__func__ is type(part).forward:
        del own["forward"]
    elif forward is not None:
        own["forward"] = _of_the_copy(forward, memo)


def _of_the_copy(value: Any, memo: dict[int, Any]) -> Any:
    """The same with the copy's modules and parameters in place of the live model's; `memo` as of `copy.deepcopy`."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        return MethodType(_of_the_copy(value.__func__, memo), _of_the_copy(value.__self__, memo))
    if isinstance(value, partial):
        parts = (_of_the_copy(part, memo) for part in (value.func, *value.args))
        return partial(*parts, **{k: _of_the_copy(v, memo) for k, v in value.keywords.items()})
    if not isinstance(value, FunctionType) or not value.__closure__:
        return value
    cells = tuple(CellType() for _ in value.__closure__)
    same = FunctionType(
        value.__code__, value.__globals__, value.__name__, value.__defaults__, cells
    )
    same.__kwdefaults__ = value.__kwdefaults__
    vars(same).update(vars(value))
    memo[id(value)] = same  # before its cells are filled: it may stand in one of them
    for cell, of in zip(cells, value.__closure__, strict=True):
        with suppress(ValueError):  # an empty one
            cell.cell_contents = _of_the_copy(of.cell_contents, memo)
    return same
