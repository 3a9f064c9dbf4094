"""The optimizer as v and P took it, by parameter: what the report sums up of it; and which tensors have a gradient."""

import itertools
import math

import numpy as np

from entropy_probe_checks.audit.sheet import Sheet

# of second moments: standard errors that decide, entries that say something, what rows and columns share
CLEAR, FEWEST, SHARED = 5.0, 8, 0.04


def write(sheet: Sheet) -> None:
    names, hyper = sheet.facts["names"], sheet.facts["hyper"]
    x, y = (set(itertools.compress(names, of)) for of in sheet[f"{sheet.u}.reached"])
    uncovered = [name for name in names if name not in x & y]
    sheet.write("registry", num_tensors=len(names), uncovered=uncovered)
    sheet.write("registry", x_coverage=len(x) / len(names), y_coverage=len(y) / len(names))
    if "sum.p_min" not in sheet:
        sheet.write("", preconditioner=None)
        return
    sheet.write("registry", num_parameters=int(sheet["sum.numel"].sum()))
    stepped = {h["name"] for h in hyper if h["step"] > 0}
    known = set(sheet.facts["moved"]) - {h["name"] for h in hyper if h["step"] == 0}
    p_min, p_max, nonfinite = (sheet[f"sum.p_{n}"] for n in ("min", "max", "nonfinite"))
    sheet.write("preconditioner", num_tensors=len(p_min), num_nonfinite=int(nonfinite.sum()))
    sheet.write("preconditioner", smallest=float(p_min.min()), largest=float(p_max.max()))
    sheet.write("preconditioner", missing=[name for name in names if name not in known])
    # the pair of one shape that would fit each other's second moments best, and tensors nothing speaks of
    shapes: dict[tuple[int, ...], list[str]] = {}
    for one in hyper:
        if one["name"] in stepped & y:
            shapes.setdefault(tuple(one["shape"]), []).append(one["name"])
    sizes = {name: math.prod(shape) for shape, names in shapes.items() for name in names}
    pairs = [pair for names in shapes.values() for pair in itertools.combinations(names, 2)]
    evidence = sheet["match.pairs"] if pairs else np.zeros(0)
    undecided = {n for pair, e in zip(pairs, evidence, strict=True) if e > -CLEAR for n in pair}
    exchanged, pair = (_exchange(sheet), pairs[int(evidence.argmax())]) if pairs else (None, None)
    undecided = sorted(undecided, key=lambda name: (sizes[name], name))
    sheet.write("preconditioner", exchanged=exchanged, exchanged_pair=pair, undecided=undecided)
    number = int((evidence > -CLEAR).sum())
    sheet.write("preconditioner", num_pairs=len(pairs), num_undecided=number)


def _exchange(sheet: Sheet) -> float:
    """½(z_ij + z_ji − z_ii − z_jj)/√(1/(n−3) + 0.04²), z = atanh of the correlation of log squares with log moments."""
    z, entries = np.zeros((2, 2)), np.zeros((2, 2))
    for i, j in itertools.product(range(2), repeat=2):
        squares, moments = sheet["match.squares"][i], sheet["match.of_pair"][j]
        both = (squares > 0) & (moments > 0)
        a, b, entries[i, j] = np.log(squares[both]), np.log(moments[both]), max(both.sum(), FEWEST)
        if len(a) >= FEWEST and a.std() * b.std() > 1e-12:
            z[i, j] = math.atanh(np.clip(np.corrcoef(a, b)[0, 1], -0.999, 0.999))
    gain = 0.5 * (z[0, 1] + z[1, 0] - z[0, 0] - z[1, 1])
    return float(gain / math.sqrt(1 / (min(entries[0, 1], entries[1, 0]) - 3) + SHARED**2))
