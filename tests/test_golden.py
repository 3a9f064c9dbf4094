"""Golden files: what is kept, what is compared, what an update replaces, and what a kill leaves behind."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from entropy_probe import ProbeError
from entropy_probe.golden import (
    MODES,
    Field,
    Golden,
    Tolerance,
    compare,
    explain,
    new_field,
    read,
    update,
    write,
)
from entropy_probe_checks.goldens import SECTIONS

DEMO = Path(__file__).parents[1] / "golden" / "demo"


def golden(meta: dict[str, Any] | None = None, **values: Any) -> Golden:
    return Golden(meta or {}, {name: new_field(name, value) for name, value in values.items()})


def through_file(path: Path, content: Golden) -> Golden:
    write(path, content)
    found = read(path)
    assert found is not None
    return found


NUMBERS = st.floats() | st.integers() | st.booleans() | st.text(max_size=4) | st.none()
VALUES = st.recursive(NUMBERS, lambda inside: st.lists(inside, max_size=3), max_leaves=8) | npst.arrays(
    st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.uint8, np.bool_]),
    npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)


@given(values=st.dictionaries(st.text(max_size=5), VALUES, max_size=4))
def test_every_value_comes_back_as_it_was(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("golden") / "x.json"
    written = Golden({}, {name: new_field(name, value, rtol=0.0, atol=0.0) for name, value in values.items()})
    found = through_file(path, written)
    assert compare(found.fields, written.fields) == compare(written.fields, found.fields)
    assert compare(found.fields, written.fields).worst == 0.0
    assert not write(path, found)


def test_not_finite_numbers_stand_as_text(tmp_path: Path) -> None:
    value = [math.nan, math.inf, -math.inf, 1.0]
    found = through_file(tmp_path / "x.json", golden(x=value))
    assert json.loads((tmp_path / "x.json").read_text())["fields"]["x"]["value"] == ["NaN", "Infinity", "-Infinity", 1]
    assert compare(found.fields, golden(x=value).fields).worst == 0.0
    for k, other in ((0, 1.0), (1, -math.inf), (1, 1e308), (2, math.nan), (3, math.nan), (3, math.inf)):
        wrong = with_leaf(value, (k,), other)
        (difference,) = compare(found.fields, golden(x=wrong).fields).differences
        assert (difference.where, difference.ratio) == (f"x[{k}]", math.inf)


@pytest.mark.parametrize(
    ("value", "plain", "tolerance"),
    [
        (torch.tensor([[1.0, 2.0]], requires_grad=True), [[1.0, 2.0]], (1.3e-6, 1e-5)),
        (torch.tensor(2.0, dtype=torch.float64), 2.0, (1e-7, 1e-7)),
        (torch.tensor([1.5], dtype=torch.bfloat16), [1.5], (1.6e-2, 1e-5)),
        (torch.tensor([1.5], dtype=torch.float8_e5m2), [1.5], (1.6e-2, 1e-5)),
        (torch.tensor([1.5], dtype=torch.float16), [1.5], (1e-3, 1e-5)),
        (torch.tensor([1, 2]), [1, 2], (0.0, 0.0)),
        (torch.zeros(2, 0), [[], []], (1.3e-6, 1e-5)),
        (torch.complex(torch.zeros(1), torch.ones(1)).conj().imag, [-1.0], (1.3e-6, 1e-5)),
        ([torch.tensor(1.0), np.float16(2.0)], [1.0, 2.0], (1e-3, 1e-5)),
        (np.float32(0.1), float(np.float32(0.1)), (1.3e-6, 1e-5)),
        (np.int32(3), 3, (0.0, 0.0)),
        (np.bool_(True), True, (0.0, 0.0)),
        (np.longdouble(0.5), 0.5, (1e-7, 1e-7)),
        (np.array(["a", "NaN"]), ["a", math.nan], (1e-7, 1e-7)),
        ((1, 2.0), [1, 2.0], (1e-7, 1e-7)),
        ("text", "text", (0.0, 0.0)),
        (None, None, (0.0, 0.0)),
    ],
)
def test_values_and_default_tolerances(value: Any, plain: Any, tolerance: tuple[float, float]) -> None:
    field = new_field("x", value)
    assert repr(field.value) == repr(plain)
    assert (field.tolerance.rtol, field.tolerance.atol) == tolerance


@pytest.mark.parametrize(
    "value", [1j, {"a": 1}, object(), np.array([1j]), np.array([{}]), torch.tensor([1j]), torch.empty(1, device="meta")]
)
def test_what_a_file_cannot_hold_is_said_in_a_line(value: Any) -> None:
    with pytest.raises(ProbeError, match=r"^golden field 'x': .*; give .*$"):
        new_field("x", value)


def test_a_field_is_named_by_a_text() -> None:
    with pytest.raises(ProbeError, match=r"^golden field 0: its name is not a text; name fields by texts$"):
        new_field(0, 1.0)


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, True])
def test_a_tolerance_is_a_number_from_zero(bad: float) -> None:
    with pytest.raises(ProbeError, match=r"^golden field 'x': rtol is .*; give a number that is 0 or more$"):
        new_field("x", 1.0, rtol=bad)


def test_the_limit_is_atol_plus_rtol_of_what_is_expected() -> None:
    stored = {"x": Field([1000.0, -1000.0], Tolerance(1e-3, 0.5))}
    assert compare(stored, {"x": Field([1001.5, -998.5], Tolerance(0.0, 0.0))}).worst == 1.0
    assert not compare(stored, {"x": Field([1001.5, -998.5], Tolerance(0.0, 0.0))}).differences
    assert compare(stored, {"x": Field([1001.6, -1000.0], Tolerance(9.0, 9.0))}).differences[0].where == "x[0]"


@pytest.mark.parametrize(
    ("expected", "got", "shown"),
    [
        (1, True, ("1", "True")),
        (0.0, None, ("0.0", "None")),
        ("a", "b", ("'a'", "'b'")),
        ("a", math.nan, ("'a'", "nan")),
        ([1.0, 2.0], [1.0], ("shape (2)", "shape (1)")),
        ([[1.0, 2.0]], [[1.0], [2.0]], ("shape (1, 2)", "shape (2, 1)")),
        ([], 1.0, ("shape (0)", "1.0")),
        (10**400, 10**400 + 1, (f"1{'0' * 19}...",) * 2),
        (1.0, 1.0 + 2**-52, ("1", "1.0000000000000002")),
    ],
    ids=range(9),
)
def test_other_kinds_shapes_and_last_digits_are_differences(expected: Any, got: Any, shown: tuple[str, str]) -> None:
    stored = {"x": Field(new_field("x", expected).value, Tolerance(0.0, 0.0))}
    found = compare(stored, golden(x=got).fields)
    assert found.worst == math.inf
    assert (found.differences[0].expected, found.differences[0].got) == shown


def test_whole_numbers_and_others_are_one_kind() -> None:
    assert compare(golden(x=1).fields, golden(x=1.0).fields).worst == 0.0


def test_a_failure_shows_metadata_first_then_the_worst_20() -> None:
    meta = {"fingerprint": "a" * 64, "versions": {"torch": "1", "numpy": "2"}, "dtype": "float64", "old": 1}
    stored = golden(meta, x=[0.0] * 30, shape=[1.0], gone=1)
    other = {**meta, "fingerprint": "b" * 64, "versions": {"torch": "2", "numpy": "2"}, "new": 1}
    got = golden(other, x=[float(k) for k in range(30)], shape=[1.0, 2.0], extra=1)
    lines = explain(stored, got, compare(stored.fields, got.fields)).splitlines()
    assert lines[0] == f"other fingerprint: golden {'a' * 12}..., here {'b' * 12}..."
    assert lines[1] == "other versions.torch: golden 1, here 2"
    assert lines[2].split() == ["field[index]", "expected", "got", "difference", "allowed"]
    assert {line.split()[0] for line in lines[3:6]} == {"shape", "gone", "extra"}
    assert lines[6].split() == ["x[29]", "0", "29", "29", "1e-07"]
    assert [line.split()[0] for line in lines[6:23]] == [f"x[{k}]" for k in range(29, 12, -1)]
    assert lines[23:] == ["… and 12 more"]
    assert max(map(len, lines)) <= 80


def edited(content: Golden, name: str, tolerance: Tolerance) -> Golden:
    return Golden(content.meta, {**content.fields, name: replace(content.fields[name], tolerance=tolerance)})


def test_what_each_mode_replaces() -> None:
    by_hand = Tolerance(0.5, 0.0, "as wide as the batch is small")
    stored = edited(golden({"run": 1}, near=1.0, far=1.0, gone=1.0), "near", by_hand)
    got = golden({"run": 2}, near=1.2, far=3.0, new=4.0)
    after = {mode: update(stored, got, mode) for mode in MODES}
    values = {mode: {n: f.value for n, f in content.fields.items()} for mode, (content, _) in after.items() if content}
    assert values == {
        "missing": {"near": 1.0, "far": 1.0, "gone": 1.0, "new": 4.0},
        "changed": {"near": 1.0, "far": 3.0, "gone": 1.0},
        "all": {"near": 1.2, "far": 3.0, "new": 4.0},
    }
    assert {mode: count for mode, (_, count) in after.items()} == {"missing": 1, "changed": 1, "all": 4}
    for content, _ in after.values():
        assert content is not None
        assert content.fields["near"].tolerance == by_hand
        assert content.meta == {"run": 2}
    assert update(None, got, "missing") == (got, 3) == update(None, got, "all")
    assert update(None, got, "changed") == (None, 0)


@pytest.mark.parametrize("mode", ["missing", "changed"])
def test_nothing_to_replace_leaves_the_metadata(mode: Any) -> None:
    stored = golden({"run": 1}, x=[math.nan, 1.0])
    assert update(stored, golden({"run": 2}, x=[math.nan, 1.0 + 1e-9]), mode) == (stored, 0)


def test_a_file_that_would_not_change_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "a" / "x.json"
    assert write(path, golden(x=1.0))
    before = path.stat()
    assert not write(path, golden(x=1.0))
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    tolerance = Tolerance(1e-3, 0.0, "why")
    write(tmp_path / "x.json", Golden({"b": 1, "a": 2}, {"x": Field([1.5], tolerance), "k": Field(1, Tolerance(0, 0))}))
    text = (tmp_path / "x.json").read_text()
    assert text.endswith("}\n")
    assert [*json.loads(text)] == ["fields", "meta", "schema"]
    assert re.findall(r'"(\w+)":', text) == [
        *("fields", "k", "atol", "rtol", "value", "x", "atol", "rtol", "source", "value", "meta", "a", "b", "schema")
    ]


FILE = {"schema": 1, "meta": {}, "fields": {"x": {"value": 1.0, "rtol": 0.0, "atol": 0.0}}}


def _with(**changes: Any) -> str:
    return json.dumps({**FILE, "fields": {"x": {**FILE["fields"]["x"], **changes}}})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"\xff", "is not JSON"),
        ('{"schema"', "is not JSON"),
        ("", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a golden file of schema 1"),
        (json.dumps({**FILE, "schema": 2}), "is not a golden file of schema 1"),
        (json.dumps({**FILE, "more": 2}), "does not consist of schema, meta and fields"),
        (json.dumps({**FILE, "fields": []}), "does not consist of schema, meta and fields"),
        (json.dumps({**FILE, "fields": {"x": 1.0}}), "field 'x' does not consist of"),
        (json.dumps({**FILE, "fields": {"x": {"value": 1.0, "rtol": 0}}}), "field 'x' does not consist of"),
        (_with(rtl=0), "field 'x' does not consist of"),
        (_with(rtol=-1e-3), "rtol of field 'x' is -0.001"),
        (_with(atol=math.nan), "is not JSON"),
        (_with(atol="NaN"), "atol of field 'x' is 'NaN'"),
        (_with(atol=None), "atol of field 'x' is None"),
        (_with(source=1), "source of field 'x' is not a text"),
        (_with(value=[{"a": 1}]), "value of field 'x' is dict"),
    ],
)
def test_a_file_that_is_no_golden_is_said_in_a_line(tmp_path: Path, text: str | bytes, problem: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ProbeError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: {problem}"), error.value
    assert "; correct it, or delete it and write it again with --probe-golden-update=missing" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_in_the_place_of_a_file_is_said_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="cannot be read"):
        read(tmp_path)


KILLS = 12
WRITER = """
import sys
from pathlib import Path
from entropy_probe.golden import Field, Golden, Tolerance, write
path, number = Path(sys.argv[1]), 0
print("ready", flush=True)
while True:
    number += 1
    write(path, Golden({"number": number}, {"x": Field([float(number)] * 20_000, Tolerance(0.0, 0.0))}))
"""


def test_a_kill_leaves_the_old_or_the_new_file(tmp_path: Path) -> None:
    path, numbers = tmp_path / "x.json", set()
    write(path, golden({"number": 0}, x=[0.0] * 20_000))
    for kill in range(KILLS):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.02 + 0.013 * kill)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        found = read(path)
        assert found is not None
        assert found.fields["x"].value == [float(found.meta["number"])] * 20_000
        numbers.add(found.meta["number"])
    assert len(numbers) > 1
    assert [file.name for file in tmp_path.glob("*.json")] == ["x.json"]  # what was not finished is no golden


def leaves(value: Any, index: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    if isinstance(value, list):
        for k, inside in enumerate(value):
            yield from leaves(inside, (*index, k))
    else:
        yield index


def at(value: Any, index: tuple[int, ...]) -> Any:
    return value if not index else at(value[index[0]], index[1:])


def with_leaf(value: Any, index: tuple[int, ...], leaf: Any) -> Any:
    if not index:
        return leaf
    return [with_leaf(inside, index[1:], leaf) if k == index[0] else inside for k, inside in enumerate(value)]


def other_than(leaf: Any, tolerance: Tolerance) -> Any:
    """What is just outside the tolerance."""
    if isinstance(leaf, bool):
        return not leaf
    if isinstance(leaf, int | float):
        return leaf + 1.01 * (tolerance.atol + tolerance.rtol * abs(leaf)) if tolerance.atol else leaf * 1.001 + 1e-9
    return "other"


@pytest.mark.parametrize("path", sorted(DEMO.glob("*.json")), ids=lambda path: path.stem)
def test_every_number_of_the_demo_is_watched(path: Path) -> None:
    stored = read(path)
    assert stored is not None
    assert compare(stored.fields, stored.fields).worst == 0.0
    for name, field in stored.fields.items():
        assert field.tolerance.source, name
        for index in leaves(field.value):
            wrong = with_leaf(field.value, index, other_than(at(field.value, index), field.tolerance))
            (difference,) = compare(stored.fields, {**stored.fields, name: replace(field, value=wrong)}).differences
            assert difference.where.partition("[")[0] == name
            assert difference.ratio > 1


def test_the_demo_has_a_file_for_every_section() -> None:
    assert {path.stem for path in DEMO.glob("*.json")} == set(SECTIONS)


@pytest.mark.parametrize("path", sorted(DEMO.glob("*.json")), ids=lambda path: path.stem)
def test_the_demo_was_made_in_float64_on_its_own_responses(path: Path) -> None:
    stored = read(path)
    assert stored is not None
    assert stored.meta["dtype"] == "float64"
    assert {*stored.meta} == {"versions", "dtype", "device", "fingerprint", "config", "responses"}
