"""A model whose parts are elsewhere measures what it measures in one place, and nothing is left behind."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import models
import typecheck
from entropy_probe import ProbeConfig, ProbeError, ProbeReport, load_checkpoint, run_probe
from entropy_probe.__main__ import main as command_line
from entropy_probe.errors import ConfigError, MeasurementError
from entropy_probe.inputs import digest
from entropy_probe.model import lending
from entropy_probe.model.disk import is_on_disk, to_disk
from entropy_probe.model.forward import bind
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.model.placement import place
from entropy_probe.model.registry import checksum
from pytest_entropy_probe.settings import read_settings

MAKE: dict[str, Callable[[Path], Path]] = {
    "llama": lambda folder: models.full_checkpoint(folder, "llama"),
    "tied": lambda folder: models.full_checkpoint(folder, "qwen2"),
    "gpt2": lambda folder: models.full_checkpoint(folder, "gpt2"),
    "lora": lambda folder: models.adapter_checkpoint(folder, "qwen2"),
    "dora": lambda folder: models.adapter_checkpoint(folder, "llama", use_dora=True),
}
MIXED = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1.mlp": "cpu", "": "disk"}
MIXED_GPT2 = {"transformer.wte": "cpu", "transformer.h.1": "disk", "": "cpu"}
MAPS = {"cpu": {"": "cpu"}, "disk": {"": "disk"}, "mixed": MIXED}
FEW = {"invariance": {"max_examples": 1}, "true_delta_h": {"etas": [1e-3]}}
IDS = torch.randint(3, models.VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Subjects:
    """Checkpoints with their rollouts, and their reports in one place, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[Any, Any] = {}

    def checkpoint(self, case: str) -> Path:
        if case not in self._made:
            path = MAKE[case](self.folder / case)
            for name, seed in (("e", 1), ("u", 2)):
                models.random_rollouts(self.folder / f"{case}-{name}.jsonl", prompts=3, responses=3, seed=seed)
            self._made[case] = path
        return self._made[case]

    def report(self, case: str, **config: Any) -> ProbeReport:
        key = case, json.dumps(config, sort_keys=True)
        if key not in self._made:
            path = self.checkpoint(case)
            files = (self.folder / f"{case}-{name}.jsonl" for name in "eu")
            with typecheck.unchecked():
                self._made[key] = run_probe(path, ProbeConfig.from_mapping(FEW | config), *files)
        return self._made[key]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Subjects:
    return Subjects(tmp_path_factory.mktemp("subjects"))


def numbers(report: ProbeReport) -> dict[str, Any]:
    """All that is measured."""
    table = json.loads(report.model_dump_json())
    for section, keys in (("checkpoint", ("device_map",)), ("config", ("device_map", "max_memory", "offload_folder"))):
        for key in keys:
            table[section].pop(key)
    return {key: value for key, value in table.items() if key not in ("timing", "memory")}


FLOAT64 = {"precision": models.FLOAT64}
SMOKE = {"budget": "smoke"}


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("case", MAKE)
def test_the_report_is_that_of_one_place(subjects: Subjects, case: str, where: str) -> None:
    """Every number, bit for bit: the same operations on the same values. In true float64, of an adapter with all that
    is measured."""
    config = FLOAT64 | ({} if case in ("lora", "dora") and where == "mixed" else SMOKE)
    device_map = MIXED_GPT2 if case == "gpt2" and where == "mixed" else MAPS[where]
    placed = subjects.report(case, device_map=device_map, **config)
    assert numbers(placed) == numbers(subjects.report(case, **config))
    assert placed.checkpoint.device_map is not None
    assert sorted(placed.checkpoint.device_map.values()) == sorted(device_map.values())
    assert subjects.report(case, **config).checkpoint.device_map is None


@pytest.mark.parametrize("case", ["tied", "dora"])
def test_the_same_in_float32(subjects: Subjects, case: str) -> None:
    placed = subjects.report(case, device_map=MIXED, **SMOKE)
    assert numbers(placed) == numbers(subjects.report(case, **SMOKE))
    assert placed.integrity.checksum_before == placed.integrity.checksum_after


def test_names_by_which_accelerate_decides(subjects: Subjects) -> None:
    """Without an accelerator all of it is in memory, or on disk beyond what is allowed; layers stay whole."""
    path = subjects.checkpoint("lora")
    for rule in ("auto", "balanced", "balanced_low_0", "sequential"):
        found = load_checkpoint(path, device_map=rule).info.device_map
        assert found is not None
        assert set(found.values()) == {"cpu"}
    model = load_checkpoint(path).model
    layer = sum(p.numel() * 4 for n, p in model.named_parameters() if ".layers.0." in n)
    embeddings = sum(p.numel() * 4 for n, p in model.named_parameters() if "embed_tokens" in n)
    allowed = {"cpu": embeddings + 2 * layer}  # a layer's room is kept free for what comes back from disk
    loaded = load_checkpoint(path, device_map="auto", max_memory=allowed)
    assert loaded.info.device_map is not None
    homes = {name.rpartition("model.")[2]: home for name, home in loaded.info.device_map.items()}
    assert (homes["embed_tokens"], homes["layers.0"], homes["layers.1"]) == ("cpu", "cpu", "disk")


# θ + ηv


def test_theta_plus_eta_v_is_beside_the_parameter_and_counts(subjects: Subjects) -> None:
    bound = bind(load_checkpoint(subjects.checkpoint("lora"), device_map={"": "disk"}).model, torch.float64)
    v = {name: torch.ones_like(p) for name, p in bound.registry.trainable.items()}
    moved = theta_plus_eta_v(bound.registry, v, 1e-2, torch.float64)
    assert all(moved[name].device == p.device for name, p in bound.registry.trainable.items())
    still = bound.logits(IDS)
    assert float((bound.logits(IDS, override=moved) - still).detach().abs().max()) > 1e-3
    assert torch.equal(bound.logits(IDS, override=theta_plus_eta_v(bound.registry, v, 0.0, torch.float64)), still)
    assert torch.equal(bound.direct_logits(IDS), still)


def test_offload_by_accelerate_loses_it_and_is_refused(subjects: Subjects) -> None:
    """Its hook puts the weight from its own map where `functional_call` put θ + ηv: the logits do not move at all."""
    model = models.tiny_model("llama")
    moved = {name: nn.Parameter(p.detach() + 0.1) for name, p in model.named_parameters()}
    still, other = (torch.func.functional_call(model, m, (IDS,), {"use_cache": False}).logits for m in ({}, moved))
    assert float((other - still).detach().abs().max()) > 0.1
    accelerate.cpu_offload(model, torch.device("cpu"))
    lost = torch.func.functional_call(model, moved, (IDS,), {"use_cache": False}).logits
    assert torch.equal(lost, still)
    complaint = r"^parameter \S+: has no data \(.*\); load the model without offload, or .* device_map$"
    with pytest.raises(ProbeError, match=complaint):
        bind(model)
    checkpoint = replace(load_checkpoint(subjects.checkpoint("llama")), model=model)
    with pytest.raises(ProbeError, match=complaint):
        run_probe(checkpoint)


def test_a_live_model_that_accelerate_spread_without_offload(subjects: Subjects) -> None:
    """Its forward is on the instance, so that it is scored from whole logits, and so is its `to`; nothing is left."""
    loaded = load_checkpoint(subjects.checkpoint("llama"))
    parts = dict.fromkeys(("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = accelerate.dispatch_model(loaded.model, parts, main_device="cpu", force_hooks=True)
    assert "forward" in vars(model)
    before, hooks = checksum(model), hooks_of(model)
    files = (subjects.folder / f"llama-{name}.jsonl" for name in "eu")
    report = run_probe(replace(loaded, model=model), ProbeConfig.from_mapping(FEW | SMOKE | FLOAT64), *files)
    alone = subjects.report("llama", **SMOKE, **FLOAT64)
    assert report.entropy.rb.value == pytest.approx(alone.entropy.rb.value, rel=1e-12)
    assert report.entropy_change[-1].delta_h == pytest.approx(alone.entropy_change[-1].delta_h, rel=1e-9)
    assert report.entropy_change[-1].delta_h != 0
    assert (checksum(model), hooks_of(model)) == (before, hooks)


# Lending


def lora(**placement: Any) -> nn.Module:
    model = models.add_adapter(models.tiny_model("qwen2"), "qwen2", **placement)
    return model.eval()


def hooks_of(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def entries(model: nn.Module) -> list[int]:
    return [id(p) for part in model.modules() for p in part._parameters.values()]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_everything_is_back_after_an_error(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an interrupt torch tells no hook."""
    live = lora()
    bound = bind(live, torch.float64, lend_frozen=True)
    before, of_live = entries(bound.module), entries(live)
    inner = bound.module.get_submodule("base_model.model.model.layers.1.mlp")
    seen = []

    def fail(*args: Any, **kwargs: Any) -> None:
        seen.append({p.dtype for p in inner.parameters()})
        raise error("in the middle")

    monkeypatch.setattr(inner, "forward", fail)
    v = {name: torch.ones_like(p) for name, p in bound.registry.trainable.items()}
    for override in ({}, theta_plus_eta_v(bound.registry, v, 1e-2, torch.float64)):
        with pytest.raises(error if error is KeyboardInterrupt else MeasurementError, match="in the middle"):
            bound.logits(IDS, override=override)
        assert (entries(bound.module), entries(live)) == (before, of_live)
        assert hooks_of(bound.module) == hooks_of(live) == 0
    assert seen == [{torch.float64}] * 2


@pytest.mark.parametrize("adapter", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_float64_copy_shares_what_is_frozen_and_has_the_same_logits(adapter: dict[str, Any]) -> None:
    model = models.tiny_model("llama")
    targets = adapter.pop("target_modules", ["q_proj", "down_proj"])
    from peft import LoraConfig, get_peft_model

    live = get_peft_model(model, LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM", **adapter)).eval()
    frozen = {name: p for name, p in live.named_parameters() if not p.requires_grad}
    first = next(iter(frozen.values()))
    first.grad = torch.zeros_like(first)
    before = checksum(live)
    whole, shared = bind(live, torch.float64), bind(live, torch.float64, lend_frozen=True)
    assert frozen
    for name, p in shared.registry.parameters.items():
        assert (p.data_ptr() == live.get_parameter(name).data_ptr()) == (name in frozen)
        assert p.dtype == (torch.float32 if name in frozen else torch.float64)
    v = {name: torch.randn_like(p) for name, p in whole.registry.trainable.items()}
    for bound in (whole, shared):
        assert bound._split is not None
    for eta in (None, 1e-3):
        override = {} if eta is None else theta_plus_eta_v(whole.registry, v, eta, torch.float64)
        assert torch.equal(whole.logits(IDS, override=override), shared.logits(IDS, override=override))
    assert checksum(live) == before


def test_a_model_that_names_no_layers_is_lent_as_a_whole() -> None:
    """Here a weight is used outside of its own module."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4).requires_grad_(False)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, ids: Tensor, **_: Any) -> tuple[Tensor]:
            return (self.embed(ids) * self.scale @ self.embed.weight.T,)

    torch.manual_seed(0)
    whole, shared = (bind(model, torch.float64, lend_frozen=lends) for model in [Tied()] for lends in (False, True))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(whole.logits(ids), shared.logits(ids))
    assert shared.logits(ids).dtype is torch.float64


@contextmanager
def lent_alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """How many of the storages that were lent are still held."""
    storages: list[Any] = []
    original = lending.Saved.note

    def note(self: Any, lent: Tensor, home: Tensor) -> None:
        original(self, lent, home)
        storages.append(lending.StorageWeakRef(lent.untyped_storage()))

    with monkeypatch.context() as patch:
        patch.setattr(lending.Saved, "note", note)
        yield lambda: sum(not storage.expired() for storage in storages)


def test_a_graph_holds_no_lent_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after the forward, nor in the graph of a backward pass; first and second derivatives are those of a whole
    copy, bit for bit."""
    live = lora()
    whole, shared = bind(live, torch.float64), bind(live, torch.float64, lend_frozen=True)
    found = []
    with lent_alive(monkeypatch) as alive:
        for bound in (whole, shared):
            parameters = list(bound.registry.trainable.values())
            logits = bound.logits(IDS, true_derivative=True)
            held = [alive()]
            with bound.recording():
                loss = logits.log_softmax(-1)[..., 5].sum()
                first = torch.autograd.grad(loss, parameters, create_graph=True)
            held.append(alive())
            second = torch.autograd.grad(sum((g * g).sum() for g in first), parameters)
            found.append([logits.detach(), *(g.detach() for g in first), *second])
            assert held == [0, 0], held
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_changes_between_forward_and_backward_is_noticed() -> None:
    live = lora()
    bound = bind(live, torch.float64, lend_frozen=True)
    loss = bound.logits(IDS).sum()
    with torch.no_grad():
        live.get_parameter("base_model.model.model.layers.1.mlp.up_proj.weight").mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Disk


def maps_of(folder: Path) -> int:
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_files_have_no_name_and_go_with_the_model(subjects: Subjects, tmp_path: Path) -> None:
    loaded = load_checkpoint(subjects.checkpoint("lora"), device_map={"": "disk"}, offload_folder=tmp_path)
    frozen = [p for p in loaded.model.parameters() if not p.requires_grad]
    assert all(map(is_on_disk, frozen))
    assert not any(is_on_disk(p) for p in loaded.model.parameters() if p.requires_grad)
    assert maps_of(tmp_path) == len(frozen)
    assert list(tmp_path.iterdir()) == []
    gone = weakref.ref(frozen[0])
    del loaded, frozen
    gc.collect()
    assert gone() is None
    assert maps_of(tmp_path) == 0
    assert tmp_path.is_dir()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_values_on_disk(dtype: torch.dtype, tmp_path: Path) -> None:
    for shape in ((3, 5), (), (0, 4)):
        tensor = torch.arange(15)[: torch.Size(shape).numel()].reshape(shape).to(dtype)
        before = tensor.clone()
        to_disk(tensor, tmp_path)
        assert torch.equal(tensor, before)
        assert tensor.dtype is dtype


PEAKS = """
import sys, tempfile, torch, transformers
from peft import LoraConfig, get_peft_model
from entropy_probe.memory import Peak, _resident
from entropy_probe.model.forward import bind
from entropy_probe.model.placement import place
from entropy_probe.model.registry import checksum
from pytest_entropy_probe.settings import read_settings
torch.set_num_threads(1)
sizes = dict(vocab_size=500, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=4)
model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**sizes))
model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
place(model, {"": sys.argv[1]}, torch.device("cpu"), offload_folder=sys.argv[2])
bound, ids = bind(model, torch.float64), torch.ones(1, 5, dtype=torch.long)
bound.logits(ids).sum().backward()
peak = Peak(torch.device("cpu"))
checksum(model)
bound.logits(ids).sum().backward()
print(sum(p.numel() * p.element_size() for p in model.parameters()), peak.held().peak)
"""


def test_disk_lowers_the_peak(tmp_path: Path) -> None:
    """Of a model of 164 MB at least 120 MB are in memory at no time, by checksum, forward and backward in float64."""
    found = {}
    for where in ("cpu", "disk"):
        done = subprocess.run(
            [sys.executable, "-c", PEAKS, where, str(tmp_path)], capture_output=True, text=True, check=True
        )
        size, found[where] = map(int, done.stdout.split())
        assert size > 150e6
    assert found["cpu"] - found["disk"] > 120e6, found


# Errors


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (
            {"device_map": {"model.norms": "cpu", "": "cpu"}},
            r"device_map.model.norms: .* no such module .*; correct it",
        ),
        ({"device_map": {"model": "cpu"}}, r"device_map: no entry covers lm_head.weight; add one, or .*"),
        ({"device_map": {"": "cuda:0"}}, r"device_map\.: 'cuda:0' cannot be used \(.*\); name a device that is there"),
        ({"device_map": "best"}, r"device_map: got 'best'; give auto, .*"),
        ({"max_memory": {"cpu": 1}}, r"max_memory: is given without a device_map; set device_map: auto, or .*"),
        (
            {"device_map": {"": "disk"}, "offload_folder": "/nowhere"},
            r"offload_folder /nowhere: is not a folder; make it.*",
        ),
        (
            {"device_map": "auto", "max_memory": {"tape": 1}},
            r"device_map 'auto': accelerate finds no place .*; give .*",
        ),
    ],
)
def test_maps_that_cannot_be(subjects: Subjects, given: dict[str, Any], complaint: str) -> None:
    if torch.cuda.is_available() and "cuda" in complaint:
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=f"^{complaint}$") as error:
        load_checkpoint(subjects.checkpoint("llama"), **given)
    assert "\n" not in str(error.value)


def test_a_folder_that_cannot_be_written() -> None:
    with pytest.raises(ConfigError, match=r"^offload_folder /proc: cannot be written \(.*\); free some of it, or .*$"):
        place(models.tiny_model("llama"), {"": "disk"}, torch.device("cpu"), offload_folder="/proc")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"device_map": "best"}, "`device_map`: got 'best', expected one of auto, .*; correct the value"),
        ({"device_map": {"lm_head": "tape"}}, "`device_map`: 'lm_head' is mapped to 'tape', expected cpu, disk, .*"),
        ({"device_map": {}}, "`device_map`: got {}, expected one of .*"),
        ({"max_memory": {"cpu": "lots"}}, "`max_memory`: cpu has 'lots', expected bytes, or a size such as 20GiB; .*"),
        ({"max_memory": {"tape": 3}}, "`max_memory`: 'tape' is not a device: give N, .*"),
        ({"max_memory": "20GiB"}, "`max_memory`: got '20GiB', expected a map .*"),
    ],
)
def test_configurations_that_cannot_be(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ProbeConfig.from_mapping(values)


def test_configuration(tmp_path: Path) -> None:
    file = tmp_path / "probe.yaml"
    file.write_text("device_map: {model: 0, lm_head: disk}\nmax_memory: {0: 20GiB, cpu: 60GiB, 1: 5000}\n")
    config = ProbeConfig.load(file)
    assert config.device_map == {"model": "cuda:0", "lm_head": "disk"}
    assert config.max_memory == {"cuda:0": "20GiB", "cpu": "60GiB", "cuda:1": 5000}
    assert config.placement["max_memory"] == {"cuda:0": 20 << 30, "cpu": 60 << 30, "cuda:1": 5000}
    assert ProbeConfig.model_validate(config.model_dump(mode="json")) == config
    assert ProbeConfig.load(file, overrides={"device_map": "auto"}).device_map == "auto"


# The ways to say it


def test_kept_reports_are_told_apart(subjects: Subjects) -> None:
    path = subjects.checkpoint("lora")
    maps = (None, "auto", {"": "cpu"}, {"": "disk"})
    assert len({digest(path, ProbeConfig.from_mapping({"device_map": given})) for given in maps}) == len(maps)


def test_command_line(subjects: Subjects, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = subjects.checkpoint("lora"), tmp_path / "report.json"
    arguments = ["run", str(path), f"--rollouts={subjects.folder}/lora-e.jsonl", "--budget=smoke", f"--out={out}"]
    assert command_line([*arguments, "--device-map=auto", f"--offload-folder={tmp_path}"]) == 0
    report = ProbeReport.from_json(out)
    assert report.checkpoint.device_map == {"base_model": "cpu"}
    assert report.config["device_map"] == "auto"
    assert command_line([*arguments, "--device-map=best"]) == 4
    assert "`device_map`: got 'best', expected one of auto" in capsys.readouterr().err.splitlines()[-1]
    assert command_line([*arguments, f"--offload-folder={tmp_path}"]) == 0  # gradients may need it, without a map
    assert ProbeReport.from_json(out).checkpoint.device_map is None


def test_pytest_session(subjects: Subjects, pytester: pytest.Pytester) -> None:
    """A rule from the command line, a folder from the ini file."""
    path = subjects.checkpoint("lora")
    pytester.makepyfile(
        test_own="def test_own(probe_report): print('MAP', probe_report.checkpoint.device_map, "
        "probe_report.config['offload_folder'])"
    )
    pytester.mkdir("spill")
    pytester.makeini("[pytest]\nprobe_device_map = best\nprobe_offload_folder = spill\n")
    args = ["-s", f"--probe-checkpoint={path}", f"--probe-rollouts={subjects.folder}/lora-e.jsonl"]
    args += ["--probe-budget=smoke", "--probe-no-cache", "test_own.py"]
    result = pytester.runpytest_subprocess(*args, "--probe-device-map=auto")
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["*MAP {'base_model': 'cpu'} */spill*"])
    for config in (pytester.parseconfig(*args), pytester.parseconfig(*args, "--probe-device-map=balanced")):
        settings = read_settings(config)
        assert settings.overrides["device_map"] == (config.getoption("probe_device_map") or "best")
        assert settings.overrides["offload_folder"] == str(pytester.path / "spill")


# Devices that are not there: shapes and places alone

FAKE = Path(__file__).with_name("fake_devices.py")


def test_devices_line_up() -> None:
    """On two accelerators and in memory, scores, sampling with a cache and gradients, on tensors without values."""
    done = subprocess.run([sys.executable, str(FAKE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["lined", "up"] * 6
