"""Budgets: values under whatever the user sets, parts that are left out, and who is told."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

import forked
import models
from entropy_probe import GenerationConfig, ProbeConfig, ProbeError, ProbeReport, load_checkpoint, run_probe
from entropy_probe.__main__ import main
from entropy_probe.budgets import BUDGETS
from entropy_probe.config import BatchConfig
from entropy_probe_checks.criteria import CRITERIA
from pytest_entropy_probe.shown.explain import explanation

SMOKE = BUDGETS["smoke"].values


def test_standard_is_the_default() -> None:
    assert ProbeConfig().budget == "standard"
    assert ProbeConfig(budget="standard") == ProbeConfig() == ProbeConfig.from_mapping({"budget": "standard"})
    assert ProbeConfig().left_out == ()


@pytest.mark.parametrize("name", list(BUDGETS))
def test_every_value_of_a_budget_is_in_force_and_gives_way(name: str) -> None:
    for section, values in BUDGETS[name].values.items():
        for key, value in values.items():
            for config in (ProbeConfig.from_mapping({"budget": name}), ProbeConfig(budget=name)):
                assert getattr(getattr(config, section), key) == value
            other = "auto" if isinstance(value, str) else value + 1
            given = {"budget": name, section: {key: other}}
            own = ProbeConfig.from_mapping(given)
            assert own == ProbeConfig(**given)
            assert getattr(getattr(own, section), key) == other
            assert ProbeConfig.from_mapping(own.model_dump(mode="json")) == own


def test_values_given_as_sections_win_even_where_they_are_the_default() -> None:
    config = ProbeConfig(budget="smoke", generation=GenerationConfig(num_return_sequences=8), batch=BatchConfig(seed=3))
    assert config.generation.num_return_sequences == 8
    assert (config.batch.num_prompts, config.batch.seed) == (SMOKE["batch"]["num_prompts"], 3)


def test_budget_under_pyproject_under_yaml_under_command_line(tmp_path: Path) -> None:
    pyproject, file = tmp_path / "pyproject.toml", tmp_path / "probe.yaml"
    pyproject.write_text("[tool.entropy-probe]\nbudget = 'full'\nbatch = {num_prompts = 5}\n")
    file.write_text("generation: {num_return_sequences: 3}\n")
    full = ProbeConfig.load(file, pyproject)
    assert (full.budget, full.batch.num_prompts, full.generation.num_return_sequences) == ("full", 5, 3)
    assert full.batch.num_update_prompts == BUDGETS["full"].values["batch"]["num_update_prompts"]
    smoke = ProbeConfig.load(file, pyproject, {"budget": "smoke"})
    assert (smoke.budget, smoke.batch.num_prompts, smoke.generation.num_return_sequences) == ("smoke", 5, 3)
    assert smoke.batch.num_update_prompts == SMOKE["batch"]["num_update_prompts"]


@pytest.mark.parametrize("budget", ["smok", "", 3, None, ["smoke"]])
def test_unknown_budgets_are_errors_with_the_choices(budget: Any) -> None:
    message = r"`budget`: input should be 'smoke', 'standard' or 'full', got "
    with pytest.raises(ProbeError, match=message) as caught:
        ProbeConfig.from_mapping({"budget": budget})
    assert "\n" not in str(caught.value)
    with pytest.raises(ProbeError, match=message):
        ProbeConfig(budget=budget)


def test_a_smoke_run_measures_and_says_what_it_left_out(tmp_path: Path) -> None:
    path = models.adapter_checkpoint(tmp_path / "ckpt", "llama", adamw={"lr": 1e-5})
    model = load_checkpoint(path).model
    e = models.sampled_rollouts(tmp_path / "e.jsonl", model, prompts=4, responses=3, seed=1)
    u = models.sampled_rollouts(tmp_path / "u.jsonl", model, prompts=4, responses=3, seed=2)
    report = run_probe(path, ProbeConfig(budget="smoke"), e, u)
    assert report.left_out == list(BUDGETS["smoke"].left_out)
    assert report.config["budget"] == "smoke"
    assert report.invariance.num_examples == SMOKE["invariance"]["max_examples"]
    assert report.real_step is report.continuity.taylor_eta_max is report.witness["curvature"] is None
    assert "projections_v" not in report.witness
    verdicts = {name: criterion(report) for name, criterion in CRITERIA.items()}
    assert {v.status for v in verdicts.values()} <= {"pass", "not_applicable"}, verdicts
    unasked = {name for name, v in verdicts.items() if v.hint == "The budget smoke leaves this out."}
    assert unasked == {name for name, criterion in CRITERIA.items() if criterion.part}
    report.to_json(tmp_path / "r.json")
    assert ProbeReport.from_json(tmp_path / "r.json") == report


def test_no_examples_are_none_drawn(tmp_path: Path) -> None:
    path = models.adapter_checkpoint(tmp_path / "ckpt", "llama")
    e = models.random_rollouts(tmp_path / "e.jsonl", prompts=4, responses=3, seed=1)
    report = run_probe(path, ProbeConfig.from_mapping({"budget": "smoke", "invariance": {"max_examples": 0}}), e)
    assert (report.invariance.num_examples, report.invariance.zero_step, report.invariance.scaling) == (0, None, None)
    for name in ("drawn_zero_check", "drawn_scaling"):
        assert CRITERIA[name](report).status == "not_applicable"


def test_explanations_name_the_budgets() -> None:
    assert ["budget", "not", "asked", "under", "smoke"] in map(str.split, explanation("taylor_order").splitlines())
    assert "not asked" not in explanation("zero_check")
    table = explanation("all").partition("budgets (--probe-budget)\n")[2]
    assert max(map(len, table.splitlines())) <= 80
    for name, budget in BUDGETS.items():
        assert f"\n  {name} " in f"\n{table}"
        for section, values in budget.values.items():
            assert all(f"{section}.{key} {value}" in " ".join(table.split()) for key, value in values.items())
    assert all(f"{name}," in table or f"{name}\n" in table for name, c in CRITERIA.items() if c.part)


def test_command_line_takes_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path), "--budget", "smok"]) == 4
    assert "`budget`: input should be 'smoke', 'standard' or 'full', got 'smok'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "label"), [(["--probe-budget=smok"], "--probe-budget"), (["-oprobe_budget=smok"], "probe_budget (ini)")]
)
def test_usage_error_of_pytest(tmp_path: Path, args: list[str], label: str) -> None:
    (tmp_path / "ckpt").mkdir()
    done = _pytest(tmp_path, *args)
    assert done.returncode == 4
    assert done.stderr.strip() == f"ERROR: {label}: got 'smok'; give one of smoke, standard, full"


def test_header_shows_the_budget_in_force(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    assert "  budget standard\n" in _pytest(tmp_path, "-v").stdout
    (tmp_path / "pytest.ini").write_text("[pytest]\nprobe_budget = full\n")
    assert "  budget full\n" in _pytest(tmp_path, "-v").stdout
    without = ", ".join(BUDGETS["smoke"].left_out)
    assert f"  budget smoke, without {without}\n" in _pytest(tmp_path, "-v", "--probe-budget=smoke").stdout


def _pytest(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    collects = ("--co", "-p", "no:cacheprovider", "--probe-checkpoint=ckpt")
    return forked.python("-m", "pytest", *collects, *args, cwd=folder)
