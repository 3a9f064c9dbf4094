"""Checkpoints whose optimizer is not Adam: loaded, measured without P and v, and judged by what needs neither."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import forked
import models
from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe.__main__ import main
from entropy_probe.errors import CheckpointError
from entropy_probe.model.checkpoint.inspect import inspect_checkpoint
from entropy_probe.model.checkpoint.moments.others import KINDS
from entropy_probe.plots import save_figure, save_steps, text_table
from entropy_probe_checks.criteria import CRITERIA, GATES
from entropy_probe_checks.criteria.gate import baseline_of
from entropy_probe_checks.goldens import SECTIONS
from pytest_entropy_probe.shown.records import headline
from pytest_entropy_probe.shown.tables import step_of

ROOT = Path(__file__).parents[1]
Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum, with the keys that lion-pytorch and timm have."""

    def __init__(self, params: Any, lr: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.0})

    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
            p.data.add_((0.9 * average + 0.1 * p.grad).sign(), alpha=-self.param_groups[0]["lr"])
            average.lerp_(p.grad, 0.01)


class Signs(Lion):
    """An optimizer that nobody knows."""

    def __init__(self, params: Any) -> None:
        torch.optim.Optimizer.__init__(self, params, {"lr": 0.5, "temper": 2.0})

    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p] = {"mood": torch.zeros(3), "turns": 1}


def of_bitsandbytes(bits: int, *, moments: int = 2, without: str = "") -> Make:
    """What bitsandbytes 0.50 writes, key by key: small tensors in float32, and all of it hidden from FSDP."""

    class Written(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            extra = {"alpha": 0.0, "t_alpha": None, "t_beta3": None} if moments == 2 else {}
            super().__init__(params, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, **extra})

        def step(self, closure: Any = None) -> None: ...

        def state_dict(self) -> Any:
            return super().state_dict() | {"state": {i: self._entry(p) for i, p in enumerate(self._all())}}

        def _all(self) -> list[Tensor]:
            return [p for group in self.param_groups for p in group["params"]]

        def _entry(self, p: Tensor) -> dict[str, Any]:
            quantised = bits == 8 and p.numel() >= 512
            inside: dict[str, Tensor] = {}
            for k in range(1, moments + 1):
                inside[f"state{k}"] = torch.zeros_like(p, dtype=torch.uint8 if quantised else torch.float32)
                if quantised:
                    inside |= {f"qmap{k}": torch.zeros(256), f"absmax{k}": torch.zeros(-(-p.numel() // 256))}
            inside = {key: tensor for key, tensor in inside.items() if not without or not key.startswith(without)}
            return {"step": 3, "__bnb_optimizer_quant_state__": inside}

    return Written


MADE: dict[str, tuple[str, Make, float | None, int | None]] = {  # name → type, how, lr, step
    "SGD": ("SGD", lambda p: torch.optim.SGD(p, lr=1e-2), 1e-2, None),
    "SGD with momentum": ("SGD", lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9), 1e-2, None),
    "RMSprop": ("RMSprop", torch.optim.RMSprop, 1e-2, 3),
    "RMSprop, centred": ("RMSprop", lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True), 1e-2, 3),
    "Adagrad": ("Adagrad", torch.optim.Adagrad, 1e-2, 3),
    "Adadelta": ("Adadelta", torch.optim.Adadelta, 1.0, 3),
    "NAdam": ("NAdam", torch.optim.NAdam, 2e-3, 3),
    "RAdam": ("RAdam", torch.optim.RAdam, 1e-3, 3),
    "Adamax": ("Adamax", torch.optim.Adamax, 2e-3, 3),
    "ASGD": ("ASGD", torch.optim.ASGD, 1e-2, 3),
    "Rprop": ("Rprop", torch.optim.Rprop, 1e-2, 3),
    "Adafactor of torch": ("Adafactor", torch.optim.Adafactor, 1e-2, 3),
    "Adafactor": ("Adafactor", transformers.optimization.Adafactor, None, 3),
    "Adafactor with lr": (
        "Adafactor",
        lambda p: transformers.optimization.Adafactor(p, lr=1e-3, relative_step=False, beta1=0.9),
        1e-3,
        3,
    ),
    "Lion": ("Lion", Lion, 1e-4, None),
    "AdamW 8-bit, not in blocks": ("AdamW 8-bit", of_bitsandbytes(8, without="absmax"), 1e-3, 3),
    "one moment in 8 bits": ("one of bitsandbytes 8-bit", of_bitsandbytes(8, moments=1), 1e-3, 3),
    "unknown": ("unknown", Signs, 0.5, None),
}


def saved(folder: Path, make: Make) -> Path:
    model = models.tiny_model("llama")
    optimizer = make(list(model.parameters()))
    models.train_steps(model, optimizer)
    return models.save_checkpoint(folder, model, optimizer)


@pytest.mark.parametrize("name", list(MADE))
def test_what_is_known_of_it(tmp_path: Path, name: str) -> None:
    kind, make, lr, step = MADE[name]
    folder = saved(tmp_path / "ckpt", make)
    loaded, found = load_checkpoint(folder), inspect_checkpoint(folder)
    assert loaded.adam == {}
    assert loaded.other is not None
    assert (loaded.other.kind, loaded.other.lr, loaded.other.step) == (kind, lr, step)
    assert loaded.other.trained == tuple(n for n, _ in loaded.model.named_parameters())
    assert all(p.requires_grad for p in loaded.model.parameters())
    assert loaded.other.reason.startswith(f"the optimizer is {kind}: ")
    assert found.problems == []
    assert found.warnings == [f"{loaded.other.reason}; criteria that need one are not applicable"]
    assert found.optimizer is not None
    assert (found.optimizer.type, found.optimizer.covered, found.optimizer.total) == (kind, 0, 21)
    assert (found.optimizer.lr, found.optimizer.step) == ([lr] if lr else [], [step] if step else [])
    assert f"optimizer   {kind} in optimizer.pt, 1 group\n" in found.text()


def test_every_kind_of_the_table_is_made_here() -> None:
    """But for those of docs/optimizers.md, which real optimizers make."""
    elsewhere = {"LAMB", "Prodigy", "Muon", "GaLore", "APOLLO"}
    assert {kind.name for kind in KINDS} - {kind for kind, *_ in MADE.values()} == elsewhere


@pytest.mark.parametrize("frozen", [False, True])
def test_what_an_adapter_trains(tmp_path: Path, frozen: bool) -> None:
    """Without any state too, and where the frozen base model was handed to the optimizer."""
    folder = models.adapter_checkpoint(tmp_path / "ckpt", "llama")
    expected = set(load_checkpoint(folder).adam)
    model = load_checkpoint(folder).model
    for make in (torch.optim.SGD, torch.optim.Adagrad):
        optimizer = make([p for p in model.parameters() if frozen or p.requires_grad], lr=1e-3)
        models.train_steps(model, optimizer)
        content = optimizer.state_dict()
        if make is torch.optim.Adagrad:  # it makes its state at once, of what it never steps too
            content["state"] = {k: e for k, e in content["state"].items() if e["step"] > 0}
        torch.save(content, folder / "optimizer.pt")
        loaded = load_checkpoint(folder)
        assert loaded.other is not None
        assert set(loaded.other.trained) == expected
        assert {n for n, p in loaded.model.named_parameters() if p.requires_grad} == expected


def test_groups_by_position(tmp_path: Path) -> None:
    """The Trainer's two; of one of the two alone it is not known which parameters it has."""
    model = models.tiny_model("llama")
    named = sorted(model.named_parameters(), key=lambda item: item[1].ndim == 1)  # stable: matrices first
    two = [{"params": [p for _, p in named if p.ndim == k]} for k in (2, 1)]
    for groups in (two, two[:1]):
        optimizer = torch.optim.Adafactor(groups)
        models.train_steps(model, optimizer)
        folder = models.save_checkpoint(tmp_path / "ckpt", model, optimizer)
        if groups is two:
            other = load_checkpoint(folder).other
            assert other is not None
            assert other.trained == tuple(name for name, _ in named)
        else:
            with pytest.raises(CheckpointError, match="fit no known order"):
                load_checkpoint(folder)


@pytest.mark.parametrize("count", [21, 3])
def test_groups_by_name(tmp_path: Path, count: int) -> None:
    model = models.tiny_model("llama")
    named = list(model.named_parameters())[::-1][:count]
    optimizer = torch.optim.Adafactor(named)
    models.train_steps(model, optimizer)
    folder = models.save_checkpoint(tmp_path / "ckpt", model, optimizer)
    other = load_checkpoint(folder).other
    assert other is not None
    assert other.trained == tuple(name for name, _ in named)
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    content["param_groups"][0]["param_names"][0] = "model.layers.0.self_attn.q_proj.weight"
    torch.save(content, folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match="is of shape"):
        load_checkpoint(folder)


def adam(folder: Path) -> tuple[Path, Any]:
    folder = saved(folder, torch.optim.AdamW)
    return folder, torch.load(folder / "optimizer.pt", weights_only=True)


def old(content: Any) -> None:
    """As apex's FusedAdam has its groups: without `amsgrad`."""
    keep = ("lr", "betas", "eps", "weight_decay", "params")
    content["param_groups"] = [{k: group[k] for k in keep} for group in content["param_groups"]]


def without_moment(content: Any, *keys: int) -> None:
    for key in keys or content["state"]:
        del content["state"][key]["exp_avg_sq"]


DAMAGED: dict[str, tuple[Callable[[Any], object], str]] = {
    "one second moment gone": (lambda c: without_moment(c, 3), "has no `exp_avg_sq`"),
    "all second moments gone": (without_moment, "has no `exp_avg_sq`"),
    "one gone, old groups": (lambda c: (old(c), without_moment(c, 3)), "has no `exp_avg_sq`"),
    "one left, old groups": (lambda c: (old(c), without_moment(c, *range(1, 21))), "has no `exp_avg_sq`"),
    "one group without betas": (
        lambda c: c["param_groups"].append({"params": [c["param_groups"][0]["params"].pop()], "lr": 1e-3}),
        "fit no known order|`betas` is None",
    ),
    "groups without betas": (lambda c: c["param_groups"][0].pop("betas"), "`betas` is None"),
    "never stepped": (lambda c: c["state"].clear(), "was never stepped"),
    "amsgrad gone": (lambda c: c["param_groups"][0].pop("amsgrad"), "lack `amsgrad`"),
}


@pytest.mark.parametrize("damage", list(DAMAGED))
def test_a_damaged_adam_is_an_error(tmp_path: Path, damage: str) -> None:
    change, message = DAMAGED[damage]
    folder, content = adam(tmp_path / "ckpt")
    change(content)
    torch.save(content, folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_old_groups_are_adam(tmp_path: Path) -> None:
    folder, content = adam(tmp_path / "ckpt")
    old(content)
    torch.save(content, folder / "optimizer.pt")
    assert load_checkpoint(folder).other is None


SPOILT: dict[str, tuple[str, Callable[[Any], object], str]] = {
    "a state lacks its tensor": ("RMSprop", lambda c: c["state"][2].pop("square_avg"), "tensor 2 lacks `square_avg`"),
    "another form": ("RMSprop", lambda c: c["state"].update({2: {"exp_avg": torch.ones(2)}}), "tensor 2 lacks"),
    "a group of another": (
        "SGD with momentum",
        lambda c: c["param_groups"].append({"params": [c["param_groups"][0]["params"].pop()], "lr": 1e-3}),
        "only some of its groups are of SGD",
    ),
    "momentum was lost": ("SGD with momentum", lambda c: c["state"].update({4: {"x": 1}}), "tensor 4 lacks"),
    "never stepped": ("SGD with momentum", lambda c: c["state"].clear(), "was never stepped"),
    "another shape": ("Adagrad", lambda c: c["state"][1].update(sum=torch.ones(2, 3)), "fit no known order"),
    "another shape of factors": (
        "Adafactor of torch",
        lambda c: c["state"][1].update(row_var=torch.ones(2, 1)),
        "fit no known order",
    ),
    "another shape in 8 bits": (
        "AdamW 8-bit",
        lambda c: c["state"][1]["__bnb_optimizer_quant_state__"].update(state2=torch.ones(2, 3)),
        "fit no known order",
    ),
    "8-bit state in part": (
        "AdamW 8-bit",
        lambda c: c["state"][1].pop("__bnb_optimizer_quant_state__"),
        "has no `exp_avg`, only step",
    ),
    "8-bit state without its scales": (
        "AdamW 8-bit",
        lambda c: c["state"][1]["__bnb_optimizer_quant_state__"].pop("absmax2"),
        "tensor 1: its moments, their maps and their scales do not fit together",
    ),
    "lr is text": ("SGD", lambda c: c["param_groups"][0].update(lr="high"), "`lr` is 'high'"),
}  # fmt: skip


@pytest.mark.parametrize("damage", list(SPOILT))
def test_damage_of_others_is_an_error_too(tmp_path: Path, damage: str) -> None:
    name, change, message = SPOILT[damage]
    make = of_bitsandbytes(8) if name == "AdamW 8-bit" else MADE[name][1]
    folder = saved(tmp_path / "ckpt", make)
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    change(content)
    torch.save(content, folder / "optimizer.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


class Files:
    """One adapter with Adam's state, the same weights with Adafactor's and with SGD's, and two batches."""

    def __init__(self, folder: Path) -> None:
        self.adam = models.adapter_checkpoint(folder / "adam", "llama", adamw={"lr": 1e-5})
        self.other = models.adapter_checkpoint(folder / "other", "llama", adamw={"lr": 1e-5})
        self.sgd = models.adapter_checkpoint(folder / "sgd", "llama", adamw={"lr": 1e-5})
        model = load_checkpoint(self.other).model
        trained = [p for p in model.parameters() if p.requires_grad]
        for path, make in ((self.other, transformers.optimization.Adafactor), (self.sgd, torch.optim.SGD)):
            optimizer = make(trained)
            models.train_steps(model, optimizer, steps=1)
            torch.save(optimizer.state_dict(), path / "optimizer.pt")
            (path / "trainer_state.json").write_text('{"global_step": 1}')
        model = load_checkpoint(self.other).model
        self.e = models.sampled_rollouts(folder / "e.jsonl", model, prompts=5, responses=3, seed=1)
        self.u = models.sampled_rollouts(folder / "u.jsonl", model, prompts=6, responses=3, seed=2)


LIMITS = {
    "entropy": {"min": 0.0},
    "predicted_change": {"max": 1.0},
    "realised_ratio": {"min": 0.5},
    "zero_advantage": {"max": 1.0},
    "adam_step": {"max": 0.0},
    "finite_moments": {"max": 0.0},
    "reward": {"min": 0.0},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="module")
def reports(files: Files) -> tuple[ProbeReport, ProbeReport]:
    config = ProbeConfig.from_mapping({"limits": LIMITS})
    return run_probe(files.adam, config, files.e, files.u), run_probe(files.other, config, files.e, files.u)


REASON = "the optimizer is Adafactor: it has no second moment per value"


def test_what_needs_no_second_moment_is_measured_as_ever(reports: tuple[ProbeReport, ProbeReport]) -> None:
    of_adam, other = reports
    assert other.no_second_moment == REASON
    assert of_adam.no_second_moment is None
    for section in ("batch", "update_batch", "entropy", "registry", "invariance", "sampler_parity"):
        assert getattr(other, section) == getattr(of_adam, section), section
    assert of_adam.witness is not None
    assert other.witness is not None
    for name, value in other.witness.items():
        if name.endswith("_difference"):
            assert value == of_adam.witness[name]
    absent = ("first_order", "two_batch", "update", "real_step", "preconditioner", "next_step")
    assert [name for name in absent if getattr(other, name) is not None] == []
    assert [row.eta for row in other.entropy_change] == [0.0]
    optimizer = other.checkpoint.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.step) == ("Adafactor", None, 1)
    assert (optimizer.covered, optimizer.total) == (0, of_adam.checkpoint.optimizer.total)
    assert ProbeReport.model_validate_json(other.model_dump_json()) == other


@pytest.mark.parametrize("name", [*CRITERIA, *GATES])
def test_each_criterion_passes_or_says_why_not(reports: tuple[ProbeReport, ProbeReport], name: str) -> None:
    criterion = (CRITERIA | GATES)[name]
    of_adam, other = (criterion(report) for report in reports)
    assert of_adam.hint != REASON
    if criterion.needs_second_moment:
        assert (other.status, other.value, other.hint) == ("not_applicable", None, REASON)
    elif name != "adam_step":  # the other checkpoint alone has a trainer_state.json
        assert other.status == of_adam.status in ("pass", "not_applicable")
    else:
        assert other.status == "pass"


def test_tests_along_a_direction_are_no_formality(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A v of zeros, as −sign(X̄) would be of no gradient, is seen."""
    original = torch.where

    def still(condition: Any, one: Any, other: Any) -> Any:
        signs = isinstance(one, float) and (one, other) == (-1.0, 1.0)
        return original(condition, 0.0, 0.0) if signs else original(condition, one, other)

    monkeypatch.setattr("entropy_probe.pipeline.next_step.torch.where", still)
    report = run_probe(files.other, ProbeConfig(), files.e, files.u)
    assert CRITERIA["param_scaling"](report).status == "fail"


def test_what_shows_a_report_says_so_in_one_line(reports: tuple[ProbeReport, ProbeReport], tmp_path: Path) -> None:
    of_adam, other = reports
    said = " ".join(headline(other).split())
    assert f"change nothing about the next step: {REASON}" in said
    assert "resolves" not in said
    assert text_table(other) == f"nothing about the next step: {REASON}"
    assert max(map(len, headline(other).splitlines())) <= 80
    step = step_of("other", "run", other, [], "")
    assert (step.predicted, step.realised, step.ess, step.step) == ("-", "-", "-", 1)
    assert step.entropy == step_of("adam", "run", of_adam, [], "").entropy
    save_figure(other, tmp_path / "one.svg")
    assert REASON in (tmp_path / "one.svg").read_text()
    save_steps([("run", 1, of_adam), ("run", 2, other)], tmp_path / "both.png")
    save_steps([("run", 2, other)], tmp_path / "alone.png")
    sections = {name: section(other) for name, section in SECTIONS.items()}
    assert {name for name, of in sections.items() if isinstance(of, str)} == {"first_order", "two_batch", "update"}
    assert {of for of in sections.values() if isinstance(of, str)} == {REASON}
    assert set(baseline_of(other).quantities) == {"entropy", "zero_advantage", "reward"}
    assert set(baseline_of(of_adam).quantities) > set(baseline_of(other).quantities)


def test_command_line(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--rollouts", str(files.e), "--update-rollouts", str(files.u), "--budget", "smoke"]
    out, plot, page = (tmp_path / name for name in ("report.json", "plot.png", "page.html"))
    files_of = ["--out", str(out), "--plot", str(plot), "--html", str(page), "--evidence", str(tmp_path)]
    assert main(["run", str(files.other), *arguments, *files_of]) == 0
    assert f"entropy-probe: nothing about the next step: {REASON}\n" in capsys.readouterr().err
    assert ProbeReport.from_json(out).no_second_moment == REASON
    assert plot.is_file()
    again = tmp_path / "again.html"
    assert main(["report", str(out), "--evidence", str(tmp_path), "--html", str(again)]) == 0
    assert page.read_text() == again.read_text()
    assert main(["run", str(files.other), "--html", "page.txt"]) == 4  # before anything is measured
    assert "is not the name of a page; end its name in .html" in capsys.readouterr().err
    assert main(["inspect", str(files.other)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "optimizer Adafactor in optimizer.pt, 1 group moments of 0 of its 12 tensors step 1" in shown
    assert f"warning: {REASON}; criteria that need one are not applicable" in shown


def test_the_whole_suite(files: Files, tmp_path: Path) -> None:
    """All checks, gates, figures and golden files: nothing fails, and what is not there is skipped with its reason;
    again with the reports that were kept."""
    reasons = {"other": REASON, "sgd": "the optimizer is SGD: it has no second moment"}
    (tmp_path / "probe.yaml").write_text(f"limits: {LIMITS}\n")
    golden, plot, json = (tmp_path / part for part in ("golden", "figures", "reports"))
    command = [
        *("-m", "pytest", "-rs", "-v", "-p", "no:xdist", "-W", "error", "--probe-config=probe.yaml"),
        *(f"--probe-checkpoint=other={files.other}", f"--probe-checkpoint=sgd={files.sgd}", "--probe-budget=smoke"),
        *(f"--probe-rollouts={files.e}", f"--probe-update-rollouts={files.u}", f"--probe-golden-dir={golden}"),
        *(f"--probe-plot={plot}", f"--probe-json={json}"),
    ]
    for more in (["--probe-golden-update=missing", "--probe-golden-update-in-ci"], []):
        run = forked.python(*command, *more, cwd=tmp_path)
        assert run.returncode == 0, run.stdout + run.stderr
        assert not re.search(r"FAILED|ERROR|Traceback", run.stdout)
        for name, reason in reasons.items():
            assert f"nothing about the next step: {reason}\n" in run.stdout
            skipped = set(re.findall(rf"::test_(\w+)\[{name}\] SKIPPED", run.stdout))
            assert skipped >= {c.name for c in (CRITERIA | GATES).values() if c.needs_second_moment}
            verdicts = ProbeReport.from_json(json / f"{name}.json").verdicts
            said = {v.criterion for v in verdicts if v.hint == reason}
            left_out = {v.criterion for v in verdicts if v.hint.endswith("leaves this out.")}
            assert said | left_out >= {c.name for c in (CRITERIA | GATES).values() if c.needs_second_moment}
            assert {v.status for v in verdicts} == {"pass", "not_applicable"}
    assert "report from pytest's cache" in run.stdout
    assert {path.name for path in plot.iterdir()} == {"other.png", "sgd.png", "by_step.png"}


def test_the_page_lists_what_the_code_says() -> None:
    page = (ROOT / "docs" / "criteria.md").read_text()
    section = " ".join(page.partition("## Optimizers that are not Adam")[2].partition("\n## ")[0].split())
    kinds, criteria, gates = (
        re.search(pattern, section)
        for pattern in (r"groups and states: (.*?);", r"not applicable there: (.*?)\.", r"Of gates: (.*?)\.")
    )
    assert kinds is not None
    assert criteria is not None
    assert gates is not None
    assert kinds[1].split(", ") == list(dict.fromkeys(kind.name for kind in KINDS))
    for found, known in ((criteria, CRITERIA), (gates, GATES)):
        assert re.findall(r"`(\w+)`", found[1]) == [c.name for c in known.values() if c.needs_second_moment]
