"""Rollouts as trainers write them, a response a row, as the lines of a rollouts file.

    verl       {"input": "…", "output": "…", "gts": …, "score": …, "step": …}, of `trainer.rollout_data_dir`
    TRL        step, prompt, completion, a column for each reward, advantage, in Parquet, of `log_completions`
    prime-rl   {"prompt": [messages], "completion": [messages], "reward": …, "trajectory": …}, train_rollouts.jsonl

They are told apart by their columns. Responses of one prompt are a group, in the order in which they come.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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


def understood(path: Path, step: int | None = None) -> Understood | None:
    """The rollouts of a trainer; `None` for a file whose first line is one of ours, or nobody's.

    Of several steps in a file one has to be chosen, `step`, or the last counts. Raises `RolloutsError` naming the row.
    """
    is_table = path.suffix.lower() == ".parquet"
    rows = rows_of_table(path) if is_table else json_lines(path, FORM)
    first = next(iter(rows), None)
    if first is None or (reader := _reader(first[1])) is None:
        if is_table:
            columns = shown(list(first[1]) if first else [])
            remedy = "give completions of TRL, or JSON lines"
            raise RolloutsError(path, f"has the columns {columns}", remedy)
        return None
    trainer, read = reader
    steps: dict[Any, dict[str, tuple[str, list[_Response]]]] = {}
    for where, row in rows_of_table(path) if is_table else json_lines(path, FORM):
        try:
            one = read(row)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            problem = f"is no row of {trainer}'s ({type(error).__name__}: {error})"
            raise RolloutsError(where, problem[:300], "give the file as it was written") from error
        groups = steps.setdefault(row.get("step"), {})
        groups.setdefault(one.key, (where, []))[1].append(one)
    known = [number for number in steps if type(number) is int]
    chosen = step if step is not None else max(known, default=None)
    if chosen not in steps:
        problem = f"has the steps {shown(sorted(known))}, not {chosen}"
        raise RolloutsError(path, problem, "give one of them")
    assumed = (
        []
        if len(steps) == 1
        else [f"of {len(steps)} steps the rollouts of step {chosen} were taken"]
    )
    lines = [(where, _line(own)) for where, own in steps[chosen].values()]
    return Understood(trainer, lines, [*assumed, *_ASSUMED[trainer]])


def _reader(row: Row) -> tuple[str, Callable[[Row], _Response]] | None:
    if {"input", "output", "score"} <= row.keys():
        return "verl", _verl
    if {"step", "prompt", "completion", "advantage"} <= row.keys():
        return "TRL", _trl
    if {"prompt", "completion", "reward"} <= row.keys():
        return "prime-rl", _prime_rl
    return None


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


def _trl(row: Row) -> _Response:
    """Rewards are the columns of numbers between the completion and the advantage."""
    names = list(row)
    between = names[names.index("completion") + 1 : names.index("advantage")]
    rewards = [row[name] for name in between if isinstance(row[name], int | float | None)]
    known = [float(r) for r in rewards if r is not None and not math.isnan(r)]
    if not known:
        raise ValueError("no column between `completion` and `advantage` is a reward")
    of_response = {
        "responses": _text(row["completion"]),
        "rewards": math.fsum(known),
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
        of_response["response_ids"] = tokens["completion_ids"]
        if tokens.get("completion_logprobs"):
            of_response["logprobs"] = tokens["completion_logprobs"]
        return _Response(key, {"prompt_ids": tokens["prompt_ids"]}, of_response)
    of_response["responses"] = _text(row["completion"])
    of_response["truncated"] = bool(row.get("is_truncated", False))
    return _Response(key, {"prompt": row["prompt"]}, of_response)


def _line(group: list[_Response]) -> dict[str, Any]:
    """What all responses of a prompt have, under our names."""
    shared = set.intersection(*(set(one.of_response) for one in group))
    of_responses = {key: [one.of_response[key] for one in group] for key in sorted(shared)}
    return group[0].of_prompt | of_responses


def _text(value: Any) -> str:
    """A text, or the content of the only message."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
        value = value[0].get("content")
    if not isinstance(value, str):
        raise TypeError(f"{shown(value)} is no text of one turn")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{shown(value)} is no number")
    return float(value)


def lines_of(path: Path) -> tuple[Iterator[_Line], list[str]]:
    """The lines of a file of ours or of a trainer's; and of the latter what was understood."""
    found = understood(path)
    if found is None:
        return json_lines(path, FORM), []
    return iter(found.lines), [f"rollouts as {found.trainer} writes them", *found.assumed]
