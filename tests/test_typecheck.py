"""Wrong shapes are refused while tests run: the annotations of functions and of dataclasses mean something there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import typecheck
from entropy_probe.estimators.ustat import cross_moments
from entropy_probe.stages.scores import Scores


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="parameter 'gram'"):
        cross_moments(torch.zeros(3, 4))


def test_a_wrong_shape_in_a_dataclass_is_refused() -> None:
    of_two_axes = torch.zeros(3, 4)
    with pytest.raises(TypeCheckError, match="parameter 'token_logp'"):
        Scores(of_two_axes, of_two_axes, of_two_axes, of_two_axes, torch.zeros(3, 4, dtype=torch.long))


def test_where_whole_measurements_are_repeated_nothing_is_checked() -> None:
    tests = Path(__file__).parent
    assert typecheck.is_checked(Path(__file__))
    assert not typecheck.is_checked(tests / "test_oracle.py")
    assert not typecheck.is_checked(tests / "faults" / "test_faults.py")
    with typecheck.unchecked(), pytest.raises(RuntimeError):
        cross_moments(torch.zeros(3, 4))
    with pytest.raises(TypeCheckError, match="parameter 'gram'"):
        cross_moments(torch.zeros(3, 4))
