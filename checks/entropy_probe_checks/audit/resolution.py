"""What the noise can tell of the next step, and how E grew until it did."""

import math
from typing import Any

from entropy_probe_checks.audit import slopes
from entropy_probe_checks.audit.batches import update
from entropy_probe_checks.audit.change import expansion
from entropy_probe_checks.audit.first_order import learning_rate
from entropy_probe_checks.audit.sheet import Sheet
from entropy_probe_checks.audit.terms import Terms, interval


def write(sheet: Sheet, along: slopes.Along | None) -> None:
    if along is None or sheet.restricted:
        sheet.write("resolution", None)
    else:
        sheet.section("resolution", _resolution(sheet, along))


def _resolution(sheet: Sheet, along: slopes.Along) -> dict[str, Any]:
    """2 SE of the predicted change at η = lr; B·(2 SE/predicted)² prompts; and the interval

    predicted ± t·√(SE² + 2·spread²) of a step with another update batch.
    """
    lr, prompts = learning_rate(sheet)[0], len(sheet["e.logp"])
    token, response = (expansion(sheet, lr, *of) for of in (along.of_tokens, along.of_response))
    mean, se, size = token.mean(), token.se.value, token.size.mean()
    spread, next_step = slopes.spread(slopes.by_unit(sheet, "u.y_dxt"), lr), None
    if sheet.facts["source"][1] == "sampled" and spread:
        fewer = min(prompts, len(sheet[f"{update(sheet)}.rewards"]))
        both = Terms(mean.value, size + spread.size)
        next_step = interval(both, math.hypot(se, math.sqrt(2) * spread.value), fewer - 1)
    target = sheet.config["batch"]["target_se"]
    if target == "2se":
        target = lr * abs(float(sheet["target.terms"].mean())) / 2
    looks = [
        {"num_prompts": n, "se": Terms(_look(sheet, lr, n), size)}
        for n in sheet.facts.get("looks", [])
    ]
    return {
        "per_token": 2 * token.se,
        "per_response": 2 * response.se,
        "prompts_needed": math.ceil(prompts * (2 * se / mean.value) ** 2) if mean.value else None,
        "next_step": next_step,
        "target_se": None if target is None else Terms(float(target), size),
        "looks": looks,
    }


def _look(sheet: Sheet, lr: float, prompts: int) -> float:
    """The SE of the predicted change per token, had E had its first prompts alone."""
    first = {n: values[:prompts] for n, values in sheet.arrays.items() if n.startswith("e.")}
    first["e.gen_lens"] = sheet.lengths("e")[:prompts].ravel()
    part = Sheet(sheet.report, first, sheet.facts)
    return expansion(part, lr, *slopes.per_token(part)).se.value
