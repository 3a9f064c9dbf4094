"""U_cross, its standard errors and δH₁, from K_nm = X_nᵀPY_m by tensor (MATH.md, one batch and two batches)."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from entropy_probe_checks.audit.batches import update
from entropy_probe_checks.audit.sheet import Line, Sheet
from entropy_probe_checks.audit.terms import Terms, interval, norm, scatter, terms


def learning_rate(sheet: Sheet) -> tuple[float, str]:
    """(lr, where it is from): configured; the largest of the optimizer's; of the initial ones; 1e-4."""
    hyper, configured = sheet.facts["hyper"], sheet.config["first_order"]["lr"]
    now, first = (max((h[n] or 0.0 for h in hyper), default=0.0) for n in ("lr", "initial_lr"))
    found = {
        "first_order.lr": configured or 0.0,
        "optimizer": now,
        "initial_lr: the optimizer's lr is 0, its scheduler has ended": first,
        "default 0.0001: the optimizer's lr is 0 and it has no initial_lr": 1e-4,
    }
    return next((float(lr), source) for source, lr in found.items() if lr > 0)


def write(sheet: Sheet) -> None:
    tensors = list(range(len(sheet.facts["names"])))
    sheet.write("update", lr=learning_rate(sheet)[0])
    if len(set(sheet[f"{update(sheet)}.unit_of_prompt"].tolist())) > 1:
        _first_order(sheet, tensors)
    else:
        sheet.nothing("first_order")
    if update(sheet) == "u":
        _two_batch(sheet, tensors)
    else:
        sheet.nothing("two_batch")


def gram(sheet: Sheet, prefix: str, tensors: list[int]) -> tuple[Terms, Terms, Terms]:
    """Σ_m K_nm, Σ_m K_mn and K_nn of every unit n, of some tensors together: their products add."""
    if f"{prefix}.k" in sheet:
        k = terms(sheet[f"{prefix}.k"][tensors].sum(0))
        return k.sum(1), k.sum(0), k.each(np.diag)
    if sheet.facts["world_size"] == 1:
        sheet.lines.append(Line(prefix, "its sums", "all of it, in one process", math.inf))
    rows, columns, diagonal = sheet[f"{prefix}.sums"][tensors].sum(0).T
    return terms(rows), terms(columns), terms(diagonal)


def row_means(rows: Terms, columns: Terms, diagonal: Terms) -> Terms:
    """r_n = ½[Σ_{m≠n} K_nm + Σ_{m≠n} K_mn]/(U−1), whose mean is U_cross."""
    return (rows + columns - 2 * diagonal) / (2 * (len(rows.value) - 1))


def _first_order(sheet: Sheet, tensors: list[int]) -> None:
    """ζ̂₁ = Σ(r − r̄)²/(U−1), SE = √(4ζ̂₁/U); the jackknife has U_{−u} = (U·U_cross − 2r_u)/(U−2), ζ̂₁ = U/4·SE²."""
    write, (lr, source) = partial(sheet.write, "first_order"), learning_rate(sheet)
    rows, columns, diagonal = gram(sheet, "u.gram", tensors)
    r = row_means(rows, columns, diagonal)
    units, u_cross, size, se = len(r.value), r.mean(), r.size.mean(), 2 * r.se.value
    write(mode=sheet.facts["mode"], estimator=sheet.config["first_order"]["estimator"])
    write(num_units=units, lr=lr, lr_source=source)
    write(u_cross=u_cross, row_means=r.even, diag_sum=diagonal.sum())
    write(bars_dot=rows.sum() / units**2, bars_dot_plain=terms(sheet["sum.plain"]).sum())
    for side in "xy":
        bar = norm(sheet[f"sum.{side}_bar_squared"])
        write(**{f"norm_{side}_sum": len(sheet[f"{update(sheet)}.rewards"]) * bar})
    write(se_plugin=Terms(se, size), zeta1_plugin=Terms(units / 4 * se**2, size**2))
    write(interval=interval(u_cross, se, units - 1))
    jackknife = zeta = None
    if units > 2:
        left = (units * u_cross.value - 2 * r.value) / (units - 2)
        variance = (units - 1) / units * scatter(left)
        jackknife, zeta = Terms(math.sqrt(variance), size), Terms(units / 4 * variance, size**2)
    write(se_jackknife=jackknife, zeta1_jackknife=zeta)
    k = sheet["u.gram.k"].sum(0) if "u.gram.k" in sheet and units > 4 else None
    write(var_unbiased=None if k is None else Terms(unbiased(k, r.value), size**2))
    write(delta_h1=-lr * u_cross, delta_h1_se=Terms(lr * se, lr * size))
    write(delta_h1_by_unit=-lr / units * r.even)

    def of_part(tensors: list[int]) -> dict[str, Terms]:
        own = -lr * row_means(*gram(sheet, "u.gram", tensors)).value
        return {"value": Terms(own.mean(), lr * size), "se": 2 * Terms(own, lr * size + 0 * own).se}

    write(delta_h1_parts=parts(sheet, of_part))


def unbiased(k: np.ndarray, r: np.ndarray) -> float:
    """Unbiased Var(U_cross): with h_ij = ½(K_ij + K_ji), W = mean_{i<j}(h − U_cross)², A = Σ(r − r̄)²·(U−1)/(U−2),

    [4(U−2)(A−W)/(U−4) + 2W]/[U(U−1) + 4(U−2)/(U−4) − 2]
    """
    units, h = len(r), ((k + k.T) / 2)[np.triu_indices(len(r), 1)]
    w, a = ((h - r.mean()) ** 2).mean(), scatter(r) * (units - 1) / (units - 2)
    factor = 4 * (units - 2) / (units - 4)
    return (factor * (a - w) + 2 * w) / (units * (units - 1) + factor - 2)


def _two_batch(sheet: Sheet, tensors: list[int]) -> None:
    """X̄_EᵀPȲ_U, s_k = X_kᵀPȲ_U, t_m = X̄_EᵀPY_m, and Var(δH₁) = lr²·[Var(s)/B_E + Var(t)/B_U − s²_int/(B_E·B_U)] with
    s²_int what is left of K after both; not less than a quarter of its term."""
    write, lr = partial(sheet.write, "two_batch"), learning_rate(sheet)[0]
    of_e, of_u = (
        np.bincount(units) / len(units)
        for units in (sheet["e.unit_of_prompt"], sheet["u.unit_of_prompt"])
    )

    def figures(tensors: list[int]) -> tuple[Terms, Terms, Terms, Terms | None, Terms | None]:
        interaction = None
        if "eu.gram.k" in sheet:
            k = terms(sheet["eu.gram.k"][tensors].sum(0))
            s, t = (k * of_u).sum(1), (k * of_e[:, None]).sum(0)
        else:
            k, s, t = None, *(terms(sheet[f"eu.gram.{n}"][tensors].sum(0)) for n in "st")
        mean, n, m = (s * of_e).sum(), len(s.value), len(t.value)
        if m < 2:  # one unit does not say how others differ
            return s, t, mean, None, None
        variance = s.se.value**2 + t.se.value**2
        if k is not None:
            left = k.value - s.value[:, None] - t.value + mean.value
            interaction = (left**2).sum() / (n - 1) / (m - 1)
            variance = max(variance - interaction / n / m, interaction / n / m / 4)
            interaction = Terms(interaction, s.size.mean() ** 2)
        return s, t, mean, Terms(math.sqrt(variance), s.size.mean()), interaction

    s, t, mean, se, interaction = figures(tensors)
    write(bars_dot=mean, projections=s.even, update_projections=t.even, interaction=interaction)
    write(delta_h1=-lr * mean, delta_h1_se=se and lr * se, conditional_se=lr * s.se)

    def of_part(tensors: list[int]) -> dict[str, Terms | None]:
        _, _, mean, se, _ = figures(tensors)
        return {"value": -lr * mean, "se": se and lr * se}

    write(delta_h1_parts=parts(sheet, of_part))


def parts(sheet: Sheet, of: Callable[[list[int]], dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{table: {label: figure of the tensors with that label}}."""
    tables: dict[str, dict[str, list[int]]] = {"layer": {}, "module": {}, "factor": {}}
    for place, name in enumerate(sheet.facts["names"]):
        for table, label in zip(tables.values(), labels(name), strict=True):
            table.setdefault(label, []).append(place)
    return {t: {label: of(tensors) for label, tensors in by.items()} for t, by in tables.items()}


KINDS = {  # the first that a name holds decides
    "norm": r"(norm|(\b|_)ln)[^.]*\.(modules_to_save\.[^.]+\.)?[^.]+$",
    "attention": r"attn|attention",
    "mlp": r"mlp|ffn|feed_forward|moe|expert|fc[0-9]|dense",
    "embedding": r"embed|wte|wpe",
    "output": r"lm_head|embed_out|output",
}
FACTORS = ("lora_A", "lora_B", "magnitude", "modules_to_save")


def labels(name: str) -> tuple[str, str, str]:
    """(layer, kind of module, what of it is trained) of a parameter, by its name."""
    kind = next((kind for kind, of in KINDS.items() if re.search(of, name.lower())), "other")
    layer = next((f"layer {int(n)}" for n in name.split(".")[1:-1] if n.isdigit()), kind)
    plain = name.replace("lora_embedding_", "lora_")
    own = "bias" if name.endswith("bias") else "weight"
    return layer, kind, next((factor for factor in FACTORS if factor in plain), own)
