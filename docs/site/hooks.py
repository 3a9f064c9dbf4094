"""mkdocs' hook, each time that the site is built: pages of the reference are written from the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import written_pages


def on_files(files: Files, config: Any) -> Files:
    for path, content in written_pages.pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A page that has several titles gets one, with the others below it: its table of contents then has them all."""
    if len(re.findall(r"^# ", markdown, re.MULTILINE)) < 2 or "```" in markdown:
        return markdown
    title, *more = re.split(r"(?=^# )", markdown, flags=re.MULTILINE)[1:]
    return title + "".join(re.sub(r"^#", "##", part, flags=re.MULTILINE) for part in more)
