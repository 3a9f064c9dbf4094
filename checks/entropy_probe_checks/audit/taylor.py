"""The Taylor tests: ΔĤ(η) of a few responses against its own derivatives (MATH.md, the realised change)."""

import math
import statistics
from functools import partial

import numpy as np

from entropy_probe_checks.audit.sheet import Array, Sheet

# orders hold up to these shares of the radius, over so many decades of η
SLOPE_RANGE, ORDER_RANGE, DECADES = 0.02, 0.1, 1.5
# a difference with a short step is off by less, with a long one by more where there are kinks
SHORT, KINKED = 1e-7, 1e-4
# ΔĤ made again may be off by this share; what is smooth differs from its mirror image by less than that
TRUSTED, LIKE = 0.1, 0.5
# steps of the five-point rules: log p of the fastest response moves by as much
WIDTHS = {"stencil": 1e-3, "near": 1e-5, "far": 2e-2}


def write(sheet: Sheet) -> None:
    """The fields of section `continuity` that belong to them."""
    of = {name[7:]: array for name, array in sheet.items() if name.startswith("taylor.")}
    write, w, s, r = partial(sheet.write, "continuity"), of["weights"], of["seq_logp"], of["rb_sum"]
    etas, delta, moved, lengths = of["etas"], of["delta_h"], of["logits"], of["gen_lens"]
    unit = 10 * float(etas[-1])
    places = 0.75 * (np.arange(len(etas)) + 1 - len(etas)) - 1
    sheet.hold("taylor.etas", etas, unit * 10**places)
    if not sheet.restricted:
        sheet.hold("taylor.weights", w, np.full(s.shape, 1 / s.size))
    # what is added up in a change: Ĥ, or what the rounding of a logit does to it
    entropy, each = float((w * r).sum()), math.sqrt(lengths.mean() / s.size)
    added = max(entropy, each * (1 + float(of["logit"].max()) * entropy) / 10)
    steps = {which: unit * width for which, width in WIDTHS.items() if which in of}
    at_0 = {which: _derivatives(of[which], h) for which, h in steps.items()}
    first, second, third = at_0["stencil"][:, 1].tolist()
    radius = min(_over(2 * first, second), _over(3 * second, third))
    radius = radius if math.isfinite(first + second + third) else math.nan
    write(taylor_eta_min=float(etas[0]), taylor_eta_max=float(etas[-1]), taylor_radius=radius)
    order_of = partial(_order, etas, floor=1e3 * float(np.finfo(float).eps) * added)
    smooth, least = True, abs(first)
    if "d_seq_logp" in of:
        d_s, d_r = of["d_seq_logp"], of["d_rb_sum"]
        # d/dη of Σŵf at 0: Σŵ(f − Ĥ)·D_vS + ŵ·D_vf
        naive = [w * ((w * s).sum() - s) * d_s, -w * d_s]
        rb = [w * (r - entropy) * d_s, w * d_r]
        slope, size = np.sum(rb), np.abs(rb).sum()
        found = {}
        for which, h in steps.items():
            both = zip(at_0[which][0], (naive, rb), strict=False)
            found[which] = [_error(of_step, terms, 1e-8 * added / h) for of_step, terms in both]
        worst = {which: max(e or 0.0 for e in errors) for which, errors in found.items()}
        naive, rb = found["stencil"]
        smooth = worst.get("far", 0.0) <= KINKED
        if worst.get("near", math.inf) < worst["stencil"] / 10:
            smooth = False
            naive, rb = (None, None) if SHORT < worst["near"] < KINKED else found["near"]
        write(taylor_slope=slope, identity_error_naive=naive, identity_error_rb=rb)
        if smooth and rb is not None and not sheet.restricted:
            # of Σŵf/ΣŵT, over the terms of Σŵf
            centred = r - r.mean() / lengths.mean() * lengths
            off = at_0["stencil"][0, 2] * lengths.mean() - (d_r + centred * d_s).mean()
            write(identity_error_per_token=_over(off, size))
        if smooth:
            rest, mirrored = delta - slope * etas, of["opposite"] + slope * etas
            write(taylor_order=order_of(rest, mirrored, most=ORDER_RANGE * radius)[0])
        least = max(least, TRUSTED * size)
    if smooth:
        write(delta_h_slope=order_of(delta, -of["opposite"], most=SLOPE_RANGE * radius)[0])
    known = etas
    if "delta_h_there" in of:
        seen = etas > 10**-6.5 * unit  # float32 knows no smaller change
        size = np.maximum(np.abs(delta), least * etas)[seen]
        close = np.abs(of["delta_h_there"] - delta[seen]) <= TRUSTED * size
        known = etas[seen][_longest(close)]
    if len(known):
        write(trusted_eta_min=known.min(), trusted_eta_max=known.max())
    if moved.any():
        few = unit * 10.0 ** np.arange(-8, -3)
        order, tiny = _order(few, moved, moved - of["asymmetry"])
        write(logit_slope=order, logit_monotone=bool((np.diff(moved[tiny]) > 0).all()))


def _derivatives(at: Array, h: float) -> Array:
    """f′, f″, f‴ at 0 of several f(−2h), f(−h), f(h), f(2h) and f(0) = 0, from odd and even parts at h and 2h."""
    odd1, odd2 = (at[:, 2:] - at[:, 1::-1]).T
    even1, even2 = (at[:, 2:] + at[:, 1::-1]).T
    first, second = (8 * odd1 - odd2) / (12 * h), (16 * even1 - even2) / (12 * h**2)
    return np.array([first, second, (odd2 - 2 * odd1) / (2 * h**3)])


def _over(a: float, b: float) -> float:
    """|a/b|, infinite over 0, but 0 of 0."""
    return abs(a) / abs(b) if b else (math.inf if a else 0.0)


def _error(found: float, terms: list[Array], rounding: float) -> float | None:
    """|f′ − Σ terms|/Σ |terms|, None where both are within the rounding of a difference."""
    size = np.abs(terms).sum()
    return None if max(size, abs(found)) <= rounding else _over(found - np.sum(terms), size)


def _order(
    etas: Array, values: Array, mirrored: Array, floor: float = -1.0, most: float = math.inf
) -> tuple[float | None, Array]:
    """Least-squares slope of log|f| against log η, and over which η: from the first on above which every |f| up to
    `most` exceeds the floor, up to where f(η) and what stands for it at −η part, if that is far enough above."""
    inside, size = np.flatnonzero(etas <= most), np.abs(values)
    if math.isnan(most) or not np.isfinite(size).all():
        return math.nan, inside
    lost = inside[size[inside] <= floor]
    chosen = inside[inside > lost.max(initial=-1)]
    like = np.abs(values - mirrored) <= LIKE * np.maximum(size, np.abs(mirrored))
    before = chosen[np.logical_and.accumulate(like[chosen])]
    chosen = before if _spans(etas[before]) else chosen
    if not _spans(etas[chosen]):
        return None, chosen
    if (size[chosen] == 0).any():
        return math.nan, chosen
    return statistics.linear_regression(np.log(etas[chosen]), np.log(size[chosen])).slope, chosen


def _spans(etas: Array) -> bool:
    return len(etas) >= 2 and math.log10(etas[-1] / etas[0]) >= DECADES - 1e-9


def _longest(holds: Array) -> slice:
    """The longest stretch on which it holds; of equally long ones, the last."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], holds, [0]]))).reshape(-1, 2).tolist()
    return slice(*max(edges, key=lambda edge: (edge[1] - edge[0], edge[0]), default=(0, 0)))
