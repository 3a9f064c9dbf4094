"""Real optimizers step, their checkpoints are loaded, and lr·v is the step that they make next; or they are not Adam.

Each row of docs/optimizers.md is what is found here. Rows of a package that is not installed are skipped.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

import real_optimizers
from real_optimizers import DISTRIBUTIONS, Make

PAGE = Path(__file__).parents[1] / "docs" / "optimizers.md"
# θ and θ' are rounded to float32: 6e-8·|θ|/(lr·|v|) of a norm, and its square of a cosine. 1 − β₂^t of torchao is a
# float32: 2⁻²⁵/(1 − 0.999⁴) = 7e-6, of which a norm has half.
ROUNDING = {"torchao": 1.5e-5}


@pytest.mark.parametrize(
    ("package", "name", "make"), [pytest.param(*row, id=" ".join(row[:2])) for row in real_optimizers.rows()]
)
def test_the_step_that_it_makes_next(tmp_path: Path, package: str, name: str, make: Make) -> None:
    if package and package not in ("torch", "transformers"):
        needed = {DISTRIBUTIONS.get(package, package)}
        if package in ("galore_torch", "apollo_torch"):  # which import it
            needed.add("bitsandbytes")
        for distribution in needed:
            try:
                importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                pytest.skip(f"{distribution} is not installed")
    with real_optimizers.quiet():
        of = real_optimizers.found(tmp_path / "ckpt", make)
    if not of.why:
        assert of.cosine >= 1 - 1e-9, of
        assert of.ratio == pytest.approx(1, abs=ROUNDING.get(package, 2e-7)), of
    assert real_optimizers.line(package, name, of) in PAGE.read_text().splitlines()


def test_the_page_has_the_rows_that_are_tested_and_no_others() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.count("|") == 4 and not line.startswith("|---")]
    wanted = [f"| {package or 'layout'} | {name} |" for package, name, _ in real_optimizers.rows()]
    assert len(rows) == len(wanted) + 1
    assert all(row.startswith(start) for row, start in zip(rows[1:], wanted, strict=True))
    assert PAGE.read_text().startswith(real_optimizers.HEAD)
    assert PAGE.read_text().endswith(real_optimizers.KEYS)
