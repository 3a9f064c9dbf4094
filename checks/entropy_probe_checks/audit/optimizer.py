"""The optimizer as v and P took it, by parameter: what the report sums up of it; and which tensors have a gradient."""

from __future__ import annotations

import numpy as np

from entropy_probe_checks.audit.batches import update
from entropy_probe_checks.audit.sheet import Sheet


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
    for name, value in again.items():
        sheet.write(f"preconditioner.{name}", value)
