"""docs/hostile.md says what the library refuses: every name in it is one that the library or the catalogue knows."""

from __future__ import annotations

import re
from pathlib import Path

import entropy_probe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "hostile.md").read_text(encoding="utf-8")
CATALOGUE = "".join((ROOT / "tests" / "hostile" / name).read_text() for name in ("catalogue.py", "damage.py"))
LIBRARY = "".join(path.read_text() for path in Path(entropy_probe.__file__).parent.rglob("*.py"))
# Files and keys that the page speaks of, each of which has a case in the catalogue.
KEYS = ("auto_map", "transformers_weights", "attn_implementation", "megatron_config", "layer_replication", "lora_alpha")


def test_every_key_that_is_refused_has_a_case() -> None:
    for key in KEYS:
        assert f"`{key}" in PAGE
        assert key in CATALOGUE
        assert key.removeprefix("attn") in LIBRARY  # which has it in a pattern


def test_every_file_on_the_page_has_a_case() -> None:
    files = re.findall(r"`([\w*]+\.(?:json|pt|pth|bin|jinja))`", PAGE)
    assert len(files) >= 6
    for name in files:
        assert name.replace("*", "") in CATALOGUE, name


def test_the_paths_and_targets_exist() -> None:
    for path in re.findall(r"`(tests/[\w/.]+)`", PAGE):
        assert (ROOT / path).is_file()
    assert re.search(r"^fuzz:", (ROOT / "Makefile").read_text(), re.M)
