"""`.ci/link.py`: the wheel's environment has what is required and nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

LINK = Path(__file__).parents[1] / ".ci" / "link.py"


def missing(tmp_path: Path, *required: str) -> list[str]:
    """Which of some modules can't be imported where a wheel that requires this is linked."""
    lines = ["Metadata-Version: 2.1", "Name: one", "Version: 1", *(f"Requires-Dist: {name}" for name in required)]
    with ZipFile(tmp_path / "one.whl", "w") as wheel:
        wheel.writestr("one-1.dist-info/METADATA", "\n".join(lines))
    site = tmp_path / "site"
    site.mkdir()
    subprocess.run([sys.executable, LINK, tmp_path / "one.whl", site, "pluggy"], check=True)
    code = (
        f"import sys\nfrom importlib.util import find_spec\nsys.path.append({str(site)!r})\n"
        "print(*(name for name in ('rich', 'pygments', 'pluggy', 'numpy', 'jaxtyping') if not find_spec(name)))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_what_is_required_through_another_is_there(tmp_path: Path) -> None:
    assert missing(tmp_path, "rich>=13", "jaxtyping; extra == 'dev'") == ["numpy", "jaxtyping"]


def test_what_is_not_required_is_missing(tmp_path: Path) -> None:
    assert missing(tmp_path) == ["rich", "pygments", "numpy", "jaxtyping"]
