"""Shapes and types of `entropy_probe` are enforced while its tests run (`--jaxtyping-packages` in pyproject.toml)."""

from __future__ import annotations

import builtins
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from types import FunctionType
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

# An int is a float, as everywhere else in Python's typing; what it is not is a TypeError, as readers of files expect.
_CONF = BeartypeConf(is_pep484_tower=True, violation_type=TypeError)
# Whole measurements again and again, or 300 000 calls: the checks would be half of the time, and what they see here
# the tests of the units have seen. Of the callback it is held that it draws no random number, and beartype draws one
# for the item of a list that it looks at.
_UNCHECKED = {"faults", "fuzz", "hostile", "page", "test_audit.py", "test_callback.py", "test_cost.py"}
_UNCHECKED |= {"test_full_passes.py", "test_oracle.py", "test_properties.py", "test_resolution.py", "test_room.py"}
_UNCHECKED |= {"test_shortened.py"}


_INNER: dict[tuple[Any, ...], Any] = {}
_JAXTYPED = jaxtyping.jaxtyped
_SHAPED = ("Bool", "Float", "Int")


def make_shapes_known() -> None:
    """Let annotations find `Float`, `Int` and `Bool`, which the library imports for type checkers alone.

    Call it before `entropy_probe` is imported: jaxtyping takes an annotation with an unknown name for `Any`.
    """
    for name in _SHAPED:
        setattr(builtins, name, getattr(jaxtyping, name))
    jaxtyping.jaxtyped = _jaxtyped  # pyright: ignore[reportPrivateImportUsage]


def _jaxtyped(function: Any = None, *, typechecker: Any) -> Any:
    """`jaxtyping.jaxtyped`, at a third of what it adds to a whole measurement.

    A function inside of another is made again at every call of that one; where nothing is checked it is left as it is.
    torch alone calls `__torch_function__`, at each of its operations, and its arguments may be anything. Where no shape
    is said, beartype alone checks.
    """
    if function is None:
        return partial(_jaxtyped, typechecker=typechecker)
    if inspect.isfunction(function):
        is_inner = "<locals>" in function.__qualname__
        if function.__name__ == "__torch_function__" or (is_inner and jaxtyping.config.jaxtyping_disable):
            return function
        if not is_inner:
            shaped = any(name in str(of) for of in function.__annotations__.values() for name in _SHAPED)
            return _when_called(function, partial(_JAXTYPED, typechecker=typechecker) if shaped else _of_types)
    return _JAXTYPED(function, typechecker=typechecker)


def _when_called(function: Any, make: Any) -> Any:
    """What `make` makes of a function, made at its first call that is checked: most of them are never called, and by
    then all names of the module are known."""
    checked: Any = None

    @wraps(function)
    def called(*arguments: Any, **named: Any) -> Any:
        nonlocal checked
        if jaxtyping.config.jaxtyping_disable:
            return function(*arguments, **named)
        if checked is None:
            checked = make(function)
        return checked(*arguments, **named)

    return called


def _of_types(function: Any) -> Any:
    """What jaxtyping makes of a function without shapes, at a fiftieth of the cost of a call: it asks for no signature.

    As there, an annotation that cannot be evaluated at run time is `Any`.
    """
    parts = function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    same = FunctionType(*parts)
    for name in ("__kwdefaults__", "__qualname__", "__module__"):
        setattr(same, name, getattr(function, name))
    same.__annotations__ = {name: _evaluated(of, function) for name, of in function.__annotations__.items()}
    return _checked(same)


def _evaluated(annotation: Any, function: Any) -> Any:
    try:
        return eval(annotation, function.__globals__) if isinstance(annotation, str) else annotation  # noqa: S307
    except Exception:
        return Any


def enforce(function: Any) -> Any:
    """What jaxtyping calls with a function that has a signature and does nothing, to have arguments or results checked.

    A function inside of another is made again at every call of that one; the checks of its signature are not.
    """
    if "<locals>" not in function.__qualname__:
        return _checked(function)
    names = function.__code__.co_varnames, repr(function.__annotations__)
    key = (function.__module__, function.__qualname__, *names)
    if key not in _INNER:
        _INNER[key] = _checked(function)
    return _INNER[key]


def _checked(function: Any) -> Any:
    return beartype(conf=_CONF)(function)


def is_checked(file: Path) -> bool:
    """Whether calls are checked in the tests of this file."""
    return _UNCHECKED.isdisjoint(file.relative_to(Path(__file__).parent).parts)


@contextmanager
def unchecked() -> Iterator[None]:
    """No call is checked in here."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
