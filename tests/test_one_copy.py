"""Processes that hold one model together: what a machine holds, who is named when one dies, and what cannot be."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import transformers

import forked
import models
import one_copy_worker as worker
from entropy_probe import ProbeConfig, load_checkpoint
from entropy_probe.cost.sizes import Batch, Network, Run
from entropy_probe.cost.tensors import of_machine
from entropy_probe.errors import ConfigError, MeasurementError
from entropy_probe.loading import load_configured
from entropy_probe.model.forward import bind
from entropy_probe.model.placement import IN_MEMORY, Placement, place, taken_home
from entropy_probe.model.registry import checksum
from entropy_probe.pipeline.prepared import bound_in, prepare
from entropy_probe.processes import one_copy
from entropy_probe.processes.world import ALONE, World
from entropy_probe.stages.reference import reference_logp
from entropy_probe.stages.responses.rollouts_file import read_rollouts
from entropy_probe.stages.scores import score

ONCE = {"sharding": "parameter", "budget": "smoke"}
pytestmark = pytest.mark.skipif(not one_copy.is_possible(), reason="memory is shown by descriptors of Linux")


def together(folder: Path, size: int, *arguments: str) -> list[CompletedProcess[str]]:
    """The worker, on so many processes, as torchrun would start them; each is forked from one with all imports."""
    return processes(size, worker.__file__, str(folder), *arguments)


def processes(size: int, *command: str, **variables: str) -> list[CompletedProcess[str]]:
    shared = {"OMP_NUM_THREADS": "1", "ENTROPY_PROBE_TIMEOUT": "20", "TORCHELASTIC_RUN_ID": "none"}
    return forked.ranks(size, *command, environment={**os.environ, **shared, **variables}, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full fine-tune of a million parameters, 4 MiB in float32."""
    folder = tmp_path_factory.mktemp("one_copy")
    torch.manual_seed(0)
    sizes = {"vocab_size": 1024, "hidden_size": 192, "intermediate_size": 256, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    models.train_steps(model, optimizer, steps=1)
    models.save_checkpoint(folder / "checkpoint", model, optimizer)
    for name, seed in (("e", 1), ("u", 2)):
        models.random_rollouts(folder / f"{name}.jsonl", prompts=8, responses=2, seed=seed)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    models.full_checkpoint(folder / "checkpoint", "llama")
    for name, seed in (("e", 1), ("u", 2)):
        models.random_rollouts(folder / f"{name}.jsonl", prompts=2, responses=2, seed=seed)
    return folder


# What every process holds of its own whatever the model: activations, numbers of products in float64. What the
# libraries take is measured (`constant`).
CONSTANT = 16 << 20


@pytest.fixture(scope="module")
def constant(small: Path) -> int:
    """With what a model of some thousand parameters takes."""
    (done,) = together(small, 1, json.dumps(ONCE))
    assert done.returncode == 0, done.stderr
    found = max(json.loads((small / "0-of-1.json").read_text()).values())
    for written in ("0-of-1.json", "report-1.json"):
        (small / written).unlink()
    return CONSTANT + found


@pytest.fixture(scope="module")
def held(folder: Path) -> dict[int, list[dict[str, int]]]:
    """By number of processes, of each: the most that it held in every stage."""
    if not worker.IS_COUNTED:
        pytest.skip("glibc tells what is allocated from 2.33 on")
    found = {}
    for size in (1, 2, 4):
        for done in together(folder, size, json.dumps(ONCE)):
            assert done.returncode == 0, done.stderr
        of_ranks = (folder / f"{rank}-of-{size}.json" for rank in range(size))
        found[size] = [json.loads(file.read_text()) for file in of_ranks]
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_a_machine_holds_what_one_process_holds(
    held: dict[int, list[dict[str, int]]], constant: int, size: int
) -> None:
    """In every stage, all processes together: at most 1.25 of the most that one alone holds, and a constant each."""
    (alone,) = held[1]
    most = max(alone.values())
    assert most > 6 * CONSTANT  # so that the constants do not decide
    of_all: Counter[str] = Counter()
    for rank in held[size]:
        of_all.update(rank)
    assert of_all.keys() >= alone.keys()
    for stage, of_stage in of_all.items():
        assert of_stage <= 1.25 * most + size * constant, stage


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_formulas_of_a_machine(
    folder: Path, held: dict[int, list[dict[str, int]]], constant: int, size: int
) -> None:
    """`of_machine`, within a fifth and the constant of each process; `smoke` leaves the real step out."""
    config, batch = ProbeConfig.from_mapping(ONCE), Batch(8, 2, 4, 6)
    network = Network.of(load_checkpoint(folder / "checkpoint").model)
    predicted = of_machine(network, Run.of(network, config, batch, batch, ranks=size, one_copy=size > 1))
    for stage in predicted.keys() - {"real step"}:
        measured = sum(rank.get(stage, 0) for rank in held[size])
        assert abs(measured - predicted[stage]) <= 0.2 * predicted[stage] + size * constant, stage


def test_the_bound_sees_a_copy_each(folder: Path, held: dict[int, list[dict[str, int]]], constant: int) -> None:
    """The same measurement with a model and vectors for each of four processes is beyond it."""
    for done in together(folder, 4, json.dumps(ONCE | {"sharding": "prompt"})):
        assert done.returncode == 0, done.stderr
    of_all: Counter[str] = Counter()
    for rank in range(4):
        of_all.update(json.loads((folder / f"{rank}-of-4.json").read_text()))
    assert max(of_all.values()) > 1.25 * max(held[1][0].values()) + 4 * constant


STAGES = ("load", "integrity", "rollouts", "scores", "gradients", "first order", "update", "slopes", "entropy change")
STAGES += ("witnesses", "evidence")


@pytest.fixture(scope="module")
def ended(small: Path) -> dict[str, list[CompletedProcess[str]]]:
    """Both processes, where the second dies in each of the stages; four of these pairs at a time, since they wait.

    Nothing is written by those that are left, and what was there has the times that it had.
    """
    before = {file: file.stat().st_mtime_ns for file in small.rglob("*")}
    with ThreadPoolExecutor(4) as threads:
        of_stages = [*threads.map(lambda stage: together(small, 2, json.dumps(ONCE), stage), STAGES)]
    assert before == {file: file.stat().st_mtime_ns for file in small.rglob("*")}
    return dict(zip(STAGES, of_stages, strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_a_process_that_dies_is_named(ended: dict[str, list[CompletedProcess[str]]], stage: str) -> None:
    first, second = ended[stage]
    assert second.returncode == -9
    assert first.returncode == 1
    said = [line for line in first.stderr.splitlines() if "rank" in line]
    assert len(said) == 1, first.stderr
    assert said[0].startswith("rank 1 (pid "), said
    assert ": ended; " in said[0]
    assert "Traceback" not in first.stderr


def run_of_two(folder: Path) -> Path:
    """Two checkpoints, the second a step after the first, so that the trainer's step is found beside the first."""
    model = models.tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in (1, 2):
        models.train_steps(model, optimizer, steps=1, seed=step)
        saved = models.save_checkpoint(folder / f"checkpoint-{step}", model, optimizer)
        (saved / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name, seed in (("e", 1), ("u", 2)):
        models.random_rollouts(folder / f"{name}.jsonl", prompts=2, responses=2, seed=seed)
    return folder


@pytest.mark.parametrize("sharding", ["parameter", "prompt"])
def test_what_one_alone_cannot_do_with_the_next_checkpoint_all_leave_out(tmp_path: Path, sharding: str) -> None:
    """And nobody waits for it, or takes what another sends for the answer to something else."""
    config = json.dumps(ONCE | {"sharding": sharding})
    for done in together(run_of_two(tmp_path), 2, config, "fails at real update"):
        assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report-2.json").read_text())
    assert report["real_update_missing"] == "rank 1: the model: is spoilt; try again"
    assert report["witness"]["x_difference"] < 1e-4


def test_what_breaks_at_the_next_checkpoint_ends_all(tmp_path: Path) -> None:
    """It is no reason to leave anything out in the process that broke, and so in none."""
    first, second = together(run_of_two(tmp_path), 2, json.dumps(ONCE), "breaks at real update")
    assert (first.returncode, second.returncode) == (1, 1)
    assert first.stderr.splitlines()[-1] == "RuntimeError: something is broken"
    assert second.stderr.endswith("rank 0: ended with RuntimeError: something is broken; see its traceback\n")
    assert not (tmp_path / "report-2.json").exists()


# rank DEAD dies, and the others are ended as torchrun would end them
_TERMINATED = """
import os, signal, sys, time
from entropy_probe.processes.world import World
world = World.of_torchrun()
world.at("load")
world.wait()
if world.rank == int(sys.argv[1]):
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.2)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""


@pytest.mark.parametrize("dead", [0, 2])
def test_who_died_is_named_by_the_first_that_lives(dead: int) -> None:
    """Not one of those that are ended with it; rank 0 too. The store is torchrun's, as its processes have it."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "MASTER_PORT": str(store.port)}
    ended = processes(3, "-c", _TERMINATED, str(dead), **agent)
    assert [done.returncode for done in ended] == [-9 if rank == dead else -15 for rank in range(3)]
    said = [line for done in ended for line in done.stderr.splitlines() if "rank" in line]
    assert len(said) == 1, said
    assert said[0].startswith(f"entropy-probe: rank {dead} (pid "), said
    assert "; stage: load): ended; " in said[0], said


class TwoInOne(World):
    """Rank 0 of two processes, of which the other is this one too."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.one_copy = 2, True


def test_one_thing_has_the_same_tensors(folder: Path) -> None:
    """Ties and flags included, at addresses where a product of one row is the same as elsewhere."""
    loaded = load_checkpoint(folder / "checkpoint")
    again = TwoInOne().one(lambda: loaded)
    assert checksum(again.model) == checksum(loaded.model)
    assert again.info == loaded.info
    for name, state in loaded.adam.items():
        assert torch.equal(again.adam[name].exp_avg_sq, state.exp_avg_sq)
    assert all(p.data_ptr() % 64 == 0 for p in again.model.parameters())


def test_what_is_placed_stays_the_same_memory(folder: Path) -> None:
    """A model that is lent to a device is the one that was handed over; a copy is handed over without a place."""
    model = TwoInOne().one(lambda: load_checkpoint(folder / "checkpoint")).model
    before = [p.data_ptr() for p in model.parameters()]
    placement = place(model, IN_MEMORY, torch.device("cpu"))
    assert [p.data_ptr() for p in model.parameters()] == before
    assert placement.device_map == IN_MEMORY
    bound = bound_in(TwoInOne(), model, torch.float64)
    assert Placement.of(bound.module) == placement
    assert Placement.of(taken_home(bound.module)) is None
    assert Placement.of(model) == placement


def test_what_is_made_once() -> None:
    world, shapes = TwoInOne(), {"a": (3, 5), "b": (0,), "c": (7,)}
    zeros = world.zeros(shapes, torch.float64)
    assert {name: tuple(t.shape) for name, t in zeros.items()} == shapes
    assert all(t.data_ptr() % 64 == 0 for t in zeros.values() if t.numel())
    zeros["a"][1, 2] = 4.0
    assert float(zeros["a"].sum()) == 4.0
    assert ALONE.made(shapes, lambda name: torch.ones(shapes[name]))["c"].tolist() == [1.0] * 7


def test_memory_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line; a folder's complaint is that of who chose the folder."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "ftruncate", full)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MeasurementError, match=r"^memory: cannot hold 0.5 GiB more \(Cannot allocate memory\); free"):
        TwoInOne().zeros({"a": (1 << 26,)}, torch.float64)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        TwoInOne().zeros({"a": (1 << 26,)}, torch.float64, tmp_path)


def test_a_reference_model_is_held_once(folder: Path) -> None:
    """In the dtype of the measurement, and its log p are those of a model of one's own."""
    held: list[torch.nn.Module] = []

    class Watched(TwoInOne):
        def one(self, make: Any) -> Any:
            held.append(super().one(make))
            return held[-1]

    checkpoint, float64 = load_checkpoint(folder / "checkpoint"), torch.float64
    config = ProbeConfig.from_mapping({"reference_model": str(folder / "checkpoint"), "precision": models.FLOAT64})
    bound = bind(checkpoint.model, float64)
    rollouts = read_rollouts(folder / "e.jsonl", bound, None)
    alone, together = (reference_logp(checkpoint.model, bound, rollouts, config, of) for of in (ALONE, Watched()))
    assert torch.equal(alone, together)
    assert [{p.dtype for p in model.parameters()} for model in held] == [{float64}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_an_adapter_is_off_in_its_copy_too(folder: Path, tmp_path: Path, dtype: torch.dtype, lora: Any) -> None:
    """log p under the reference are those of the base model alone, in every dtype, and all is on again afterwards."""
    checkpoint = load_checkpoint(models.adapter_checkpoint(tmp_path / "lora", "llama", **lora))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "lora-base").eval()
    config = ProbeConfig.from_mapping({"precision": {"dtype": str(dtype).removeprefix("torch.")}})
    bound = bind(checkpoint.model, dtype)
    rollouts = read_rollouts(models.random_rollouts(tmp_path / "e", prompts=2, responses=2, seed=1), bound, None)
    before, trained = score(bound, rollouts, config).token_logp, list(bound.registry.trainable)
    found = reference_logp(checkpoint.model, bound, rollouts, config)
    expected = score(bind(base, dtype), rollouts, config).token_logp
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype is torch.float32 else 1e-12)
    assert float((found - before).abs().max()) > 0.01
    assert torch.equal(score(bound, rollouts, config).token_logp, before)
    assert list(bound.registry.trainable) == trained


def test_names_are_shared_out_evenly() -> None:
    sizes = {"large": 100, **{f"{k}": 10 for k in range(20)}}
    parts = one_copy.shares(sizes, 3)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    assert [sum(sizes[name] for name in part) for part in parts] == [100, 100, 100]
    assert one_copy.shares({}, 2) == [[], []]


def test_what_cannot_be_handed_over_is_said() -> None:
    with pytest.raises(ConfigError, match=r"sharding: parameter cannot hand the model .*; set sharding: prompt"):
        one_copy.with_thing(lambda: None)


def test_what_is_moved_is_never_there_twice() -> None:
    """Each tensor's memory is given up as soon as the file has it; views and ties come back as they were."""
    tied = torch.arange(6.0)
    given = {"a": tied, "half": torch.ones(3, dtype=torch.bfloat16), "none": torch.ones(0), "again": tied.view(2, 3).T}
    for moved in (False, True):
        file = one_copy.with_thing(given, moved=moved)
        found = one_copy.thing_in(one_copy.path_of(file))
        os.close(file)
        assert [t.untyped_storage().nbytes() for t in given.values()] == ([0] * 4 if moved else [24, 6, 0, 24])
        assert found["again"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
        found["a"][1] = 7.0
        assert float(found["again"][1, 0]) == 7.0
        assert (found["half"].dtype, found["half"].tolist()) == (torch.bfloat16, [1.0] * 3)
        assert found["none"].shape == (0,)


def test_memory_of_another_machine_is_not_seen(tmp_path: Path) -> None:
    assert not one_copy.has_content(f"/proc/{os.getpid()}/fd/1000000", b"token")
    (tmp_path / "file").write_bytes(b"other")
    assert not one_copy.has_content(str(tmp_path / "file"), b"token")


class Elsewhere(World):
    """Of two processes on two machines."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 2

    def is_of_one_machine(self) -> bool:
        return False


def test_two_machines_are_refused(folder: Path) -> None:
    """Asked for, it is one line; by `auto` each process then has its own."""
    with pytest.raises(ConfigError, match=r"^sharding: parameter needs processes that see one another's memory"):
        load_configured(folder / "checkpoint", None, ProbeConfig.from_mapping(ONCE), Elsewhere())
    found = load_configured(folder / "checkpoint", None, ProbeConfig(), Elsewhere())
    assert not found.in_one_copy


def test_a_checkpoint_of_each_process_is_refused(folder: Path) -> None:
    """What Python has loaded is not held once, whatever the configuration says."""

    class Two(TwoInOne):
        def in_one_copy(self, *, one_copy: bool = True) -> World:
            self.one_copy = one_copy
            return self

    checkpoint = load_checkpoint(folder / "checkpoint")
    with pytest.raises(ConfigError, match=r"^sharding: parameter needs a folder to load; "):
        prepare(checkpoint, ProbeConfig.from_mapping(ONCE), world=Two())


def test_auto_holds_one_copy_of_a_full_model_that_is_too_large(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = TwoInOne()
    assert not load_configured(folder / "checkpoint", None, ProbeConfig(), world).in_one_copy
    size = sum(file.stat().st_size for file in (folder / "checkpoint").rglob("*"))
    for free, once in ((12 * size - 1, True), (12 * size + 1, False)):
        monkeypatch.setattr("entropy_probe.memory.available_bytes", lambda _, free=free: free)
        found = load_configured(folder / "checkpoint", None, ProbeConfig(), world)
        assert found.in_one_copy is once
    monkeypatch.setattr("entropy_probe.memory.available_bytes", lambda _: 1)
    models.adapter_checkpoint(folder / "lora", "llama")
    assert not load_configured(folder / "lora", None, ProbeConfig(), world).in_one_copy


def test_a_map_of_devices_does_not_go_with_it() -> None:
    with pytest.raises(ConfigError, match="`device_map` is given with `sharding: parameter`"):
        ProbeConfig.from_mapping(ONCE | {"device_map": "auto"})
