"""How much memory there is, and how much of it a stretch of work took at most."""

from __future__ import annotations

import subprocess
import sys
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


PEAKS = """
import torch
from entropy_probe.memory import Peak
torch.ones(1)
peak = Peak(torch.device("cpu"))
for megabytes in (50, 30):
    held = torch.ones(megabytes * 1_000_000, dtype=torch.uint8)
    del held
print(peak.bytes())
peak.start()
held = torch.ones(40_000_000, dtype=torch.uint8)
print(peak.bytes())
peak.start()
print(peak.bytes())
"""


def test_peak_is_what_was_held_at_once() -> None:
    """50 MB that are freed before 30 MB come: 50, not 80, within what the allocator itself takes (4 MB). What is held
    already does not count. In a process of its own: memory that this one freed and kept would be used again."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    assert [float(line) for line in done.stdout.split()] == pytest.approx([50e6, 40e6, 0.0], abs=4e6)


def test_peak_is_unknown_where_the_kernel_does_not_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CLEAR", tmp_path / "none" / "clear_refs")
    assert memory.Peak(torch.device("cpu")).bytes() is None
