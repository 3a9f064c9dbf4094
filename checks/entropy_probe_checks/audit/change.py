"""ΔĤ(η) by self-normalised importance sampling, and how far the prediction is from it (MATH.md, realised change)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from entropy_probe_checks.audit import student, tail
from entropy_probe_checks.audit.entropy import cluster_se
from entropy_probe_checks.audit.first_order import learning_rate
from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.slopes import Along


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
    """0, lr and the configured η; or `auto`: ± five, two a decade, down from the smaller of lr and the η at which
    exp(−η²·Var D_vS) is `min_ess_fraction`, and ± the reach of the prediction, where that is smaller."""
    if along is None:
        return [0.0]
    config, (lr, _) = sheet.report["config"]["true_delta_h"], learning_rate(sheet)
    if config["etas"] != "auto":
        return sorted({0.0, lr, *map(float, config["etas"])})
    spread, end = float(along.d_s.var(ddof=1)), lr
    if spread > 0:
        end = min(lr, math.sqrt(-math.log(config["min_ess_fraction"]) / spread) or lr)
    steps = [end / 10 ** (k / 2) for k in range(5)]
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
    figures |= _predicted(
        sheet, eta, rb, along, reliable, unclipped / log_w.size >= config["min_ess_fraction"]
    )
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
    slope, bent, own = along.slope, along.curvature.terms, rb.influence.mean(1)
    if len(slope.terms) != len(own):
        unit_of = sheet["e.unit_of_prompt"]
        sizes = np.bincount(unit_of)
        bent, own = (np.bincount(unit_of, weights=of) / sizes for of in (bent, own))
    terms = eta * slope.terms + eta**2 / 2 * bent
    value = eta * slope.value + eta**2 / 2 * along.curvature.value

    def se(of: np.ndarray) -> float:
        return float(of.std(ddof=1)) / math.sqrt(len(of))

    size = abs(eta) * slope.size + eta**2 / 2 * along.curvature.size
    ratio = ratio_size = None
    if value != 0:
        ratio = rb.value / value
        ratio_size = rb.size / abs(value) + abs(ratio) * size / abs(value)
    return {
        "predicted": (value, size),
        "predicted_se": (se(terms), size),
        "difference": (rb.value - value, size + rb.size),
        "difference_se": (se(own - terms), size + rb.size),
        "ratio": (ratio, ratio_size),
        "in_range": (bool(reliable and near and abs(eta) <= along.reach), None),
    }
