"""Prompts in files as trainers hold them, a row at a time: JSON lines, JSON, CSV, Parquet, `save_to_disk` folders.

A file is read twice, once to count and check its rows and once for those that were drawn, and is never held whole.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from entropy_probe.errors import ProbeError, RolloutsError, shown
from entropy_probe.stages.responses.prompts import Prompt, prompt_of_row
from entropy_probe.text import json_lines, open_regular, read_text

Rows = Iterator[tuple[str, Mapping[str, Any]]]

FORM = 'write {"prompt": "…", "gold": "…"}, or a list of messages under `prompt`'
_AT_ONCE = 256
"""Rows of a table that are made Python objects at once."""


@dataclass(frozen=True)
class PromptFile(Sequence[Prompt]):
    """The prompts of a file, in their order. `gold` is the column that their answers are from."""

    path: Path
    rows: Callable[[], Rows]
    size: int
    gold: str | None

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return self.at(range(self.size)[index])
        return self.at([range(self.size)[index]])[0]

    def __iter__(self) -> Iterator[Prompt]:
        for where, row in self.rows():
            yield _prompt(where, row)[0]

    def at(self, places: Sequence[int]) -> list[Prompt]:
        """Those at some places, in the order of the places, by one pass."""
        wanted, found = set(places), dict[int, Prompt]()
        for place, (where, row) in enumerate(self.rows()):
            if place in wanted:
                found[place] = _prompt(where, row)[0]
                if len(found) == len(wanted):
                    break
        return [found[place] for place in places]


def read_prompts(path: str | Path, split: str = "train") -> PromptFile:
    """Look at every row: `prompt`, a text or a list of messages, beside whatever a reward is given.

    `split` matters to a folder that has several. Raises `RolloutsError` naming the row that is not of this form.
    """
    file = Path(path)
    rows = _rows_of(file, split)
    count, golds = 0, Counter[str]()
    for where, row in rows():
        count += 1
        _, gold = _prompt(where, row)
        if gold is not None:
            golds[gold] += 1
    if not count:
        raise RolloutsError(path, "holds no prompt", 'write one {"prompt": "…"} per line')
    return PromptFile(file, rows, count, ", ".join(golds) or None)


def _prompt(where: str, row: Mapping[str, Any]) -> tuple[Prompt, str | None]:
    try:
        return prompt_of_row(row)
    except ValueError as error:
        raise RolloutsError(where, str(error), FORM) from error


def _rows_of(path: Path, split: str) -> Callable[[], Rows]:
    if path.is_dir():
        return lambda: _of_folder(path, split)
    readers: dict[str, Callable[[Path], Rows]] = {
        ".json": _of_json,
        ".csv": _of_csv,
        ".tsv": _of_csv,
        ".parquet": _of_parquet,
    }
    reader = readers.get(path.suffix.lower(), lambda file: json_lines(file, FORM))
    return lambda: reader(path)


def _of_json(path: Path) -> Rows:
    """A list of rows; or, as some call them, lines."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise RolloutsError(path, f"cannot be read ({error})", "give a JSON file") from error
    text = text.removeprefix("\ufeff")
    if not text.lstrip().startswith("["):
        yield from json_lines(path, FORM)
        return
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RolloutsError(path, f"is not JSON ({error})", FORM) from error
    for number, row in enumerate(rows, start=1):
        yield _object(f"{path}: entry {number}", row)


def _object(where: str, row: Any) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(row, Mapping):
        raise RolloutsError(where, f"is {shown(row)}", FORM)
    return where, row


def _of_csv(path: Path) -> Rows:
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    limit = csv.field_size_limit(1 << 24)
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, delimiter=separator, strict=True)
            table.fieldnames = [name.strip() for name in table.fieldnames or ()]
            if "prompt" not in table.fieldnames:
                problem = f"has the columns {shown(table.fieldnames)}"
                raise RolloutsError(path, problem, "name one `prompt`")
            for row in table:
                if None in row:
                    problem = f"has more than {len(table.fieldnames)} columns"
                    raise RolloutsError(
                        f"{path}:{table.line_num}", problem, "quote the fields that contain commas"
                    )
                yield f"{path}:{table.line_num}", _of_cells(row)
    except (OSError, ValueError, csv.Error) as error:
        raise RolloutsError(path, f"cannot be read ({error})", "give a CSV file") from error
    finally:
        csv.field_size_limit(limit)


def _of_cells(row: Mapping[str, str | None]) -> dict[str, Any]:
    """An empty cell is nothing, and a prompt may be messages, written as JSON."""
    found: dict[str, Any] = {key: value or None for key, value in row.items()}
    prompt = found["prompt"]
    if isinstance(prompt, str) and prompt.lstrip().startswith("[{"):
        with suppress(ValueError):
            messages = json.loads(prompt)
            if all(isinstance(m, dict) and "role" in m for m in messages):
                found["prompt"] = messages
    return found


def _of_parquet(path: Path) -> Rows:
    for where, row in rows_of_table(path):
        if "prompt" not in row:
            raise RolloutsError(path, f"has the columns {shown(list(row))}", "name one `prompt`")
        yield where, row


def rows_of_table(path: Path) -> Rows:
    """Of a Parquet file, a few at a time."""
    parquet: Any = _library("pyarrow.parquet", path)
    try:
        with open_regular(path) as stream:
            table, number = parquet.ParquetFile(stream, pre_buffer=False), 0
            for batch in table.iter_batches(batch_size=_AT_ONCE, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except ProbeError:
        raise
    except Exception as error:  # pyarrow has errors of its own, and codecs' too
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise RolloutsError(path, problem[:300], "give a Parquet file") from error


def _of_folder(path: Path, split: str) -> Rows:
    """What `datasets`' `save_to_disk` wrote: one table, or one for each split."""
    datasets: Any = _library("datasets", path)
    try:
        table: Any = datasets.load_from_disk(str(path))
        if isinstance(table, Mapping):
            if split not in table and len(table) > 1:
                problem = f"has the splits {', '.join(table)}"
                raise RolloutsError(path, problem, "set batch.split, or give the folder of one")
            table = table[split] if split in table else next(iter(table.values()))
        table = table.with_format(None)  # one for training may hide columns, or make arrays of them
        if "prompt" not in table.column_names:
            problem = f"has the columns {shown(table.column_names)}"
            raise RolloutsError(path, problem, "name one `prompt`")
        for start in range(0, len(table), _AT_ONCE):
            columns = table[start : start + _AT_ONCE]
            for k in range(len(columns["prompt"])):
                row = {name: values[k] for name, values in columns.items()}
                yield f"{path}: row {start + k + 1}", row
    except ProbeError:
        raise
    except Exception as error:
        problem = f"cannot be read ({type(error).__name__}: {error})"
        raise RolloutsError(path, problem[:300], "give what `save_to_disk` wrote") from error


def _library(name: str, path: Path) -> Any:
    package = name.partition(".")[0]
    try:
        __import__(name)
    except ImportError as error:
        problem = f"needs the package {package}, which is not installed"
        raise RolloutsError(path, problem, f"install {package}, or give JSON lines") from error
    return sys.modules[name]
