"""The Taylor tests: ΔĤ(η) of a few responses against its own derivatives (MATH.md, the realised change)."""

import math

import numpy as np

from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.terms import Terms, terms

SLOPE_RANGE, ORDER_RANGE, DECADES = 0.02, 0.1, 1.5
"""Orders hold up to these shares of the radius, over at least so many decades of η."""
SHORT, KINKED, TRUSTED = 1e-7, 1e-4, 0.1
"""A difference with a short step is off by less, with a long one by more where there are kinks; 10 % is trusted."""
LIKE = 0.5
"""What is smooth differs from its mirror image by less than this share of itself."""
WIDTHS = {"stencil": 1e-3, "near": 1e-5, "far": 3e-2}
"""Steps of the five-point rules: log p of the fastest response moves by as much."""


def write(sheet: Sheet) -> None:
    """The fields of section `continuity` that belong to them, where they were made."""
    if "taylor.etas" not in sheet:
        return
    etas, delta, opposite, moved, asymmetry, w, s, r, lengths, stencil = (
        sheet[f"taylor.{name}"]
        for name in [
            "etas",
            "delta_h",
            "opposite",
            "logits",
            "asymmetry",
            "weights",
            "seq_logp",
            "rb_sum",
            "gen_lens",
            "stencil",
        ]
    )
    unit, few = 10 * float(etas[-1]), etas[::2]
    sheet.compare(
        "taylor.etas", etas, unit * 10 ** ((np.arange(len(etas)) - (len(etas) - 1)) / 2 - 1)
    )
    if not sheet.restricted:
        sheet.compare("taylor.weights", w, np.full(s.shape, 1 / s.size))
    entropy, each = float((w * r).sum()), math.sqrt(lengths.mean() / s.size)
    change = max(entropy, each * (1 + float(sheet["taylor.logit"].max()) * entropy) / 10)
    floor = 1e3 * float(np.finfo(float).eps) * change
    first, second, third = _derivatives(stencil[1], unit * WIDTHS["stencil"])
    radius = min(_over(2 * first, second), _over(3 * second, third))
    radius = radius if math.isfinite(first + second + third) else math.nan
    errors, smooth, slope, order = dict.fromkeys(("naive", "rb", "per_token")), True, None, None
    if "taylor.d_seq_logp" in sheet:
        d_s, d_r = sheet.terms("taylor", "d_seq_logp d_rb_sum")
        # d/dη of Σŵf: Σŵ(f − Ĥ)·D_vS + ŵ·D_vf
        naive, rb = (
            (w * terms(f - (w * f).sum()) * d_s + w * d_f).sum()
            for f, d_f in ((-s, -d_s), (r, d_r))
        )
        slope = rb
        errors["naive"], errors["rb"], smooth = _identities(sheet, (naive, rb), unit, change)
        if smooth and errors["rb"] is not None and not sheet.restricted:
            # D of Σŵf/ΣŵT, over the size of the terms of rb
            mean, h = lengths.mean(), r.mean() / lengths.mean()
            own = (d_r.value + (r - h * lengths) * d_s.value).mean() / mean
            found = _derivatives(stencil[2], unit * WIDTHS["stencil"])[0]
            errors["per_token"] = _over(found - own, rb.size / mean)
        remainders = delta - rb.value * etas, opposite + rb.value * etas
        order = _order(etas, *remainders, floor, ORDER_RANGE * radius)
    trusted = slice(None)
    if "taylor.delta_h_there" in sheet:
        least = max(abs(first), TRUSTED * (slope.size if slope else 0.0)) * etas
        off = np.abs(sheet["taylor.delta_h_there"] - delta)
        trusted = _longest(off <= TRUSTED * np.maximum(np.abs(delta), least))
    known = [float(eta) for eta in etas[trusted]]
    tiny = (few <= 1.5e-4 * unit) & (few <= _smooth_up_to(few, asymmetry <= LIKE * moved))
    moves, of_delta = bool(moved.any()), _order(etas, delta, -opposite, floor, SLOPE_RANGE * radius)
    figures = {
        "taylor_eta_min": float(etas[0]),
        "taylor_eta_max": float(etas[-1]),
        "taylor_radius": radius,
        "taylor_slope": slope,
        # what is left once the slope is taken off may be no more than a thousand roundings
        "taylor_order": Terms(order, 1e3) if smooth and order is not None else None,
        "delta_h_slope": of_delta if smooth else None,
        "logit_slope": _loglog(few[tiny], moved[tiny]) if moves else None,
        "logit_monotone": bool((np.diff(moved[tiny]) > 0).all()) if moves else None,
        "trusted_eta_min": min(known, default=None),
        "trusted_eta_max": max(known, default=None),
    }
    for name, error in errors.items():
        figures[f"identity_error_{name}"] = None if error is None else Terms(error, 1.0)
    sheet.write("continuity", **figures)


def _derivatives(at: np.ndarray, h: float) -> tuple[float, float, float]:
    """f′, f″, f‴ at 0 of f(−2h), f(−h), f(h), f(2h) and f(0) = 0, with f₍ₖ₎± the sum and difference at ±kh:

    f′ = (8f₁⁻ − f₂⁻)/12h,   f″ = (16f₁⁺ − f₂⁺)/12h²,   f‴ = (f₂⁻ − 2f₁⁻)/2h³
    """
    below2, below1, above1, above2 = (float(value) for value in at)
    odd1, odd2, even1, even2 = above1 - below1, above2 - below2, above1 + below1, above2 + below2
    return (
        (8 * odd1 - odd2) / (12 * h),
        (16 * even1 - even2) / (12 * h**2),
        (odd2 - 2 * odd1) / (2 * h**3),
    )


def _over(a: float, b: float) -> float:
    """|a/b|, infinite over 0, but 0 of 0."""
    return abs(a) / abs(b) if b else (math.inf if a else 0.0)


def _identities(
    sheet: Sheet, slopes: tuple[Terms, Terms], unit: float, change: float
) -> tuple[float | None, float | None, bool]:
    """|f′ − slope|/size of naive and rb, by the step that crosses no kink, and whether there are none in the range.

    None where both are within the rounding of a difference, 1e-8/h of what is added up in a `change`.
    """
    of: dict[str, list[float | None]] = {}
    for which, width in WIDTHS.items():
        h = unit * width
        found = [_derivatives(row, h)[0] for row in sheet[f"taylor.{which}"][:2]]
        of[which] = [
            None
            if max(slope.size, abs(f)) <= 1e-8 * change / h
            else _over(f - slope.value, slope.size)
            for f, slope in zip(found, slopes, strict=True)
        ]
    short, near, far = (max((e for e in row if e is not None), default=0.0) for row in of.values())
    if short > SHORT and near < short / 10:
        return *([None, None] if SHORT < near < KINKED else of["near"]), False
    return *of["stencil"], not (short <= SHORT and far > KINKED)


def _loglog(etas: np.ndarray, values: np.ndarray) -> float:
    """Least-squares slope of log|f| against log η."""
    if (values == 0).any() or not np.isfinite(values).all():
        return math.nan
    x, y = np.log(etas), np.log(np.abs(values))
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


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
    chosen = chosen[etas[chosen] <= _smooth_up_to(etas[chosen], like[chosen])]
    return _loglog(etas[chosen], values[chosen]) if _spans(etas[chosen]) else None


def _smooth_up_to(etas: np.ndarray, like: np.ndarray) -> float:
    """The last η before the first that is not `like`; infinite where all are, or where too few lie before it."""
    before = etas[: len(etas) if like.all() else int(np.argmin(like))]
    return float(before[-1]) if len(before) < len(etas) and _spans(before) else math.inf


def _spans(etas: np.ndarray) -> bool:
    return len(etas) >= 2 and math.log10(etas[-1] / etas[0]) >= DECADES - 1e-9


def _longest(holds: np.ndarray) -> slice:
    """The longest stretch on which it holds; of equally long ones, the last."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], holds, [False]]).astype(int)))
    stretches = edges.reshape(-1, 2).tolist()
    return slice(*max(stretches, key=lambda s: (s[1] - s[0], s[0]), default=(0, 0)))
