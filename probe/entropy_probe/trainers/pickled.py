"""`training_args.bin`, read without running it: a pickle of a dataclass, whose plain values stand in one table.

The pickle's own operations are followed on a stack, where a class or a call is a note of its name and no more: nothing
is imported, built or called.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entropy_probe.errors import ProbeError

_MOST = 1 << 20  # bytes; what transformers and TRL write has some 6 KB
_VALUES = ("INT", "LONG", "FLOAT", "STRING", "UNICODE", "BYTES")
"""Ends of the names of operations that put a number or a text on the stack, but for a length in bytes."""


@dataclass
class Note:
    """What stands for a class (`args` is None), or for what a call would give; `state` is what it would be given."""

    name: str
    args: Any = None
    state: dict[Any, Any] = field(default_factory=dict)


def read_arguments(path: Path) -> Note:
    """The note of what the file holds. Raises `ProbeError` where it is no such file."""
    try:
        note = _followed(_pickle_in(path))
    except Exception as error:  # whatever a damaged archive or pickle makes their readers raise
        problem = f"is not what transformers writes ({type(error).__name__}: {error})"[:200]
        raise ProbeError(path, problem, "its settings are not read") from error
    if not isinstance(note, Note) or not note.state:
        raise ProbeError(path, "holds no settings", "its settings are not read")
    return note


def plain(value: Any) -> Any:
    """A number, text, flag or None as it is; the text of an enumeration; None for anything else."""
    if isinstance(value, Note) and isinstance(value.args, tuple) and len(value.args) == 1:
        value = value.args[0]
    if type(value) is int and abs(value) >= 1 << 63:
        return None
    return value if value is None or type(value) in (bool, int, float, str) else None


def _pickle_in(path: Path) -> bytes:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError(f"{len(names)} pickles in it")
        with archive.open(names[0]) as stream:
            data = stream.read(_MOST + 1)
    if len(data) > _MOST:
        raise ValueError("more than 1 MiB of settings")
    return data


def _followed(data: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []  # how long the stack was at each
    memo: dict[int, Any] = {}

    def after_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    def popped(count: int) -> list[Any]:
        if len(stack) - (marks[-1] if marks else 0) < count:
            raise IndexError("the stack is too short")
        items = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return items

    def texts(items: list[Any]) -> list[str]:
        if not all(type(item) is str for item in items):
            raise ValueError("a name is not a text")
        return items

    def call() -> Note:
        of, args = popped(2)
        return Note(of.name if isinstance(of, Note) else "", args)

    def put_items(pairs: list[Any]) -> None:
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) in (str, int, float, bool) and isinstance(stack[-1], dict):
                stack[-1][key] = value

    def build() -> None:
        (state,) = popped(1)
        if isinstance(stack[-1], Note) and isinstance(state, dict):
            stack[-1].state.update(state)

    def add(items: list[Any]) -> None:
        if isinstance(stack[-1], list):
            stack[-1].extend(items)

    made: dict[str, Callable[[Any], Any]] = {
        "NONE": lambda _: None,
        "NEWTRUE": lambda _: True,
        "NEWFALSE": lambda _: False,
        "EMPTY_DICT": lambda _: {},
        "EMPTY_LIST": lambda _: [],
        "EMPTY_SET": lambda _: [],
        "EMPTY_TUPLE": lambda _: (),
        "DUP": lambda _: stack[-1],
        "GLOBAL": lambda arg: Note(arg.replace(" ", ".")),
        "STACK_GLOBAL": lambda _: Note(".".join(texts(popped(2)))),
        "TUPLE": lambda _: tuple(after_mark()),
        "TUPLE1": lambda _: tuple(popped(1)),
        "TUPLE2": lambda _: tuple(popped(2)),
        "TUPLE3": lambda _: tuple(popped(3)),
        "LIST": lambda _: after_mark(),
        "FROZENSET": lambda _: after_mark(),
        "DICT": lambda _: Note("dict", tuple(after_mark())),
        "REDUCE": lambda _: call(),
        "NEWOBJ": lambda _: call(),
        "BINPERSID": lambda _: Note("persistent", tuple(popped(1))),
        "GET": lambda arg: memo[arg],
        "BINGET": lambda arg: memo[arg],
        "LONG_BINGET": lambda arg: memo[arg],
    }
    done: dict[str, Callable[[Any], Any]] = {
        "MARK": lambda _: marks.append(len(stack)),
        "PROTO": lambda _: None,
        "FRAME": lambda _: None,
        "POP": lambda _: popped(1),
        "POP_MARK": lambda _: after_mark(),
        "PUT": lambda arg: memo.__setitem__(arg, stack[-1]),
        "BINPUT": lambda arg: memo.__setitem__(arg, stack[-1]),
        "LONG_BINPUT": lambda arg: memo.__setitem__(arg, stack[-1]),
        "MEMOIZE": lambda _: memo.__setitem__(len(memo), stack[-1]),
        "APPEND": lambda _: add(popped(1)),
        "APPENDS": lambda _: add(after_mark()),
        "ADDITEMS": lambda _: add(after_mark()),
        "SETITEM": lambda _: put_items(popped(2)),
        "SETITEMS": lambda _: put_items(after_mark()),
        "BUILD": lambda _: build(),
    }
    for operation, arg, _ in pickletools.genops(io.BytesIO(data)):
        name = operation.name
        if name == "STOP":
            return stack[-1]
        if name in done:
            done[name](arg)
        elif name in made:
            stack.append(made[name](arg))
        elif name.rstrip("1248").endswith(_VALUES):
            stack.append(arg)
        else:
            raise ValueError(f"{name} does not belong in settings")
    raise ValueError("it has no end")
