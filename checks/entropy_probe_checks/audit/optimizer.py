"""The optimizer as v and P took it, by parameter: what the report sums up of it; and which tensors have a gradient."""

import itertools
import math
from typing import Any

import numpy as np

from entropy_probe_checks.audit.batches import update
from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.terms import Terms

CLEAR, FEWEST, SHARED = 5.0, 8, 0.04
"""Of second moments: standard errors that decide, entries that say something, and what rows and columns share."""


def write(sheet: Sheet) -> None:
    names = sheet.facts["names"]
    x, y = (set(itertools.compress(names, of)) for of in sheet[f"{update(sheet)}.reached"])
    registry = {
        "num_tensors": len(names),
        "x_coverage": len(x) / len(names),
        "y_coverage": len(y) / len(names),
        "uncovered": [n for n in names if n not in x & y],
    }
    if "sum.p_min" not in sheet:
        sheet.write("registry", **registry)
        sheet.nothing("preconditioner")
        return
    sheet.write("registry", **registry, num_parameters=int(sheet["sum.numel"].sum()))
    fresh = {h["name"] for h in sheet.facts["hyper"] if h["step"] == 0}
    preconditioner = {
        "num_tensors": len(sheet["sum.p_min"]),
        "missing": [n for n in names if n in fresh or n not in sheet.facts["moved"]],
        "num_nonfinite": int(sheet["sum.p_nonfinite"].sum()),
        "smallest": float(np.min(sheet["sum.p_min"])),
        "largest": float(np.max(sheet["sum.p_max"])),
    }
    sheet.write("preconditioner", **preconditioner, **_match(sheet, y))


def _match(sheet: Sheet, with_gradient: set[str]) -> dict[str, Any]:
    """The pair of tensors of one shape that would fit each other's second moments best, and those nothing speaks of."""
    sizes = {h["name"]: math.prod(h["shape"]) for h in sheet.facts["hyper"]}
    shapes: dict[tuple[int, ...], list[str]] = {}
    for one in sheet.facts["hyper"]:
        if one["step"] > 0 and one["name"] in with_gradient:
            shapes.setdefault(tuple(one["shape"]), []).append(one["name"])
    pairs = [pair for names in shapes.values() for pair in itertools.combinations(names, 2)]
    evidence = sheet["match.pairs"] if pairs else np.zeros(0)
    undecided = {n for pair, e in zip(pairs, evidence, strict=True) if e > -CLEAR for n in pair}
    return {
        "exchanged": Terms(_exchange(sheet), 1e6) if pairs else None,
        "exchanged_pair": pairs[int(np.argmax(evidence))] if pairs else None,
        "num_pairs": len(pairs),
        "num_undecided": int((evidence > -CLEAR).sum()),
        "undecided": sorted(undecided, key=lambda name: (sizes[name], name)),
    }


def _exchange(sheet: Sheet) -> float:
    """½(z_ij + z_ji − z_ii − z_jj)/√(1/(n−3) + 0.04²), z = atanh of the correlation of log squares with log moments."""
    z, entries = np.zeros((2, 2)), np.zeros((2, 2))
    for i, j in itertools.product(range(2), repeat=2):
        squares, moments = sheet["match.squares"][i], sheet["match.of_pair"][j]
        both = (squares > 0) & (moments > 0)
        entries[i, j] = max(both.sum(), FEWEST)
        a, b = np.log(squares[both]), np.log(moments[both])
        if len(a) >= FEWEST and a.std() * b.std() > 1e-12:
            z[i, j] = math.atanh(np.clip(np.corrcoef(a, b)[0, 1], -0.999, 0.999))
    gain = 0.5 * (z[0, 1] + z[1, 0] - z[0, 0] - z[1, 1])
    return float(gain / math.sqrt(1 / (min(entries[0, 1], entries[1, 0]) - 3) + SHARED**2))
