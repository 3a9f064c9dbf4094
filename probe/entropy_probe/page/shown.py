"""Numbers as the page writes them: three digits, a true minus sign, a value beside its standard error; and as tables of
the terminal do."""

from __future__ import annotations

import math

MISSING = "–"


def number(value: float | str | None, *, signed: bool = False) -> str:
    """Three digits; text as it is; – for what is missing."""
    if value is None:
        return MISSING
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return str(value).replace("-", "−").replace("inf", "∞")
    shown = f"{value + 0.0:{'+' if signed else ''}.3g}"
    mantissa, e, power = shown.partition("e")
    return (mantissa + (f"e{int(power)}" if e else "")).replace("-", "−")


def with_se(value: float | None, se: float | None, *, signed: bool = False) -> str:
    """`value ± se`, both to the second digit of the SE."""
    if value is None:
        return MISSING
    if se is None or not math.isfinite(se) or se <= 0 or not math.isfinite(value):
        return number(value, signed=signed) + ("" if se is None else f" ± {number(se)}")
    power = math.floor(math.log10(se))
    largest = math.floor(math.log10(max(abs(value), se)))
    sign = "+" if signed else ""
    if power >= -4 and largest < 6:
        digits = max(0, 1 - power)
        return f"{value + 0.0:{sign}.{digits}f} ± {se:.{digits}f}".replace("-", "−")
    scale = 10.0**largest
    digits = min(max(0, largest - power + 1), 9)
    shown = f"({value / scale:{sign}.{digits}f} ± {se / scale:.{digits}f})e{largest}"
    return shown.replace("-", "−")


def brief(value: float | None, se: float | None, *, signed: bool = True) -> str:
    """`value±se`, both to the first digit of the SE, as long as that is short."""
    if value is None or se is None:
        return "-"
    sign, first = "+" * signed, -math.floor(math.log10(se)) if se > 0 and math.isfinite(se) else 0
    if 1 <= first <= 4 and abs(value) < 100:
        return f"{value:{sign}.{first}f}±{se:.{first}f}"
    return f"{value:{sign}.2g}±{se:.1g}"


def percent(share: float | None, *, signed: bool = False) -> str:
    if share is None or not math.isfinite(share):
        return MISSING
    size = abs(share)
    digits = 0 if size >= 0.0995 else 1 if size >= 0.00995 else 2
    return f"{share:{'+' if signed else ''}.{digits}%}".replace("-", "−").replace("%", " %")
