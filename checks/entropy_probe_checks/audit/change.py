"""ΔĤ(η) by self-normalised importance sampling, and how far the prediction is from it (MATH.md, realised change)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from entropy_probe_checks.audit import student, tail
from entropy_probe_checks.audit.entropy import cluster_se
from entropy_probe_checks.audit.first_order import learning_rate
from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.slopes import Along, Slope, both_coefficients


@dataclass(frozen=True)
class Change:
    """ΔĤ, its influence by response, and the size of its terms."""

    value: float
    influence: np.ndarray
    size: float

    @property
    def se(self) -> float:
        return cluster_se(self.influence)

    @property
    def interval(self) -> list[float]:
        half = student.quantile(0.95, len(self.influence) - 1) * self.se
        return [self.value - half, self.value + half]


def write(sheet: Sheet, along: Along | None) -> None:
    for k, eta in enumerate(_grid(sheet, along)):
        sheet.write(f"entropy_change.{k}.eta", eta)
    for k, eta in enumerate(sheet.facts["etas"]):
        _row(sheet, k, float(eta), along)


def _grid(sheet: Sheet, along: Along | None) -> list[float]:
    """0, lr and the configured η; or of the smaller of lr and the η at which exp(−η²·Var D_vS) is `min_ess_fraction`
    ± 10^−½ and ± 10^−1 (`auto`), or ± five, two a decade down from it (`fine`). And ± the reach of the prediction,
    where that is smaller."""
    if along is None:
        return [0.0]
    config, (lr, _) = sheet.report["config"]["true_delta_h"], learning_rate(sheet)
    if not isinstance(config["etas"], str):
        return sorted({0.0, lr, *map(float, config["etas"])})
    spread, end = float(along.d_s.var(ddof=1)), lr
    if spread > 0:
        end = min(lr, math.sqrt(-math.log(config["min_ess_fraction"]) / spread) or lr)
    steps = [end / 10 ** (k / 2) for k in ((1, 2) if config["etas"] == "auto" else range(5))]
    if 0 < along.reach < steps[-1]:
        steps.append(along.reach)
    return sorted({0.0, lr, *steps, *(-step for step in steps)})


def weights(log_weights: np.ndarray, clip: float | None = None) -> tuple[np.ndarray, float]:
    """(ŵ = w/Σw, ESS = (Σw)²/Σw²) of w = exp(log w), cut to [−clip, clip]."""
    cut = log_weights if clip is None else np.minimum(np.maximum(log_weights, -clip), clip)
    w = np.exp(cut - cut.max())
    return w / w.sum(), float(w.sum() ** 2 / (w**2).sum())


def change(
    before: np.ndarray,
    after: np.ndarray,
    w: np.ndarray,
    w_after: np.ndarray,
    lengths: tuple[np.ndarray, np.ndarray] | None,
) -> Change:
    """Ĥ⁺ − Ĥ with Ĥ = Σŵf/ΣŵT (T = 1 without lengths), and φ = N·[ŵ⁺(f⁺ − Ĥ⁺T)/Σŵ⁺T − ŵ(f − ĤT)/ΣŵT]."""
    t, t_after = lengths or (np.ones_like(before), np.ones_like(after))
    h, h_after = (
        (w * before).sum() / (w * t).sum(),
        (w_after * after).sum() / (w_after * t_after).sum(),
    )
    influence = w_after * (after - h_after * t_after) / (w_after * t_after).sum()
    influence = before.size * (influence - w * (before - h * t) / (w * t).sum())
    size = (w * np.abs(before)).sum() / (w * t).sum()
    return Change(float(h_after - h), influence, float(size))


def by_tokens(sheet: Sheet, k: int) -> tuple[Change, Change]:
    """ΔH per response and per token by the performance difference, at the k-th η:

    D = Σ_t w_{<t}·[(H_t⁺ − H_t) + (ρ_t − 1)·c_t],  E the same of the length (H = H⁺ = 1),  w_{<t} = Π_{s<t} ρ_s

    ΔH = mean D;  Δh = (ΔH − h·mean E)/(L + mean E), with the influence of `slopes._per_token`.
    """
    logp, entropy = sheet["e.logp"], sheet["e.entropy"]
    rho = np.exp(sheet[f"after.{k}.logp"] - logp)
    before = np.ones_like(rho)
    np.cumprod(rho[..., :-1], -1, out=before[..., 1:])
    step = np.expm1(sheet[f"after.{k}.logp"] - logp)
    of_entropy, of_length = both_coefficients(sheet)
    own = before * (sheet[f"after.{k}.entropy"] - entropy), before * step * of_entropy
    d, e = (own[0] + own[1]).sum(-1), (before * step * of_length).sum(-1)
    size = sum(float(np.abs(part).sum(-1).mean()) for part in own)
    r = entropy.sum(-1)
    lengths = sheet["e.gen_lens"].reshape(r.shape).astype(np.float64)
    h, mean, longer = r.mean() / lengths.mean(), lengths.mean(), e.mean()
    change = (d - h * e).mean() / (mean + longer)
    influence = d - h * e - change * (lengths + e) - longer * (r - h * lengths) / mean
    influence = (influence - influence.mean()) / (mean + longer)
    return (
        Change(float(d.mean()), d - d.mean(), size + float(r.mean())),
        Change(float(change), influence, (size + float(r.mean())) / mean),
    )


def _row(sheet: Sheet, k: int, eta: float, along: Along | None) -> None:
    config = sheet.report["config"]["true_delta_h"]
    restricted = sheet.report["config"]["generation"]["top_p"] < 1
    s, s_q, r = (sheet[f"e.{name}"].sum(-1) for name in ("logp", "logq", "entropy"))
    lengths = sheet["e.gen_lens"].reshape(s.shape).astype(np.float64)
    s_after, r_after = sheet[f"after.{k}.logp"].sum(-1), sheet[f"after.{k}.entropy"].sum(-1)
    clip, log_w = config["clip_log_weight"], s_after - s_q
    w, ess = weights(log_w, clip)
    _, unclipped = weights(log_w)
    clipped = 0 if clip is None else int((np.abs(log_w) > clip).sum())
    k_hat, smooth = None, log_w.ravel()
    if log_w.size >= 64 and unclipped / log_w.size < 0.95:
        smooth, k_hat = tail.smoothed(log_w.ravel())
    enough = unclipped / log_w.size >= config["min_ess_fraction"]
    heavy = k_hat is not None and k_hat > config["max_pareto_k"]
    method, reliable, used = "snis", enough and not heavy and not clipped, w
    if config["fallback"] == "psis" and eta != 0 and not reliable and k_hat is not None:
        method, reliable = "psis", not heavy
        used = weights(smooth)[0].reshape(w.shape)
    now = weights(s - s_q, clip)[0]
    t_after = lengths
    if sheet.has(f"fresh.{k}.logp"):
        method, reliable = "resample", True
        s_after, r_after = (sheet[f"fresh.{k}.{name}"].sum(-1) for name in ("logp", "entropy"))
        t_after = sheet[f"fresh.{k}.gen_lens"].reshape(s.shape).astype(np.float64)
        now = used = np.full_like(s, 1 / s.size)
    both = lengths, t_after
    is_per_token = config["normalize"] == "per_token"
    naive, rb = (
        change(before, after, now, used, both if is_per_token else None)
        for before, after in ((-s, -s_after), (r, r_after))
    )
    naive_token, rb_token = (
        change(before, after, now, used, both) for before, after in ((-s, -s_after), (r, r_after))
    )
    size_w = float(np.abs(log_w).max() + np.abs(s).mean())
    ordered = np.sort(log_w.ravel())
    figures = {
        "eta": (eta, None),
        "ess": (ess, None),
        "ess_fraction": (ess / log_w.size, None),
        "unclipped_ess_fraction": (unclipped / log_w.size, None),
        "pareto_k": (k_hat, 1.0),
        "clip_fraction": (clipped / log_w.size, None),
        "log_weight_min": (float(ordered[0]), size_w),
        "log_weight_median": (float(ordered[(len(ordered) - 1) // 2]), size_w),
        "log_weight_max": (float(ordered[-1]), size_w),
        "method": (method, None),
        "reliable": (bool(reliable), None),
        "restricted": (restricted, None),
    }
    for name, of in (
        ("delta_h", naive),
        ("delta_h_rb", rb),
        ("delta_h_per_token", rb_token),
        ("delta_h_per_token_naive", naive_token),
    ):
        figures[name] = (of.value, of.size)
        figures[f"{name}_se"] = (of.se, of.size)
        if name != "delta_h_per_token_naive":
            figures[f"{name}_interval"] = (of.interval, of.size + of.se)
    figures["delta_h_rb_by_prompt"] = ([float(own.mean()) for own in rb.influence], rb.size)
    pair: tuple[Change | None, Change | None] = (None, None)
    if along is not None and not restricted:
        whole, token = by_tokens(sheet, k)
        pair = (token if is_per_token else whole), token
    for name, of in zip(("delta_h_pd", "delta_h_per_token_pd"), pair, strict=True):
        figures[name] = (of and of.value, of and of.size)
        figures[f"{name}_se"] = (of and of.se, of and of.size)
        figures[f"{name}_interval"] = (of and of.interval, of and of.size + of.se)
    own = pair[0] and [float(row.mean()) for row in pair[0].influence]
    figures["delta_h_pd_by_prompt"] = (own, pair[0] and pair[0].size)
    plain = method == "snis" and not clipped
    realised = pair[0] if plain and pair[0] else rb
    realised_token = pair[1] if plain and pair[1] else rb_token
    near = unclipped / log_w.size >= config["min_ess_fraction"]
    figures |= _predicted(sheet, eta, realised, along, reliable, near)
    figures |= _predicted_per_token(sheet, eta, realised_token, along)
    for name, (again, size) in figures.items():
        sheet.write(f"entropy_change.{k}.{name}", again, size)


def _predicted(
    sheet: Sheet, eta: float, rb: Change, along: Along | None, reliable: bool, near: bool
) -> dict[str, tuple]:
    """η·slope + ½η²·curvature, with the SE of its terms by prompt; realised minus predicted, with that of the
    difference. Where the slope has terms of blocks, those of the others are averaged in each block first."""
    names = ("predicted", "predicted_se", "difference", "difference_se", "ratio", "in_range")
    if along is None or sheet.report["config"]["generation"]["top_p"] < 1:
        return dict.fromkeys(names, (None, None))
    own = expansion(sheet, eta, along.slope, along.curvature)
    value, size, of_difference = own.value, own.size, own.se_of(rb)
    ratio = ratio_size = None
    if value != 0:
        ratio = rb.value / value
        ratio_size = rb.size / abs(value) + abs(ratio) * size / abs(value)
    return {
        "predicted": (value, size),
        "predicted_se": (own.se, size),
        "difference": (rb.value - value, size + rb.size),
        "difference_se": (of_difference, size + rb.size),
        "ratio": (ratio, ratio_size),
        "in_range": (bool(reliable and near and abs(eta) <= along.reach), None),
    }


def _predicted_per_token(
    sheet: Sheet, eta: float, realised: Change, along: Along | None
) -> dict[str, tuple]:
    names = [f"{n}_per_token{se}" for n in ("predicted", "difference") for se in ("", "_se")]
    restricted = sheet.report["config"]["generation"]["top_p"] < 1
    if along is None or restricted:
        return dict.fromkeys(names, (None, None))
    own = expansion(sheet, eta, *along.of_tokens)
    found = (own.value, own.se, realised.value - own.value, own.se_of(realised))
    sizes = (own.size, own.size, own.size + realised.size, own.size + realised.size)
    return dict(zip(names, zip(found, sizes, strict=True), strict=True))


@dataclass(frozen=True)
class Expansion:
    """η·slope + ½η²·curvature: its terms, of prompts, or of blocks of prompts (`unit_of`)."""

    value: float
    size: float
    terms: np.ndarray
    unit_of: np.ndarray | None

    @property
    def se(self) -> float:
        return _se(self.terms)

    def se_of(self, realised: Change) -> float:
        """The SE of realised minus this."""
        return _se(_of_units(realised.influence.mean(1), self.unit_of) - self.terms)


def expansion(sheet: Sheet, eta: float, slope: Slope, curvature: Slope) -> Expansion:
    unit_of = None if len(slope.terms) == len(curvature.terms) else sheet["e.unit_of_prompt"]
    terms = eta * slope.terms + eta**2 / 2 * _of_units(curvature.terms, unit_of)
    value = eta * slope.value + eta**2 / 2 * curvature.value
    return Expansion(value, abs(eta) * slope.size + eta**2 / 2 * curvature.size, terms, unit_of)


def _of_units(terms: np.ndarray, unit_of: np.ndarray | None) -> np.ndarray:
    return terms if unit_of is None else np.bincount(unit_of, weights=terms) / np.bincount(unit_of)


def _se(terms: np.ndarray) -> float:
    return float(terms.std(ddof=1)) / math.sqrt(len(terms))
