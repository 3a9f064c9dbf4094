"""GSM8K as R1-style prompts, from files in its own format or from the cache of `datasets`.

Nothing is read from the network. The format is JSON lines with two fields: `question`, and
`answer`, a worked solution that ends in `#### ` and the gold answer. A folder holds `train.jsonl`
and `test.jsonl`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from entropy_probe.errors import ConfigError, RolloutsError
from entropy_probe.stages.responses.prompts import Prompt, checked_prompt
from entropy_probe.text import json_lines

R1_TEMPLATE = (
    "A conversation between User and Assistant. "
    "The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind "
    "and then provides the user with the answer. "
    "The reasoning process and answer are enclosed within <think> </think> and "
    "<answer> </answer> tags, respectively, i.e., "
    "<think> reasoning process here </think> <answer> answer here </answer>.\n"
    "User: {question}\n"
    "Assistant:"
)
"""The prompt template of DeepSeek-R1-Zero (arXiv:2501.12948, table 1).

`User:` and `Assistant:` stand on lines of their own. `{question}` is the only field.
"""

REPOSITORY, CONFIGURATION = "openai/gsm8k", "main"
_FORM = 'write {"question": "…", "answer": "… #### 72"}'


def gsm8k_r1_template(split: str, path: str | None = None) -> list[Prompt]:
    """The questions of a split in `R1_TEMPLATE`, in their own order, with their gold answers.

    `path` is a file, read whole whatever the split, or a folder with `<split>.jsonl`; without it
    the cache of the package `datasets` is read. Raises `ConfigError` where neither is there,
    `RolloutsError` naming a bad line.
    """
    if path is None:
        return _prompts(_numbered(_cached(split)), REPOSITORY)
    file = Path(path)
    if file.is_dir():
        file = file / f"{split}.jsonl"
    if not file.is_file():
        problem = f"gsm8k_r1_template: there is no file {file}"
        raise ConfigError("batch.dataset", problem, "give GSM8K's own JSON lines")
    return _prompts(json_lines(file, _FORM), str(file))


def _numbered(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((f"{REPOSITORY} row {number}", row) for number, row in enumerate(rows))


def _prompts(rows: Iterable[tuple[str, Mapping[str, Any]]], source: str) -> list[Prompt]:
    prompts = []
    for where, row in rows:
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not question:
            raise RolloutsError(where, "has no text under `question`", _FORM)
        _, mark, gold = answer.rpartition("####") if isinstance(answer, str) else ("", "", "")
        if not mark or not gold.strip():
            raise RolloutsError(where, "has no gold answer after `####` under `answer`", _FORM)
        try:
            prompts.append(checked_prompt(R1_TEMPLATE.format(question=question), gold.strip()))
        except ValueError as error:
            raise RolloutsError(where, str(error), _FORM) from error
    if not prompts:
        raise RolloutsError(source, "holds no question", _FORM)
    return prompts


def _cached(split: str) -> list[dict[str, Any]]:
    remedy = (
        "give gsm8k_r1_template:PATH, a file in GSM8K's own format "
        "or a folder with train.jsonl and test.jsonl, "
        f"or fill the cache once with datasets.load_dataset('{REPOSITORY}', '{CONFIGURATION}')"
    )
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError as error:
        problem = f"gsm8k_r1_template needs the package datasets ({error})"
        raise ConfigError("batch.dataset", problem, remedy) from error
    try:
        with _offline(datasets):
            return list(datasets.load_dataset(REPOSITORY, CONFIGURATION, split=split))
    except Exception as error:  # what it raises for a missing cache differs between its versions
        reason = f"cannot be read from the local cache ({type(error).__name__})"
        problem = f"gsm8k_r1_template: {REPOSITORY} {reason}"
        raise ConfigError("batch.dataset", problem, remedy) from error


@contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """No request leaves the machine, and nothing is logged.

    Both packages read HF_DATASETS_OFFLINE and HF_HUB_OFFLINE once, when they are imported, and look
    at the module constants made of them at every request; so the constants are what is set here,
    and put back.
    """
    constants: Any = importlib.import_module("huggingface_hub.constants")
    flags = [
        (datasets.config, "HF_DATASETS_OFFLINE"),
        (datasets.config, "HF_HUB_OFFLINE"),
        (constants, "HF_HUB_OFFLINE"),
    ]
    known = [(module, name) for module, name in flags if hasattr(module, name)]
    before = [(module, name, getattr(module, name)) for module, name in known]
    verbosity = datasets.utils.logging.get_verbosity()
    try:
        for module, name, _ in before:
            setattr(module, name, True)
        datasets.utils.logging.set_verbosity_error()
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        datasets.utils.logging.set_verbosity(verbosity)
