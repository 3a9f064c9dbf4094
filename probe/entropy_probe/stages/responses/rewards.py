"""The rewards of responses, by the function or functions that `batch.reward` names.

`tag_pref` and `stand_in` are built in. Others come from an entry point of the group
`entropy_probe.rewards` or as `module:function`; what they return is checked, because one reward
that is not finite spoils every average it enters.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

from entropy_probe.errors import ConfigError, ProbeError, shown
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.user_functions import call, find_function

Reward = Callable[[str, str | None], float]

LARGEST_REWARD = 1e30  # beyond it is a mistake, and its square would not be finite in float32
KEY = "batch.reward"
GROUP = "entropy_probe.rewards"
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


def stand_in(response: str, gold: str | None) -> float:
    """A number from 0 to 1 that the text alone decides: where no reward is given the numerics are still exercised, by
    advantages that differ within every group of different responses. It says nothing of the policy."""
    digest = hashlib.sha256(f"stand-in {response}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48


REWARDS: dict[str, Reward] = {"tag_pref": tag_pref, "stand_in": stand_in}


def find_reward(name: str) -> Reward:
    """The reward of one response that `name` means, as (response, gold) → number.

    Raises `ConfigError`; so does calling it, where a user's function raises or returns something
    that is not a finite number (a bool is one).
    """
    if name in REWARDS:
        return REWARDS[name]
    function = find_function(name, key=KEY, group=GROUP, built_in=REWARDS)

    def checked(response: str, gold: str | None) -> float:
        value = call(function, response, gold, named=name, key=KEY)
        return _finite(value, name, f"for {shown(response)}")

    return checked


def _finite(value: Any, name: str, which: str) -> float:
    number: Any = value if isinstance(value, Real) else math.nan
    if not abs(number) <= LARGEST_REWARD:
        problem = f"{name!r} returned {shown(value)} {which}"
        raise ConfigError(KEY, problem, "return a finite number as a float")
    return float(number)


@dataclass(frozen=True)
class Asked:
    """A response whose reward is asked for: its prompt, its text and its ids."""

    prompt: Prompt
    text: str
    ids: Sequence[int]

    @property
    def completion(self) -> str | list[dict[str, str]]:
        """As TRL hands it to a reward function: a text, or a message where the prompt is messages."""
        if self.prompt.messages is None:
            return self.text
        return [{"role": "assistant", "content": self.text}]

    def __str__(self) -> str:
        return f"for {shown(self.text)} to {shown(self.prompt.text)}"


Rewards = Callable[[Sequence[Asked]], list[float]]
"""The rewards of many responses at once."""


def of_each(reward: Reward) -> Rewards:
    """(response, gold) → number, of many."""
    return lambda asked: [reward(one.text, one.prompt.gold) for one in asked]


def find_rewards(names: str | Sequence[str], weights: Sequence[float] | None = None) -> Rewards:
    """What `batch.reward` names: one function, or several whose weighted sum counts, in any of three forms.

        (response, gold) → number
        TRL's:   (prompts, completions, **columns) → a list with a number for each; of several, None counts as 0
        verl's:  (data_source, solution_str, ground_truth, extra_info) → a number, or {"score": number, …}

    Raises `ConfigError`; so does calling it, naming prompt and response, where a function raises, or returns None, NaN
    or anything else that is not a finite number.
    """
    chosen = [names] if isinstance(names, str) else list(names)
    if not chosen or len(weights if weights is not None else chosen) != len(chosen):
        problem = f"has {len(weights or ())} weights for {len(chosen)} functions"
        raise ConfigError("batch.reward_weights", problem, "give one for each")
    functions = [_form_of(name) for name in chosen]
    of_all = [1.0] * len(chosen) if weights is None else [float(w) for w in weights]

    def together(asked: Sequence[Asked]) -> list[float]:
        values = [function(asked) for function in functions]
        rewards = []
        for one, own in zip(asked, zip(*values, strict=True), strict=True):
            known = [w * value for w, value in zip(of_all, own, strict=True) if value is not None]
            if not known:
                problem = f"{', '.join(map(repr, chosen))} returned None {one}"
                raise ConfigError(KEY, problem, "return a finite number as a float")
            rewards.append(math.fsum(known))
        return rewards

    return together


def _form_of(name: str) -> Callable[[Sequence[Asked]], list[float | None]]:
    """The function as one of many responses, by the names of its parameters."""
    if name in REWARDS:
        return of_each(REWARDS[name])  # pyright: ignore[reportReturnType]
    function = find_function(name, key=KEY, group=GROUP, built_in=REWARDS)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # one that does not say
        parameters = {}
    if "completions" in parameters:
        return lambda asked: _by_trl(function, name, asked)
    if {"solution_str", "ground_truth"} <= set(parameters):
        return lambda asked: [_by_verl(function, name, parameters, one) for one in asked]
    return lambda asked: [
        _finite(_called(function, name, one, one.text, one.prompt.gold), name, str(one))
        for one in asked
    ]


def _called(function: Callable[..., Any], name: str, one: Asked, *args: Any, **kwargs: Any) -> Any:
    """What it raises names prompt and response."""
    try:
        return function(*args, **kwargs)
    except ProbeError:
        raise
    except (Exception, SystemExit) as error:
        problem = f"{name!r} raised {type(error).__name__}: {error}"[:300]
        raise ConfigError(KEY, f"{problem} {one}", "correct it, or name another") from error


def _by_trl(function: Callable[..., Any], name: str, asked: Sequence[Asked]) -> list[float | None]:
    if not asked:
        return []
    keys = dict.fromkeys(key for one in asked for key in one.prompt.columns)
    columns = {
        key: [copy.deepcopy(one.prompt.columns.get(key)) for one in asked]
        for key in keys
        if key not in ("prompt", "completion", "completion_ids")
    }
    arguments: dict[str, Any] = {
        "prompts": [one.prompt.given for one in asked],
        "completions": [one.completion for one in asked],
        "completion_ids": [list(one.ids) for one in asked],
        "trainer_state": None,
        "log_extra": lambda *_: None,
        "log_metric": lambda *_: None,
    }
    parameters = inspect.signature(function).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = {key: value for key, value in arguments.items() if key in parameters}
        columns = {key: value for key, value in columns.items() if key in parameters}
    try:
        found = function(**(columns | arguments))
        if inspect.isawaitable(found):
            found = in_a_loop(found)
        values = list(found)
    except ProbeError:
        raise
    except (Exception, SystemExit) as error:
        if (
            len(asked) > 1
        ):  # which of them? A function that compares responses may raise for none alone
            for one in asked:
                _by_trl(function, name, [one])
        problem = f"{name!r} raised {type(error).__name__}: {error}"[:300]
        which = str(asked[0]) if len(asked) == 1 else f"for {len(asked)} responses together"
        raise ConfigError(KEY, f"{problem} {which}", "correct it, or name another") from error
    if len(values) != len(asked):
        problem = f"{name!r} returned {len(values)} rewards for {len(asked)} responses"
        raise ConfigError(KEY, problem, "return one for each")
    return [
        None if value is None else _finite(_plain(value), name, str(one))
        for value, one in zip(values, asked, strict=True)
    ]


def in_a_loop(found: Any) -> Any:
    """What an asynchronous function gives, also where a loop is running already, as in a notebook."""

    async def awaited() -> Any:
        return await found

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, awaited()).result()


def _by_verl(
    function: Callable[..., Any], name: str, parameters: Mapping[str, Any], one: Asked
) -> float:
    columns = one.prompt.columns
    of_model = columns.get("reward_model")
    gold = of_model.get("ground_truth") if isinstance(of_model, Mapping) else None
    arguments = {
        "data_source": columns.get("data_source"),
        "solution_str": one.text,
        "ground_truth": one.prompt.gold if gold is None else gold,
        "extra_info": columns.get("extra_info"),
    }
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        arguments = {key: value for key, value in arguments.items() if key in parameters}
    value = _called(function, name, one, **arguments)
    if isinstance(value, Mapping):
        value = value.get("score")
    return _finite(_plain(value), name, str(one))


def _plain(value: Any) -> Any:
    """The number of a tensor or an array of one number."""
    item = getattr(value, "item", None)
    if item is None or isinstance(value, Real):
        return value
    try:
        return item()
    except (RuntimeError, TypeError, ValueError):
        return value
