"""U_cross, its standard errors and δH₁, from K_nm = X_nᵀPY_m by tensor (MATH.md, one batch and two batches)."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from entropy_probe_checks.audit.sheet import Sheet, interval, se

KINDS = {  # of modules; the first that a name holds decides
    "norm": r"(norm|(\b|_)ln)[^.]*\.(modules_to_save\.[^.]+\.)?[^.]+$",
    "attention": r"attn|attention",
    "mlp": r"mlp|ffn|feed_forward|moe|expert|fc[0-9]|dense",
    "embedding": r"embed|wte|wpe",
    "output": r"lm_head|embed_out|output",
}
FACTORS = ("lora_A", "lora_B", "magnitude", "modules_to_save")
Tensors = slice | list[int]
ALL = slice(None)


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
    sheet.write("update", lr=learning_rate(sheet)[0])
    if sheet[f"{sheet.u}.unit_of_prompt"].any():
        _first_order(sheet)
    else:
        sheet.write("", first_order=None)
    if sheet.u == "u":
        _two_batch(sheet)
    else:
        sheet.write("", two_batch=None)


def gram(
    sheet: Sheet, prefix: str, tensors: Tensors
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """r, Σ_m K_nm and K_nn of every unit n, of some tensors together, whose products add; and the size of r:

    r_n = ½[Σ_{m≠n} K_nm + Σ_{m≠n} K_mn]/(U−1), whose mean is U_cross.
    """
    if f"{prefix}.k" in sheet:
        k = sheet[f"{prefix}.k"][tensors].sum(0)
        rows, columns, diagonal = k.sum(1), k.sum(0), np.diag(k)
    else:
        rows, columns, diagonal = sheet[f"{prefix}.sums"][tensors].sum(0).T
        if sheet.facts["world_size"] == 1:
            sheet.compare(prefix, "its sums", "all of it, in one process")
    others = len(rows) - 1
    size = float((abs(rows) + abs(diagonal)).mean()) / others
    return (rows + columns - 2 * diagonal) / 2 / others, rows, diagonal, size


def _first_order(sheet: Sheet, tensors: Tensors = ALL) -> dict[str, float]:
    """ζ̂₁ = Σ(r − r̄)²/(U−1), SE = √(4ζ̂₁/U); the jackknife has U_{−u} = (U·U_cross − 2r_u)/(U−2), ζ̂₁ = U/4·SE²."""
    write, (lr, source) = partial(sheet.write, "first_order"), learning_rate(sheet)
    r, rows, diagonal, size = gram(sheet, "u.gram", tensors)
    units, u_cross, zeta = len(r), r.mean(), r.var(ddof=1)
    plugin = math.sqrt(4 * zeta / units)
    if tensors is not ALL:
        return {"value": -lr * u_cross, "se": lr * plugin}
    write(mode=sheet.facts["mode"], estimator=sheet.config["first_order"]["estimator"])
    write(num_units=units, lr=lr, lr_source=source)
    write(size, u_cross=u_cross, row_means=r, diag_sum=diagonal.sum())
    write(bars_dot=rows.sum() / units**2, bars_dot_plain=sheet["sum.plain"].sum())
    x, y = (math.sqrt(sheet[f"sum.{side}_bar_squared"].sum()) for side in "xy")
    prompts = len(sheet[f"{sheet.u}.rewards"])
    write(norm_x_sum=prompts * x, norm_y_sum=prompts * y)
    write(size, se_plugin=plugin, interval=interval(u_cross, plugin, units - 1))
    write(size**2, zeta1_plugin=zeta)
    jackknife = of_jackknife = unbiased = None
    if units > 2:
        left = (units * u_cross - 2 * r) / (units - 2)
        jackknife = math.sqrt((units - 1) * left.var())
        of_jackknife = units / 4 * jackknife**2
    if units > 4 and "u.gram.k" in sheet:
        # h_ij = ½(K_ij + K_ji), W = mean_{i<j}(h − U_cross)², A = Σ(r − r̄)²·(U−1)/(U−2):
        # [4(U−2)(A−W)/(U−4) + 2W]/[U(U−1) + 4(U−2)/(U−4) − 2]
        k, factor = sheet["u.gram.k"].sum(0), 4 * (units - 2) / (units - 4)
        h = ((k + k.T) / 2)[np.triu_indices(units, 1)]
        w, a = ((h - u_cross) ** 2).mean(), zeta * (units - 1) ** 2 / (units - 2)
        unbiased = (factor * (a - w) + 2 * w) / (units * (units - 1) + factor - 2)
    write(se_jackknife=jackknife, zeta1_jackknife=of_jackknife, var_unbiased=unbiased)
    write(lr * size, delta_h1=-lr * u_cross, delta_h1_se=lr * plugin)
    write(lr * size, delta_h1_by_unit=-lr * r / units)
    write(lr * size, delta_h1_parts=_parts(sheet, partial(_first_order, sheet)))
    return {}


def _two_batch(sheet: Sheet, tensors: Tensors = ALL) -> dict[str, float | None]:
    """X̄_EᵀPȲ_U, s_k = X_kᵀPȲ_U, t_m = X̄_EᵀPY_m, and Var(δH₁) = lr²·[Var(s)/B_E + Var(t)/B_U − s²_int/(B_E·B_U)] with
    s²_int what is left of K after both; not less than a quarter of its term."""
    write, lr = partial(sheet.write, "two_batch"), learning_rate(sheet)[0]
    blocks = (sheet[f"{which}.unit_of_prompt"] for which in "eu")
    of_e, of_u = (np.bincount(units) / len(units) for units in blocks)
    k = sheet["eu.gram.k"][tensors].sum(0) if "eu.gram.k" in sheet else None
    if k is None:
        s, t = (sheet[f"eu.gram.{side}"][tensors].sum(0) for side in "st")
    else:
        s, t = k @ of_u, of_e @ k
    mean, pairs, error, interaction = of_e @ s, len(s) * len(t), None, None
    if len(t) > 1:  # one unit does not say how others differ
        variance = se(s) ** 2 + se(t) ** 2
        if k is not None:
            left = k - s[:, None] - t + mean
            interaction = (left**2).sum() / (len(s) - 1) / (len(t) - 1)
            variance = max(variance - interaction / pairs, interaction / pairs / 4)
        error = lr * math.sqrt(variance)
    if tensors is ALL:
        write(bars_dot=mean, projections=s, update_projections=t, interaction=interaction)
        write(delta_h1=-lr * mean, delta_h1_se=error, conditional_se=lr * se(s))
        write(delta_h1_parts=_parts(sheet, partial(_two_batch, sheet)))
    return {"value": -lr * mean, "se": error}


def _parts(sheet: Sheet, of: Callable[[Tensors], Any]) -> dict[str, dict[str, Any]]:
    """{table: {label: figure of the tensors with that label}}: by layer, by kind of module, and by what is trained."""
    tables: dict[str, dict[str, list[int]]] = {"layer": {}, "module": {}, "factor": {}}
    for place, name in enumerate(sheet.facts["names"]):
        kind = next((kind for kind, of in KINDS.items() if re.search(of, name.lower())), "other")
        layer = next((f"layer {int(n)}" for n in name.split(".")[1:-1] if n.isdigit()), kind)
        own = "bias" if name.endswith("bias") else "weight"
        plain = name.replace("lora_embedding_", "lora_")
        factor = next((factor for factor in FACTORS if factor in plain), own)
        for table, label in zip(tables.values(), (layer, kind, factor), strict=True):
            table.setdefault(label, []).append(place)
    return {t: {label: of(tensors) for label, tensors in by.items()} for t, by in tables.items()}
