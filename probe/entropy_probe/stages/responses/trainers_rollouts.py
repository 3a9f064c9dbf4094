"""Rollouts as trainers write them, a response a row, as the lines of a rollouts file.

    verl       {"input": "…", "output": "…", "gts": …, "score": …, "step": …}, of `trainer.rollout_data_dir`
    TRL        step, prompt, completion, a column for each reward, advantage, in Parquet, of `log_completions`
    prime-rl   {"prompt": [messages], "completion": [messages], "reward": …, "trajectory": …}, train_rollouts.jsonl

They are told apart by their columns. Responses of one prompt are a group, in the order in which they come.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from entropy_probe.errors import RolloutsError, shown
from entropy_probe.stages.responses.prompt_files import rows_of_table
from entropy_probe.text import json_lines

FORM = "write one object per line"
Row = Mapping[str, Any]
_Line = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Understood:
    """What was read: whose rollouts these are, lines under our names with where each begins, and what was assumed."""

    trainer: str
    lines: list[_Line]
    assumed: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Response:
    """One row: `key` says which prompt it belongs to, `of_prompt` is what its line has of that, `of_response` what it
    has of each response."""

    key: str
    of_prompt: dict[str, Any]
    of_response: dict[str, Any]


def understood(
    path: Path, step: int | None = None, rewards: Sequence[str] = ()
) -> Understood | None:
    """The rollouts of a trainer; `None` for a file whose first line is one of ours, or nobody's.

    Of several steps in a file `step` counts, or the last. `rewards` names the columns that are, where TRL's table has
    several numbers. Raises `RolloutsError` naming the row.
    """
    is_table = path.suffix.lower() == ".parquet"

    def rows() -> Iterator[tuple[str, Row]]:
        return rows_of_table(path) if is_table else json_lines(path, FORM)

    first = next(rows(), None)
    if first is None or (trainer := _whose(first[1])) is None:
        if is_table:
            columns = shown(list(first[1]) if first else [])
            remedy = "give completions of TRL, or JSON lines"
            raise RolloutsError(path, f"has the columns {columns}", remedy)
        return None
    if trainer == "TRL":
        rewards = _reward_columns(path, first[1], rewards)
    read = {"verl": _verl, "TRL": partial(_trl, rewards), "prime-rl": _prime_rl}[trainer]
    steps: dict[Any, dict[str, tuple[str, list[_Response]]]] = {}
    last, again = (None, ""), False
    for where, row in rows():
        try:
            one = read(row)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            problem = f"is not a row of {trainer} ({type(error).__name__}: {error})"
            raise RolloutsError(where, problem[:300], "give the file as it was written") from error
        groups = steps.setdefault(_step(row.get("step")), {})
        again = again or (last != (id(groups), one.key) and one.key in groups)
        last = id(groups), one.key
        groups.setdefault(one.key, (where, []))[1].append(one)
    known = sorted(number for number in steps if isinstance(number, int))
    chosen = step
    if step is None:
        chosen = known[-1] if known else next(iter(steps))
    if chosen not in steps:
        problem = f"has the steps {shown(known)}, not {chosen}"
        raise RolloutsError(path, problem, "give one of them")
    assumed = list(_ASSUMED[trainer])
    if len(steps) > 1:
        assumed.append(f"of {len(steps)} steps the rollouts of step {chosen} were taken")
    if again and trainer != "verl":
        assumed.append("a prompt that comes again further down is one with the first")
    if trainer == "TRL":
        assumed.append(f"rewards are the column{'s'[: len(rewards) > 1]} {', '.join(rewards)}")
    own = [(where, group) for where, group in steps[chosen].values()]
    missing = {
        key for _, group in own for one in group for key in _all_keys(group) - set(one.of_response)
    }
    assumed += [f"`{key}` are left out: some responses have none" for key in sorted(missing)]
    return Understood(trainer, [(where, _line(group, missing)) for where, group in own], assumed)


def _step(value: Any) -> Any:
    """The number of a step, however it is written."""
    try:
        return int(value)
    except (TypeError, ValueError):
        return value


def _all_keys(group: list[_Response]) -> set[str]:
    return set().union(*(one.of_response for one in group))


def _whose(row: Row) -> str | None:
    if {"input", "output", "score"} <= row.keys():
        return "verl"
    if {"step", "prompt", "completion", "advantage"} <= row.keys():
        return "TRL"
    if {"prompt", "completion", "reward"} <= row.keys():
        return "prime-rl"
    return None


def _reward_columns(path: Path, row: Row, named: Sequence[str]) -> list[str]:
    """Of the columns of numbers between the completion and the advantage, where others may stand that were logged."""
    names = list(row)
    between = names[names.index("completion") + 1 : names.index("advantage")]
    if named:
        unknown = next((name for name in named if name not in between), None)
        if unknown is not None:
            raise RolloutsError(
                path, f"has no column {unknown!r} of rewards", f"there are {shown(between)}"
            )
        return list(named)
    numbers = [name for name in between if isinstance(row[name], int | float | None)]
    if len(numbers) != 1:
        problem = (
            f"has the columns {shown(numbers)} before the advantage, which need not all be rewards"
        )
        remedy = f"say which: entropy-probe rollouts {path.name} --rewards NAME,NAME --out e.jsonl"
        raise RolloutsError(path, problem, remedy)
    return numbers


_ASSUMED = {
    "verl": [
        "prompts and responses are text without special tokens, as verl writes them: of a chat model the prompts' ids "
        "are not those that it was given",
        "every response is taken to have ended",
    ],
    "TRL": [
        "rewards of several functions are added with weight 1",
        "every response is taken to have ended",
    ],
    "prime-rl": [],
}


def _verl(row: Row) -> _Response:
    gold = row.get("gts")
    of_prompt = {"prompt": _text(row["input"])}
    if isinstance(gold, str):
        of_prompt["gold"] = gold
    of_response = {"responses": _text(row["output"]), "rewards": _number(row["score"])}
    return _Response(json.dumps([row["input"], gold], default=str), of_prompt, of_response)


def _trl(rewards: Sequence[str], row: Row) -> _Response:
    """The sum of the rewards; of none, as TRL takes it, 0."""
    values = [float(row[name]) for name in rewards if row[name] is not None]
    of_response = {
        "responses": _text(row["completion"]),
        "rewards": math.fsum(value for value in values if not math.isnan(value)),
        "advantages": _number(row["advantage"]),
    }
    return _Response(json.dumps(row["prompt"], default=str), {"prompt": row["prompt"]}, of_response)


def _prime_rl(row: Row) -> _Response:
    """By the ids of its only turn, where they are there, with the log-probabilities of the sampler."""
    key = json.dumps([row.get("example_id"), row["prompt"]], default=str)
    of_response: dict[str, Any] = {"rewards": _number(row["reward"])}
    if row.get("advantage") is not None:
        of_response["advantages"] = _number(row["advantage"])
    turns = row.get("trajectory")
    tokens = turns[0].get("tokens") if isinstance(turns, list) and len(turns) == 1 else None
    if isinstance(tokens, Mapping) and tokens.get("completion_ids"):
        if not all(tokens.get("completion_mask") or [1]):
            raise ValueError("completion_mask has a 0: tokens that the policy did not choose")
        of_response["response_ids"] = tokens["completion_ids"]
        if tokens.get("completion_logprobs"):
            of_response["logprobs"] = tokens["completion_logprobs"]
        return _Response(key, {"prompt_ids": tokens["prompt_ids"]}, of_response)
    of_response["responses"] = _text(row["completion"])
    of_response["truncated"] = bool(row.get("is_truncated", False))
    return _Response(key, {"prompt": row["prompt"]}, of_response)


def _line(group: list[_Response], missing: set[str]) -> dict[str, Any]:
    """What all responses of the file have, under our names."""
    shared = sorted(_all_keys(group) - missing)
    of_responses = {key: [one.of_response[key] for one in group] for key in shared}
    return group[0].of_prompt | of_responses


def _text(value: Any) -> str:
    """A text, or the content of the only message."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content")
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)} is not a text of one turn")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{shown(value)} is not a number")
    return float(value)


def lines_of(path: Path) -> tuple[Iterator[_Line], list[str]]:
    """The lines of a file of ours or of a trainer's; and of the latter what was understood."""
    found = understood(path)
    if found is None:
        return json_lines(path, FORM), []
    return iter(found.lines), [f"rollouts as {found.trainer} writes them", *found.assumed]
