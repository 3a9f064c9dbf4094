"""U_cross, its standard errors and δH₁, from K_nm = X_nᵀPY_m by tensor (MATH.md, one batch and two batches)."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from entropy_probe_checks.audit.batches import update
from entropy_probe_checks.audit.sheet import Line, Sheet
from entropy_probe_checks.audit.terms import Terms, interval, scatter, terms


@dataclass(frozen=True)
class K:
    """Σ_m K_nm, Σ_m K_mn and K_nn of every unit n; and K itself, where one process has all of it."""

    rows: Terms
    columns: Terms
    diagonal: Terms
    whole: np.ndarray | None

    @property
    def r(self) -> Terms:
        """r_n = ½[Σ_{m≠n} K_nm + Σ_{m≠n} K_mn]/(U−1), whose mean is U_cross."""
        off = (self.rows - self.diagonal) + (self.columns - self.diagonal)
        return off / (2 * (len(off.value) - 1))


def of_tensors(sheet: Sheet, prefix: str, tensors: list[int]) -> K:
    """K of some tensors together: their products add."""
    if sheet.has(f"{prefix}.k"):
        k = terms(sheet[f"{prefix}.k"][tensors].sum(0))
        return K(k.sum(1), k.sum(0), k.each(np.diag), k.value)
    if sheet.facts["world_size"] == 1:
        sheet.lines.append(Line(prefix, "its sums", "all of it, in one process", math.inf))
    rows, columns, diagonal = sheet[f"{prefix}.sums"][tensors].sum(0).T
    return K(terms(rows), terms(columns), terms(diagonal), None)


def learning_rate(sheet: Sheet) -> tuple[float, str]:
    """(lr, where it is from): configured; the largest of the optimizer's; of the initial ones; 1e-4."""
    configured = sheet.config["first_order"]["lr"]
    now = max((h["lr"] for h in sheet.facts["hyper"]), default=0.0)
    first = max((h["initial_lr"] or 0.0 for h in sheet.facts["hyper"]), default=0.0)
    if configured is not None:
        return configured, "first_order.lr"
    if now > 0:
        return now, "optimizer"
    if first > 0:
        return first, "initial_lr: the optimizer's lr is 0, its scheduler has ended"
    return 1e-4, "default 0.0001: the optimizer's lr is 0 and it has no initial_lr"


def write(sheet: Sheet) -> None:
    tensors = list(range(len(sheet.facts["names"])))
    sheet.write("update.lr", float(learning_rate(sheet)[0]))
    k, two = of_tensors(sheet, "u.gram", tensors), update(sheet) == "u"
    if len(k.rows.value) > 1:
        sheet.section("first_order", _first_order(sheet, k))
    else:
        sheet.write("first_order", None)
    if two:
        sheet.section("two_batch", _two_batch(sheet, tensors))
    else:
        sheet.write("two_batch", None)


def se_plugin(r: Terms) -> float:
    """√(4ζ̂₁/U), ζ̂₁ = Σ(r − r̄)²/(U−1)."""
    units = len(r.value)
    return math.sqrt(4 * scatter(r.value) / (units - 1) / units)


def _first_order(sheet: Sheet, k: K) -> dict[str, Any]:
    r, (lr, source) = k.r, learning_rate(sheet)
    units, u_cross, se = len(r.value), r.mean(), se_plugin(r)
    size = float(u_cross.size)
    jackknife = None
    if units > 2:  # U_{−u} = (U·U_cross − 2r_u)/(U−2)
        left = (units * u_cross.value - 2 * r.value) / (units - 2)
        jackknife = (units - 1) / units * scatter(left)
    prompts = len(sheet[f"{update(sheet)}.rewards"])

    def of_part(tensors: list[int]) -> dict[str, Terms]:
        own = of_tensors(sheet, "u.gram", tensors).r
        return {
            "value": Terms(-lr * own.value.mean(), lr * size),
            "se": Terms(lr * se_plugin(own), lr * size),
        }

    return {
        "mode": sheet.facts["mode"],
        "estimator": sheet.config["first_order"]["estimator"],
        "num_units": units,
        "u_cross": u_cross,
        "zeta1_plugin": Terms(units / 4 * se**2, size**2),
        "zeta1_jackknife": None if jackknife is None else Terms(units / 4 * jackknife, size**2),
        "se_plugin": Terms(se, size),
        "se_jackknife": None if jackknife is None else Terms(math.sqrt(jackknife), size),
        "var_unbiased": unbiased(k, size),
        "interval": interval(u_cross, se, units - 1),
        "bars_dot": k.rows.sum() / units**2,
        "bars_dot_plain": terms(sheet["sum.plain"]).sum(),
        "diag_sum": k.diagonal.sum(),
        "row_means": r,
        "norm_x_sum": prompts * math.sqrt(math.fsum(sheet["sum.x_bar_squared"])),
        "norm_y_sum": prompts * math.sqrt(math.fsum(sheet["sum.y_bar_squared"])),
        "lr": float(lr),
        "lr_source": source,
        "delta_h1": -lr * u_cross,
        "delta_h1_se": Terms(lr * se, lr * size),
        "delta_h1_by_unit": -lr / units * r,
        "delta_h1_parts": parts(sheet, of_part),
    }


def unbiased(k: K, size: float) -> Terms | None:
    """Unbiased Var(U_cross): with h_ij = ½(K_ij + K_ji), W = mean_{i<j}(h − U_cross)², A = Σ(r − r̄)²·(U−1)/(U−2),

    [4(U−2)(A−W)/(U−4) + 2W]/[U(U−1) + 4(U−2)/(U−4) − 2]
    """
    r = k.r.value
    units = len(r)
    if units < 5 or k.whole is None:
        return None
    h = (k.whole + k.whole.T)[np.triu_indices(units, 1)] / 2
    w, a = ((h - r.mean()) ** 2).mean(), scatter(r) * (units - 1) / (units - 2)
    factor = 4 * (units - 2) / (units - 4)
    return Terms((factor * (a - w) + 2 * w) / (units * (units - 1) + factor - 2), size**2)


def _two_batch(sheet: Sheet, tensors: list[int]) -> dict[str, Any]:
    """X̄_EᵀPȲ_U, s_k = X_kᵀPȲ_U, t_m = X̄_EᵀPY_m, and the SEs of s, t and what is left of K after both."""
    lr = learning_rate(sheet)[0]
    of_e, of_u = (
        np.bincount(units) / len(units)
        for units in (sheet["e.unit_of_prompt"], sheet["u.unit_of_prompt"])
    )

    def figures(tensors: list[int]) -> dict[str, Any]:
        k = None
        if sheet.has("eu.gram.k"):
            k = terms(sheet["eu.gram.k"][tensors].sum(0))
            s, t = (k * of_u).sum(1), (k * of_e[:, None]).sum(0)
        else:
            s, t = (terms(sheet[f"eu.gram.{side}"][tensors].sum(0)) for side in "st")
        mean, size, (n, m) = (s * of_e).sum(), s.size.mean(), (len(s.value), len(t.value))
        var_s, var_t = (x.se.value**2 if x.se else 0.0 for x in (s, t))
        interaction, variance = None, var_s + var_t
        if k is not None and m > 1:
            left = k.value - s.value[:, None] - t.value + mean.value
            interaction = Terms((left**2).sum() / (n - 1) / (m - 1), size**2)
            once = interaction.value / n / m
            variance = max(variance - once, once / 4)
        # one unit does not say how others differ
        se = Terms(lr * math.sqrt(variance), lr * size) if m > 1 else None
        return {
            "bars_dot": mean,
            "delta_h1": -lr * mean,
            "delta_h1_se": se,
            "conditional_se": Terms(lr * math.sqrt(var_s), lr * size),
            "projections": s,
            "update_projections": t,
            "interaction": interaction,
        }

    whole = figures(tensors)

    def of_part(tensors: list[int]) -> dict[str, Terms | None]:
        own = figures(tensors)
        return {"value": own["delta_h1"], "se": own["delta_h1_se"]}

    return whole | {"delta_h1_parts": parts(sheet, of_part)}


def parts(sheet: Sheet, of: Callable[[list[int]], dict[str, Any]]) -> dict[str, dict]:
    """{table: {label: figure of the tensors with that label}}."""
    tables: dict[str, dict[str, list[int]]] = {"layer": {}, "module": {}, "factor": {}}
    for place, name in enumerate(sheet.facts["names"]):
        for table, label in zip(tables, labels(name), strict=True):
            tables[table].setdefault(label, []).append(place)
    return {t: {label: of(tensors) for label, tensors in by.items()} for t, by in tables.items()}


KINDS = (  # the first that a name holds decides
    ("norm", r"(norm|(\b|_)ln)[^.]*\.(modules_to_save\.[^.]+\.)?[^.]+$"),
    ("attention", r"attn|attention"),
    ("mlp", r"mlp|ffn|feed_forward|moe|expert|fc[0-9]|dense"),
    ("embedding", r"embed|wte|wpe"),
    ("output", r"lm_head|embed_out|output"),
)
FACTORS = ("lora_A", "lora_B", "magnitude", "modules_to_save")


def labels(name: str) -> tuple[str, str, str]:
    """(layer, kind of module, what of it is trained) of a parameter, by its name."""
    words = name.split(".")
    kind = next((kind for kind, pattern in KINDS if re.search(pattern, name.lower())), "other")
    layer = next((f"layer {int(word)}" for word in words[1:-1] if word.isdigit()), kind)
    plain = name.replace("lora_embedding_", "lora_")
    own = "bias" if name.endswith("bias") else "weight"
    return layer, kind, next((factor for factor in FACTORS if factor in plain), own)
