"""What each process of `test_distributed.py` runs: `torchrun … distributed_worker.py FOLDER CASE…`, cases one by one.

Rank 0 writes CASE-N.json; of a case that fails every rank writes its error to CASE-N.RANK. A case `killed` or `stopped`
ends or stops rank 1 while it scores. `command_line` is two commands, each with a `World` of its own.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from entropy_probe import ProbeConfig, ProbeError, ProbeReport, run_probe
from entropy_probe.__main__ import main as command_line
from entropy_probe.demo import checkpoint_path
from entropy_probe.errors import MeasurementError
from entropy_probe.pipeline import measured as both_batches
from entropy_probe.processes.connection import Connection
from entropy_probe.processes.world import World
from entropy_probe.stages.gradients.unit_gradients import UnitGradientsOnce
from entropy_probe.stages.gradients.units import bytes_of_units
from entropy_probe.stages.memory.memory_limit import Plan, planned

FLOAT64 = {"precision": {"dtype": "float64"}}
SMOKE = {"budget": "smoke", **FLOAT64}
ETAS = {"true_delta_h": {"etas": [-1e-3, 1e-2]}}
# tokens of a response differ in weight, and what decides it is about tokens of all processes
BY_TOKEN = {
    "name": "trl-bnpo",
    "micro_batch_size": 4,
    "entropy_coef": 0.05,
    "top_entropy_quantile": 0.6,
    "kl_coef": 0.1,
}
# configuration, E batch, U batch; without files the demo samples
CASES: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "two_batches": (SMOKE | ETAS, "e7", "u5"),
    "twice_as_many": (SMOKE | ETAS, "e14", "u10"),
    "sums": (SMOKE | ETAS | {"first_order": {"max_pairs_gib": 0}}, "e7", "u5"),
    "two_prompts": (FLOAT64, "e2", None),
    "ema_blocks": (
        SMOKE
        | {"first_order": {"estimator": "rb", "baseline": "hk_ema", "mode": "block", "num_blocks": 3}}
        | {"recipe": BY_TOKEN},
        "e7",
        "u5",
    ),
    "ridge": (
        SMOKE
        | {"first_order": {"estimator": "rb", "baseline": "hk_ridge", "mode": "block", "num_blocks": 3}}
        | {"true_delta_h": {"normalize": "per_token"}},
        "e7",
        None,
    ),
    "sampled": (
        SMOKE
        | {
            "batch": {"num_prompts": 5, "num_update_prompts": 4},
            "true_delta_h": {"fallback": "resample", "etas": [50.0, 1e3]},
        }
        | {"generation": {"num_return_sequences": 3, "max_new_tokens": 8}},
        None,
        None,
    ),
    "grown": (
        SMOKE
        | {"batch": {"num_prompts": 5, "num_update_prompts": 4, "target_se": "2se", "max_prompts": 12}}
        | {"generation": {"num_return_sequences": 3, "max_new_tokens": 8}},
        None,
        None,
    ),
    "relative": (
        SMOKE
        | {"batch": {"num_prompts": 3, "num_update_prompts": 4, "reward": "chat:longer_than_the_mean"}}
        | {"generation": {"num_return_sequences": 3, "max_new_tokens": 8}},
        None,
        None,
    ),
    "uneven": (SMOKE | {"recipe": "slime"}, "e7", "uneven"),
    "one_update": (SMOKE, "e7", "u1"),
    "limited": (SMOKE | {"memory_limit": "64GiB"}, "e7", "u5"),
    "sgd": (FLOAT64, "e7", "u5"),
    "full": (SMOKE | ETAS, "e7", "u5"),
    "tied_blocks": (
        SMOKE | {"first_order": {"estimator": "rb", "baseline": "hk_group", "mode": "block", "num_blocks": 3}},
        "e7",
        None,
    ),
    "fails": (SMOKE, "e7", "u5"),
    "killed": (SMOKE, "e7", "u5"),
    "stopped": (SMOKE, "e7", "u5"),
}


OTHERS = {"sgd": "sgd", "full": "full", "tied_blocks": "tied"}
"""Cases of other checkpoints than the adapter's."""
ONCE = ("two_batches", "two_prompts", "full", "tied_blocks", "grown", "sgd")
"""Cases that are measured with `sharding: parameter` too: CASE_once."""
for _case in ONCE:
    _config, *_files = CASES[_case]
    CASES[f"{_case}_once"] = (_config | {"sharding": "parameter"}, *_files)
SLIPPED = "full_once_slipped"
"""Y of the other processes' units is taken from the rows of X."""
CASES[SLIPPED] = CASES["full_once"]


def measured(folder: Path, case: str, world: World) -> ProbeReport:
    config, e, u = CASES[case]
    files = (None if name is None else folder / f"{name}.jsonl" for name in (e, u))
    name = OTHERS.get(case.partition("_once")[0], "checkpoint")
    checkpoint = checkpoint_path() if e is None else folder / name
    original = both_batches.planned
    both_batches.planned = _three_blocks if case == "limited" else original
    every_y = UnitGradientsOnce.every_y
    if case == SLIPPED:
        UnitGradientsOnce.every_y = lambda self, name, part: self.every[0][name][:, part]
    try:
        return run_probe(checkpoint, ProbeConfig.from_mapping(config), *files, world=world)
    finally:
        both_batches.planned, UnitGradientsOnce.every_y = original, every_y


def _three_blocks(bound: Any, float64: Any, batches: Any, config: ProbeConfig, world: World) -> Plan:
    """What is planned, as if no more than the gradients of three blocks had room."""
    plan = planned(bound, float64, batches, config, world)
    room = {"max_gradient_gib": bytes_of_units(bound, 3) / 2**30}
    first_order = config.first_order.model_copy(update=room)
    return replace(plan, config=plan.config.model_copy(update={"first_order": first_order}))


def _spoilt(case: str) -> Any:
    """`score`, until rank 1 comes to it."""
    original = both_batches.score

    def score(*args: Any, **options: Any) -> Any:
        if case == "fails":
            raise MeasurementError("the scores", "are spoilt", "try again")
        os.kill(os.getpid(), signal.SIGKILL if case == "killed" else signal.SIGSTOP)
        return original(*args, **options)

    return score


def _longest_sums() -> list[int]:
    """[how many floating-point numbers the longest all-reduce of this process had]."""
    longest, original = [0], Connection.all_reduce

    def all_reduce(self: Connection, values: torch.Tensor, **options: Any) -> torch.Tensor:
        longest[0] = max(longest[0], values.numel() * values.is_floating_point())
        return original(self, values, **options)

    Connection.all_reduce = all_reduce
    return longest


def _commands(folder: Path) -> None:
    for name, code in (("checkpoint", 0), ("nowhere", 4)):
        arguments = [str(folder / name), f"--rollouts={folder}/e2.jsonl", "--budget=smoke"]
        assert command_line(["run", *arguments]) == code


def main(folder: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    world = World.of_torchrun()
    longest = _longest_sums()
    for case in cases:
        if case == "command_line":
            world.close()
            _commands(folder)
            world = World.of_torchrun()
            continue
        longest[0] = 0
        original = both_batches.score
        if world.rank == 1 and case in ("fails", "killed", "stopped"):
            both_batches.score = _spoilt(case)
        try:
            report = measured(folder, case, world)
        except ProbeError as error:
            (folder / f"{case}-{world.size}.{world.rank}").write_text(str(error))
            if case != "fails":
                sys.exit(f"{world.rank}: {error}")
        else:
            if world.first:
                report.to_json(folder / f"{case}-{world.size}.json")
                assert report.evidence is not None
                report.evidence.to_file(folder / f"{case}-{world.size}.safetensors")
                (folder / f"{case}-{world.size}.longest").write_text(str(longest[0]))
        both_batches.score = original
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
