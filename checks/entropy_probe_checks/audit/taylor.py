"""The Taylor tests: ΔĤ(η) of a few responses against its own derivatives (MATH.md, the realised change)."""

import math
import statistics
from functools import partial

import numpy as np

from entropy_probe_checks.audit.sheet import Sheet

# orders hold up to these shares of the radius, over so many decades of η
SLOPE_RANGE, ORDER_RANGE, DECADES = 0.02, 0.1, 1.5
# a difference with a short step is off by less, with a long one by more where there are kinks
SHORT, KINKED = 1e-7, 1e-4
# ΔĤ made again may be off by this share; what is smooth differs from its mirror image by less than that
TRUSTED, LIKE = 0.1, 0.5
# steps of the five-point rules: log p of the fastest response moves by as much
WIDTHS = {"stencil": 1e-3, "near": 1e-5, "far": 2e-2}


def write(sheet: Sheet) -> None:
    """The fields of section `continuity` that belong to them, where they were made."""
    if "taylor.etas" not in sheet:
        return
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
    at_0 = {which: _derivatives(of[which], unit * WIDTHS[which]) for which in WIDTHS if which in of}
    first, second, third = at_0["stencil"][:, 1].tolist()
    radius = min(_over(2 * first, second), _over(3 * second, third))
    radius = radius if math.isfinite(first + second + third) else math.nan
    write(taylor_eta_min=float(etas[0]), taylor_eta_max=float(etas[-1]), taylor_radius=radius)
    order_of = partial(_order, etas, floor=1e3 * float(np.finfo(float).eps) * added)
    smooth, least = True, abs(first)
    if "d_seq_logp" in of:
        d_s, d_r = of["d_seq_logp"], of["d_rb_sum"]
        # d/dη of Σŵf at 0: Σŵ(f − Ĥ)·D_vS + ŵ·D_vf
        terms = [
            np.array([w * (f - (w * f).sum()) * d_s, w * d_f]) for f, d_f in ((-s, -d_s), (r, d_r))
        ]
        slope, size = terms[1].sum(), abs(terms[1]).sum()
        naive, rb, smooth = _identities(at_0, terms, 1e-8 * added / unit)
        write(taylor_slope=slope, identity_error_naive=naive, identity_error_rb=rb)
        if smooth and rb is not None and not sheet.restricted:
            # of Σŵf/ΣŵT, over the terms of Σŵf
            centred = r - r.mean() / lengths.mean() * lengths
            off = at_0["stencil"][0, 2] * lengths.mean() - (d_r + centred * d_s).mean()
            write(identity_error_per_token=_over(off, size))
        if smooth:
            rest = delta - slope * etas, of["opposite"] + slope * etas
            write(taylor_order=order_of(*rest, most=ORDER_RANGE * radius))
        least = max(least, TRUSTED * size)
    if smooth:
        write(delta_h_slope=order_of(delta, -of["opposite"], most=SLOPE_RANGE * radius))
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
        tiny = _smooth(few, of["asymmetry"] <= LIKE * moved)
        write(logit_slope=_loglog(few[tiny], moved[tiny]))
        write(logit_monotone=bool((np.diff(moved[tiny]) > 0).all()))


def _derivatives(at: np.ndarray, h: float) -> np.ndarray:
    """f′, f″, f‴ at 0 of several f(−2h), f(−h), f(h), f(2h) and f(0) = 0, from odd and even parts at h and 2h."""
    odd1, odd2 = (at[:, 2:] - at[:, 1::-1]).T
    even1, even2 = (at[:, 2:] + at[:, 1::-1]).T
    first, second = (8 * odd1 - odd2) / (12 * h), (16 * even1 - even2) / (12 * h**2)
    return np.array([first, second, (odd2 - 2 * odd1) / (2 * h**3)])


def _over(a: float, b: float) -> float:
    """|a/b|, infinite over 0, but 0 of 0."""
    return abs(a) / abs(b) if b else (math.inf if a else 0.0)


def _identities(
    at_0: dict[str, np.ndarray], terms: list[np.ndarray], rounding: float
) -> tuple[float | None, float | None, bool]:
    """|f′ − Σ terms|/Σ |terms| of naive and rb, None where both are within the rounding of a difference over h, by the
    step that crosses no kink; and whether none is in the range."""
    errors: dict[str, list[float | None]] = {}
    for which, derivatives in at_0.items():
        errors[which] = []
        for found, part in zip(derivatives[0].tolist(), terms, strict=False):
            size = abs(part).sum()
            unseen = max(size, abs(found)) <= rounding / WIDTHS[which]
            errors[which].append(None if unseen else _over(found - part.sum(), size))
    worst = {which: max(e or 0.0 for e in own) for which, own in errors.items()}
    naive, rb = errors["stencil"]
    if "near" not in at_0:
        return naive, rb, worst["far"] <= KINKED
    if worst["near"] >= worst["stencil"] / 10:
        return naive, rb, True
    naive, rb = (None, None) if SHORT < worst["near"] < KINKED else errors["near"]
    return naive, rb, False


def _loglog(etas: np.ndarray, values: np.ndarray) -> float:
    """Least-squares slope of log|f| against log η."""
    if (values == 0).any() or not np.isfinite(values).all():
        return math.nan
    return statistics.linear_regression(np.log(etas), np.log(np.abs(values))).slope


def _order(
    etas: np.ndarray, values: np.ndarray, mirrored: np.ndarray, floor: float, most: float
) -> float | None:
    """`_loglog` from the first η on above which every |f| up to η = `most` exceeds the floor, up to where f(η) and what
    stands for it at −η part."""
    if math.isnan(most) or not np.isfinite(values).all():
        return math.nan
    inside = np.flatnonzero(etas <= most)
    lost = inside[np.abs(values[inside]) <= floor]
    chosen = inside[inside > lost.max(initial=-1)]
    like = np.abs(values - mirrored) <= LIKE * np.maximum(np.abs(values), np.abs(mirrored))
    chosen = chosen[_smooth(etas[chosen], like[chosen])]
    return _loglog(etas[chosen], values[chosen]) if _spans(etas[chosen]) else None


def _smooth(etas: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Those before the first that is not `like`; all, where too few lie before it."""
    before = np.logical_and.accumulate(like)
    return before if _spans(etas[before]) else np.ones(len(etas), bool)


def _spans(etas: np.ndarray) -> bool:
    return len(etas) >= 2 and math.log10(etas[-1] / etas[0]) >= DECADES - 1e-9


def _longest(holds: np.ndarray) -> slice:
    """The longest stretch on which it holds; of equally long ones, the last."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], holds, [0]]))).reshape(-1, 2).tolist()
    return slice(*max(edges, key=lambda edge: (edge[1] - edge[0], edge[0]), default=(0, 0)))
