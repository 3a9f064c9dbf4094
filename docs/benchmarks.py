"""Writes what `benchmarks/results` says into the pages: `python docs/benchmarks.py`, in a second.

    1.41<!-- benchmark: NAME: ratios.TRL -->                a figure of the result of the benchmark NAME
    1/18<!-- benchmark: NAME: bytes.ours / bytes.TRL -->    a quotient of two; 1/18 where its inverse rounds to 18
    36<!-- benchmark: FILE.json: cases.demo.seconds -->     a figure of one file
    <!-- benchmark table: per_prompt --> … <!-- end of table -->    a whole table, of the benchmark of other libraries

A figure keeps as many decimals as it is written with. `tests/test_benchmarks.py` fails where a page says anything else.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = re.compile(
    r"(?P<one>1/)?(?P<number>\d+(?:\.\d+)?)(?P<mark><!-- benchmark: (?P<key>.+?) -->)"
)
TABLE = re.compile(r"(<!-- benchmark table: (\w+) -->\n)(.*?)(<!-- end of table -->\n)", re.DOTALL)
SIZES = ("32k-512", "32k-2048", "152k-512", "152k-2048")


@cache
def results() -> dict[str, dict[str, Any]]:
    """Of every benchmark on a CPU, by its name without `test_`."""
    return of_file("cpu.json")


@cache
def of_file(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def value(key: str) -> float:
    """`NAME: PATH` or `NAME: PATH / PATH`; a path is `section.way`, of a file any number of keys."""
    name, paths = key.split(": ", 1)
    top: Any = of_file(name) if name.endswith(".json") else results()[name]

    def at(path: str) -> float:
        found = top
        for part in path.split(".") if name.endswith(".json") else path.split(".", 1):
            found = found[part]
        return float(found)

    above, *below = (at(path) for path in paths.split(" / "))
    return above / below[0] if below else above


def written(figure: re.Match[str]) -> str:
    """The figure as the results have it, with its mark, and as many decimals as before."""
    found = value(figure["key"])
    decimals = len(figure["number"].partition(".")[2])
    one = figure["one"] or ""
    return f"{one}{1 / found if one else found:.{decimals}f}{figure['mark']}"


def table(name: str) -> str:
    """Of every way: its median time over that of ours, and the most memory of its tensors over that of ours."""
    named = {size: f"{name}[{size}]" for size in SIZES}
    found = {size: results()[key] for size, key in named.items() if key in results()}
    if not found:
        return "Not measured yet.\n"
    heads = [f"{size.partition('-')[0]}, T {size.partition('-')[2]}" for size in found]
    lines = [f"| time, memory over ours | {' | '.join(heads)} |", f"|{'---|' * (1 + len(found))}"]
    own = [
        f"{of['seconds']['ours']:.2g} s, {of['bytes']['ours'] / 2**20:.0f} MiB"
        for of in found.values()
    ]
    lines.append(f"| ours | {' | '.join(own)} |")
    ways = dict.fromkeys(way for of in found.values() for way in of["ratios"])
    for way in ways:
        cells = [
            f"{of['ratios'][way]:.2f}, {of['bytes'][way] / of['bytes']['ours']:.2f}"
            if way in of["ratios"]
            else ""
            for of in found.values()
        ]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    rounds = [edge for of in found.values() for spread in of["spread"].values() for edge in spread]
    load = [one for of in found.values() for one in of["load"]]
    busy = dict.fromkeys(f"{edge:.0f}" for edge in (min(load), max(load)))
    lines.append(
        f"\nRounds lie between {min(rounds):.2f} and {max(rounds):.2f} of their medians; "
        f"{' to '.join(busy)} processes wanted to run on the machine."
    )
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """A page with its figures and tables as the results have them."""
    text = FIGURE.sub(written, text)
    return TABLE.sub(lambda of: f"{of[1]}\n{table(of[2])}\n{of[4]}", text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


if __name__ == "__main__":
    for path in pages():
        before = path.read_text()
        after = page(before)
        if after != before:
            path.write_text(after)
            print(path.relative_to(ROOT))
