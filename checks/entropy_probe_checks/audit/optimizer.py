"""The optimizer as v and P took it, by parameter: what the report sums up of it; and which tensors have a gradient."""

import itertools
import math
from functools import partial

import numpy as np

from entropy_probe_checks.audit.sheet import Sheet

# of second moments: standard errors that decide, entries that say something, what rows and columns share
CLEAR, FEWEST, SHARED = 5.0, 8, 0.04


def write(sheet: Sheet) -> None:
    write, names = partial(sheet.write, "registry"), sheet.facts["names"]
    x, y = (set(itertools.compress(names, of)) for of in sheet[f"{sheet.u}.reached"])
    write(num_tensors=len(names), uncovered=[name for name in names if name not in x & y])
    write(x_coverage=len(x) / len(names), y_coverage=len(y) / len(names))
    if "sum.p_min" not in sheet:  # without a step nothing says how long they are
        write(num_parameters=sheet.report["registry"]["num_parameters"])
        return
    write(num_parameters=int(sheet["sum.numel"].sum()))
    write = partial(sheet.write, "preconditioner")
    p_min, p_max, nonfinite = sheet.of("sum", "p_min p_max p_nonfinite")
    write(num_tensors=len(p_min), num_nonfinite=int(nonfinite.sum()))
    write(smallest=float(p_min.min()), largest=float(p_max.max()))
    known = set(sheet.facts["moved"]) - {h["name"] for h in sheet.facts["hyper"] if h["step"] == 0}
    write(missing=[name for name in names if name not in known])
    # the pair of one shape that would fit each other's second moments best, and tensors nothing speaks of
    alike: dict[tuple[int, ...], list[tuple[int, str]]] = {}
    for h in sheet.facts["hyper"]:
        if h["step"] > 0 and h["name"] in y:
            alike.setdefault(tuple(h["shape"]), []).append((math.prod(h["shape"]), h["name"]))
    pairs = [pair for tensors in alike.values() for pair in itertools.combinations(tensors, 2)]
    evidence = sheet["match.pairs"] if pairs else np.zeros(0)
    vague = list(itertools.compress(pairs, evidence > -CLEAR))
    write(num_pairs=len(pairs), num_undecided=len(vague))
    write(undecided=[name for _, name in sorted(set(itertools.chain(*vague)))])
    if pairs:
        pair = [name for _, name in pairs[int(evidence.argmax())]]
        write(exchanged=_exchange(sheet), exchanged_pair=pair)


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
