"""U_cross, its standard errors and δH₁, from K_nm = X_nᵀPY_m by tensor (MATH.md, the cross-prompt U-statistic)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from entropy_probe_checks.audit import student
from entropy_probe_checks.audit.batches import update
from entropy_probe_checks.audit.sheet import Line, Sheet


@dataclass(frozen=True)
class K:
    """Of K: Σ_m K_nm, Σ_m K_mn and K_nn of every unit n; and K itself, where one process has all of it."""

    rows: np.ndarray
    columns: np.ndarray
    diagonal: np.ndarray
    whole: np.ndarray | None

    @property
    def r(self) -> np.ndarray:
        """r_n = ½[Σ_{m≠n} K_nm + Σ_{m≠n} K_mn]/(U−1), whose mean is U_cross."""
        off = (self.rows - self.diagonal) + (self.columns - self.diagonal)
        return off / 2 / (len(off) - 1)

    @property
    def u_cross(self) -> float:
        return math.fsum(self.r) / len(self.r)

    @property
    def size(self) -> float:
        """Mean |K_nm| off the diagonal; of sums what they give."""
        if self.whole is None:
            return float((np.abs(self.rows) + np.abs(self.diagonal)).mean() / (len(self.rows) - 1))
        return float(np.abs(self.whole).mean() + np.abs(self.diagonal).mean() / len(self.rows))


def of_tensors(sheet: Sheet, prefix: str, tensors: list[int]) -> K:
    """K of some tensors together: their products add."""
    if sheet.has(f"{prefix}.k"):
        k = sheet[f"{prefix}.k"][tensors].sum(0)
        return K(k.sum(1), k.sum(0), np.diag(k), k)
    if sheet.facts["world_size"] == 1:
        sheet.lines.append(Line(prefix, "its sums", "all of it, in one process", math.inf))
    rows, columns, diagonal = sheet[f"{prefix}.sums"][tensors].sum(0).T
    return K(rows, columns, diagonal, None)


def learning_rate(sheet: Sheet) -> tuple[float, str]:
    """(lr, where it is from): configured; the largest of the optimizer's; of the initial ones; 1e-4."""
    configured = sheet.report["config"]["first_order"]["lr"]
    now = max((h["lr"] for h in sheet.facts["hyper"]), default=0.0)
    first = max((h["initial_lr"] or 0.0 for h in sheet.facts["hyper"]), default=0.0)
    if configured is not None:
        return configured, "first_order.lr"
    if now > 0:
        return now, "optimizer"
    if first > 0:
        return first, "initial_lr: the optimizer's lr is 0, its scheduler has ended"
    return 1e-4, "default 0.0001: the optimizer's lr is 0 and it has no initial_lr"


def plug_in(k: K) -> tuple[float, float]:
    """(ζ̂₁, SE): Σ(r − r̄)²/(U−1), √(4ζ̂₁/U)."""
    units, mean = len(k.r), k.u_cross
    zeta = math.fsum((r - mean) ** 2 for r in k.r) / (units - 1)
    return zeta, math.sqrt(4 * zeta / units)


def jackknife(k: K) -> tuple[float | None, float | None]:
    """(ζ̂₁, SE) from U without each unit in turn, which is (Σ_all − Σ_own)/((U−1)(U−2))."""
    units = len(k.r)
    if units < 3:
        return None, None
    own = [2 * (units - 1) * r for r in k.r]
    total = math.fsum(own) / 2
    left = [(total - o) / (units - 1) / (units - 2) for o in own]
    centre = math.fsum(left) / units
    variance = (units - 1) / units * math.fsum((x - centre) ** 2 for x in left)
    return units / 4 * variance, math.sqrt(variance)


def unbiased(k: K) -> float | None:
    """Unbiased Var(U_cross): with h_ij = ½(K_ij + K_ji), W = mean_{i<j}(h − U)², A = Σ(r − r̄)²·(U−1)/(U−2), it is
    [4(U−2)(A−W)/(U−4) + 2W]/[U(U−1) + 4(U−2)/(U−4) − 2]."""
    units, mean = len(k.r), k.u_cross
    if units < 5 or k.whole is None:
        return None
    pairs = [
        ((k.whole[i, j] + k.whole[j, i]) / 2 - mean) ** 2
        for i in range(units)
        for j in range(i + 1, units)
    ]
    w = math.fsum(pairs) / len(pairs)
    a = math.fsum((r - mean) ** 2 for r in k.r) * (units - 1) / (units - 2)
    factor = 4 * (units - 2) / (units - 4)
    return (factor * (a - w) + 2 * w) / (units * (units - 1) + factor - 2)


def write(sheet: Sheet) -> None:
    names, u = list(range(len(sheet.facts["names"]))), update(sheet)
    k = of_tensors(sheet, "u.gram", names)
    units, (lr, source) = len(k.rows), learning_rate(sheet)
    sheet.write("update.lr", float(lr))
    if units == 1:
        sheet.write("first_order", None)
        _two_batches(sheet, names, lr)
        return
    zeta, se = plug_in(k)
    zeta_jackknife, se_jackknife = jackknife(k)
    half = student.quantile(0.95, units - 1) * se
    size, prompts = k.size, len(sheet[f"{u}.rewards"])
    spread = size**2
    lines = {
        "mode": (sheet.facts["mode"], None),
        "estimator": (sheet.report["config"]["first_order"]["estimator"], None),
        "num_units": (units, None),
        "u_cross": (k.u_cross, size),
        "zeta1_plugin": (zeta, spread),
        "zeta1_jackknife": (zeta_jackknife, spread),
        "se_plugin": (se, size),
        "se_jackknife": (se_jackknife, size),
        "var_unbiased": (unbiased(k), spread),
        "interval": ([k.u_cross - half, k.u_cross + half], size + half),
        "bars_dot": (math.fsum(k.rows) / units**2, size),
        "bars_dot_plain": (math.fsum(sheet["sum.plain"]), float(np.abs(sheet["sum.plain"]).sum())),
        "diag_sum": (math.fsum(k.diagonal), units * size),
        "row_means": (list(k.r), size),
        "norm_x_sum": (prompts * math.sqrt(math.fsum(sheet["sum.x_bar_squared"])), None),
        "norm_y_sum": (prompts * math.sqrt(math.fsum(sheet["sum.y_bar_squared"])), None),
        "lr": (float(lr), None),
        "lr_source": (source, None),
        "delta_h1": (-lr * k.u_cross, lr * size),
        "delta_h1_se": (lr * se, lr * size),
        "delta_h1_by_unit": ([-lr * r / units for r in k.r], lr * size),
    }
    for name, (again, terms) in lines.items():
        sheet.write(f"first_order.{name}", again, terms)

    def of_part(tensors: list[int]) -> dict[str, float | None]:
        part = of_tensors(sheet, "u.gram", tensors)
        return {"value": -lr * part.u_cross, "se": lr * plug_in(part)[1]}

    sheet.write("first_order.delta_h1_parts", parts(sheet, of_part), lr * size)
    if u == "u":
        _two_batches(sheet, names, lr)
    else:
        sheet.write("two_batch", None)


def parts(sheet: Sheet, of: Callable[[list[int]], dict[str, float | None]]) -> dict[str, dict]:
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


def _two_batches(sheet: Sheet, names: list[int], lr: float) -> None:
    """X̄_EᵀPȲ_U, s_k = X_kᵀPȲ_U, t_m = X̄_EᵀPY_m, and the SEs of s, t and what is left of K after both."""
    sizes = [np.bincount(sheet[f"{which}.unit_of_prompt"]) for which in ("e", "u")]
    weights = [of / of.sum() for of in sizes]

    def moments(tensors: list[int]) -> tuple:
        if sheet.has("eu.gram.k"):
            k = sheet["eu.gram.k"][tensors].sum(0)
            s, t = k @ weights[1], weights[0] @ k
        else:
            k = None
            s, t = (sheet[f"eu.gram.{side}"][tensors].sum(0) for side in ("s", "t"))
        mean = math.fsum(weights[0] * s)
        var_s, var_t = (float(of.var(ddof=1)) / len(of) if len(of) > 1 else 0.0 for of in (s, t))
        interaction, total = None, var_s + var_t
        if k is not None and len(t) > 1:
            left = [
                (k[i, j] - s[i] - t[j] + mean) ** 2 for i in range(len(s)) for j in range(len(t))
            ]
            interaction = math.fsum(left) / (len(s) - 1) / (len(t) - 1)
            once = interaction / len(s) / len(t)
            total = max(total - once, once / 4)
        se = math.sqrt(total) if len(t) > 1 else None  # one unit does not say how others differ
        return mean, s, t, interaction, math.sqrt(var_s), se

    mean, s, t, interaction, given, total = moments(names)
    size = float(np.abs(s).mean() + np.abs(t).mean())
    if sheet.has("eu.gram.k"):
        size = float(np.abs(sheet["eu.gram.k"].sum(0)).mean())
    lines = {
        "bars_dot": (mean, size),
        "delta_h1": (-lr * mean, lr * size),
        "delta_h1_se": (None if total is None else lr * total, lr * size),
        "conditional_se": (lr * given, lr * size),
        "projections": (list(s), size),
        "update_projections": (list(t), size),
        "interaction": (interaction, size**2),
    }
    for name, (again, terms) in lines.items():
        sheet.write(f"two_batch.{name}", again, terms)

    def of_part(tensors: list[int]) -> dict[str, float | None]:
        value, *_, se = moments(tensors)
        return {"value": -lr * value, "se": None if se is None else lr * se}

    sheet.write("two_batch.delta_h1_parts", parts(sheet, of_part), lr * size)
