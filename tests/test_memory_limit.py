"""Batches and pieces of logits that keep a limit of memory: chosen beforehand, and kept by whole runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import models
from entropy_probe import ProbeConfig, load_checkpoint, run_probe
from entropy_probe.errors import ConfigError, MeasurementError
from entropy_probe.memory import Held, LiveTensors, counted_bytes, live_tensors
from entropy_probe.model.forward import bind
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.stages.gradients import products
from entropy_probe.stages.gradients.units import units_within_memory
from entropy_probe.stages.memory import memory_limit, pass_memory
from entropy_probe.stages.memory.memory_limit import for_sampling, planned, require_loaded_within
from entropy_probe.stages.memory.pass_memory import Passes
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.scores import score

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
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
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
                "response_ids": [torch.randint(3, 16000, (n,), generator=generator).tolist() for n in (24, 32)],
                "rewards": [0.0, 1.0],
            }
            for _ in range(2)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


class Subject:
    """The checkpoint, bound in both precisions, and its batches. Nothing is held already, and passes are tried once."""

    def __init__(self, folder: Path) -> None:
        model = load_checkpoint(folder / "checkpoint").model
        self.bound, self.float64 = bind(model), bind(model, torch.float64)
        self.batches = tuple(read_rollouts(folder / f"{name}.jsonl", self.bound, None) for name in ("e", "u"))
        config = ProbeConfig.from_mapping({"budget": "smoke"})
        passes = Passes(self.bound, self.float64, pass_memory.longest_rows(self.batches), config)
        self.kinds = [*passes.kinds(2**60)]

    def planned(self, limit: int, monkeypatch: pytest.MonkeyPatch) -> memory_limit.Plan:
        monkeypatch.setattr(memory_limit, "_held_now", lambda device: 0)
        monkeypatch.setattr(Passes, "kinds", lambda passes, usable: self.kinds)
        config = ProbeConfig.from_mapping({"memory_limit": limit, "budget": "smoke"})
        return planned(self.bound, self.float64, self.batches, config)


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return Subject(folder)


def test_rows_and_pieces_shrink_with_the_limit(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Much: as without a limit. Less: pieces of fewer positions, then fewer rows."""
    sizes, limit, error = [], 4096 * MIB, None
    while error is None:
        try:
            plan = subject.planned(limit, monkeypatch)
        except MeasurementError as too_little:
            error = too_little
        else:
            assert plan.expected <= limit
            assert plan.config.first_order.mode == "exact"
            sizes.append((plan.config.generation.tf_batch_size, plan.logits_at_once // 16000))
            limit = plan.expected - 1
    assert sizes[0] == (8, 131)
    assert sizes == sorted(sizes, reverse=True)
    assert {rows for rows, _ in sizes} > {8, 1}
    assert {positions for _, positions in sizes} > {131, 16}


def test_what_is_needed_is_enough(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MeasurementError, match="too little for one response at a time") as caught:
        subject.planned(2 * MIB, monkeypatch)
    needed = re.search(r"([\d.]+) GiB are needed", str(caught.value))
    assert needed is not None
    assert str(caught.value).count(";") == 1
    plan = subject.planned(int(1.005 * float(needed[1]) * 2**30), monkeypatch)
    assert plan.config.generation.tf_batch_size == 1
    with pytest.raises(MeasurementError, match="too little"):
        subject.planned(int(0.99 * float(needed[1]) * 2**30), monkeypatch)


@pytest.mark.parametrize("kind", ["_score", "_score_at", "_differentiate", "_derive", "_alpha", "_twice"])
def test_a_pass_is_within_its_bound(subject: Subject, kind: str) -> None:
    """Of 8 rows and pieces of 90 positions, from passes of fewer; and the bound is not far off."""
    few = pass_memory.longest_rows(subject.batches)
    passes, work, rows = Passes(subject.bound, subject.float64, few, ProbeConfig()), getattr(pass_memory, kind), 8
    bound = passes.counted(work, lambda config: rows, 2**60, 2)(ProbeConfig(), 90)
    eight = {key: torch.cat([getattr(few, key)] * 2) for key in ("ids", "prompt_lens", "gen_lens", "rewards")}
    at_once = {name: replace(getattr(passes, name), logits_at_once=90 * 16000) for name in ("bound", "float64")}
    larger = replace(passes, rollouts=replace(few, **eight), **at_once)
    counted = counted_bytes(lambda: work(larger, torch.arange(rows)), CPU)
    assert counted <= bound <= 1.7 * counted


@pytest.mark.parametrize("tokens", [1, 3, 4, 10])
def test_short_responses(subject: Subject, tokens: int) -> None:
    """No pass of more positions than there are is thought to take more."""
    few = memory_limit.longest_rows(subject.batches)
    short = replace(few, gen_lens=few.gen_lens.clamp(max=tokens))
    passes = Passes(subject.bound, subject.float64, short, ProbeConfig())
    usable = [passes.counted(pass_memory._score, lambda config: 1, room) for room in (0, 2**60)]
    least, same = (kind(ProbeConfig(), 4) for kind in usable)
    assert least == same
    assert usable[1](ProbeConfig(), 64) == usable[1](ProbeConfig(), tokens)


def test_what_is_fixed_does_not_grow() -> None:
    assert pass_memory._above({1: 110, 4: 140}, 8, fixed=100) == 180
    assert pass_memory._above({1: 110, 4: 140}, 8) == 280
    assert pass_memory._above({1: 10, 4: 40}, 8, fixed=100) == 70


def test_bounds_of_convex_functions() -> None:
    points = {4: 10, 16: 22, 64: 118}
    assert [pass_memory._above(points, x) for x in (1, 4, 10, 16, 40, 64, 128)] == [10, 10, 16, 22, 70, 118, 236]


def test_units_become_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is trained in full: the gradients of 40 prompts do not fit beside the rest."""
    model = load_checkpoint(models.full_checkpoint(tmp_path / "full", "llama")).model
    bound, float64 = bind(model), bind(model, torch.float64)
    e = read_rollouts(models.random_rollouts(tmp_path / "e.jsonl", prompts=40, responses=2, seed=1), bound, None)
    monkeypatch.setattr(memory_limit, "_SLACK", 0)
    monkeypatch.setattr(memory_limit, "_held_now", lambda device: 0)
    found = {}
    for limit in ("1GiB", "6MiB"):
        config = ProbeConfig.from_mapping({"memory_limit": limit, "budget": "smoke"})
        found[limit] = units_within_memory(bound, e, planned(bound, float64, (e, e), config).config)
    assert found["1GiB"] == ("exact", 40)
    assert found["6MiB"][0] == "block"
    assert 2 <= found["6MiB"][1] < 40


def test_second_derivatives_can_be_left_out(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they alone are too much, the plan is that without them, and it says so."""
    with monkeypatch.context() as patch:
        patch.setattr(Passes, "kinds_of_second_order", lambda passes, usable: [])
        without = subject.planned(4096 * MIB, monkeypatch)
    assert without.left_out is None
    monkeypatch.setattr(Passes, "kinds_of_second_order", lambda passes, usable: [lambda config, positions: 2**40])
    found = subject.planned(4096 * MIB, monkeypatch)
    assert found.left_out is not None
    assert "GiB, and memory_limit is 4 GiB" in found.left_out
    assert replace(found, left_out=None) == replace(without, recompute=found.recompute)


def test_sampling_takes_fewer_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = bind(load_checkpoint(folder / "checkpoint").model)
    monkeypatch.setattr(memory_limit, "_held_now", lambda device: 0)
    rows = []
    for limit in ("4GiB", "31MiB", "28MiB"):
        config = ProbeConfig.from_mapping({"memory_limit": limit, "generation": {"max_new_tokens": 300}})
        rows.append(for_sampling(bound, 20, config).generation.gen_batch_size)
    assert rows[0] == 32
    assert rows[0] > rows[1] > rows[2] >= 1
    with pytest.raises(MeasurementError, match=r"too little to sample one response at a time: .* GiB are needed"):
        for_sampling(bound, 20, ProbeConfig.from_mapping({"memory_limit": "1MiB"}))
    assert for_sampling(bound, 20, ProbeConfig()).generation.gen_batch_size == 32


def test_frozen_parameters_are_shared_where_a_copy_is_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are the same, bit for bit."""
    folder = models.adapter_checkpoint(tmp_path / "checkpoint", "llama")
    bound = bind(load_checkpoint(folder).model)
    frozen = sum(p.numel() for p in bound.registry.parameters.values() if not p.requires_grad)
    with monkeypatch.context() as patch:
        patch.setattr(memory_limit, "_held_now", lambda device: 4 * MIB)
        for left, expected in ((16 * frozen + 8, False), (16 * frozen - 8, True)):
            config = ProbeConfig().model_copy(update={"memory_limit": 4 * MIB + left})
            assert memory_limit.lends_frozen(bound, config) is expected
    file = models.random_rollouts(tmp_path / "e.jsonl", prompts=2, responses=2, seed=1)
    reports = []
    for lends in (False, True):
        monkeypatch.setattr("entropy_probe.pipeline.measured.lends_frozen", lambda bound, config, lends=lends: lends)
        config = ProbeConfig.from_mapping({"budget": "smoke", "memory_limit": "64GiB"})
        reports.append(run_probe(folder, config, file).model_dump(exclude={"timing", "memory"}))
    assert reports[0] == reports[1]


def test_a_product_of_units_is_within_its_bound() -> None:
    """Few columns of many units at a time, with sums as in one piece."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 40_000, generator=generator) for _ in range(2))
    weights = torch.rand(64, generator=generator, dtype=torch.float64)
    small = products.IN_FLOAT64
    products.IN_FLOAT64 = 64 * 1000
    try:
        for work in (lambda: products._gram(a, b, None), lambda: products.weighted_sum(weights, a)):
            assert counted_bytes(work, CPU) <= 8 * (4 * 64_000 + 2 * 40_000)
        torch.testing.assert_close(products._gram(a, b, None), a.double() @ b.double().T)
        torch.testing.assert_close(products.weighted_sum(weights, a), weights @ a.double())
    finally:
        products.IN_FLOAT64 = small


def test_weights_are_aligned(tmp_path: Path) -> None:
    """Where the data of a file begins, all stands off by 8 bytes; loaded weights stand at a multiple of 64, as θ + 0·v
    does, and one row at a time gives the same there."""
    folder = models.full_checkpoint(tmp_path / "full", "llama")
    file = folder / "model.safetensors"
    tensors, pad = load_file(file), 0
    while (8 + int.from_bytes(file.read_bytes()[:8], "little")) % 64 != 8:
        pad += 8
        save_file({name: t.clone() for name, t in tensors.items()}, file, {"format": "pt", "pad": "x" * pad})
    model = load_checkpoint(folder).model
    assert all(parameter.data_ptr() % 64 == 0 for parameter in model.parameters())
    bound = bind(model)
    e = read_rollouts(models.random_rollouts(tmp_path / "e.jsonl", prompts=2, responses=2, seed=1), bound, None)
    config = ProbeConfig.from_mapping({"generation": {"tf_batch_size": 1}})
    v = {name: torch.ones_like(p) for name, p in bound.registry.parameters.items()}
    still = theta_plus_eta_v(bound.registry, v, 0.0, bound.dtype)
    assert torch.equal(score(bound, e, config).token_logp, score(bound, e, config, still).token_logp)


def test_a_load_that_took_more_is_an_error() -> None:
    config = ProbeConfig.from_mapping({"memory_limit": "1GiB"})
    require_loaded_within(config, Held(0, 2**30))
    with pytest.raises(MeasurementError, match="1 GiB is too little: merely loading took 2 GiB"):
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


@pytest.mark.parametrize(
    "given", ["8", "much", "", True, [1], "1e30", "9" * 400 + "GiB", "-1GiB", "5 GiB of it", "8ib", "99 gbit", 1000]
)
def test_what_is_no_size(given: object) -> None:
    with pytest.raises(ConfigError, match=r"`memory_limit`: .* is not a size of 1 MiB or more: give one such as 8GiB"):
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
    """Three limits: one that changes no size, and two that leave 110 and 80 MiB beside what is held already."""
    reports, limit = [], 2 * 2**30
    for left in (0, 110 * MIB, 80 * MIB):
        limit = reports[0]["memory"]["stages"]["memory limit"]["at_start"] + left if left else limit
        process, seen, said = run(folder, f"{left}", f"--memory-limit={limit}")
        assert (process.returncode, said) == (0, ""), said
        report = json.loads((folder / f"{left}.json").read_text())
        peak = max(stage["peak"] for stage in report["memory"]["stages"].values())
        assert seen <= peak + MIB  # nothing between the stages, and none in which more was held than it says
        assert peak <= limit, (peak / MIB, limit / MIB, report["memory"])
        assert report["memory"]["expected"] <= limit
        reports.append(report)
    free, _, least = reports
    assert least["memory"]["logits_at_once"] < free["memory"]["logits_at_once"]
    assert max(stage["peak"] for stage in free["memory"]["stages"].values()) > limit
    for section, key in (("entropy", "rb"), ("update", "curvature"), ("two_batch", "delta_h1")):
        assert least[section][key] == pytest.approx(free[section][key], rel=1e-4)


def test_layers_are_run_again_where_nothing_else_fits(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` first as without, `never` not at all, `always` from the start."""
    recomputed = {False: 200 * MIB, True: 100 * MIB}
    monkeypatch.setattr(memory_limit, "_held_now", lambda device: 0)
    monkeypatch.setattr(
        Passes, "kinds", lambda passes, usable: [lambda config, positions: recomputed[passes.bound.recompute]]
    )
    monkeypatch.setattr(Passes, "kinds_of_second_order", lambda passes, usable: [])

    def plan(limit: int, recompute: str) -> memory_limit.Plan:
        given = {"memory_limit": limit, "budget": "smoke", "recompute": recompute}
        return planned(subject.bound, subject.float64, subject.batches, ProbeConfig.from_mapping(given))

    for recompute, large, small in (("auto", False, True), ("always", True, True), ("never", False, None)):
        assert plan(1024 * MIB, recompute).recompute is large
        if small is None:
            with pytest.raises(MeasurementError, match="too little for one response"):
                plan(200 * MIB, recompute)
        else:
            assert plan(200 * MIB, recompute).recompute is small


def test_a_count_of_nothing_is_an_error() -> None:
    """Benchmarks and tests of memory take no 0 for an answer, and none that depends on what went before."""

    def work() -> None:
        torch.zeros(MIB // 4).add(1)

    for before in (1, 64 * MIB):
        torch.zeros(before)
        assert live_tensors(work, CPU) == LiveTensors(2 * MIB, MIB)
    with pytest.raises(MeasurementError, match="made no tensor on meta"):
        live_tensors(work, torch.device("meta"))
