"""What is asked of the folder itself, beside the measurement: rank 0 alone does so, on a few responses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entropy_probe.afresh.inputs import Questions, of_dataset, of_file
from entropy_probe.afresh.plain import Row, plain_model, plain_scores, plain_tokenizer, step
from entropy_probe.afresh.stored import base_is_changed, read_again
from entropy_probe.memory import available_bytes
from entropy_probe.pipeline.measured import Measured
from entropy_probe.pipeline.next_step import NextStep
from entropy_probe.pipeline.prepared import Prepared
from entropy_probe.stages.responses.rollouts import Rollouts

_RESPONSES = 4
"""Of each of two prompts of a batch, at most."""


def found_again(of: Measured, then: NextStep, prepared: Prepared) -> dict[str, Any]:
    """Facts `stored`, `plain` and `inputs` of the evidence: what was found, or a text that says why nothing was."""
    info = of.checkpoint.info
    batches = {"e": of.e} if of.same_batch else {"e": of.e, "u": of.u}
    questions = functools.cache(lambda: _questions(of, prepared))
    inputs = {
        which: _inputs(batch.rollouts, of, prepared, place, questions)
        for place, (which, batch) in enumerate(batches.items())
    }
    if not info.path.is_dir() or not info.optimizer_file.exists():
        why = "the checkpoint was given as objects, without its folder"
        return {"stored": why, "plain": why, "inputs": inputs}
    try:
        is_adam = of.checkpoint.other is None
        stored = read_again(info.path, info.optimizer_file, info.base_model, is_adam=is_adam)
    except Exception as error:  # whatever a library raises: this is a second opinion
        stored = f"the libraries alone cannot read it ({type(error).__name__}: {error})"
    plain: dict[str, Any] | str = "its weights are not in a file that transformers reads"
    if isinstance(stored, dict):
        try:
            plain = _plain(of, then)
        except Exception as error:  # it does not fit, or transformers builds another model
            plain = f"transformers alone cannot score it ({type(error).__name__}: {error})"
        stored = base_is_changed(info.path) or stored
    return {"stored": stored, "plain": plain, "inputs": inputs}


def _inputs(
    rollouts: Rollouts,
    of: Measured,
    prepared: Prepared,
    place: int,
    questions: Callable[[], Questions],
) -> dict[str, Any] | str:
    """Of one batch, from where it was asked for."""
    group, given, batch = rollouts.num_responses, prepared.given[place], of.config.batch
    firsts = zip(
        rollouts.ids[::group].tolist(), rollouts.prompt_lens[::group].tolist(), strict=True
    )
    prompts = [ids[:length] for ids, length in firsts]
    rows = [rollouts.responses[n * group :][:group] for n in range(len(prompts))]
    responses = [[response for response in of_prompt if response] for of_prompt in rows]
    try:
        if given != "sampled":
            return of_file(Path(given), prompts, responses, lambda: _pad(of))
        recorded = rollouts.rewards.tolist()
        looks = of.growth.looks if of.growth is not None and place == 0 else []
        parts = [look.num_prompts for look in looks]
        return of_dataset(questions(), batch, rollouts.reward, prompts, responses, recorded, parts)
    except Exception as error:
        return f"cannot be looked up again ({type(error).__name__}: {error})"


def _questions(of: Measured, prepared: Prepared) -> Questions:
    """Of the dataset, by a tokenizer of the folder that nobody has touched."""
    info, batch = of.checkpoint.info, of.config.batch
    file = None if prepared.prompts is None else Path(prepared.prompts)
    tokenizer = plain_tokenizer(info.path, info.base_model)
    return Questions.of(batch, file, tokenizer)


def _pad(of: Measured) -> int | None:
    info = of.checkpoint.info
    if of.checkpoint.tokenizer is None:
        return None
    return plain_tokenizer(info.path, info.base_model).pad_token_id


def _plain(of: Measured, then: NextStep) -> dict[str, Any] | str:
    info, config = of.checkpoint.info, of.config
    needed = 6 * info.num_parameters  # float32, and room to load it
    device = of.bound.device
    free = available_bytes(device)
    if config.memory_limit is not None or info.device_map is not None:
        return "too large: a limit of memory or a map of devices leaves no room for a second model"
    if free is not None and needed > free:
        return (
            f"too large: a second model needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
        )
    model = plain_model(info.path, info.base_model, device)
    temperature = config.generation.temperature
    e, rows_e = _rows(of.e.rollouts)
    found: dict[str, Any] = {"e": e, "at_e": plain_scores(model, rows_e, temperature)}
    if not of.same_batch:
        u, rows_u = _rows(of.u.rollouts)
        found |= {"u": u, "at_u": plain_scores(model, rows_u, temperature)}
    etas = [change.eta for change in then.changes]
    if then.direction is not None:
        k = max(range(len(etas)), key=lambda i: etas[i])
        step(model, then.v, etas[k])
        found |= {"step": k, "after": plain_scores(model, rows_e, temperature)}
        drawn = then.changes[k].drawn
        if drawn is not None and not of.e.share.several:
            places, rows = _rows(drawn)
            found |= {f"fresh.{k}": places, f"at_fresh.{k}": plain_scores(model, rows, temperature)}
    return found


def _rows(rollouts: Rollouts) -> tuple[list[int], list[Row]]:
    """Places of rows in the batch, and the rows: of its first and its last prompt."""
    group = rollouts.num_responses
    prompts = dict.fromkeys((0, rollouts.num_prompts - 1))
    places = [n * group + g for n in prompts for g in range(min(group, _RESPONSES))]
    places = [place for place in places if rollouts.gen_lens[place]]
    rows = []
    for place in places:
        start = int(rollouts.prompt_lens[place])
        end = start + int(rollouts.gen_lens[place])
        rows.append((rollouts.ids[place, :end].tolist(), start))
    return places, rows
