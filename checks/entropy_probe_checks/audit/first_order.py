"""U_cross, its standard errors and δH₁, from K_nm = X_nᵀPY_m by tensor (MATH.md, one batch and two batches)."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from entropy_probe_checks.audit.sheet import Line, Sheet
from entropy_probe_checks.audit.terms import Terms, interval, norm, scatter, terms

KINDS = {  # of modules; the first that a name holds decides
    "norm": r"(norm|(\b|_)ln)[^.]*\.(modules_to_save\.[^.]+\.)?[^.]+$",
    "attention": r"attn|attention",
    "mlp": r"mlp|ffn|feed_forward|moe|expert|fc[0-9]|dense",
    "embedding": r"embed|wte|wpe",
    "output": r"lm_head|embed_out|output",
}
FACTORS = ("lora_A", "lora_B", "magnitude", "modules_to_save")


def learning_rate(sheet: Sheet) -> tuple[float, str]:
    """(lr, where it is from): configured; the largest of the optimizer's; of the initial ones; 1e-4."""
    hyper = sheet.facts["hyper"]
    found = {
        "first_order.lr": sheet.config["first_order"]["lr"] or 0.0,
        "optimizer": max((h["lr"] for h in hyper), default=0.0),
        "initial_lr: the optimizer's lr is 0, its scheduler has ended": max(
            (h["initial_lr"] or 0.0 for h in hyper), default=0.0
        ),
        "default 0.0001: the optimizer's lr is 0 and it has no initial_lr": 1e-4,
    }
    return next((float(lr), source) for source, lr in found.items() if lr > 0)


def write(sheet: Sheet) -> None:
    sheet.write("update", lr=learning_rate(sheet)[0])
    one_unit = sheet[f"{sheet.u}.unit_of_prompt"].max() == 0
    absent = ["first_order"] * bool(one_unit) + ["two_batch"] * (sheet.u == "e")
    sheet.nothing(*absent)
    tensors = list(range(len(sheet.facts["names"])))
    if "first_order" not in absent:
        _first_order(sheet, tensors)
    if "two_batch" not in absent:
        _two_batch(sheet, tensors)


def gram(sheet: Sheet, prefix: str, tensors: list[int]) -> tuple[Terms, Terms, Terms]:
    """r, Σ_m K_nm and K_nn of every unit n, of some tensors together, whose products add:

    r_n = ½[Σ_{m≠n} K_nm + Σ_{m≠n} K_mn]/(U−1), whose mean is U_cross.
    """
    if f"{prefix}.k" in sheet:
        k = terms(sheet[f"{prefix}.k"][tensors].sum(0))
        rows, columns, diagonal = k.sum(1), k.sum(0), k.each(np.diag)
    else:
        if sheet.facts["world_size"] == 1:
            sheet.lines.append(Line(prefix, "its sums", "all of it, in one process", math.inf))
        rows, columns, diagonal = map(terms, sheet[f"{prefix}.sums"][tensors].sum(0).T)
    r = (rows + columns - 2 * diagonal) / (2 * (len(rows.value) - 1))
    return r, rows, diagonal


def _first_order(sheet: Sheet, tensors: list[int]) -> None:
    """ζ̂₁ = Σ(r − r̄)²/(U−1), SE = √(4ζ̂₁/U); the jackknife has U_{−u} = (U·U_cross − 2r_u)/(U−2), ζ̂₁ = U/4·SE²."""
    write, (lr, source) = partial(sheet.write, "first_order"), learning_rate(sheet)
    r, rows, diagonal = gram(sheet, "u.gram", tensors)
    units, u_cross, size, se = len(r.value), r.mean(), r.size.mean(), 2 * r.se.value
    write(mode=sheet.facts["mode"], estimator=sheet.config["first_order"]["estimator"])
    write(num_units=units, lr=lr, lr_source=source)
    write(u_cross=u_cross, row_means=r, diag_sum=diagonal.sum())
    write(bars_dot=rows.sum() / units**2, bars_dot_plain=terms(sheet["sum.plain"]).sum())
    for side in "xy":
        bar = norm(sheet[f"sum.{side}_bar_squared"])
        write(**{f"norm_{side}_sum": len(sheet[f"{sheet.u}.rewards"]) * bar})
    write(se_plugin=Terms(se, size), zeta1_plugin=Terms(units / 4 * se**2, size**2))
    write(interval=interval(u_cross, se, units - 1))
    jackknife = zeta = unbiased = None
    if units > 2:
        left = (units * u_cross.value - 2 * r.value) / (units - 2)
        variance = (units - 1) / units * scatter(left)
        jackknife, zeta = Terms(math.sqrt(variance), size), Terms(units / 4 * variance, size**2)
    if units > 4 and "u.gram.k" in sheet:
        # h_ij = ½(K_ij + K_ji), W = mean_{i<j}(h − U_cross)², A = Σ(r − r̄)²·(U−1)/(U−2):
        # [4(U−2)(A−W)/(U−4) + 2W]/[U(U−1) + 4(U−2)/(U−4) − 2]
        k, factor = sheet["u.gram.k"].sum(0), 4 * (units - 2) / (units - 4)
        h = ((k + k.T) / 2)[np.triu_indices(units, 1)]
        w, a = ((h - u_cross.value) ** 2).mean(), scatter(r.value) * (units - 1) / (units - 2)
        over = units * (units - 1) + factor - 2
        unbiased = Terms((factor * (a - w) + 2 * w) / over, size**2)
    write(se_jackknife=jackknife, zeta1_jackknife=zeta, var_unbiased=unbiased)
    write(delta_h1=-lr * u_cross, delta_h1_se=Terms(lr * se, lr * size))
    write(delta_h1_by_unit=-lr / units * r)

    def of_part(tensors: list[int]) -> dict[str, Terms]:
        own = lr * gram(sheet, "u.gram", tensors)[0].value
        return {
            "value": Terms(-own.mean(), lr * size),
            "se": Terms(2 * terms(own).se.value, lr * size),
        }

    write(delta_h1_parts=_parts(sheet, of_part))


def _two_batch(sheet: Sheet, tensors: list[int]) -> None:
    """X̄_EᵀPȲ_U, s_k = X_kᵀPȲ_U, t_m = X̄_EᵀPY_m, and Var(δH₁) = lr²·[Var(s)/B_E + Var(t)/B_U − s²_int/(B_E·B_U)] with
    s²_int what is left of K after both; not less than a quarter of its term."""
    write, lr = partial(sheet.write, "two_batch"), learning_rate(sheet)[0]
    blocks = (sheet[f"{which}.unit_of_prompt"] for which in "eu")
    of_e, of_u = (np.bincount(units) / len(units) for units in blocks)

    def figures(tensors: list[int]) -> tuple[Terms, Terms, Terms, Terms | None, Terms | None]:
        if whole := "eu.gram.k" in sheet:
            k = terms(sheet["eu.gram.k"][tensors].sum(0))
            s, t = (k * of_u).sum(1), (k * of_e[:, None]).sum(0)
        else:
            s, t = (terms(sheet[f"eu.gram.{n}"][tensors].sum(0)) for n in "st")
        mean, size, n, m = (s * of_e).sum(), s.size.mean(), len(s.value), len(t.value)
        if m < 2:  # one unit does not say how others differ
            return s, t, mean, None, None
        variance, interaction = s.se.value**2 + t.se.value**2, None
        if whole:
            left = k.value - s.value[:, None] - t.value + mean.value
            once = (left**2).sum() / (n - 1) / (m - 1) / n / m
            variance, interaction = max(variance - once, once / 4), Terms(once * n * m, size**2)
        return s, t, mean, Terms(math.sqrt(variance), size), interaction

    def of_part(tensors: list[int]) -> dict[str, Terms | None]:
        _, _, mean, se, _ = figures(tensors)
        return {"value": -lr * mean, "se": se and lr * se}

    s, t, mean, se, interaction = figures(tensors)
    write(bars_dot=mean, projections=s, update_projections=t, interaction=interaction)
    write(delta_h1=-lr * mean, delta_h1_se=se and lr * se, conditional_se=lr * s.se)
    write(delta_h1_parts=_parts(sheet, of_part))


def _parts(sheet: Sheet, of: Callable[[list[int]], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{table: {label: figure of the tensors with that label}}: by layer, by kind of module, and by what is trained."""
    tables: dict[str, dict[str, list[int]]] = {"layer": {}, "module": {}, "factor": {}}
    for place, name in enumerate(sheet.facts["names"]):
        kind = next((kind for kind, of in KINDS.items() if re.search(of, name.lower())), "other")
        layer = next((f"layer {int(n)}" for n in name.split(".")[1:-1] if n.isdigit()), kind)
        own, plain = (
            "bias" if name.endswith("bias") else "weight",
            name.replace("lora_embedding_", "lora_"),
        )
        factor = next((factor for factor in FACTORS if factor in plain), own)
        for table, label in zip(tables.values(), (layer, kind, factor), strict=True):
            table.setdefault(label, []).append(place)
    return {t: {label: of(tensors) for label, tensors in by.items()} for t, by in tables.items()}
