"""Scores of sequences."""

import pytest

from entropy_probe_checks.criteria import sequences

pytestmark = [pytest.mark.acceptance, pytest.mark.sequences]


def test_padding_invariance(probe_judge):
    probe_judge(sequences.padding_invariance)
