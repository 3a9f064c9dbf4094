"""The optimizer as v and P took it, by parameter: what the report sums up of it; and which tensors have a gradient."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from entropy_probe_checks.audit.batches import update
from entropy_probe_checks.audit.sheet import Sheet

CLEAR, FEWEST, SHARED = 5.0, 8, 0.04
"""Of second moments: standard errors that decide, entries that say something, and what rows and columns share."""


def write(sheet: Sheet) -> None:
    names, trained = sheet.facts["names"], sheet[f"{update(sheet)}.reached"]
    x, y = ([n for n, count in zip(names, side, strict=True) if count] for side in trained)
    again = {
        "num_tensors": len(names),
        "x_coverage": len(x) / len(names),
        "y_coverage": len(y) / len(names),
        "uncovered": [n for n in names if n not in x or n not in y],
    }
    for name, value in again.items():
        sheet.write(f"registry.{name}", value)
    if not sheet.has("sum.p_min"):
        sheet.write("preconditioner", None)
        return
    sheet.write("registry.num_parameters", int(sheet["sum.numel"].sum()))
    fresh = [h["name"] for h in sheet.facts["hyper"] if h["step"] == 0]
    again = {
        "num_tensors": len(sheet["sum.p_min"]),
        "missing": [n for n in names if n in fresh or n not in sheet.facts["moved"]],
        "num_nonfinite": int(sheet["sum.p_nonfinite"].sum()),
        "smallest": float(np.min(sheet["sum.p_min"])),
        "largest": float(np.max(sheet["sum.p_max"])),
    }
    for name, value in (again | _match(sheet, y)).items():
        sheet.write(f"preconditioner.{name}", value, 1e6 if name == "exchanged" else None)


def _match(sheet: Sheet, with_gradient: list[str]) -> dict[str, Any]:
    """The pair of tensors of one shape that would fit each other's second moments best, and those nothing speaks of."""
    of = {h["name"]: h for h in sheet.facts["hyper"]}
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, one in of.items():
        if one["step"] > 0 and name in with_gradient:
            shapes.setdefault(tuple(one["shape"]), []).append(name)
    pairs = [pair for names in shapes.values() for pair in itertools.combinations(names, 2)]
    if not pairs:
        nothing = {"exchanged": None, "exchanged_pair": None, "undecided": []}
        return nothing | {"num_pairs": 0, "num_undecided": 0}
    evidence = sheet["match.pairs"]
    open_ = {n for pair, e in zip(pairs, evidence, strict=True) if e > -CLEAR for n in pair}
    return {
        "exchanged": _exchange(sheet),
        "exchanged_pair": list(pairs[int(np.argmax(evidence))]),
        "num_pairs": len(pairs),
        "num_undecided": int((evidence > -CLEAR).sum()),
        "undecided": sorted(open_, key=lambda name: (math.prod(of[name]["shape"]), name)),
    }


def _exchange(sheet: Sheet) -> float:
    """½(z_ij + z_ji − z_ii − z_jj)/√(1/(n−3) + 0.04²), z = atanh of the correlation of log squares with log moments."""
    squares, moments = sheet["match.squares"], sheet["match.of_pair"]
    z, fewest = np.zeros((2, 2)), math.inf
    for i, j in itertools.product(range(2), repeat=2):
        both = (squares[i] > 0) & (moments[j] > 0)
        n = int(both.sum())
        a, b = np.log(squares[i][both]), np.log(moments[j][both])
        if n >= FEWEST and a.std() * b.std() > 1e-12:
            z[i, j] = math.atanh(min(max(float(np.corrcoef(a, b)[0, 1]), -0.999), 0.999))
        if i != j:
            fewest = min(fewest, max(n, FEWEST))
    gain = 0.5 * (z[0, 1] + z[1, 0] - z[0, 0] - z[1, 1])
    return float(gain / math.sqrt(1 / (fewest - 3) + SHARED**2))
