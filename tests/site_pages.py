"""The pages of the site as tests read them: their texts, sentences, files and commands."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
ROOMS = ("start/", "concepts/", "howto/", "index.md", "evidence.md")
"""Pages that are written for the site; the others were there before, and have tests of their own."""

_PROGRAMS = r"(?:PYTHONPATH=\S+ pytest|pytest|entropy-probe|torchrun|python|pip|shtab|source)\b"
_FENCED = re.compile(
    r"^(?:<!-- needs (?P<needs>[^>]*?) -->\n)?```(?P<kind>\w*)(?P<head>[^\n]*)\n(?P<text>.*?)^```", re.M | re.S
)


def fenced(page: str) -> list[tuple[str, str, str, str]]:
    """Blocks of a page in their order: language, title, what the reader needs, text."""
    found = []
    for block in _FENCED.finditer(PAGES[page]):
        title = re.search(r'title="([^"]+)"', block["head"])
        found.append((block["kind"], title[1] if title else "", block["needs"] or "", block["text"]))
    return found


def commands(page: str) -> list[tuple[str, str]]:
    """Commands of a page in their order, each on one line, with what the reader needs for it."""
    found = []
    for kind, _, needs, text in fenced(page):
        if kind == "sh":
            found += [(line, needs) for line in lines(text)]
    indented = re.findall(rf"^ {{4}}({_PROGRAMS} .*?)(?: {{2,}}#.*)?$", _FENCED.sub("", PAGES[page]), re.MULTILINE)
    return found + [(line, "") for line in indented]


def lines(text: str) -> list[str]:
    """Commands of a block, each on one line."""
    return [re.sub(r" +", " ", line) for line in text.replace(" \\\n", " ").splitlines() if line.strip()]


def own_inputs(place: Path) -> None:
    """`rewards.py` and `prompts.parquet` as the page on a TRL checkpoint makes them; other pages go on from there."""
    written = {title: text for _, title, _, text in fenced("start/checkpoint.md") if title}
    (place / "rewards.py").write_text(written["rewards.py"])
    with contextlib.chdir(place):
        exec(written["save_prompts.py"], {})  # noqa: S102 (the page's own text)


def prose(page: str) -> list[str]:
    """Sentences of a page, without code, tables' rules, addresses of links and marks."""
    text = _FENCED.sub("\n\n", PAGES[page])
    text = re.sub(r"^ {4,}\S.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^\|[-| ]+\|$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    parts = re.split(r"\n\s*\n|\n(?=[*#|] |\d\. )|\|", text)
    sentences = []
    for part in parts:
        sentences += re.split(r"(?<=[.!?])[*_]*\s+", " ".join(part.split()))
    return [one.strip("*# ") for one in sentences if one.strip("*# ")]
