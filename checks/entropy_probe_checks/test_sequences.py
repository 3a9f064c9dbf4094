"""Scores of sequences."""

import pytest

from entropy_probe_checks.criteria import sequences

pytestmark = [pytest.mark.acceptance, pytest.mark.sequences]


def test_padding_invariance(_probe_judge):
    _probe_judge(sequences.padding_invariance)


def test_batch_invariance(_probe_judge):
    _probe_judge(sequences.batch_invariance)


def test_chunk_invariance(_probe_judge):
    _probe_judge(sequences.chunk_invariance)


def test_sampler_parity(_probe_judge):
    _probe_judge(sequences.sampler_parity)


def test_on_policy(_probe_judge):
    _probe_judge(sequences.on_policy)


def test_gold_complete(_probe_judge):
    _probe_judge(sequences.gold_complete)


def test_precision_invariance(_probe_judge):
    _probe_judge(sequences.precision_invariance)


def test_ends_at_eos(_probe_judge):
    _probe_judge(sequences.ends_at_eos)


def test_batches_as_given(_probe_judge):
    _probe_judge(sequences.batches_as_given)


def test_cache_agrees(_probe_judge):
    _probe_judge(sequences.cache_agrees)


def test_seeded(_probe_judge):
    _probe_judge(sequences.seeded)
