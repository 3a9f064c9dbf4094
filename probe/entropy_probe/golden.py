"""Golden files: numbers that were right once, and how far from them is still right.

    {"schema": 1,
     "meta":   {"versions": {..}, "dtype": .., "device": .., "fingerprint": ..},
     "fields": {name: {"value": .., "rtol": .., "atol": .., "source": ..}}}

    |got − expected| ≤ atol + rtol·|expected|        for every number of every field

A value is `None`, a bool, a text, a number, or a list of values of any shape. NaN and the infinities stand as "NaN",
"Infinity" and "-Infinity", so a text that reads like that is the number; NaN equals NaN. Whole numbers and others are
one kind; a field that is missing or not expected, another kind and another shape are differences like any other.

`meta` says what the numbers were made with. It never fails a comparison; a failure shows first what of it is different.

The tolerances of the file are the ones that count: they may be edited, and stay when values are replaced. `source`, a
text, says where they come from, and stays too. A file is written whole or not at all (`write_atomically`), and not
touched where nothing in it would change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeGuard

import numpy as np

from entropy_probe.atomic import write_atomically
from entropy_probe.errors import ProbeError

Mode = Literal["missing", "changed", "all"]
MODES: tuple[Mode, ...] = ("missing", "changed", "all")
SCHEMA = 1
MOST_ROWS = 20
Value: TypeAlias = bool | int | float | str | list[Any] | None

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
# (rtol, atol) of torch.testing.assert_close; a dtype that is not here is narrower than all of them
_EXACT, _COARSEST = (0.0, 0.0), (1.6e-2, 1e-5)
_BY_DTYPE = {
    "float64": (1e-7, 1e-7),
    "float32": (1.3e-6, 1e-5),
    "float16": (1e-3, 1e-5),
    "longdouble": (1e-7, 1e-7),
}


@dataclass(frozen=True)
class Tolerance:
    """atol + rtol·|expected| is allowed; `source` says where the two come from."""

    rtol: float
    atol: float
    source: str | None = None


@dataclass(frozen=True)
class Field:
    value: Value
    tolerance: Tolerance


@dataclass(frozen=True)
class Golden:
    """The content of one file."""

    meta: Mapping[str, Any]
    fields: Mapping[str, Field]


@dataclass(frozen=True)
class Difference:
    """What is out of tolerance at one place; `size` is `None` where the two have no difference to speak of."""

    where: str
    expected: str
    got: str
    size: float | None
    allowed: float | None

    @property
    def ratio(self) -> float:
        """Size over what is allowed; infinite where there is no size, or an infinite one."""
        return (
            self.size / self.allowed
            if self.allowed and self.size is not None and self.size < math.inf
            else math.inf
        )


@dataclass(frozen=True)
class Comparison:
    """`worst` is the largest difference in parts of what is allowed, in tolerance or not; `differences` are those that
    are out of it, missing numbers, kinds and shapes first, then worst first."""

    worst: float
    differences: tuple[Difference, ...]


def new_field(name: Any, value: Any, rtol: float | None = None, atol: float | None = None) -> Field:
    """A value of any kind that a file can hold, tensors and arrays too, and the tolerance it gets if it is new.

    Without `rtol` and `atol` those of `torch.testing.assert_close` for its dtype: 1e-7 and 1e-7 in float64, 1.3e-6 and
    1e-5 in float32, 1e-3 and 1e-5 in float16, 1.6e-2 and 1e-5 in bfloat16, 0 for all that is no floating number.
    Raises `ProbeError` for a name or value that a file cannot hold, and for a tolerance that is none.
    """
    if not isinstance(name, str):
        raise ProbeError(f"golden field {name!r}", "its name is not a text", "name fields by texts")
    dtypes: set[str] = set()
    plain = _plain(name, value, dtypes)
    found = [_BY_DTYPE.get(dtype, _COARSEST) for dtype in dtypes] or [_EXACT]
    own = [max(column) for column in zip(*found, strict=True)]
    chosen = [
        given if given is not None else default
        for given, default in zip((rtol, atol), own, strict=True)
    ]
    for key, number in zip(("rtol", "atol"), chosen, strict=True):
        if not _is_tolerance(number):
            raise ProbeError(
                f"golden field {name!r}", f"{key} is {number!r}", "give a number that is 0 or more"
            )
    return Field(plain, Tolerance(float(chosen[0]), float(chosen[1])))


def _plain(name: str, value: Any, dtypes: set[str]) -> Value:
    """`value` as builtins; the dtypes of the floating numbers in it go into `dtypes`."""
    if isinstance(value, str):
        value = _NOT_FINITE.get(value, str(value))
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        dtypes.add("float64")
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(name, entry, dtypes) for entry in value]
    if hasattr(value, "detach"):
        value = _of_tensor(name, value, dtypes)
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype.kind == "f":
            dtypes.add("longdouble" if array.dtype.itemsize > 8 else array.dtype.name)
            return array.astype(np.float64).tolist()
        if array.dtype.kind in "biuU":
            return _plain(name, array.tolist(), dtypes)
        value = array
    kind = f"{type(value).__name__} {getattr(value, 'dtype', '')}".strip()
    raise ProbeError(
        f"golden field {name!r}",
        f"is {kind}, which a golden file cannot hold",
        "give real numbers, texts, bools or None, or lists, arrays or tensors of them",
    )


def _of_tensor(name: str, tensor: Any, dtypes: set[str]) -> Any:
    """The array of a tensor, with what numpy has no dtype for (bfloat16 and narrower) as float32."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    narrow = tensor.is_floating_point() and dtype not in _BY_DTYPE
    if narrow:
        dtypes.add(dtype)
    try:
        return (
            (tensor.detach().float() if narrow else tensor.detach())
            .cpu()
            .resolve_neg()
            .resolve_conj()
            .numpy()
        )
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ProbeError(
            f"golden field {name!r}",
            f"this tensor has no array ({error})",
            "give an array of its numbers",
        ) from error


def read(path: Path) -> Golden | None:
    """The file's content, `None` where there is none; `ProbeError` for a file that is no golden."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ProbeError(path, f"cannot be read ({error.strerror})", "make it readable") from error
    except (ValueError, RecursionError) as error:
        raise _no_golden(path, f"is not JSON ({error})") from error
    schema = table.get("schema") if isinstance(table, dict) else None
    if schema != SCHEMA:
        raise _no_golden(path, f"is not a golden file of schema {SCHEMA} (schema: {schema!r})")
    if set(table) != {"schema", "meta", "fields"} or not all(
        isinstance(table[k], dict) for k in ("meta", "fields")
    ):
        raise _no_golden(path, "does not consist of schema, meta and fields")
    return Golden(
        table["meta"],
        {name: _read_field(path, name, entry) for name, entry in table["fields"].items()},
    )


def _no_constant(name: str) -> float:
    raise ValueError(f'{name} is written without quotes; write "{name}"')


def _no_golden(path: Path, problem: str) -> ProbeError:
    return ProbeError(
        path,
        problem,
        "correct it, or delete it and write it again with --probe-golden-update=missing",
    )


def _read_field(path: Path, name: str, entry: Any) -> Field:
    if not isinstance(entry, dict) or not {"value", "rtol", "atol"} <= set(entry) <= {
        *("value", "rtol", "atol", "source")
    }:
        raise _no_golden(path, f"field {name!r} does not consist of value, rtol, atol and source")
    for key in ("rtol", "atol"):
        if not _is_tolerance(entry[key]):
            raise _no_golden(
                path, f"{key} of field {name!r} is {entry[key]!r}, not a number that is 0 or more"
            )
    if not isinstance(entry.get("source"), str | None):
        raise _no_golden(path, f"source of field {name!r} is not a text")
    try:
        value = _plain(name, entry["value"], set())
    except ProbeError as error:
        raise _no_golden(path, f"value of field {name!r} {error.problem}") from error
    return Field(value, Tolerance(float(entry["rtol"]), float(entry["atol"]), entry.get("source")))


def _is_tolerance(number: Any) -> bool:
    return (
        isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < math.inf
    )


def write(path: Path, golden: Golden) -> bool:
    """Write the file, unless it reads like that already; whether it was written."""
    fields = {}
    for name, field in golden.fields.items():
        tolerance = {key: part for key, part in asdict(field.tolerance).items() if part is not None}
        fields[name] = {"value": _written(field.value), **tolerance}
    table = {"schema": SCHEMA, "meta": golden.meta, "fields": fields}
    text = json.dumps(table, sort_keys=True, indent=1, allow_nan=False) + "\n"
    if path.is_file() and path.read_bytes() == text.encode():
        return False
    write_atomically(path, text)
    return True


def _written(value: Value) -> Value:
    if isinstance(value, list):
        return [_written(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return next(name for name, number in _NOT_FINITE.items() if str(number) == str(value))
    return value


def compare(expected: Mapping[str, Field], got: Mapping[str, Field]) -> Comparison:
    """Every number of `got` against `expected`, with the tolerances of `expected`."""
    found: list[Difference] = []
    for name in {**expected, **got}:
        if name not in got or name not in expected:
            one, other = ("a value" if name in side else "missing" for side in (expected, got))
            found.append(Difference(name, one, other, None, None))
        else:
            found += _differences(
                name, expected[name].value, got[name].value, expected[name].tolerance
            )
    out = (d for d in found if d.size is None or d.ratio > 1)
    by_size = sorted(out, key=lambda d: (d.size is not None, -d.ratio, -(d.size or 0.0)))
    return Comparison(max((d.ratio for d in found), default=0.0), tuple(by_size))


def _differences(
    name: str, expected: Value, got: Value, tolerance: Tolerance, index: tuple[int, ...] = ()
) -> Iterator[Difference]:
    """Where the two differ at all, in tolerance or not."""
    if isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        for k, (one, other) in enumerate(zip(expected, got, strict=True)):
            yield from _differences(name, one, other, tolerance, (*index, k))
        return
    where = f"{name}[{', '.join(map(str, index))}]" if index else name
    if _is_number(expected) and _is_number(got):
        if expected == got or (expected != expected and got != got):
            return
        allowed = tolerance.atol + (
            tolerance.rtol * _distance(expected, 0) if tolerance.rtol else 0.0
        )
        yield Difference(where, *_apart(expected, got), _distance(expected, got), allowed)
    elif type(expected) is not type(got) or expected != got:
        yield Difference(where, _shown(expected), _shown(got), None, None)


def _is_number(value: Value) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _distance(one: float, other: float) -> float:
    """|one − other|; infinite where one of them is NaN or infinite, or too large for a float."""
    try:
        size = float(abs(one - other))
    except OverflowError:
        return math.inf
    return size if math.isfinite(size) else math.inf


def _apart(expected: float, got: float) -> tuple[str, str]:
    """The two numbers with as many digits as tell them apart."""
    for digits in range(6, 18):
        try:
            shown = f"{expected:.{digits}g}", f"{got:.{digits}g}"
        except OverflowError:
            break
        if shown[0] != shown[1]:
            return shown
    return _shown(expected), _shown(got)


def _shown(value: Value) -> str:
    """A value on a few characters."""
    if isinstance(value, list):
        shape, inside = [], value
        while isinstance(inside, list):
            shape.append(len(inside))
            inside = inside[0] if inside else None
        return f"shape ({', '.join(map(str, shape))})"
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:20]}..."


def update(stored: Golden | None, got: Golden, mode: Mode) -> tuple[Golden | None, int]:
    """What the file should hold, and in how many fields that differs from what it holds.

    `missing` adds fields, and makes the file; `changed` replaces the values that are out of tolerance; `all` replaces
    every value, adds fields, and drops those that are no more. Tolerances that the file has are kept. Where nothing
    changes it stays as it is, but for `all`, which renews `meta` too.
    """
    before = {} if stored is None else stored.fields
    if stored is None and mode == "changed":
        return None, 0
    kept = {
        name: replace(field, tolerance=before[name].tolerance) if name in before else field
        for name, field in got.fields.items()
    }
    if mode == "missing":
        after = {**kept, **before}
    elif mode == "changed":
        out = [
            n for n, f in before.items() if n in kept and compare({n: f}, {n: kept[n]}).differences
        ]
        after = {**before, **{name: kept[name] for name in out}}
    else:
        after = kept
    changed = sum(_text(before.get(name)) != _text(after.get(name)) for name in {**before, **after})
    if stored is not None and not changed and mode != "all":
        return stored, 0
    return Golden(got.meta, after), changed


def _text(field: Field | None) -> str:
    """By which fields are the same: NaN too is what it was."""
    return repr(field)


def explain(expected: Golden, got: Golden, comparison: Comparison) -> str:
    """What is different: of the metadata first, which explains most; then the worst differences, at most 20."""
    lines = [
        f"other {key}: golden {_short(one)}, here {_short(other)}"
        for key, one, other in _metadata(expected.meta, got.meta)
    ]
    rows = [("field[index]", "expected", "got", "difference", "allowed")]
    for d in comparison.differences[:MOST_ROWS]:
        size, allowed = (
            "-" if number is None else f"{number:.3g}" for number in (d.size, d.allowed)
        )
        rows.append((d.where, d.expected, d.got, size, allowed))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = (text.rjust(width) for text, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join((first.ljust(widths[0]), *cells)))
    more = len(comparison.differences) - MOST_ROWS
    return "\n".join(lines + ([f"… and {more} more"] if more > 0 else []))


def _metadata(
    expected: Mapping[str, Any], got: Mapping[str, Any], above: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """(key, expected, got) of what both sides know and say differently."""
    for key in sorted(expected.keys() & got.keys()):
        one, other = expected[key], got[key]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _metadata(one, other, f"{above}{key}.")
        elif one != other:
            yield f"{above}{key}", one, other


def _short(value: Any) -> str:
    """A digest is told from another by its first digits."""
    text = str(value)
    return text if len(text) < 32 else f"{text[:12]}..."
