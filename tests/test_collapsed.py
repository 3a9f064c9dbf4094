"""No criterion is red on batches of policies that have collapsed, or nearly; `collapsed.py` draws more."""

from __future__ import annotations

from pathlib import Path

import pytest

from collapsed import Batch, red

# Of the first 200, the ones that turned most criteria red before differences were measured against their rounding:
# of logits in the thousands, of entropies from 1e-100 to 1e-6, of responses that are all the same, of equal rewards;
# one where ⌈B·(2 SE/predicted)²⌉ is of a whole number but for rounding, and two where figures are what cancels leaves.
CHOSEN = (0, 7, 8, 12, 14, 22, 53, 87, 89, 125, 138, 171, 183, 187)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("collapsed")


@pytest.mark.parametrize("number", CHOSEN)
def test_nothing_is_red(folder: Path, number: int) -> None:
    assert red(folder, Batch.of(number)) == {}
