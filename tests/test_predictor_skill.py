"""How well predictors told the changes of a run: the statistics by plain loops and where the truth is known, and the
table of a run's reports."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import models
from entropy_probe import ProbeConfig, ProbeError, ProbeReport, run_probe
from entropy_probe.estimators.skill import fitted, rank_correlation, skill
from entropy_probe.predictor_skill import HEADINGS, PREDICTORS, run_skill

RNG = np.random.default_rng(5)
FIGURES, CHANGES = RNG.normal(size=12).tolist(), RNG.normal(size=12).tolist()
NO_NOISE = [0.0] * 12


def test_kappa_is_fitted_on_what_came_before() -> None:
    """By numpy's least squares without intercept on the changes before each; those at and after it move nothing."""
    kappas = fitted(FIGURES, CHANGES)
    assert math.isnan(kappas[0])
    for k in range(1, 12):
        expected = np.linalg.lstsq(np.array(FIGURES[:k])[:, None], np.array(CHANGES[:k]), rcond=None)[0][0]
        assert kappas[k] == pytest.approx(expected, rel=1e-12)
        later = [*CHANGES[:k], *(99.0 for _ in CHANGES[k:])]
        assert fitted(FIGURES, later)[k] == kappas[k]
    assert fitted([0.0, 1.0], [1.0, 1.0])[1] == 0.0


def test_by_its_definition() -> None:
    errors = [0.1 + 0.01 * k for k in range(12)]
    kappas = fitted(FIGURES, CHANGES)
    for fit in (True, False):
        missed = noise = signal = signs = 0.0
        for k in range(1, 12):
            told = FIGURES[k] * (kappas[k] if fit else 1.0)
            missed += (CHANGES[k] - told) ** 2 - errors[k] ** 2
            signal += CHANGES[k] ** 2 - errors[k] ** 2
            signs += FIGURES[k] * CHANGES[k] > 0
            noise += errors[k] ** 2
        found = skill(FIGURES, CHANGES, errors, fit=fit)
        assert found.skill == pytest.approx(1 - missed / signal, rel=1e-12)
        assert (found.signs, found.count) == (signs, 11)
        assert found.kappa == (kappas[-1] if fit else None)


def test_the_ends_of_the_scale() -> None:
    """1 for the changes themselves, 0 for who predicts none, less for the opposite; `None` where all is noise."""
    assert skill(CHANGES, CHANGES, NO_NOISE, fit=False).skill == 1.0
    assert skill(CHANGES, CHANGES, NO_NOISE, fit=False).rank == pytest.approx(1.0)
    nothing = skill([0.0] * 12, CHANGES, NO_NOISE, fit=False)
    assert (nothing.skill, nothing.signs, nothing.rank) == (0.0, 0, None)
    assert skill([-c for c in CHANGES], CHANGES, NO_NOISE, fit=False).skill == pytest.approx(-3.0)
    assert skill(CHANGES, CHANGES, [10.0] * 12, fit=False).skill is None


def test_a_scale_is_nothing_to_who_is_fitted() -> None:
    """Figures in other units, or of the other sign, come to the same skill; signs and ranks are those of the figure."""
    one = skill(FIGURES, CHANGES, NO_NOISE, fit=True)
    other = skill([-1e6 * x for x in FIGURES], CHANGES, NO_NOISE, fit=True)
    assert other.skill == pytest.approx(one.skill, rel=1e-9)
    assert other.signs == 11 - one.signs
    assert other.rank == pytest.approx(-(one.rank or math.nan))


def test_rank_correlation_with_ties() -> None:
    """Pearson's of the mean ranks."""
    x, y = [1.0, 1.0, 2.0, 5.0, 0.0], [3.0, 1.0, 1.0, 9.0, 2.0]
    expected = np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1]
    assert rank_correlation(x, y) == pytest.approx(expected)
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert rank_correlation([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_noise_of_the_changes_is_not_held_against_a_predictor() -> None:
    """Who tells the true change has skill 1 on average, though changes are as noisy as they are large; without the SE
    it would be 0.5. Of 4000 runs of 40, pooled: ±0.01."""
    rng = np.random.default_rng(0)
    true, noise = rng.normal(size=(4000, 40)), rng.normal(size=(4000, 40))
    missed = signal = plain = 0.0
    for t, e in zip(true, noise, strict=True):
        found = skill(t.tolist(), (t + e).tolist(), [1.0] * 40, fit=False)
        of_changes = float(((t + e)[1:] ** 2).sum())
        signal += of_changes - 39
        missed += (1 - (found.skill or 0.0)) * (of_changes - 39)
        plain += of_changes
    assert 1 - missed / signal == pytest.approx(1.0, abs=0.01)
    assert 1 - (missed + 39 * 4000) / plain == pytest.approx(0.5, abs=0.01)


# --- reports of a run


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> ProbeReport:
    folder = tmp_path_factory.mktemp("skill")
    path = models.full_checkpoint(folder / "ckpt", "llama")
    e = models.random_rollouts(folder / "e.jsonl", prompts=5, responses=3, seed=1)
    u = models.random_rollouts(folder / "u.jsonl", prompts=4, responses=2, seed=2)
    config = {"budget": "smoke", "invariance": {"max_examples": 0}}
    return run_probe(path, ProbeConfig.from_mapping(config), e, u)


def at(one: ProbeReport, step: int, terms: list[float], prompts: str = "same", **figures: float) -> ProbeReport:
    """The report of another checkpoint of the run, with these terms of the entropy per token."""
    value, se = statistics.fmean(terms), statistics.stdev(terms) / math.sqrt(len(terms))
    per_token = one.entropy.per_token.model_copy(update={"value": value, "se": se})
    entropy = one.entropy.model_copy(update={"per_token": per_token, "per_token_by_prompt": terms})
    batch = one.batch.model_copy(update={"fingerprint": str(step), "prompts_fingerprint": prompts})
    assert one.update is not None
    told = figures.pop("told", 0.0)
    rows = [
        row.model_copy(update={"predicted_per_token": told}) if row.eta == one.update.lr else row
        for row in one.entropy_change
    ]
    return one.model_copy(
        update={
            "checkpoint": one.checkpoint.model_copy(update={"global_step": step}),
            "entropy": entropy,
            "batch": batch,
            "entropy_change": rows,
            "predictors": one.predictors.model_copy(update=figures),
        }
    )


def run(one: ProbeReport, count: int = 6, apart: int = 1) -> list[ProbeReport]:
    """A run in which the probe is right, `wang` too with κ = 0.5, and `steer` never."""
    rng = np.random.default_rng(2)
    changes, prompts = rng.normal(size=count) * 0.1, rng.normal(size=8)
    reports = []
    for k in range(count):
        terms = (1 + changes[:k].sum() + prompts + 0.001 * rng.normal(size=8)).tolist()
        told = {"told": changes[k], "wang": 2 * changes[k], "steer": -changes[k], "of_entropies": changes[k] / 2}
        reports.append(at(one, 100 + k * apart, terms, **told))
    return reports


def test_the_predictors_of_a_run(one: ProbeReport) -> None:
    """In any order of the reports. Noise of 0.001·√2/√8 stands beside changes of 0.1."""
    found = run_skill(run(one)[::-1])
    assert (found.steps, found.apart) == ([100, 101, 102, 103, 104, 105], 1)
    assert list(found.skills) == [*PREDICTORS, "persistence"]
    of = found.skills
    assert (of["probe"].signs, of["probe"].kappa) == (4, None)
    for name in ("probe", "wang", "steer"):
        assert of[name].skill == pytest.approx(1.0, abs=0.05), name
    assert of["of_entropies"].skill == pytest.approx(0.75, abs=0.05)
    assert of["wang"].kappa == pytest.approx(0.5, abs=0.03)
    assert (of["steer"].signs, of["steer"].rank) == (0, pytest.approx(-1.0))
    again = skill([0.0, *found.changes[:-1]], found.changes, found.errors, fit=False)
    assert of["persistence"] == again
    assert all(len(row) == len(HEADINGS) for row in found.rows())
    assert len(found.title) <= 80


def test_the_same_prompts_are_taken_away(one: ProbeReport) -> None:
    """The SE of a change is that of the differences, prompt by prompt; of other prompts that of both."""
    reports = run(one)
    for error in run_skill(reports).errors:
        assert error == pytest.approx(0.001 * math.sqrt(2 / 8), rel=0.6)
    others = [
        r.model_copy(update={"batch": r.batch.model_copy(update={"prompts_fingerprint": str(k)})})
        for k, r in enumerate(reports)
    ]
    pairs = itertools.pairwise(reports)
    expected = [math.hypot(a.entropy.per_token.se, b.entropy.per_token.se) for a, b in pairs]
    assert run_skill(others).errors == pytest.approx(expected)
    assert min(expected) > 0.1


def test_with_several_steps_between_all_are_fitted(one: ProbeReport) -> None:
    found = run_skill(run(one, apart=10))
    assert found.skills["probe"].kappa is not None
    assert found.skills["persistence"].kappa is None
    assert "10 steps lie between, and the probe predicts one" in found.note


def test_what_a_report_lacks_is_left_out(one: ProbeReport) -> None:
    reports = run(one)
    lacking = reports[2].model_copy(update={"predictors": reports[2].predictors.model_copy(update={"of_visits": None})})
    assert set(PREDICTORS) - set(run_skill([*reports[:2], lacking, *reports[3:]]).skills) == {"of_visits"}
    at_the_end = [
        *reports[:5],
        lacking.model_copy(update={"checkpoint": reports[5].checkpoint, "batch": reports[5].batch}),
    ]
    assert "of_visits" in run_skill(at_the_end).skills


def wrong(one: ProbeReport) -> dict[str, tuple[list[ProbeReport], str]]:
    reports = run(one)
    unnamed = reports[0].checkpoint.model_copy(
        update={"global_step": None, "optimizer": one.checkpoint.optimizer.model_copy(update={"step": None})}
    )
    hotter: dict[str, Any] = dict(one.config, generation=one.config["generation"] | {"temperature": 0.5})
    shared = reports[1].model_copy(update={"batch": reports[0].batch})
    return {
        "few": (reports[:3], "3 checkpoints; give 4 of one run"),
        "uneven": ([*reports[:3], *reports[4:]], "are 1, 2 steps apart"),
        "twice": ([*reports, reports[0]], "are 0, 1 steps apart"),
        "no step": ([reports[0].model_copy(update={"checkpoint": unnamed}), *reports[1:]], "the report has no step"),
        "other temperature": (
            [*reports[:5], reports[5].model_copy(update={"config": hotter})],
            "differ in `generation`",
        ),
        "one file": ([reports[0], shared, *reports[2:]], "on the responses of one file"),
    }


@pytest.mark.parametrize("name", ["few", "uneven", "twice", "no step", "other temperature", "one file"])
def test_what_no_skill_can_be_said_of(one: ProbeReport, name: str) -> None:
    reports, message = wrong(one)[name]
    with pytest.raises(ProbeError, match=message) as raised:
        run_skill(reports)
    assert "\n" not in str(raised.value)


def test_reports_of_files(one: ProbeReport, tmp_path: Path) -> None:
    reports = run(one)
    for k, report in enumerate(reports):
        report.to_json(tmp_path / f"{k}.json")
    read = [ProbeReport.from_json(tmp_path / f"{k}.json") for k in range(len(reports))]
    assert run_skill(read) == run_skill(reports)
