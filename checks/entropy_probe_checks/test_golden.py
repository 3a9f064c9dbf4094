"""The report's numbers beside stored ones of the same checkpoint; collected only with --probe-golden-dir."""

import pytest

from entropy_probe_checks import goldens

pytestmark = [pytest.mark.acceptance, pytest.mark.golden]


def test_checkpoint(_probe_golden_section):
    _probe_golden_section(goldens.checkpoint)


def test_batch(_probe_golden_section):
    _probe_golden_section(goldens.batch)


def test_entropy(_probe_golden_section):
    _probe_golden_section(goldens.entropy)


def test_first_order(_probe_golden_section):
    _probe_golden_section(goldens.first_order)


def test_two_batch(_probe_golden_section):
    _probe_golden_section(goldens.two_batch)


def test_update(_probe_golden_section):
    _probe_golden_section(goldens.update)


def test_entropy_change(_probe_golden_section):
    _probe_golden_section(goldens.entropy_change)


def test_registry(_probe_golden_section):
    _probe_golden_section(goldens.registry)
