"""How much memory there is, and how much of it a stretch of work took at most."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from entropy_probe import memory


def test_available_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CONTAINERS", ((tmp_path, "limit", "used", "inactive_file"),))
    assert memory.available_bytes(torch.device("cpu")) is None
    meminfo.write_text("MemTotal:       16000000 kB\nMemAvailable:    8000000 kB\n", encoding="ascii")
    assert memory.available_bytes(torch.device("cpu")) == 8_000_000 * 1024
    assert memory.available_bytes(torch.device("mps")) is None
    (tmp_path / "limit").write_text("5000\n", encoding="ascii")
    (tmp_path / "used").write_text("4000\n", encoding="ascii")
    (tmp_path / "memory.stat").write_text("cache 1\ninactive_file 1500\n", encoding="ascii")
    assert memory.available_bytes(torch.device("cpu")) == 2500
    (tmp_path / "limit").write_text("max\n", encoding="ascii")
    assert memory.available_bytes(torch.device("cpu")) == 8_000_000 * 1024
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert memory.available_bytes(torch.device("cuda")) == 130


def test_peak_is_what_was_held_at_once() -> None:
    """50 MB that are freed again before 30 MB come: 50, not 80, within what the allocator itself takes (4 MB)."""
    peak = memory.Peak(torch.device("cpu"))
    for megabytes in (50, 30):
        held = torch.ones(megabytes * 1_000_000, dtype=torch.uint8)
        del held
    assert peak.bytes() == pytest.approx(50e6, abs=4e6)
    peak.start()
    held = torch.ones(30_000_000, dtype=torch.uint8)
    assert peak.bytes() == pytest.approx(30e6, abs=4e6)
    peak.start()
    assert peak.bytes() == pytest.approx(0, abs=1e6)  # what is held already does not count
    assert held.sum() == 30_000_000


def test_peak_is_unknown_where_the_kernel_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none" / "clear_refs")
    assert memory.Peak(torch.device("cpu")).bytes() is None
