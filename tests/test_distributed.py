"""Several processes: the numbers of one, on gloo; what is sent; errors, deaths, and exit codes under torchrun."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import distributed_worker as worker
import models
import typecheck
from entropy_probe import ProbeReport, load_checkpoint
from entropy_probe.evidence import Evidence
from entropy_probe.processes.world import ALONE
from entropy_probe_checks.audit import LIMIT, audit, worst

SAME = (
    "two_batches",
    "sums",
    "two_prompts",
    "ema_blocks",
    "ridge",
    "sampled",
    "grown",
    "relative",
    "uneven",
    "one_update",
    "limited",
    "sgd",
    "full",
    "tied_blocks",
)
ONCE = tuple(f"{case}_once" for case in worker.ONCE)
"""The same with `sharding: parameter`, which one process does not know: its reports are those of SAME."""
# What is not a number of the measurement, and what needs all pairs of prompts, where their gradients are not sent.
NOT_COMPARED = r"\.(timing|memory|environment|distributed)\b|\.checkpoint\.(name|path)|worst_parameter|\.example$"
ALL_PAIRS = r"first_order\.var_unbiased|two_batch\.(interaction|delta_h1_se|delta_h1_parts\..*\.se)$"
# Differences that would be 0 without rounding: they are sums of nothing but that.
ROUNDING = r"identity_error|witness|invariance|integrity|real_step\.(virtual|real)|preconditioner\.difference"
# Second derivatives are differences over steps of 1e-5 and 1e-3: 1e-16 over these, of the terms.
BY_DIFFERENCE = r"curvature|eta_star|taylor_|predicted|difference|ratio"
# The radius has a third derivative in it, over a step of 1e-3: 1e-16 over its cube, and few responses to add.
BY_THIRD_DIFFERENCE = r"taylor_radius"
# ΔH, and what is made of it: absolute 1e-13·max(1, |Ĥ|) (MATH.md), which a small η makes a large share of it.
OF_CHANGE = r"entropy_change\[\d+\]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    models.adapter_checkpoint(folder / "checkpoint", "llama")
    without_second_moment(models.adapter_checkpoint(folder / "sgd", "llama"))
    models.full_checkpoint(folder / "full", "llama")
    models.full_checkpoint(folder / "tied", "qwen2")
    for name, seed in (("e7", 1), ("u5", 2), ("e2", 3), ("u1", 4)):
        models.random_rollouts(folder / f"{name}.jsonl", prompts=int(name[1:]), responses=3, seed=seed)
    for name in ("e7", "u5"):  # the same prompts again, so that no length differs
        text = (folder / f"{name}.jsonl").read_text()
        (folder / f"{name[0]}{2 * int(name[1:])}.jsonl").write_text(text + text)
    lines = map(json.loads, (folder / "u5.jsonl").read_text().splitlines())
    uneven = [
        {key: value if key == "prompt_ids" else value[: 1 + n % 3] for key, value in line.items()}
        for n, line in enumerate(lines)
    ]
    (folder / "uneven.jsonl").write_text("".join(json.dumps(line) + "\n" for line in uneven))
    with typecheck.unchecked():  # as in the other processes
        for case in SAME:
            worker.measured(folder, case, ALONE).to_json(folder / f"{case}-1.json")
    return folder


def without_second_moment(checkpoint: Path) -> None:
    """The same adapter after a step of SGD."""
    model = load_checkpoint(checkpoint).model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    models.train_steps(model, optimizer, steps=1)
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.pt")


def command(size: int, *args: object) -> list[str]:
    """torchrun, on a port of its own."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", *map(str, args)]


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "ENTROPY_PROBE_TIMEOUT": "20", **variables}


def torchrun(size: int, *args: object, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(size, *args), cwd=cwd, env=environment(**variables), capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module", params=[2, 3])
def ended(request: pytest.FixtureRequest, folder: Path) -> tuple[int, int, str, str]:
    """Every case on so many processes; one that fails is among them, and those after it are none the worse. At last
    rank 1 is killed, or stopped so that its connections stay: only its pulse says that it does not go on.

    (number of processes, exit code, stdout, stderr)
    """
    size, said = request.param, ""
    last = ["command_line", "killed"] if size == 2 else ["stopped"]
    cases = [*SAME[:2], "fails", *SAME[2:], *ONCE, worker.SLIPPED, "twice_as_many", *last]
    with (
        (folder / f"stdout-{size}").open("w+") as out,
        subprocess.Popen(
            command(size, worker.__file__, folder, *cases),
            env=environment(ENTROPY_PROBE_TIMEOUT="8"),
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
        ) as running,
    ):
        assert running.stderr is not None
        for line in running.stderr:
            said += line
            if found := re.search(r"\(pid (\d+) on \S+; stage: scores\): has sent no sign of life", line):
                with suppress(ProcessLookupError):
                    os.kill(int(found[1]), signal.SIGKILL)  # torchrun would wait 30 s for it
        code = running.wait()
        out.seek(0)
        return size, code, out.read(), said


@pytest.fixture(scope="module")
def size(ended: tuple[int, int, str, str], folder: Path) -> int:
    assert (folder / f"twice_as_many-{ended[0]}.json").is_file(), ended[3]
    return ended[0]


def read(folder: Path, case: str, size: int) -> dict[str, Any]:
    return json.loads((folder / f"{case}-{size}.json").read_text())


def differences(one: Any, other: Any, path: str = "", scale: float = 0.0) -> Iterator[str]:
    """Numbers further apart than 1e-9 of the largest of their list, or of what the report says of the terms added."""
    if re.search(NOT_COMPARED, path):
        return
    if isinstance(one, dict) and isinstance(other, dict):
        assert one.keys() == other.keys(), path
        for key, value in one.items():
            yield from differences(value, other[key], f"{path}.{key}", scale if key == "se" else 0.0)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        largest = max((abs(x) for x in one if isinstance(x, int | float)), default=0.0)
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{path}[{i}]", largest)
    elif isinstance(one, float) and isinstance(other, int | float):
        absolute = 1e-9 if re.search(ROUNDING, path) else 1e-13 * scale
        if re.search(OF_CHANGE, path):
            absolute = 1e-12
        relative = 1e-7 if re.search(BY_DIFFERENCE, path) else 1e-9
        if re.search(BY_THIRD_DIFFERENCE, path):
            relative = 1e-5
        if not math.isclose(one, other, rel_tol=relative, abs_tol=max(absolute, 1e-9 * scale, 1e-13)):
            yield f"{path}: {one} and {other}"
    elif one != other:
        yield f"{path}: {one!r:.80} and {other!r:.80}"


@pytest.mark.parametrize("case", SAME + ONCE)
def test_the_numbers_of_one_process(folder: Path, size: int, case: str) -> None:
    """7, 5 and 2 prompts on 2 and 3 processes: uneven shares, and with 2 prompts on 3 a process that has none."""
    case, once = case.removesuffix("_once"), case.endswith("_once")
    alone, several = read(folder, case, 1), read(folder, f"{case}_once" if once else case, size)
    assert several["config"].pop("sharding") == ("parameter" if once else alone["config"]["sharding"])
    del alone["config"]["sharding"]
    wrong = list(differences(alone, several))
    assert (several["first_order"] is None) == (case in ("sgd", "one_update"))
    if case == "sums":
        assert [line for line in wrong if not re.search(ALL_PAIRS, line.partition(":")[0])] == []
        assert several["first_order"]["var_unbiased"] is None
        assert several["two_batch"]["interaction"] is None
        assert several["two_batch"]["delta_h1_se"] >= several["two_batch"]["conditional_se"]
    else:
        assert wrong == []
    assert several["distributed"]["world_size"] == size
    assert several["distributed"]["sharding"] == ("parameter" if once else "prompt")
    assert {"load", "scores", "gradients", "witnesses"} < several["memory"]["stages"].keys()
    if case == "limited":
        assert (several["first_order"]["mode"], several["first_order"]["num_units"]) == ("block", 3)


@pytest.mark.parametrize("case", SAME + ONCE)
def test_the_figures_of_several_are_computed_again(folder: Path, size: int, case: str) -> None:
    """From evidence in which every process filled in its part."""
    lines = audit(read(folder, case, size), Evidence.from_file(folder / f"{case}-{size}.safetensors"))
    assert worst(lines).difference <= LIMIT / 10, worst(lines)
    assert len(lines) > (80 if case.startswith("sgd") else 200)


def test_a_slip_in_the_one_copy_is_seen(folder: Path, size: int) -> None:
    """What the figures read of other processes' rows, the evidence does not read in the same way."""
    case = worker.SLIPPED
    lines = audit(read(folder, case, size), Evidence.from_file(folder / f"{case}-{size}.safetensors"))
    wrong = {line.name for line in lines if not line.difference <= LIMIT}
    assert {"first_order.u_cross", "two_batch.bars_dot"} <= wrong


def test_the_same_responses(folder: Path, size: int) -> None:
    """Of two sampled batches and of one drawn again at θ + ηv."""
    alone, several = read(folder, "sampled", 1), read(folder, "sampled", size)
    assert [row["method"] for row in several["entropy_change"]].count("resample") > 0
    for batch in ("batch", "update_batch"):
        assert several[batch]["fingerprint"] == alone[batch]["fingerprint"]


def test_bytes_do_not_grow_with_the_batch(folder: Path, size: int) -> None:
    """Sums of gradients, counts and scalars: of X and Y of U, of X of E, and four rows for the witness."""
    once, twice = (read(folder, case, size)["distributed"] for case in ("two_batches", "twice_as_many"))
    assert twice["bytes_sent_per_rank"] == once["bytes_sent_per_rank"]
    assert twice["bytes_of_prompts_per_rank"] > 1.5 * once["bytes_of_prompts_per_rank"]
    trainable = read(folder, "two_batches", size)["checkpoint"]["num_trainable"]
    gradients = 7 * 8 * trainable * 2 * (size - 1) / size
    assert gradients < once["bytes_sent_per_rank"] < gradients + 60_000


def test_no_vector_of_the_parameters_is_sent(folder: Path, size: int) -> None:
    """Where processes hold such vectors once; where each holds its own, sums of gradients are."""
    for case, of_parameters in (("full_once", False), ("two_batches", True), ("full", True)):
        largest = int((folder / f"{case}-{size}.longest").read_text())
        trainable = read(folder, case, size)["checkpoint"]["num_trainable"]
        assert (largest >= trainable / 2) is of_parameters, (case, largest, trainable)


def test_an_error_of_one_is_the_error_of_all(folder: Path, size: int) -> None:
    lines = {(folder / f"fails-{size}.{rank}").read_text() for rank in range(size)}
    assert lines == {"rank 1: the scores: are spoilt; try again"}


def test_a_process_that_dies_or_hangs_is_named(ended: tuple[int, int, str, str]) -> None:
    size, code, _, said = ended
    how = "ended" if size == 2 else "has sent no sign of life for 8 s"
    assert code != 0
    assert re.search(rf"rank 1 \(pid \d+ on \S+; stage: scores\): {how}; ", said), said


def test_the_command_line(ended: tuple[int, int, str, str]) -> None:
    """One report on stdout, and one line about a folder that is not there."""
    size, _, out, said = ended
    if size == 2:
        distributed = ProbeReport.model_validate_json(out).distributed
        assert distributed is not None
        assert distributed.world_size == 2
        assert len(re.findall(r"^entropy-probe: .*nowhere: no such folder; ", said, re.MULTILINE)) == 1


def test_the_exit_code_is_that_of_rank_0(folder: Path) -> None:
    """The second run finds the report kept: it measures nothing, and the other process is let go all the same."""
    options = ("--probe-checkpoint=checkpoint", "--probe-config=probe.yaml", "--probe-rollouts=e2.jsonl")
    own = ("-m", "gate", "--probe-json=report.json", "-pno:jaxtyping", "-pno:benchmark")
    for least, passes in (("1e-9", True), ("50", False)):
        (folder / "probe.yaml").write_text(f"budget: smoke\nlimits: {{entropy: {{min: {least}}}}}\n")
        done = torchrun(2, "-m", "pytest", *options, *own, cwd=folder)
        assert (done.returncode == 0) is passes, done.stdout
        assert len(re.findall(r"^=+ 1 (passed|failed)", done.stdout, re.MULTILINE)) == 1, done.stdout
        assert ("report from pytest's cache" in done.stdout) is not passes
        assert json.loads((folder / "report.json").read_text())["distributed"]["world_size"] == 2


def test_xdist_and_torchrun_are_not_mixed(folder: Path) -> None:
    done = torchrun(2, "-m", "pytest", "--probe-checkpoint=checkpoint", "-n2", "-pno:jaxtyping", cwd=folder)
    assert done.returncode != 0
    assert done.stderr.count("ERROR: -n: xdist and torchrun both start processes; leave one of them out") == 1
