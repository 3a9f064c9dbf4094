"""Batches and pieces of logits that keep a limit of memory: chosen beforehand, and kept by whole runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import models
from entropy_probe import ProbeConfig, load_checkpoint
from entropy_probe.errors import ConfigError, MeasurementError
from entropy_probe.memory import Held, counted_bytes
from entropy_probe.model.forward import bind
from entropy_probe.stages import memory_limit
from entropy_probe.stages.memory_limit import for_sampling, planned, require_loaded_within
from entropy_probe.stages.rollouts import read_rollouts

CPU = torch.device("cpu")
MIB = 1 << 20


def test_counted_bytes_are_those_alive_at_once() -> None:
    def work() -> None:
        first = torch.ones(3, MIB // 4)  # 3 MiB
        second = first[1:] * 2  # 2 more
        del first, second
        torch.ones(MIB)  # 4

    assert counted_bytes(work, CPU) == 5 * MIB
    assert counted_bytes(work, torch.device("meta")) == 0


def test_counted_bytes_of_a_backward_pass() -> None:
    weight = torch.ones(512, 512, requires_grad=True)  # 1 MiB, held before

    def work() -> None:
        (weight.exp() * 2).sum().backward()

    # the result of exp is kept for its derivative; then the products' gradient, and exp's
    assert 2 * MIB <= counted_bytes(work, CPU) <= 4 * MIB + 4096


HELD_BACK = """
import torch
from contextlib import nullcontext
from entropy_probe.memory import Peak, given_back_at_once, held_bytes
with {}:
    for _ in range(3):  # glibc's own rule has then moved the threshold beyond these blocks
        torch.ones(4_000_000)
    cpu = torch.device("cpu")
    before = held_bytes(cpu)
    blocks = [torch.ones(1_000_000) for _ in range(50)]
    kept = blocks[1::2]
    del blocks
    print((Peak(cpu).held().at_start - before) / 4e6)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_freed_blocks_go_back() -> None:
    """Of 50 blocks of 4 MB every second one is freed, between others that stay."""

    def blocks(context: str) -> float:
        code = [sys.executable, "-c", HELD_BACK.format(context)]
        return float(subprocess.run(code, capture_output=True, text=True, check=True).stdout)

    assert blocks("nullcontext()") > 45
    assert blocks("given_back_at_once()") == pytest.approx(25, abs=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA checkpoint whose logits are most of what a pass takes, and its batches."""
    folder = tmp_path_factory.mktemp("limit")
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Qwen2Config(
        vocab_size=16000, **sizes, num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0
    )
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    model = models.add_adapter(transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), "qwen2")
    model.peft_config["default"].base_model_name_or_path = "base"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    models.train_steps(model, optimizer, steps=1)
    models.save_checkpoint(folder / "checkpoint", model, optimizer)
    generator = torch.Generator().manual_seed(1)
    for name in ("e", "u"):
        lines = [
            {
                "prompt_ids": torch.randint(3, 16000, (10,), generator=generator).tolist(),
                "response_ids": [torch.randint(3, 16000, (n,), generator=generator).tolist() for n in (90, 100)],
                "rewards": [0.0, 1.0],
            }
            for _ in range(2)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


class Subject:
    """The checkpoint, bound in both precisions, and its batches; `now` bytes are held already."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = load_checkpoint(folder / "checkpoint").model
        self.bound, self.float64 = bind(model), bind(model, torch.float64)
        self.batches = tuple(read_rollouts(folder / f"{name}.jsonl", self.bound, None) for name in ("e", "u"))
        monkeypatch.setattr(memory_limit, "_held_now", lambda device: 0)

    def planned(self, limit: int, **values: Any) -> memory_limit.Plan:
        config = ProbeConfig.from_mapping({"memory_limit": limit, **values})
        return planned(self.bound, self.float64, self.batches, config)


@pytest.fixture
def subject(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    return Subject(folder, monkeypatch)


def test_rows_and_pieces_shrink_with_the_limit(subject: Subject) -> None:
    """Much: as without a limit. Less: pieces of fewer positions, then fewer rows, then fewer positions still."""
    plans = [subject.planned(limit * MIB) for limit in (4000, 240, 130, 110)]
    sizes = [(plan.config.generation.tf_batch_size, plan.logits_at_once // 16000) for plan in plans]
    assert sizes[0] == (8, 131)
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[1] < sizes[0]
    assert sizes[-1][0] == 1
    for plan, limit in zip(plans, (4000, 240, 130, 110), strict=True):
        assert plan.expected <= limit * MIB
        assert plan.config.first_order.mode == "exact"


def test_what_is_needed_is_enough(subject: Subject) -> None:
    with pytest.raises(MeasurementError, match="too little for one response at a time") as caught:
        subject.planned(50 * MIB)
    needed = re.search(r"([\d.]+) GiB are needed", str(caught.value))
    assert needed is not None
    assert str(caught.value).count(";") == 1
    plan = subject.planned(int(1.01 * float(needed[1]) * 2**30))
    assert plan.config.generation.tf_batch_size == 1
    with pytest.raises(MeasurementError, match="too little"):
        subject.planned(int(0.97 * float(needed[1]) * 2**30))


@pytest.mark.parametrize("kind", ["_score", "_score_at", "_differentiate", "_differentiate_alone", "_derive", "_twice"])
def test_a_pass_is_what_was_expected_of_it(subject: Subject, kind: str) -> None:
    """c₀ + c₁·rows + c₂·positions, from one and two rows and 4 and 16 positions, against a pass of 4 rows and 32."""
    few = memory_limit._longest_rows(subject.batches)
    passes = memory_limit._Passes(subject.bound, subject.float64, few, ProbeConfig())
    work = getattr(memory_limit, kind)
    rows = 1 if kind == "_differentiate_alone" else 4
    of_kind = passes._counted(work, lambda config: rows, 2**60)
    larger = replace(
        few, **{key: getattr(few, key)[:1].repeat(4, *[1] * (getattr(few, key).dim() - 1)) for key in ROWS}
    )
    at_once = {name: replace(getattr(passes, name), logits_at_once=32 * 16000) for name in ("bound", "float64")}
    counted = counted_bytes(lambda: work(replace(passes, rollouts=larger, **at_once), torch.arange(rows)), CPU)
    assert counted == pytest.approx(of_kind.bytes(ProbeConfig(), 32), rel=0.1)


def test_units_become_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is trained in full the gradients of 12 prompts, 8 units of whose numbers fit."""
    model = load_checkpoint(models.full_checkpoint(tmp_path / "full", "llama")).model
    bound, float64 = bind(model), bind(model, torch.float64)
    e = read_rollouts(models.random_rollouts(tmp_path / "e.jsonl", prompts=40, responses=2, seed=1), bound, None)
    monkeypatch.setattr(memory_limit, "_SLACK", 0)
    monkeypatch.setattr(memory_limit, "_held_now", lambda device: 0)
    parameters = sum(p.numel() for p in bound.registry.trainable.values())
    config = ProbeConfig.from_mapping({"memory_limit": "16MiB"})
    most = planned(bound, float64, (e, e), config).config.first_order.max_gradient_gib * 2**30
    assert most < 4 * parameters * (3 * 40 + 8)
    plan = planned(bound, float64, (e, e), config)
    assert units_within_memory(bound, e, plan.config)[0] == "block"


def test_sampling_takes_fewer_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = bind(load_checkpoint(folder / "checkpoint").model)
    monkeypatch.setattr(memory_limit, "_held_now", lambda device: 0)
    rows = []
    for limit in ("4GiB", "50MiB", "30MiB"):
        config = ProbeConfig.from_mapping({"memory_limit": limit, "generation": {"max_new_tokens": 300}})
        rows.append(for_sampling(bound, 20, config).generation.gen_batch_size)
    assert rows[0] == 32
    assert rows[0] > rows[1] > rows[2] >= 1
    with pytest.raises(MeasurementError, match=r"too little to sample one response at a time: .* GiB are needed"):
        for_sampling(bound, 20, ProbeConfig.from_mapping({"memory_limit": "1MiB"}))
    assert for_sampling(bound, 20, ProbeConfig()).generation.gen_batch_size == 32


def test_a_load_that_took_more_is_an_error() -> None:
    config = ProbeConfig.from_mapping({"memory_limit": "1GiB"})
    require_loaded_within(config, Held(0, 2**30))
    with pytest.raises(MeasurementError, match="1 GiB is too little: loading alone took 2 GiB"):
        require_loaded_within(config, Held(0, 2**31))


def test_a_limit_that_cannot_be_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = bind(load_checkpoint(folder / "checkpoint").model)
    monkeypatch.setattr(memory_limit.memory, "held_bytes", lambda device: None)
    with pytest.raises(ConfigError, match="memory_limit: memory cannot be measured here"):
        for_sampling(bound, 20, ProbeConfig.from_mapping({"memory_limit": "1GiB"}))


@pytest.mark.parametrize(
    ("given", "expected"),
    [("8GiB", 2**33), ("1.5 GB", 1_500_000_000), ("800mib", 800 * MIB), (3e9, 3_000_000_000), (MIB, MIB), (None, None)],
)
def test_sizes(given: object, expected: int | None) -> None:
    assert ProbeConfig.from_mapping({"memory_limit": given}).memory_limit == expected


@pytest.mark.parametrize("given", ["8", "much", "", True, [1], "1e30", "9" * 400 + "GiB", "-1GiB", "5 GiB of it", 1000])
def test_what_is_no_size(given: object) -> None:
    with pytest.raises(ConfigError, match=r"`memory_limit`: .* is no size of 1 MiB or more: give one such as 8GiB"):
        ProbeConfig.from_mapping({"memory_limit": given})


def run(folder: Path, name: str, *options: str) -> tuple[subprocess.Popen[str], int, str]:
    """The process, the most that it held, looked at every few milliseconds from outside, and what it said."""
    batches = ("--rollouts", folder / "e.jsonl", "--update-rollouts", folder / "u.jsonl")
    command = [sys.executable, "-m", "entropy_probe", "run", folder / "checkpoint", *batches, "--budget", "smoke"]
    most = 0
    with subprocess.Popen(
        [*map(str, command), "--out", str(folder / f"{name}.json"), *options], stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            most = max(most, int(found[1]) * 1024 if found else 0)
            time.sleep(0.003)
        assert process.stderr is not None
        return process, most, process.stderr.read()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident sizes are Linux's")
def test_limits_are_kept(folder: Path) -> None:
    """Three limits between what is needed at least, as the error of a fourth says, and what is held without one."""
    process, free, _ = run(folder, "free")
    assert process.returncode == 0
    process, _, said = run(folder, "too little", "--memory-limit=300MiB")
    assert process.returncode == 1
    expected = json.loads((folder / "free.json").read_text())
    start = expected["memory"]["stages"]["rollouts"]["peak"]
    for name, limit in (("a", start + 400 * MIB), ("b", start + 150 * MIB), ("c", start + 100 * MIB)):
        process, seen, said = run(folder, name, f"--memory-limit={limit}")
        assert (process.returncode, said) == (0, ""), said
        report = json.loads((folder / f"{name}.json").read_text())
        peak = max(stage["peak"] for stage in report["memory"]["stages"].values())
        assert seen <= peak + MIB
        assert peak <= limit, (peak / MIB, limit / MIB, report["memory"])
        assert peak < free
        assert report["memory"]["expected"] <= limit
        assert report["entropy"]["rb"]["value"] == pytest.approx(expected["entropy"]["rb"]["value"], rel=1e-6)
        assert report["update"]["curvature"] == pytest.approx(expected["update"]["curvature"], rel=1e-4)
