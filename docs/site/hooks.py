"""mkdocs' hook: pages of the reference that are written from the code, each time that the site is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import reference


def on_files(files: Files, config: Any) -> Files:
    for path, content in reference.pages().items():
        files.append(File.generated(config, path, content=content))
    return files
