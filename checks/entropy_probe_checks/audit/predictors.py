"""Predictors of the change that need no gradient, on U, and the two parts of the slope along v, on E.

−Cov(log p, A);  −mean[A(1 − p)(H + log p)];  −mean[A(S − Σ_i p_i S_i)], S = p(H + log p), over the tokens of the step
"""

import numpy as np

from entropy_probe_checks.audit.batches import advantages, update
from entropy_probe_checks.audit.first_order import learning_rate
from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.slopes import Along
from entropy_probe_checks.audit.terms import Terms, estimate, ratio, terms


def write(sheet: Sheet, along: Along | None) -> None:
    """Section `predictors`."""
    figures = {}
    for name, of in (_of_batch(sheet) | _of_slope(sheet, along)).items():
        figures |= estimate(name, of)
    sheet.section("predictors", figures)


def _of_batch(sheet: Sheet) -> dict[str, Terms | None]:
    which = update(sheet)
    l, h, mean_s = sheet.terms(which, "logp entropy mean_s")
    chosen = np.arange(l.value.shape[2]) < sheet.lengths(which)[..., None]
    if sheet.has(f"{which}.in_step"):
        chosen &= sheet[f"{which}.in_step"].astype(bool)[..., None]
    given = sheet.has(f"{which}.given_advantages")
    a = sheet[f"{which}.given_advantages"] if given else advantages(sheet, which)
    a = terms((a if a.ndim == 3 else a[..., None]) * chosen)
    p, mean_l, mean_a = np.exp(l.value), l.value[chosen].mean(), a.value[chosen].mean()
    products = (l.value - mean_l) * (a.value - mean_a) * chosen
    return {
        name: -ratio(of, chosen)
        for name, of in (
            ("cov_logp_advantage", Terms(products, np.abs(a.value * l.value))),
            ("steer", a * (1 - p) * (h + l)),
            ("wang", a * (p * (h + l) - mean_s)),
        )
    }


def _of_slope(sheet: Sheet, along: Along | None) -> dict[str, Terms | None]:
    """lr·mean[D_vR] over the mean length or over 1, and what is left of the slope."""
    found: dict[str, Terms | None] = {}
    lengths = sheet.lengths("e")
    for end, t in (("", lengths), ("_per_response", np.ones_like(lengths))):
        found |= {f"of_entropies{end}": None, f"of_visits{end}": None}
        if along is not None:
            own = ratio(sheet["e.d_entropy"].sum(-1), t)
            slope = along.plain[bool(end)]
            lr = learning_rate(sheet)[0]
            found |= {f"of_entropies{end}": lr * own, f"of_visits{end}": lr * (slope - own)}
    return found
