"""Wrong shapes are refused while tests run: the annotations of functions and of dataclasses mean something there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

import typecheck
from entropy_probe.estimators.ustat import cross_moments
from entropy_probe.stages.entropy_change import grid
from entropy_probe.stages.scores import Scores


def test_a_wrong_shape_is_refused() -> None:
    with pytest.raises(TypeCheckError, match="parameter 'gram'"):
        cross_moments(torch.zeros(3, 4))


def test_a_wrong_shape_in_a_dataclass_is_refused() -> None:
    of_two_axes = torch.zeros(3, 4)
    with pytest.raises(TypeCheckError, match="parameter 'token_logp'"):
        Scores(of_two_axes, of_two_axes, of_two_axes, of_two_axes, torch.zeros(3, 4, dtype=torch.long))


def test_wrong_types_are_refused_where_no_shape_is_said() -> None:
    config: Any = "none"
    with pytest.raises(TypeError, match="parameter config"):
        grid(config, 1.0)
    with typecheck.unchecked(), pytest.raises(AttributeError):
        grid(config, 1.0)


def test_a_wrong_type_inside_of_a_function_is_refused() -> None:
    """What is made at every call is checked where it was made while calls are."""

    def call() -> Any:
        def inner(number: float) -> float:
            return number

        return typecheck._jaxtyped(inner, typechecker=typecheck.enforce)

    with pytest.raises(TypeCheckError, match="parameter 'number'"):
        call()("none")
    with typecheck.unchecked():
        assert call()("none") == "none"


def test_where_whole_measurements_are_repeated_nothing_is_checked() -> None:
    tests = Path(__file__).parent
    assert typecheck.is_checked(Path(__file__))
    assert not typecheck.is_checked(tests / "test_oracle.py")
    assert not typecheck.is_checked(tests / "faults" / "test_faults.py")
    with typecheck.unchecked(), pytest.raises(RuntimeError):
        cross_moments(torch.zeros(3, 4))
    with pytest.raises(TypeCheckError, match="parameter 'gram'"):
        cross_moments(torch.zeros(3, 4))
