"""The reward of a response: a function (response, gold) → float, chosen by `batch.reward`.

`tag_pref` is built in. Others come from an entry point of the group `entropy_probe.rewards` or as
`module:function`; what they return is checked, because one reward that is not finite spoils every
average it enters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from decimal import Decimal
from numbers import Real
from typing import Any

from entropy_probe.errors import ConfigError, shown
from entropy_probe.stages.responses.user_functions import call, find_function

Reward = Callable[[str, str | None], float]

LARGEST_REWARD = 1e30  # beyond it is a mistake, and its square would not be finite in float32
_KEY = "batch.reward"
_GROUP = "entropy_probe.rewards"
_NUMBER = re.compile(
    r"(?P<sign>\$?[+-]?|[+-]\$)"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
    r"(?P<exponent>[eE][+-]?[0-9]{1,3})?\$?"
)


def _as_number(text: str) -> Decimal | None:
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        return None
    sign = "-" if "-" in match["sign"] else ""
    digits = match["digits"].replace(",", "")
    return Decimal(sign + digits + (match["exponent"] or ""))  # exact, whatever the context


def same_answer(answer: str, gold: str) -> bool:
    """Numbers are equal as numbers (`1,000` = `1000.0` = `$1000`), texts as texts.

    Of texts case and white space are folded. A number is ASCII digits, with commas only between
    groups of three, at most one point, an exponent of at most three digits (`1e3` = 1000), and a
    dollar sign before or after. Everything else is a text and equals only itself: `1,00` (100 or
    1.00?), `1_000`, `٣`, `50%`, `nan`, `1e999999999`. Texts are not normalised otherwise: Unicode's
    normal forms take quadratic time on hostile input, and NFKC would make x² equal to x2. Linear in
    both lengths.
    """
    answer_number, gold_number = _as_number(answer), _as_number(gold)
    if answer_number is not None and gold_number is not None:
        return answer_number == gold_number
    return " ".join(answer.casefold().split()) == " ".join(gold.casefold().split())


def tag_pref(response: str, gold: str | None) -> float:
    """1.0 if the response has exactly one `<answer>…</answer>` with the content `gold`, else 0.0.

    Without a gold answer the reward is 0.0, and such prompts are counted as `missing_gold`
    (docs/derivations.md, departure 12).
    """
    if gold is None or response.count("<answer>") != 1 or response.count("</answer>") != 1:
        return 0.0
    before, _, _ = response.partition("</answer>")
    _, opened, content = before.partition("<answer>")
    return float(bool(opened) and same_answer(content, gold))


REWARDS: dict[str, Reward] = {"tag_pref": tag_pref}


def find_reward(name: str) -> Reward:
    """The reward that `batch.reward` names.

    Raises `ConfigError`; so does calling it, where a user's function raises or returns something
    that is not a finite number (a bool is one).
    """
    if name in REWARDS:
        return REWARDS[name]
    function = find_function(name, key=_KEY, group=_GROUP, built_in=REWARDS)

    def checked(response: str, gold: str | None) -> float:
        value = call(function, response, gold, named=name, key=_KEY)
        number: Any = value if isinstance(value, Real) else math.nan
        if not abs(number) <= LARGEST_REWARD:
            problem = f"{name!r} returned {shown(value)} for {shown(response)}"
            raise ConfigError(_KEY, problem, "return a finite number as a float")
        return float(number)

    return checked
