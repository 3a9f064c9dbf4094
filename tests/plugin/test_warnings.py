"""A user's `filterwarnings = error` is for the user's code, not for the libraries that are measured with."""

from __future__ import annotations

import warnings

import pytest

from pytest_entropy_probe.library import warnings_are_not_errors


def test_error_is_read_as_default_and_the_rest_stays() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="ignored by the user")
        with warnings_are_not_errors():
            warnings.warn("shown", UserWarning, stacklevel=1)
            warnings.warn("ignored by the user", UserWarning, stacklevel=1)
            warnings.warn("of no use", DeprecationWarning, stacklevel=1)
        assert [str(warning.message) for warning in seen] == ["shown"]
        with pytest.raises(UserWarning, match="an error again"):
            warnings.warn("an error again", UserWarning, stacklevel=1)
