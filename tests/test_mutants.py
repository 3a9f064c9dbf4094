"""A sample of what `make mutants` does: most slips that move a number are seen, and each kind of slip can be made."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mutants.mutate import mutants

SAMPLE = """
import json, sys
sys.path.insert(0, {tests!r})
from mutants.run import judged
found = judged(12, 4, 1, standard={{"budget": "smoke"}}, show=False)
print(json.dumps([(str(mutant), status, why) for mutant, status, why in found]))
"""


def test_a_sample_of_mutants() -> None:
    """Twelve, each by two short runs, in a process that has none of our modules: most of them are killed."""
    code = SAMPLE.format(tests=str(Path(__file__).parent))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 10
    killed, survived = ([one for one in found if one[1] == status] for status in ("killed", "survived"))
    assert len(killed) >= 4, found
    assert len(survived) <= 2, survived


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a + b", "a - b"),
        ("a / b", "a * b"),
        ("-a", "a"),
        ("a < b", "a <= b"),
        ("a == b", "a != b"),
        ("a and b", "a or b"),
        ("a[1]", "a[2]"),
        ("a.mean()", "a.sum()"),
        ("a.detach()", "a"),
        ("f(a, b)", "f(b, a)"),
        ("f(x=a, y=b)", "f(x=b, y=a)"),
    ],
)
def test_every_kind_of_slip(tmp_path: Path, line: str, expected: str) -> None:
    source = f'def f(a: int, b: int):\n    """A docstring, 1 + 1."""\n    return {line}\n'
    (tmp_path / "m.py").write_text(source)
    made = {mutant.source for mutant in mutants(tmp_path, {"m.py": {3}}, 100, 0)}
    assert ast.unparse(ast.parse(source.replace(f"return {line}", f"return {expected}"))) in made
    assert mutants(tmp_path, {"m.py": {2}}, 100, 0) == []
    assert all("1 + 1." in text for text in made)
