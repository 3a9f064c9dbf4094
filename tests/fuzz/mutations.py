"""Hypothesis strategies: a good file or structure with a few things wrong in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st

HUGE = 10**12


def laughs(depth: int = 12) -> list[Any]:
    """2^depth entries, of which only `depth` lists are in memory."""
    content: list[Any] = ["ha"]
    for _ in range(depth):
        content = [content, content]
    return content


_NUMBERS: list[Any] = [0, -1, 1, 2, 67, 2**31, 2**63, -(2**63), 10**400, 0.0, -0.0, 0.5, 1e308, 1e-308, True, False]
_NUMBERS += [float("nan"), float("inf"), float("-inf")]
_TEXTS = ["", "a", "é", "\0", "\ud800", "x" * 300, "1", "nan", "null", "../..", "/dev/zero", "a\nb", "%s{}", "["]
_TEXTS += ["(a+)+$"]
JSON_VALUES: list[Any] = [None, *_NUMBERS, *_TEXTS, [], {}, [[]], [None], [1, 2], {"": None}, {"a": [1]}, [[1]] * 3]
VALUES: list[Any] = [*JSON_VALUES, 10**5000, b"a", 1j, (), (1, 2), {1: 2}, {(1,): 2}, laughs(), tuple(laughs(5))]
TENSORS: list[Callable[[], Any]] = [
    lambda: torch.zeros(()),
    lambda: torch.zeros(0),
    lambda: torch.ones(1),
    lambda: torch.ones(2, 3),
    lambda: torch.ones(2, 3) * float("nan"),
    lambda: -torch.ones(2, 3),
    lambda: torch.ones(2, 3, dtype=torch.int64),
    lambda: torch.ones(2, 3, dtype=torch.complex64),
    lambda: torch.ones(2, 3, dtype=torch.bfloat16),
    lambda: torch.ones(2, 3, dtype=torch.bool),
    lambda: torch.ones(2, 3).to(torch.float8_e4m3fn),
    lambda: torch.ones(2, 3).to_sparse(),
    lambda: torch.ones(2, 3, device="meta"),
    lambda: torch.ones(2, 3, requires_grad=True),
    lambda: torch.nn.Parameter(torch.ones(2, 3)),
    lambda: torch.zeros(1).expand(HUGE),
    lambda: torch.zeros(1).expand(2, 3),
    lambda: torch.quantize_per_tensor(torch.ones(2, 3), 1.0, 0, torch.qint8),
]


@st.composite
def trees(draw: st.DrawFn, good: Any, values: list[Any], made: list[Callable[[], Any]] | None = None) -> Any:
    """`good`, a tree of dicts and lists, with up to four entries changed, removed, added or moved."""
    tree = copy.deepcopy(good)
    for _ in range(draw(st.integers(1, 4))):
        inner, holder, key = tree, None, None
        while isinstance(inner, dict | list) and inner and (holder is None or draw(st.integers(0, 3))):
            keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
            holder, key = inner, draw(st.sampled_from(keys))
            inner = holder[key]
        if holder is None:
            return tree
        value = draw(st.sampled_from([*values, *(made or [])]))
        value = value() if callable(value) else copy.deepcopy(value)
        match draw(st.sampled_from(["change", "change", "change", "remove", "add", "twice"])):
            case "change":
                holder[key] = value
            case "remove":
                del holder[key]
            case "add" if isinstance(holder, dict):
                other = draw(st.sampled_from(values))
                holder[other if isinstance(other, str | int | float | bytes | None) else "other"] = value
            case _:
                holder[key] = [holder[key], holder[key]]
    return tree


@st.composite
def cut_up(draw: st.DrawFn, good: bytes) -> bytes:
    """`good` with up to six bytes or slices changed."""
    content = bytearray(good)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 100]))
        match draw(st.sampled_from(["flip", "flip", "remove", "insert", "copy", "end"])):
            case "flip" if content:
                content[at] ^= draw(st.integers(1, 255))
            case "remove":
                del content[at : at + length]
            case "insert":
                content[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "copy":
                content[at:at] = content[at : at + length]
            case "end" if draw(st.integers(0, 3)) == 0:
                del content[at:]
            case _:
                pass
    return bytes(content)


def as_json(tree: Any) -> bytes:
    """JSON as Python writes it, NaN and lone surrogates included."""
    return json.dumps(tree, default=str).encode()


_YAML = ["- ", "{", "}", "[", "]", ": ", " ", "\n", "\n  ", "&a ", "*a", "<<: *a", "<<: [*a, *a]", "? ", "| ", "> "]
_YAML += ["!!python/object/apply:os.mkdir [executed]", "!!python/name:os.system", "!!binary ", "!!set ", "!!int ", "'"]
_YAML += ["batch", "generation", "num_prompts", "budget", "limits", "precision", "stop", "device", "seed", "etas", "%"]
_YAML += ["1", "8e-7", ".nan", ".inf", "1e400", "0x" + "f" * 9000, "9" * 5000, "1:2:3", "2001-01-01", "2001-99-99"]
_YAML += ["true", "\ufeff", "\0", "\x85", "é", "---\n", "...\n", "smoke", "a" * 200, "[" * 40, "~", "#", "!x ", '"']
YAML_TEXTS = st.lists(st.sampled_from(_YAML), min_size=1, max_size=30).map("".join)
