"""The Taylor tests: ΔĤ(η) of a few responses against its own derivatives (MATH.md, the realised change)."""

from __future__ import annotations

import math

import numpy as np

from entropy_probe_checks.audit.sheet import Sheet

SLOPE_RANGE, ORDER_RANGE, DECADES = 0.02, 0.1, 1.5
"""Orders hold up to these shares of the radius, over at least so many decades of η."""
SHORT, KINKED, TRUSTED = 1e-7, 1e-4, 0.1
"""A difference with a short step is off by less, with a long one by more where there are kinks; 10 % is trusted."""
LIKE = 0.5
"""What is smooth differs from its mirror image by less than this share of itself."""
WIDTHS = {"stencil": 1e-3, "near": 1e-5, "far": 2e-2}
"""Steps of the five-point rules: log p of the fastest response moves by as much."""


def write(sheet: Sheet) -> None:
    """The fields of section `continuity` that belong to them, where they were made."""
    if not sheet.has("taylor.etas"):
        return
    etas, delta, moved, weights = (
        sheet[f"taylor.{name}"] for name in ("etas", "delta_h", "logits", "weights")
    )
    s, r = sheet["taylor.seq_logp"], sheet["taylor.rb_sum"]
    config, unit = sheet.report["config"], 10 * float(etas[-1])
    if config["generation"]["top_p"] == 1.0:
        sheet.hold("taylor.weights", np.full(s.shape, 1 / s.size).tolist())
    entropy = float((weights * r).sum())
    each = math.sqrt(float(sheet["taylor.gen_lens"].mean()) / s.size)
    terms_of_change = max(entropy, each * (1 + float(sheet["taylor.logit"].max()) * entropy) / 10)
    floor = 1e3 * float(np.finfo(float).eps) * terms_of_change
    first, second, third = _derivatives(sheet["taylor.stencil"][1], unit * WIDTHS["stencil"])
    radius = _radius(first, second, third)
    jvp, size, smooth = None, 0.0, True
    errors: dict[str, float | None] = dict.fromkeys(("naive", "rb", "per_token"))
    if sheet.has("taylor.d_seq_logp"):
        d_s, d_r = sheet["taylor.d_seq_logp"], sheet["taylor.d_rb_sum"]
        terms = {
            name: np.stack([weights * (f - (weights * f).sum()) * d_s, weights * d_f])
            for name, f, d_f in (("naive", -s, -d_s), ("rb", r, d_r))
        }
        jvp, size = float(terms["rb"].sum()), float(np.abs(terms["rb"]).sum())
        of = {
            which: [
                _error(sheet[f"taylor.{which}"][k], terms[name], unit * width, terms_of_change)
                for k, name in enumerate(("naive", "rb"))
            ]
            for which, width in WIDTHS.items()
            if sheet.has(f"taylor.{which}")
        }
        smooth = _kinks(of, errors)
        if smooth and errors["rb"] is not None and config["generation"]["top_p"] == 1.0:
            lengths = sheet["taylor.gen_lens"].astype(np.float64)
            per_token = r.mean() / lengths.mean()
            slope = (d_r + (r - per_token * lengths) * d_s).mean() / lengths.mean()
            found = _derivatives(sheet["taylor.stencil"][2], unit * WIDTHS["stencil"])[0]
            of_size = size / lengths.mean()
            errors["per_token"] = float(abs(found - slope) / of_size) if of_size > 0 else math.inf
    order, opposite = None, sheet["taylor.opposite"]
    if jvp is not None:
        both = delta - jvp * etas, opposite + jvp * etas
        order = _order(etas, *both, floor, ORDER_RANGE * radius)
    asymmetry, some = sheet["taylor.asymmetry"], unit * 10.0 ** np.arange(-8, -3)
    known = etas
    if sheet.has("taylor.delta_h_there"):
        there, looked = sheet["taylor.delta_h_there"], etas > 10**-6.5 * unit
        least = max(abs(first), TRUSTED * size) * etas[looked]
        off = np.abs(there - delta[looked])
        known = etas[looked][_longest(off <= TRUSTED * np.maximum(np.abs(delta[looked]), least))]
    tiny = some <= _smooth_up_to(some, asymmetry <= LIKE * moved)
    moves = bool((moved != 0).any())
    figures = {
        "taylor_eta_min": float(etas[0]),
        "taylor_eta_max": float(etas[-1]),
        "taylor_radius": radius,
        "taylor_slope": jvp,
        "taylor_order": order if smooth else None,
        "delta_h_slope": _order(etas, delta, -opposite, floor, SLOPE_RANGE * radius)
        if smooth
        else None,
        "logit_slope": _loglog(some[tiny], moved[tiny]) if moves else None,
        "logit_monotone": bool((np.diff(moved[tiny]) > 0).all()) if moves else None,
        "trusted_eta_min": float(known[0]) if len(known) else None,
        "trusted_eta_max": float(known[-1]) if len(known) else None,
    }
    figures |= {f"identity_error_{name}": error for name, error in errors.items()}
    # what is left once the slope is taken off may be no more than a thousand roundings
    sizes = {
        "taylor_slope": size,
        "taylor_order": 1e3,
        **{n: 1.0 for n in figures if n.startswith("identity")},
    }
    for name, again in figures.items():
        sheet.write(f"continuity.{name}", again, sizes.get(name))
    grid = unit * 10 ** (0.75 * (np.arange(len(etas)) - (len(etas) - 1)) - 1)
    sheet.hold("taylor.etas", grid.tolist())


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


def _radius(first: float, second: float, third: float) -> float:
    """min(2|f′/f″|, 3|f″/f‴|)."""
    if not math.isfinite(first + second + third):
        return math.nan
    found = []
    for above, below in ((2 * abs(first), abs(second)), (3 * abs(second), abs(third))):
        found.append(above / below if below else (math.inf if above else 0.0))
    return min(found)


def _error(at: np.ndarray, terms: np.ndarray, h: float, change: float) -> float | None:
    """|f′ − Σterms|/Σ|terms|; None where both are within the rounding of a difference, 1e-8/h of what is added up in a
    `change`."""
    found, size = _derivatives(at, h)[0], float(np.abs(terms).sum())
    if max(size, abs(found)) <= 1e-8 * change / h:
        return None
    return abs(found - float(terms.sum())) / size if size else math.inf


def _kinks(of: dict[str, list[float | None]], errors: dict[str, float | None]) -> bool:
    """Whether there are none in the range; `errors` of naive and rb by the step that crosses none."""
    short, near, far = (
        max((e for e in of.get(which, ()) if e is not None), default=0.0) for which in WIDTHS
    )
    errors["naive"], errors["rb"] = of["stencil"]
    if "near" in of and short > SHORT and near < short / 10:
        both = [None, None] if SHORT < near < KINKED else of["near"]
        errors["naive"], errors["rb"] = both
        return False
    return not (short <= SHORT and far > KINKED)


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
    chosen = inside[inside > (lost[-1] if len(lost) else -1)]
    apart = np.abs(values - mirrored)[chosen]
    like = apart <= LIKE * np.maximum(np.abs(values), np.abs(mirrored))[chosen]
    chosen = chosen[etas[chosen] <= _smooth_up_to(etas[chosen], like)]
    return _loglog(etas[chosen], values[chosen]) if _spans(etas[chosen]) else None


def _smooth_up_to(etas: np.ndarray, like: np.ndarray) -> float:
    """The last η before the first that is not `like`; infinite where all are, or where too few lie before it."""
    before = len(etas) if like.all() else int(np.argmin(like))
    return float(etas[before - 1]) if before < len(etas) and _spans(etas[:before]) else math.inf


def _spans(etas: np.ndarray) -> bool:
    return len(etas) >= 2 and math.log10(etas[-1] / etas[0]) >= DECADES - 1e-9


def _longest(holds: np.ndarray) -> np.ndarray:
    """True on the longest stretch on which it holds; of equally long ones, the last."""
    best, start = range(0), 0
    for end in range(len(holds) + 1):
        if end == len(holds) or not holds[end]:
            if end > start and end - start >= len(best):
                best = range(start, end)
            start = end + 1
    return np.isin(np.arange(len(holds)), best)
