"""Commands of the tests find the libraries imported, whichever files were collected before."""

from __future__ import annotations

import forked


def test_all_is_imported_before_the_fork() -> None:
    """A second list of what the one server of a process imports would take the place of this one, and no other test
    would fail: all of them would take twice the time."""
    code = f"import sys; print(*set({forked.IMPORTED!r}) - set(sys.modules))"
    done = forked.python("-c", code)
    assert (done.stdout, done.stderr) == ("\n", "")
