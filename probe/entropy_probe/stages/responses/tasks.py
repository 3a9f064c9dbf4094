"""Prompts to sample from, chosen by `batch.dataset`.

A dataset is a list of `Prompt(text, gold)` for a split. The names:

    arithmetic                  sums and differences, generated here
    jsonl:PATH                  a file or folder of prompts (prompt_files.py)
    gsm8k_r1_template[:PATH]    GSM8K (gsm8k.py)
    NAME                        an entry point of the group `entropy_probe.datasets`
    module:function             split → iterable of Prompt, (text, gold) or {"prompt": …, "gold": …}

Rewards are in rewards.py; `same_answer` and `tag_pref` are found here too.
"""

from __future__ import annotations

import os.path
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from entropy_probe.errors import ConfigError, shown
from entropy_probe.stages.responses.gsm8k import gsm8k_r1_template
from entropy_probe.stages.responses.prompt_files import PromptFile, read_prompts
from entropy_probe.stages.responses.prompts import Prompt, checked_prompt, prompt_of_row
from entropy_probe.stages.responses.rewards import same_answer, tag_pref
from entropy_probe.stages.responses.user_functions import call, find_function

__all__ = [
    "DATASETS",
    "DATASETS_OF_FILES",
    "Prompt",
    "arithmetic",
    "dataset_prompts",
    "draw_prompts",
    "further_prompts",
    "gsm8k_r1_template",
    "read_prompts",
    "same_answer",
    "tag_pref",
]

ARITHMETIC_TEMPLATE = "What is {a}{op}{b}?\n"
_LARGEST_OPERAND = 49
# A generator that never ends would fill the memory; the largest prompt sets are smaller.
_LARGEST_POOL = 1_000_000
_KEY = "batch.dataset"
_GROUP = "entropy_probe.datasets"


def arithmetic(split: str) -> list[Prompt]:
    """Every sum a+b and difference a-b with 0 <= a, b <= 49, in one fixed random order.

    The last fifth is `test`. The two splits are disjoint and their union is the whole set of 5000
    questions.
    """
    prompts = [
        Prompt(ARITHMETIC_TEMPLATE.format(a=a, op=op, b=b), str(answer))
        for a in range(_LARGEST_OPERAND + 1)
        for b in range(_LARGEST_OPERAND + 1)
        for op, answer in (("+", a + b), ("-", a - b))
    ]
    random.Random(0).shuffle(prompts)
    first_held_out = len(prompts) * 4 // 5
    return prompts[first_held_out:] if split == "test" else prompts[:first_held_out]


DATASETS: dict[str, Callable[[str], list[Prompt]]] = {
    "arithmetic": arithmetic,
    "gsm8k_r1_template": gsm8k_r1_template,
}
DATASETS_OF_FILES: dict[str, Callable[[str, str], Sequence[Prompt]]] = {
    "jsonl": lambda split, path: read_prompts(path, split),
    "gsm8k_r1_template": gsm8k_r1_template,
}


def dataset_prompts(name: str, split: str) -> Sequence[Prompt]:
    """All prompts of the split of the dataset that `name` means. Built-in names come first.

    Raises `ConfigError` for a name that is not known, and for a user's function that raises or
    yields something else than prompts; `RolloutsError` naming the line of a file.
    """
    if name in DATASETS:
        return DATASETS[name](split)
    head, _, path = name.partition(":")
    if head in DATASETS_OF_FILES:
        if not path:
            raise ConfigError(_KEY, f"{name!r} names no file", f"write {head}:PATH")
        return DATASETS_OF_FILES[head](split, os.path.expanduser(path))
    if head in DATASETS:
        raise ConfigError(_KEY, f"{name!r}: {head} takes no file", f"write {head}")
    built_in = [*DATASETS, *(f"{known}:PATH" for known in DATASETS_OF_FILES)]
    function = find_function(name, key=_KEY, group=_GROUP, built_in=built_in)
    returned = call(function, split, named=name, key=_KEY)
    try:
        iterator = iter(returned)
    except TypeError as error:
        problem = f"{name!r} returned {shown(returned)}"
        raise ConfigError(_KEY, problem, "return an iterable of (text, gold)") from error
    rows: list[Any] = call(list, islice(iterator, _LARGEST_POOL + 1), named=name, key=_KEY)
    if not 0 < len(rows) <= _LARGEST_POOL:
        got = f"more than {_LARGEST_POOL}" if rows else "no"
        problem = f"{name!r} yields {got} prompts for split {split}"
        raise ConfigError(_KEY, problem, "yield the prompts of the split")
    return [as_prompt(row, f"{name!r} entry {i}") for i, row in enumerate(rows)]


def as_prompt(row: object, which: str, key: str = _KEY) -> Prompt:
    """A `Prompt`, a (text, gold) or {"prompt": text or messages, "gold": gold, …} as a prompt.

    Raises `ConfigError` naming `which`.
    """
    remedy = 'give Prompt(text, gold), (text, gold) or {"prompt": text, "gold": gold}'
    try:
        if isinstance(row, Prompt):
            checked_prompt(row.text, row.gold)
            return row
        if isinstance(row, Mapping):
            return prompt_of_row(row)[0]
        if isinstance(row, tuple | list) and len(row) == 2:
            return checked_prompt(*row)
        raise ConfigError(key, f"{which} is {shown(row)}", remedy)
    except ValueError as error:
        raise ConfigError(key, f"{which} {error}", remedy) from error


def draw_prompts(
    pool: Sequence[Prompt],
    count: int,
    *,
    seed: int,
    with_replacement: bool,
) -> list[Prompt]:
    """Draw `count` prompts from the pool, the same for the same seed.

    Raises `ConfigError` where the pool is smaller than `count` and `with_replacement` is false.
    """
    rng, every = random.Random(seed), range(len(pool))
    if not with_replacement and count > len(pool):
        raise ConfigError(
            "batch.num_prompts",
            f"E and U need {count} prompts together, but the dataset has {len(pool)}",
            "give more prompts, set batch.num_prompts and batch.num_update_prompts lower, or set "
            "batch.with_replacement: true",
        )
    places = rng.choices(every, k=count) if with_replacement else rng.sample(every, count)
    return _at(pool, places)


def further_prompts(
    pool: Sequence[Prompt],
    drawn: int,
    count: int,
    *,
    seed: int,
    with_replacement: bool,
) -> list[Prompt]:
    """Up to `count` prompts beside the `drawn` ones of `draw_prompts`: fewer where the pool holds no more.

    The same for the same seed, and of a smaller `count` the first of them.
    """
    every = range(len(pool))
    if with_replacement:
        return _at(pool, random.Random(seed).choices(every, k=drawn + count)[drawn:])
    before = set(random.Random(seed).sample(every, drawn))
    rest = [place for place in every if place not in before]
    random.Random(f"further {seed}").shuffle(rest)
    return _at(pool, rest[:count])


def _at(pool: Sequence[Prompt], places: Sequence[int]) -> list[Prompt]:
    return pool.at(places) if isinstance(pool, PromptFile) else [pool[place] for place in places]
