"""What the noise can tell of the next step, and how E grew until it did."""

from __future__ import annotations

import math

import numpy as np

from entropy_probe_checks.audit import slopes, student
from entropy_probe_checks.audit.batches import update
from entropy_probe_checks.audit.change import expansion
from entropy_probe_checks.audit.first_order import learning_rate
from entropy_probe_checks.audit.sheet import Sheet


def write(sheet: Sheet, along: slopes.Along) -> None:
    """Section `resolution`: 2 SE of the predicted change at η = lr; B·(2 SE/predicted)² prompts; and the interval

    predicted ± t·√(SE² + 2·spread²) of a step with another update batch.
    """
    lr, prompts = learning_rate(sheet)[0], len(sheet["e.logp"])
    if sheet.report["config"]["generation"]["top_p"] < 1:
        sheet.write("resolution", None)
        return
    per_token, per_response = (
        expansion(sheet, lr, *of) for of in (along.of_tokens, along.of_response)
    )
    sheet.write("resolution.per_token", 2 * per_token.se, per_token.size)
    sheet.write("resolution.per_response", 2 * per_response.se, per_response.size)
    needed = None
    if per_token.value != 0:
        needed = math.ceil(prompts * (2 * per_token.se / abs(per_token.value)) ** 2)
    sheet.write("resolution.prompts_needed", needed)
    interval, by_unit = None, slopes.by_unit(sheet, "u.y_dxt")
    if sheet.facts["source"][1] == "sampled" and len(by_unit) > 1:
        spread = lr * math.sqrt(len(by_unit) * by_unit.var(ddof=1))
        fewer = min(prompts, len(sheet[f"{update(sheet)}.rewards"]))
        half = student.quantile(0.95, fewer - 1) * math.hypot(per_token.se, math.sqrt(2) * spread)
        interval = [per_token.value - half, per_token.value + half]
    sheet.write(
        "resolution.next_step", interval, per_token.size + lr * float(np.abs(by_unit).sum())
    )
    asked, target = sheet.report["config"]["batch"]["target_se"], None
    if asked is not None:
        target = (
            float(asked) if asked != "2se" else lr * abs(float(sheet["target.terms"].mean())) / 2
        )
    sheet.write("resolution.target_se", target, per_token.size)
    looks = [
        {"num_prompts": size, "se": _look(sheet, lr, size)} for size in sheet.facts.get("looks", [])
    ]
    sheet.write("resolution.looks", looks, per_token.size)


def _look(sheet: Sheet, lr: float, prompts: int) -> float:
    """The SE of the predicted change per token, had E had its first prompts alone."""
    lengths = sheet["e.gen_lens"].reshape(sheet["e.entropy"].shape[:2])[:prompts].ravel()
    first = {
        name: values[:prompts] for name, values in sheet.arrays.items() if name.startswith("e.")
    }
    part = Sheet(sheet.report, first | {"e.gen_lens": lengths}, sheet.facts)
    slope, bent = slopes.per_token(part)
    return slopes.Slope(lr * slope.terms + lr**2 / 2 * bent.terms, 0.0).se
