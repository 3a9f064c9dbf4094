"""U_cross, its standard errors and δH₁, from K_nm = X_nᵀPY_m by tensor (MATH.md, one batch and two batches)."""

import math
import re
from functools import partial
from typing import Any

import numpy as np

from entropy_probe_checks.audit.sheet import Array, Sheet, interval, se

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
    if sheet.u == "u":
        _two_batch(sheet)


def gram(sheet: Sheet, prefix: str, groups: Array) -> tuple[Array, Array, Array, float]:
    """r, Σ_m K_nm and K_nn of every unit n, for each of several groups of tensors, whose products add; and the size of
    r of the first group:

    r_n = ½[Σ_{m≠n} K_nm + Σ_{m≠n} K_mn]/(U−1), whose mean is U_cross.
    """
    if f"{prefix}.k" in sheet:
        k = np.tensordot(groups, sheet[f"{prefix}.k"], 1)
        rows, columns, diagonal = k.sum(2), k.sum(1), k.diagonal(0, 1, 2)
    else:
        sums = np.tensordot(groups, sheet[f"{prefix}.sums"], 1)
        rows, columns, diagonal = np.moveaxis(sums, 2, 0)
        if sheet.facts["world_size"] == 1:
            sheet.hold(prefix, "its sums", "all of it, in one process")
    others = rows.shape[1] - 1
    size = float((abs(rows[0]) + abs(diagonal[0])).mean()) / others
    return (rows + columns - 2 * diagonal) / 2 / others, rows, diagonal, size


def _first_order(sheet: Sheet) -> None:
    """ζ̂₁ = Σ(r − r̄)²/(U−1), SE = √(4ζ̂₁/U); the jackknife has U_{−u} = (U·U_cross − 2r_u)/(U−2), ζ̂₁ = U/4·SE²."""
    write, (lr, source) = partial(sheet.write, "first_order"), learning_rate(sheet)
    of_groups, rows, diagonal, size = gram(sheet, "u.gram", _groups(sheet)[1])
    r, units = of_groups[0], of_groups.shape[1]
    u_cross, zeta, plugin = r.mean(), r.var(ddof=1), 2 * se(r)
    write(mode=sheet.facts["mode"], estimator=sheet.config["first_order"]["estimator"])
    write(num_units=units, lr=lr, lr_source=source)
    write(size, u_cross=u_cross, row_means=r, diag_sum=diagonal[0].sum())
    write(bars_dot=rows[0].sum() / units**2, bars_dot_plain=sheet["sum.plain"].sum())
    x, y = (math.sqrt(sheet[f"sum.{side}_bar_squared"].sum()) for side in "xy")
    prompts = len(sheet[f"{sheet.u}.rewards"])
    write(norm_x_sum=prompts * x, norm_y_sum=prompts * y)
    write(size, se_plugin=plugin, interval=interval(u_cross, plugin, units - 1))
    write(size**2, zeta1_plugin=zeta)
    if units > 2:
        left = (units * u_cross - 2 * r) / (units - 2)
        jackknife = math.sqrt((units - 1) * left.var())
        write(size, se_jackknife=jackknife)
        write(size**2, zeta1_jackknife=units / 4 * jackknife**2)
    if units > 4 and "u.gram.k" in sheet:
        # h_ij = ½(K_ij + K_ji), W = mean_{i<j}(h − U_cross)², A = Σ(r − r̄)²·(U−1)/(U−2):
        # [4(U−2)(A−W)/(U−4) + 2W]/[U(U−1) + 4(U−2)/(U−4) − 2]
        k, factor = sheet["u.gram.k"].sum(0), 4 * (units - 2) / (units - 4)
        h = ((k + k.T) / 2)[np.triu_indices(units, 1)]
        w, a = ((h - u_cross) ** 2).mean(), zeta * (units - 1) ** 2 / (units - 2)
        v = (factor * (a - w) + 2 * w) / (units * (units - 1) + factor - 2)
        write(size**2, var_unbiased=v)
    write(lr * size, delta_h1_by_unit=-lr * r / units)
    _write_parts(sheet, "first_order", -lr * of_groups.mean(1), 2 * lr * se(of_groups), lr * size)


def _two_batch(sheet: Sheet) -> None:
    """X̄_EᵀPȲ_U, s_k = X_kᵀPȲ_U, t_m = X̄_EᵀPY_m, and Var(δH₁) = lr²·[Var(s)/B_E + Var(t)/B_U − s²_int/(B_E·B_U)] with
    s²_int what is left of K after both; not less than a quarter of its term."""
    write, lr = partial(sheet.write, "two_batch"), learning_rate(sheet)[0]
    blocks = (sheet[f"{which}.unit_of_prompt"] for which in "eu")
    of_e, of_u = (np.bincount(units) / len(units) for units in blocks)
    (_, groups), k = _groups(sheet), None
    if "eu.gram.k" in sheet:
        k = np.tensordot(groups, sheet["eu.gram.k"], 1)
        s, t = k @ of_u, of_e @ k
    else:
        s, t = (groups @ sums for sums in sheet.of("eu.gram", "s t"))
    mean, errors = s @ of_e, [None] * len(s)
    write(bars_dot=mean[0], projections=s[0], update_projections=t[0], conditional_se=lr * se(s[0]))
    if t.shape[1] > 1:  # one unit does not say how others differ
        variance = se(s) ** 2 + se(t) ** 2
        if k is not None:
            left = k - s[:, :, None] - t[:, None] + mean[:, None, None]
            interaction = (left**2).sum((1, 2)) / (s.shape[1] - 1) / (t.shape[1] - 1)
            write(interaction=interaction[0])
            shared = interaction / s.shape[1] / t.shape[1]
            variance = np.maximum(variance - shared, shared / 4)
        errors = lr * np.sqrt(variance)
    _write_parts(sheet, "two_batch", -lr * mean, errors)


def _groups(sheet: Sheet) -> tuple[list[str], Array]:
    """Groups of tensors, and which tensors are in each: all; by layer, by kind of module, and by what is trained."""
    of_tensors = []
    for name in sheet.facts["names"]:
        kind = next((kind for kind, of in KINDS.items() if re.search(of, name.lower())), "other")
        layer = next((f"layer {int(n)}" for n in name.split(".")[1:-1] if n.isdigit()), kind)
        own = "bias" if name.endswith("bias") else "weight"
        plain = name.replace("lora_embedding_", "lora_")
        factor = next((factor for factor in FACTORS if factor in plain), own)
        of_tensors.append({"", f"layer.{layer}", f"module.{kind}", f"factor.{factor}"})
    groups = sorted(set().union(*of_tensors))
    return groups, np.array([[group in own for own in of_tensors] for group in groups], float)


def _write_parts(sheet: Sheet, section: str, values: Array, errors: Any, size: float = 0.0) -> None:
    """δH₁ of all tensors, and of every group of them."""
    sheet.write(section, size, delta_h1=values[0], delta_h1_se=errors[0])
    for group, value, error in list(zip(_groups(sheet)[0], values, errors, strict=True))[1:]:
        sheet.write(f"{section}.delta_h1_parts.{group}", size, value=value, se=error)
