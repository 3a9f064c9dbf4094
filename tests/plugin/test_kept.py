"""Reports in pytest's cache: reused where only limits changed, dropped where anything else did."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import forked
from entropy_probe import ProbeConfig, ProbeError, inputs
from entropy_probe.demo import checkpoint_path
from pytest_entropy_probe.kept import FOLDER, MOST, Kept

SMALL = "batch: {num_prompts: 2, num_update_prompts: 2}\ngeneration: {num_return_sequences: 2, max_new_tokens: 4}\n"
OWN = "def test_own(probe_report): print('LIMITS', probe_report.config['limits'], probe_report.checkpoint.name)\n"
# No forward: whatever calls a module fails the run.
NO_FORWARD = """
import torch
def refuse(*args, **kwargs): raise AssertionError("a module was called")
torch.nn.Module.__call__ = refuse
"""


def run(folder: Path, limits: str, *args: str, forward: bool = True) -> subprocess.CompletedProcess[str]:
    (folder / "test_own.py").write_text(OWN)
    (folder / "conftest.py").write_text("" if forward else NO_FORWARD)
    (folder / "probe.yaml").write_text(f"budget: smoke\n{SMALL}limits: {{{limits}}}\n")
    return forked.python("-m", "pytest", "-s", "--probe-config=probe.yaml", "test_own.py", *args, cwd=folder)


def entries(folder: Path) -> list[Path]:
    return sorted((folder / ".pytest_cache" / "d" / FOLDER).glob("*.json"))


def test_other_limits_compute_no_forward(tmp_path: Path) -> None:
    first = run(tmp_path, "", "--probe-checkpoint=demo")
    assert first.returncode == 0, first.stdout
    assert "cache" not in first.stdout
    (entry,) = entries(tmp_path)

    limits = "logit_scaling: 2.5, entropy: {min: 0.01}"
    second = run(tmp_path, limits, "--probe-checkpoint=again=demo", forward=False)
    assert second.returncode == 0, second.stdout
    assert "LIMITS {'logit_scaling': 2.5, 'entropy': {'min': 0.01}} again" in second.stdout
    assert "\nentropy-probe: again: report from pytest's cache (--probe-no-cache)\n" in second.stdout

    for option in ("--probe-no-cache", "--probe-seed=1"):
        measured = run(tmp_path, limits, "--probe-checkpoint=demo", option, forward=False)
        assert measured.returncode == 1, option
        assert "a module was called" in measured.stdout
        assert entries(tmp_path) == [entry]

    whole = entry.read_text()
    entry.write_text(whole[: len(whole) // 2])
    third = run(tmp_path, limits, "--probe-checkpoint=demo")
    assert third.returncode == 0
    assert "entropy-probe: demo: measured again: its report in pytest's cache was damaged (" in third.stdout
    assert entries(tmp_path) == [entry]

    cleared = run(tmp_path, limits, "--probe-checkpoint=demo", "--cache-clear", forward=False)
    assert cleared.returncode == 1
    assert entries(tmp_path) == []


# What pytest shows of the modules that a run imported.
SPY = """
import sys
def pytest_unconfigure():
    heavy = {"torch", "transformers", "peft", "safetensors.torch", "jaxtyping", "scipy.stats"}
    print("IMPORTED", sorted(heavy & set(sys.modules)))
"""


def test_a_kept_report_is_judged_without_torch(tmp_path: Path) -> None:
    """All criteria, the limits in force, and report.json; of one checkpoint under two names."""
    (tmp_path / "probe.yaml").write_text(f"budget: smoke\n{SMALL}")
    (tmp_path / "conftest.py").write_text(SPY)
    options = ("--probe-config=probe.yaml", "--probe-json=reports", "-m", "acceptance", "-v")
    command = [sys.executable, "-m", "pytest", *options]

    def judged(*checkpoints: str) -> subprocess.CompletedProcess[str]:
        given = [f"--probe-checkpoint={checkpoint}" for checkpoint in checkpoints]
        return subprocess.run(
            [*command, *given], cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", check=False
        )

    first = judged("a=demo", "b=demo")
    assert "'torch'" in first.stdout.partition("IMPORTED")[2], first.stdout
    (tmp_path / "reports" / "a.json").unlink()
    second = judged("a=demo", "b=demo")
    assert second.stdout.rstrip().endswith("IMPORTED []"), second.stdout
    assert "entropy-probe: 2 checkpoints: report from pytest's cache (" in second.stdout
    assert first.returncode == second.returncode
    assert outcomes(first.stdout) == outcomes(second.stdout) != []
    assert (tmp_path / "reports" / "a.json").is_file()


def outcomes(output: str) -> list[str]:
    """`ID PASSED` and the like, as -v prints them."""
    return [line.split("%")[0][:-5] for line in output.splitlines() if line.startswith("probe-checks/")]


@pytest.mark.parametrize("damage", ["", "0", "\n", "no digest\n{}", b"\xff\xfe"])
def test_a_damaged_entry_is_dropped(tmp_path: Path, damage: str | bytes) -> None:
    entry = tmp_path / "key.json"
    entry.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    report, note = Kept(entry).read()
    assert report is None
    assert "damaged" in note
    assert not entry.exists()
    assert Kept(entry).read() == (None, "")


def test_an_entry_that_is_no_report_of_this_version_is_dropped(tmp_path: Path) -> None:
    entry, text = tmp_path / "key.json", '{"schema_version": 1}'
    entry.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
    assert Kept(entry).read() == (None, "measured again: its report in pytest's cache was damaged (key.json)")
    assert not entry.exists()


def test_an_entry_that_cannot_be_removed_is_said(tmp_path: Path) -> None:
    entry = tmp_path / "key.json"
    entry.mkdir()
    report, note = Kept(entry).read()
    assert report is None
    assert "damaged" in note


def test_a_device_that_is_not_there_has_no_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading says what is wrong with it."""
    monkeypatch.setattr("torch.cuda.get_device_name", refuse)
    files = Files(tmp_path)
    files.values = {"device": "cuda:7"}
    with pytest.raises(ProbeError, match="'cuda:7' is not there"):
        files.digest()


def refuse(device: str) -> str:
    raise AssertionError("Invalid device id")


def test_an_entry_that_was_changed_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even into another valid report."""
    from entropy_probe import ProbeReport

    monkeypatch.setattr(ProbeReport, "model_validate_json", lambda text: text)
    entry = Kept(tmp_path / "key.json")
    assert entry.write(ProbeReport.model_construct(schema_version=1)) == ""
    assert entry.read()[0] == '{"schema_version":1}'
    entry.file.write_text(entry.file.read_text().replace('n":1', 'n":2'))
    report, note = entry.read()
    assert report is None
    assert "damaged" in note


def test_entries_do_not_pile_up(tmp_path: Path) -> None:
    from entropy_probe import ProbeReport

    report = ProbeReport.model_construct(schema_version=1)
    for number in range(MOST + 3):
        assert Kept(tmp_path / f"{number}.json").write(report) == ""
    assert len(list(tmp_path.iterdir())) == MOST


class Files:
    """A checkpoint with its base model and files beside it, and the digest of a measurement on them."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint, self.base = folder / "checkpoint-100", folder / "base"
        shutil.copytree(checkpoint_path(), self.checkpoint, copy_function=shutil.copyfile)
        shutil.copytree(checkpoint_path().parent / "base", self.base, copy_function=shutil.copyfile)
        self.prompts, self.data, self.e = folder / "prompts.jsonl", folder / "data.jsonl", folder / "e.jsonl"
        for file in (self.prompts, self.data, self.e):
            file.write_text("{}\n")
        self.values: dict[str, object] = {"batch": {"dataset": f"jsonl:{self.data}"}}
        self.arguments: dict[str, Path] = {}

    def digest(self) -> str:
        return inputs.digest(self.checkpoint, ProbeConfig.from_mapping(self.values), **self.arguments)


CHANGES: dict[str, Callable[[Files, pytest.MonkeyPatch], object]] = {
    "weights": lambda f, _: flip(f.checkpoint / "adapter_model.safetensors"),
    "moments": lambda f, _: flip(f.checkpoint / "optimizer.pt"),
    "adapter's configuration": lambda f, _: append(f.checkpoint / "adapter_config.json"),
    "step": lambda f, _: append(f.checkpoint / "trainer_state.json"),
    "tokenizer": lambda f, _: append(f.checkpoint / "tokenizer.json"),
    "base weights": lambda f, _: flip(f.base / "model.safetensors"),
    "base configuration": lambda f, _: append(f.base / "config.json"),
    "another file": lambda f, _: append(f.checkpoint / "chat_template.jinja"),
    "dataset": lambda f, _: append(f.data),
    "prompts": lambda f, _: f.arguments.update(prompts=f.prompts),
    "rollouts": lambda f, _: f.arguments.update(rollouts=f.e),
    "seed": lambda f, _: f.values.update(batch={"dataset": f"jsonl:{f.data}", "seed": 1}),
    "precision": lambda f, _: f.values.update(precision={"allow_tf32": True}),
    "ess limit, which the measurement reads": lambda f, _: f.values.update(true_delta_h={"min_ess_fraction": 0.4}),
    "budget": lambda f, _: f.values.update(budget="smoke"),
    "a library's version": lambda f, m: m.setattr(inputs, "version", lambda name: "0"),
    "our code": lambda f, m: m.setattr(inputs, "__file__", str(f.base / "x.py")),
}


def append(path: Path) -> None:
    with path.open("a") as stream:
        stream.write("\n")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_invalidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    files = Files(tmp_path)
    before = files.digest()
    CHANGES[change](files, monkeypatch)
    assert files.digest() != before


def test_a_file_that_changed_under_its_name_invalidates(tmp_path: Path) -> None:
    files = Files(tmp_path)
    for key, file in (("prompts", files.prompts), ("rollouts", files.e), ("update_rollouts", files.e)):
        files.arguments = {key: file}
        before = files.digest()
        append(file)
        assert files.digest() != before


def test_limits_do_not_invalidate(tmp_path: Path) -> None:
    files = Files(tmp_path)
    before = files.digest()
    files.values |= {"limits": {"logit_scaling": 2.5, "entropy": {"min": 1}}, "allow_inconclusive": ["ess"]}
    assert files.digest() == before


@pytest.mark.parametrize(
    "batch", [{"reward": "mine:reward"}, {"dataset": "mine:data"}, {"dataset": "gsm8k_r1_template"}]
)
def test_what_depends_on_code_of_the_users_own_has_no_digest(tmp_path: Path, batch: dict[str, str]) -> None:
    files = Files(tmp_path)
    files.values = {"batch": batch}
    with pytest.raises(ProbeError):
        files.digest()
    files.arguments = {"rollouts": files.e}  # with responses given, neither is called
    assert files.digest()
