"""The callback inside of trainers under FSDP2: what it measures, that nothing of the training changes, and what is said
where it does not measure. Two ranks, `fsdp_callback.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

import forked
from entropy_probe.errors import ConfigError, MeasurementError
from entropy_probe.integrations import of_trainer
from entropy_probe.integrations.of_trainer import require_whole
from entropy_probe.model import sharded

CASES = ("full", "lora", "bf16")
APART = "several machines, full"
PROBED = [0, 2]
NOT_MEASURED = ("config", "environment", "timing", "since")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every run came to, in each process."""
    folder = tmp_path_factory.mktemp("fsdp")
    ended = forked.ranks(2, Path(__file__).with_name("fsdp_callback.py"), folder, timeout=240)
    assert [done.returncode for done in ended] == [0, 0], "\n".join(done.stderr for done in ended)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_the_training_is_the_same_to_the_last_bit(ranks: list[dict[str, Any]], case: str) -> None:
    """Shards, moments, generators, batches, gradients, modes and hooks of every step in each process, and the logs; in
    bf16 with layers that are computed again."""
    for found in ranks:
        assert found[f"{case}, with"] == found[f"{case}, without"]
        assert found[f"{case}, logged"] == PROBED


def numbers(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf of a report, by its name."""
    if isinstance(value, dict | list):
        for key, of in value.items() if isinstance(value, dict) else enumerate(value):
            yield from numbers(of, f"{name}.{key}")
    else:
        yield name, value


SUMS = (".update.norm", ".update.grad_norm", ".update.momentum_share")


def check_same(
    report: dict[str, Any], expected: dict[str, Any], *, alone: bool = False, of_terms: float = 1e-11
) -> None:
    """θ, v and the tokens are the same to the last bit, and so is what the first process measures `alone`, but for
    norms. What is added up over processes has another order of its terms, in float64: 1e-13 of them are measured, and
    1e-9 promised."""
    left_out = *NOT_MEASURED, "batch"
    assert report["batch"]["fingerprint"] == expected["batch"]["fingerprint"]
    one, other = (dict(numbers({k: v for k, v in of.items() if k not in left_out})) for of in (report, expected))
    assert one.keys() == other.keys()
    for name in one:
        if (alone and name not in SUMS) or not isinstance(other[name], float):
            assert one[name] == other[name], name
        else:
            assert one[name] == pytest.approx(other[name], rel=of_terms, abs=of_terms), name
    assert report["came"] is not None


@pytest.mark.parametrize("case", CASES)
def test_each_figure_is_that_of_one_process(ranks: list[dict[str, Any]], case: str) -> None:
    """Beside the same parameters, gradient and moments in one process, in float32. The rank of the adapters, 3, is not
    the same number of rows in both processes."""
    reports = ranks[0][f"{case}, reports"]
    assert len(reports) == len(PROBED)
    for report, expected in reports:
        check_same(report, expected)


WAYS = ["AdamW", "SGD in replicas", "gathered", "a model each", "experts in float32", "LoRA"]


@pytest.mark.parametrize("loop", range(6), ids=WAYS)
def test_a_loop_of_ones_own(ranks: list[dict[str, Any]], loop: int) -> None:
    """`measure_step` in float64 with the curvature, with tied embeddings, and with tensors that several processes have
    whole: these count once in a norm. Experts are in float32, and the curvature in float64."""
    report, expected = ranks[0]["loops"][loop]
    check_same(report, expected, of_terms=1e-5 if WAYS[loop].endswith("float32") else 1e-11)
    assert report["predicted_per_token"]["second_order"] is not None
    other, _ = ranks[1]["loops"][loop]
    assert {k: v for k, v in other.items() if k != "timing"} == {k: v for k, v in report.items() if k != "timing"}


def test_a_step_that_is_not_finite_in_one_process_is_measured_in_none(ranks: list[dict[str, Any]]) -> None:
    assert [found["refusals"]["not finite"] for found in ranks] == ["None", "None"]


def test_what_cannot_be_told_is_an_error_in_all(ranks: list[dict[str, Any]]) -> None:
    assert "pickle" in ranks[0]["refusals"]["told"]
    assert ranks[1]["refusals"]["told"].startswith("MeasurementError: rank 0: ended with")


def test_inside_of_a_trainer_on_several_machines(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert found[f"{APART}, with"] == found["full, without"]
        assert found[f"{APART}, logged"] == PROBED
    reports = ranks[0][f"{APART}, reports"]
    assert len(reports) == len(PROBED)
    for report, expected in reports:
        check_same(report, expected, alone=True)


def test_on_several_machines_the_first_process_measures_alone(ranks: list[dict[str, Any]]) -> None:
    assert ranks[1]["several machines"] is None
    check_same(*ranks[0]["several machines"], alone=True)


def test_processes_that_have_the_whole_model_measure_together(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        report, expected, prompts = found["not spread"]
        check_same(report, expected)
        assert prompts == [2, 4]


def test_no_tensor_of_the_model_is_sent_and_all_see_one(ranks: list[dict[str, Any]]) -> None:
    """Objects are sent as bytes; sums are of numbers of prompts, of which there are less than of parameters. `whole`
    shows that a gathered tensor would have been seen."""
    for found in ranks:
        sent, sizes = found["sent"], found["sent"]["sizes"]
        floats = [(name, n) for name, dtype, n in sent["measuring"] if dtype.is_floating_point]
        assert all("allreduce" in name and n < max(sizes) for name, n in floats)
        assert sum(n for _, n in floats) < sum(sizes) / 2
        gathered = (n for name, dtype, n in sent["whole"] if "gather" in name and dtype is torch.float64)
        assert sum(gathered) > sum(sizes) / 4
        assert sent["seen"] == (17.0, 17.0)


def test_no_process_has_a_model_of_its_own(ranks: list[dict[str, Any]]) -> None:
    """Each holds the step of its own half until it is written for all, and what that was made of in float64: at most
    0.9 of θ were measured. A copy of θ would add 1, and one in float64, in which the curvature is measured, 2."""
    for found in ranks:
        own = found["of its own"]
        assert own["model"] > 40e6
        assert 0.4 * own["model"] < own["measuring"] < 1.3 * own["model"]
        assert own["after"] < 0.5 * own["model"]


def test_memory_that_is_shared_is_gone_before_the_training_goes_on(ranks: list[dict[str, Any]]) -> None:
    """Copies of TRL's models close over themselves: Python would free them at some later time. Two pieces show that
    one would have been seen: a model, and a step."""
    for found in ranks:
        assert (found["sent"]["mapped"], found["sent"]["mapped then"]) == (2, 0)
        for name in (*CASES, APART, *FAILURES):
            assert found[f"{name}, held"] == [0] * 4, name


FAILURES = {
    "prompts of the first": "prompts.jsonl: cannot be read",
    "a step of the second": "process 1: RuntimeError: planted; take the callback out, or report this",
    "the scaler of the second": "process 1: RuntimeError: planted; take the callback out, or report this",
    "memory of the second": "rank 1: memory: has 0.0 GiB free on cpu, and needs 0.0; probe the checkpoints instead",
    "a copy of the first": "RuntimeError: planted; take the callback out, or report this",
    "a part of the second": "rank 1: ended with RuntimeError: planted; see its traceback",
    "scores of the second": "rank 1: ended with RuntimeError: planted; see its traceback",
    "the change of the second": "rank 1: ended with RuntimeError: planted; see its traceback",
    "the change of the first": "RuntimeError: planted; take the callback out, or report this",
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_fails_in_one_process_ends_the_probe_in_all(ranks: list[dict[str, Any]], name: str) -> None:
    """At the second step of three that are to be measured. The first process says it in one line, nobody measures the
    third, and the training goes on as without."""
    (line,) = ranks[0][f"{name}, said"]
    assert line.startswith("the entropy probe is off, and the training goes on: ")
    assert FAILURES[name] in line
    assert ranks[1][f"{name}, said"] == []
    for found in ranks:
        assert found[name] == found["full, without"]
        assert found[f"{name}, logged"] == PROBED[:1]


REFUSED = {
    "Adafactor": "the optimizer: is Adafactor, which may need whole tensors, and each process has a part",
    "OwnAdamW": "the optimizer: is OwnAdamW, which may need whole tensors, and each process has a part",
    "gradients": "the optimizer: has gradients for other parameters than in the first process",
    "mesh": "the model: has a tensor on 1 of 2 processes",
    "steps": "the step: is another in each process",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_measured_is_said_in_all(ranks: list[dict[str, Any]], name: str) -> None:
    for found in ranks:
        assert found["refusals"][name].startswith(f"MeasurementError: {REFUSED[name]}")


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_trainers_that_leave_no_tensor_whole(kind: str) -> None:
    """FSDP without a 2 is FSDP1."""
    accelerator = SimpleNamespace(distributed_type=DistributedType(kind), is_fsdp2=False)
    with pytest.raises(ConfigError, match=r"spread by .*; train with FSDP2 \(`fsdp_version: 2`\) or DDP, or probe the"):
        require_whole(SimpleNamespace(accelerator=accelerator))


@pytest.mark.parametrize("kind", ["NO", "MULTI_GPU", "MULTI_CPU", "FSDP"])
def test_trainers_that_can_be_measured(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(distributed_type=DistributedType(kind), is_fsdp2=kind == "FSDP")
    trainer = SimpleNamespace(accelerator=accelerator, model=nn.Linear(2, 2))
    require_whole(trainer)
    monkeypatch.setattr(of_trainer, "is_sharded", lambda model: True)
    if kind == "FSDP":
        require_whole(trainer)
        return
    with pytest.raises(ConfigError, match="spread by tensor parallelism"):
        require_whole(trainer)


def test_packed_weights_are_not_brought_together() -> None:
    layer = nn.Linear(2, 2)
    layer.quant_state = object()  # as a layer of bitsandbytes has it
    with pytest.raises(MeasurementError, match="is quantised"):
        sharded._require_possible(nn.Sequential(layer), gathers=True, wide=False)


def test_what_the_first_process_holds() -> None:
    """θ of each tensor, and of what is trained the step and the sum in float32: 6 bfloat16, and 4 trained of them."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).bfloat16()
    model[1].requires_grad_(False)
    assert sharded._held(model) == 4 * 4 + 2 * 2 + 2 * 4 * 4
    assert sharded._held(model, wide=True) - sharded._held(model) == 8 * 6 + 2 * 8 * 4
