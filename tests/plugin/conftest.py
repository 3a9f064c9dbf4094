"""Runs inside these tests have our plugin and xdist only: the start-up of others takes longer than most of the runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

OTHERS = ("anyio", "benchmark", "hypothesispytest", "jaxtyping")


@pytest.fixture(scope="session", autouse=True)
def _without_other_plugins() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("GITHUB_STEP_SUMMARY", raising=False)
        patch.setenv("PYTEST_ADDOPTS", " ".join(f"-pno:{name}" for name in OTHERS))
        yield
