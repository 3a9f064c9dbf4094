"""The callback inside of real trainers: the training goes on as if it were not there, whatever happens to it."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import callback_runs as runs
from entropy_probe.integrations import transformers as integration
from entropy_probe.integrations.as_found import as_found
from entropy_probe.integrations.of_trainer import gradient_scale
from entropy_probe.integrations.transformers import EntropyProbeCallback
from entropy_probe.model.live_step import live_step
from entropy_probe.step_report import StepReport

PROBED = [0, 7, 14]
"""Steps that are probed of `runs.STEPS`."""
ENDS = {"short": 3, "two probes": 9}
"""Steps of a run that has one log, and of one that is probed twice."""


def of_case(folder: Path, case: str, probe: dict[str, Any] | None) -> tuple[runs.Found, Any]:
    if case in ENDS:
        return runs.run(folder, "full", probe, max_steps=ENDS[case])
    if case == "supervised":
        own = None if probe is None else {"prompts": runs.PROMPTS} | probe
        return runs.run(folder, case, own, runs.supervised)
    return runs.run(folder, case, probe)


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], runs.Found]:
    """What a run without the callback comes to."""
    made: dict[str, runs.Found] = {}

    def of(case: str) -> runs.Found:
        if case not in made:
            made[case], _ = of_case(tmp_path_factory.mktemp(case), case, None)
        return made[case]

    return of


def differences(found: runs.Found, expected: runs.Found) -> list[object]:
    """The first step that differs, with what differs in it; and the logs."""
    said: list[object] = [] if found["logs"] == expected["logs"] else [found["logs"], expected["logs"]]
    for one, other in zip(found["steps"], expected["steps"], strict=True):
        if one != other and isinstance(one[1], dict):
            return [one[0], {key: (of, other[1][key]) for key, of in one[1].items() if of != other[1][key]}, *said]
        if one != other:
            return [one, other, *said]
    return said


@pytest.mark.parametrize("case", ["full", "lora", "accumulation", "checkpointing", "bf16", "supervised"])
def test_training_is_the_same_to_the_last_bit(tmp_path: Path, without: Callable[[str], runs.Found], case: str) -> None:
    """θ, moments, generators, batches, completions, gradients, modes, hooks, settings and logs of 20 steps."""
    found, trainer = of_case(tmp_path, case, runs.PROBE)
    assert differences(found, without(case)) == []
    assert len(found["logs"]) == 7
    assert [entry["step"] - 1 for entry in runs.logged(trainer)] == PROBED
    for step in PROBED:
        report = StepReport.from_json(tmp_path / "entropy-probe" / f"step-{step}.json")
        check_step(report, trained_in_bf16=False)


def check_step(report: StepReport, *, trained_in_bf16: bool) -> None:
    """What came is what θ + v was expected to bring: weights are float32, and one step rounds them by 1e-7 of their
    size, which moves the change by less than a thousandth of its own noise."""
    assert report.came is not None
    came, realised = report.came.realised_per_token, report.realised.realised_per_token
    assert came[0] == pytest.approx(realised[0], abs=1e-3 * realised[1] + 1e-6)
    assert report.update.in_float64
    assert report.update.norm > 0


def test_a_forward_in_bf16_or_with_checkpoints_is_measured_as_any_other(tmp_path: Path) -> None:
    """At the first step all have the same θ: whatever trainers put around the model's forward is not around ours."""
    found = {}
    for case in ("full", "accumulation", "checkpointing", "bf16"):
        runs.run(tmp_path / case, case, runs.PROBE, max_steps=1)
        found[case] = StepReport.from_json(tmp_path / case / "entropy-probe" / "step-0.json").entropy
    assert all(of == found["full"] for of in found.values())


def draws_a_number(trainer: Any) -> None:
    torch.rand(1)


def leaves_a_mode(trainer: Any) -> None:
    trainer.model.model.layers[0].eval()


def touches_a_gradient(trainer: Any) -> None:
    next(trainer.model.parameters()).grad.mul_(1 + 1e-6)


def leaves_a_hook(trainer: Any) -> None:
    trainer.model.register_forward_hook(lambda *_: None)


def logs_by_the_trainer(trainer: Any) -> None:
    trainer.log({"probe/entropy": 1.0})


def switches_the_cache(trainer: Any) -> None:
    trainer.model.config.use_cache = not trainer.model.config.use_cache


DISTURBANCES = (
    draws_a_number,
    leaves_a_mode,
    touches_a_gradient,
    leaves_a_hook,
    logs_by_the_trainer,
    switches_the_cache,
)


@pytest.mark.parametrize("disturbance", DISTURBANCES, ids=lambda of: of.__name__)
def test_a_disturbance_is_seen(
    tmp_path: Path,
    without: Callable[[str], runs.Found],
    monkeypatch: pytest.MonkeyPatch,
    disturbance: Callable[[Any], None],
) -> None:
    """Each of these, once, at the first step that is probed."""

    def disturbed(self: EntropyProbeCallback, step: int) -> None:
        if step == 0:
            disturbance(self._trainer)

    monkeypatch.setattr(EntropyProbeCallback, "_measured", disturbed)
    monkeypatch.setattr(integration, "as_found", nullcontext)
    found, _ = of_case(tmp_path, "short", runs.PROBE)
    assert differences(found, without("short"))


def test_generators_are_put_back_after_an_error() -> None:
    before = torch.get_rng_state()

    def fails() -> None:
        with as_found():
            torch.rand(3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_run(tmp_path: Path) -> None:
    """With the callback before and after, without it before, and with its state restored by the trainer: the rest of
    the training is the same, and so is when the next probe is due."""
    saving = {"save_strategy": "steps", "save_steps": 10}
    whole, _ = runs.run(tmp_path / "plain", "full", None, **saving)
    for name, probe in (("plain", None), ("probed", runs.PROBE)):
        if probe is not None:
            runs.run(tmp_path / name, "full", probe, **saving, max_steps=20)
        start = str(tmp_path / name / "checkpoint-10")
        restored = {"restore_callback_states_from_checkpoint": probe is not None}
        expected, _ = runs.run(tmp_path / "again", "full", None, resume=start)
        found, trainer = runs.run(tmp_path / f"{name}-rest", "full", runs.PROBE, resume=start, **restored)
        assert differences(found, expected) == []
        rest = [entry["step"] - 1 for entry in runs.logged(trainer) if entry["step"] > 10]
        assert rest == ([10, 17] if probe is None else [14])
        assert found["steps"][-1][1]["theta"] == whole["steps"][-1][1]["theta"]
    state = json.loads((tmp_path / "probed" / "checkpoint-20" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["EntropyProbeCallback"]["attributes"]["kept"]
    assert kept["recipe"].startswith("given (the optimizer's own step")
    assert kept["next"] == 21
    assert kept["figures"]["entropy"] == kept["last"]["entropy"]["value"]


def test_two_processes(tmp_path: Path) -> None:
    """DDP over gloo: each is the same as without, and after a failure of the first, of which the second hears, too."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(Path(runs.__file__)), str(tmp_path)]
    around = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the entropy probe is off") == 1
    assert f"{tmp_path / 'prompts.jsonl'}: cannot be read" in done.stderr
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]
    for found in ranks:
        assert found["with"] == found["without"] == found["fails"]
        assert [entry["step"] - 1 for entry in found["with, logged"]] == PROBED
        assert [entry["step"] - 1 for entry in found["fails, logged"]] == [0]
    assert ranks[0]["with, logged"] == ranks[1]["with, logged"]
    assert sorted(path.name for path in (tmp_path / "with").iterdir()) == ["step-0.json", "step-14.json", "step-7.json"]


# What goes wrong


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "entropy_probe"]


OF_USE: dict[str, tuple[dict[str, Any], str]] = {
    "gate": ({"gates": {"entropie": {"min": 1}}}, "unknown gate `entropie`; did you mean `entropy`?"),
    "files": ({"gates": {"reward": {"min": 1}}}, "`reward` is not measured inside of the training loop"),
    "bound": ({"gates": {"entropy": {"least": 1}}}, "`entropy.least` is not a bound"),
    "unbounded": ({"gates": {"entropy": 0.1}}, "`entropy` is 0.1"),
    "value": ({"gates": {"entropy": {"min": "a"}}}, "`entropy.min` is 'a'; give a number"),
    "action": ({"action": "halt"}, "action: is 'halt'; give `warn` or `stop`"),
    "every": ({"every": 0}, "every: is 0; give a number of 1 or more"),
    "share": ({"max_share": -1}, "max_share: is -1"),
    "prompts": ({"prompts": "nowhere.jsonl"}, "prompts: there is no file 'nowhere.jsonl'"),
    "config": ({"config": {"batch": {"num_prompt": 3}}}, "num_prompt"),
    "one": ({"prompts": ["1+1="]}, "prompts: there is one, and a standard error needs two"),
    "row": ({"prompts": [1, 2, 3]}, "prompts: entry"),
    "nucleus": ({"config": {"generation": {"top_p": 0.9}}}, "generation.top_p: is below 1"),
    "folder": ({"folder": __file__}, "is a file; give a folder"),
}


@pytest.mark.parametrize("name", OF_USE)
def test_an_error_of_use_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    options, said = OF_USE[name]
    _, trainer = runs.run(tmp_path, "full", runs.PROBE | options, max_steps=2)
    (warning,) = warnings_of(caplog)
    assert warning.startswith("the entropy probe is off, and the training goes on: ")
    assert said in warning
    assert trainer.state.global_step == 2
    assert runs.logged(trainer) == []


def test_a_training_set_without_prompts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, trainer = runs.run(tmp_path, "supervised", runs.PROBE, runs.supervised, max_steps=2)
    (warning,) = warnings_of(caplog)
    assert "the training set has the columns ['input_ids', 'labels']; give prompts=" in warning
    assert trainer.state.global_step == 2


def a_vanished_file(tmp_path: Path) -> tuple[dict[str, Any], Callable[[], None], str]:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in runs.PROMPTS))
    return {"prompts": str(file)}, file.unlink, "prompts.jsonl: cannot be read"


def a_full_disk(tmp_path: Path) -> tuple[dict[str, Any], Callable[[], None], str]:
    """The report of step 7 is to be written to a device that is always full."""
    folder = tmp_path / "probe"
    folder.mkdir()
    return {"folder": folder}, lambda: (folder / "step-7.json").symlink_to("/dev/full"), "No space left on device"


def a_folder_that_is_a_file_now(tmp_path: Path) -> tuple[dict[str, Any], Callable[[], None], str]:
    folder = tmp_path / "probe"

    def replace() -> None:
        shutil.rmtree(folder)
        folder.touch()

    return {"folder": folder}, replace, "cannot be written (File exists); choose another path"


class Rows(list[str]):
    """Prompts whose memory is gone at some time."""

    gone = False

    def __getitem__(self, index: Any) -> Any:
        if self.gone:
            raise MemoryError
        return super().__getitem__(index)


def no_memory(tmp_path: Path) -> tuple[dict[str, Any], Callable[[], None], str]:
    rows = Rows(runs.PROMPTS)
    return {"prompts": rows}, lambda: setattr(rows, "gone", True), "does not fit into memory"


@pytest.mark.parametrize("plant", [a_vanished_file, a_full_disk, a_folder_that_is_a_file_now, no_memory])
def test_what_fails_in_the_middle_is_one_warning(
    tmp_path: Path,
    without: Callable[[str], runs.Found],
    caplog: pytest.LogCaptureFixture,
    plant: Callable[[Path], tuple[dict[str, Any], Callable[[], None], str]],
) -> None:
    """At step 5, when the first probe is done and the second is not: the training ends as without the callback."""
    options, at_step, said = plant(tmp_path)
    steps = {"max_steps": ENDS["two probes"]}
    found, trainer = runs.run(tmp_path / "run", "full", runs.PROBE | options, at_step=at_step, **steps)
    (warning,) = warnings_of(caplog)
    assert said in warning
    assert differences(found, without("two probes")) == []
    assert [entry["step"] - 1 for entry in runs.logged(trainer)] == [0]


def test_a_deleted_run_folder_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run"
    _, trainer = runs.run(folder, "full", runs.PROBE, at_step=lambda: shutil.rmtree(folder))
    assert warnings_of(caplog) == [f"{folder / 'entropy-probe'} was deleted; reports go on in a new one"]
    assert [path.name for path in sorted((folder / "entropy-probe").iterdir())] == ["step-14.json", "step-7.json"]
    assert trainer.state.global_step == runs.STEPS


class BrokenTracker(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "probe/entropy" in logs:
            raise ConnectionError("the tracker is away")


def test_a_tracker_that_fails(
    tmp_path: Path, without: Callable[[str], runs.Found], caplog: pytest.LogCaptureFixture
) -> None:
    """On our figures alone: one warning, and no probe after it."""

    def make(folder: Path, case: str) -> Any:
        trainer = runs.grpo(folder, case)
        trainer.add_callback(BrokenTracker())
        return trainer

    found, _ = runs.run(tmp_path, "full", runs.PROBE, make)
    (warning,) = warnings_of(caplog)
    assert "ConnectionError: the tracker is away" in warning
    assert differences(found, without("full")) == []
    assert len(list((tmp_path / "entropy-probe").iterdir())) == 1


# What it says, and does


def test_gates(tmp_path: Path, without: Callable[[str], runs.Found], caplog: pytest.LogCaptureFixture) -> None:
    """The entropy is about 3 nats per token. A bound that it meets changes nothing; of one that it misses a warning is
    logged, or the training ends after the step."""
    for action, least, steps, count in (("stop", 1.0, 20, 0), ("warn", 9.0, 20, 3), ("stop", 9.0, 1, 1)):
        caplog.clear()
        probe = runs.PROBE | {"gates": {"entropy": {"min": least}}, "action": action}
        found, trainer = runs.run(tmp_path / f"{action}-{least}", "full", probe)
        assert trainer.state.global_step == steps
        assert len(warnings_of(caplog)) == count
        assert all("gate entropy failed: " in warning for warning in warnings_of(caplog))
        failed = {entry["probe/gates_failed"] for entry in runs.logged(trainer)}
        assert failed == {float(count > 0)}
        if steps == 20:
            assert differences(found, without("full")) == []


def test_a_fall_is_from_the_first_probe_of_the_run(tmp_path: Path) -> None:
    """Also of a run that was resumed: its first probe was before."""
    probe = runs.PROBE | {"gates": {"entropy": {"fall": 0.5}}}
    runs.run(tmp_path, "full", probe, save_strategy="steps", save_steps=10, max_steps=10)
    first = StepReport.from_json(tmp_path / "entropy-probe" / "step-0.json").entropy.per_token
    start = str(tmp_path / "checkpoint-10")
    runs.run(tmp_path, "full", probe, resume=start)
    (verdict,) = StepReport.from_json(tmp_path / "entropy-probe" / "step-14.json").gates
    assert verdict.status == "pass"
    assert f"baseline {first.value:.3g} ± {first.se:.2g}" in verdict.hint


def test_trackers_have_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's own files, read by itself, beside `log_history` and the report."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    _, trainer = runs.run(tmp_path, "full", runs.PROBE, report_to=["tensorboard"])
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    report = StepReport.from_json(tmp_path / "entropy-probe" / "step-7.json")
    entry = runs.logged(trainer)[1]
    for name, value in report.figures.items():
        written = {event.step: event.value for event in events.Scalars(f"train/probe/{name}")}
        logged = entry[f"probe/{name}"]
        assert written[8] == pytest.approx(logged, rel=1e-6)  # event files hold float32
        assert logged == value or name == "seconds"
    losses = [event.step for event in events.Scalars("train/loss")]
    assert losses == [3, 6, 9, 12, 15, 18]


def test_the_change_since_the_last_probe(tmp_path: Path) -> None:
    """The difference of the entropies of both, with the SE of two independent batches, beside the step's prediction."""
    runs.run(tmp_path, "full", runs.PROBE)
    before, now = (StepReport.from_json(tmp_path / "entropy-probe" / f"step-{n}.json") for n in (7, 14))
    then, at = before.entropy.per_token, now.entropy.per_token
    assert now.since is not None
    assert (now.since.after_step, now.since.steps) == (7, 7)
    assert now.since.change.value == at.value - then.value
    assert now.since.change.se == pytest.approx((then.se**2 + at.se**2) ** 0.5, rel=1e-12)
    assert now.since.predicted == before.predicted_per_token.best
    assert before.batch.fingerprint != now.batch.fingerprint


def test_the_interval_grows_until_the_share_is_kept(tmp_path: Path) -> None:
    """n steps with share·(spent + n·t) ≥ spent, and no fewer than were asked for."""
    probe = runs.PROBE | {"every": 2, "max_share": 0.2}
    _, trainer = runs.run(tmp_path, "full", probe, max_steps=40)
    entries = runs.logged(trainer)
    steps = [entry["step"] - 1 for entry in entries]
    intervals = [entry["probe/interval"] for entry in entries]
    assert steps[0] == 0
    assert [after - before for before, after in pairwise(steps)] == intervals[:-1]
    assert max(intervals) > 2  # a probe takes as long as several steps of this model
    callback = EntropyProbeCallback(trainer, every=3, max_share=0.05)
    for spent, of_a_step in ((2.0, 0.1), (0.01, 5.0), (30.0, 2.0)):
        n = callback._interval(spent, of_a_step)
        assert spent / (spent + n * of_a_step) <= 0.05
        assert n == 3 or spent / (spent + (n - 1) * of_a_step) > 0.05


def test_gradients_that_a_scaler_has_scaled() -> None:
    """Before they are unscaled, and after; a step that it leaves out has nothing to be measured."""

    class Trainer:
        class accelerator:
            scaler = torch.amp.GradScaler("cpu", init_scale=64.0)

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), Trainer.accelerator.scaler
    scaler.scale(weight.square().sum()).backward()
    assert gradient_scale(Trainer, optimizer) == 64.0
    before = live_step(optimizer, {"weight": weight}, gradient_scale(Trainer, optimizer))
    scaler.unscale_(optimizer)
    assert gradient_scale(Trainer, optimizer) == 1.0
    after = live_step(optimizer, {"weight": weight}, gradient_scale(Trainer, optimizer))
    for step in (before, after):  # −lr·2w, whatever the gradient is multiplied by
        assert torch.allclose(step.move["weight"], torch.full((3,), -0.2))
        assert math.isclose(step.grad_norm, 12**0.5, rel_tol=1e-6)
    assert math.isclose(float(weight.grad.norm()), 12**0.5, rel_tol=1e-6)  # pyright: ignore[reportOptionalMemberAccess]


def test_without_a_trainer() -> None:
    integration.EntropyProbeCallback._newest = None
    with pytest.raises(TypeError, match=r"EntropyProbeCallback\(trainer\)"):
        EntropyProbeCallback()


def test_nothing_imports_trainers_and_trackers() -> None:
    """Neither the library nor the plugin: a process of its own, in which both are imported as far as they are by
    themselves, and the modules that measure."""
    code = (
        "import sys, entropy_probe, pytest_entropy_probe.plugin, entropy_probe.run, entropy_probe_checks.step_gates\n"
        "names = {'trl', 'tensorboard', 'wandb', 'trackio', 'mlflow', 'datasets', 'transformers.trainer'}\n"
        "print(sorted(names & set(sys.modules)), 'entropy_probe.integrations' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "False"]


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "entropy_probe")
