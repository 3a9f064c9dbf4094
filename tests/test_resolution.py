"""What the noise resolves, and an E batch that grows until it is enough."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from entropy_probe import ProbeConfig, ProbeError, ProbeReport, load_checkpoint, run_probe
from entropy_probe.demo import checkpoint_path
from entropy_probe.estimators.resolution import next_step_interval, prompts_needed, prompts_to_draw
from entropy_probe.pipeline import growth, measured
from entropy_probe.stages.responses import sampled_rollouts
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.tasks import draw_prompts, further_prompts
from entropy_probe_checks.audit import LIMIT, audit, worst
from pytest_entropy_probe.shown.records import FIRST, headline

SMALL: dict[str, Any] = {
    "budget": "smoke",
    "precision": {"dtype": "float64"},
    "generation": {"num_return_sequences": 3, "max_new_tokens": 8},
}
BATCH = {"num_prompts": 4, "num_update_prompts": 3, "reward": "chat:excess_over_the_mean"}


def config(**batch: Any) -> ProbeConfig:
    return ProbeConfig.from_mapping({**SMALL, "batch": {**BATCH, **batch}})


@pytest.fixture(scope="module")
def passes() -> list[tuple[str, int]]:
    return []


@pytest.fixture(scope="module")
def grown(passes: list[tuple[str, int]]) -> ProbeReport:
    """Asked for more than 11 prompts can give; `passes` has what was sampled, scored and derived, and of how many."""
    with pytest.MonkeyPatch.context() as patch:

        def counted(module: Any, name: str, rows: Any) -> None:
            original = getattr(module, name)

            def call(*args: Any, **options: Any) -> Any:
                passes.append((name, rows(*args)))
                return original(*args, **options)

            patch.setattr(module, name, call)

        counted(sampled_rollouts, "_sampled", lambda _, __, prompts, *___: len(prompts))
        counted(measured, "score", lambda _, rollouts, *__: rollouts.num_prompts)
        counted(growth, "score", lambda _, rollouts, *__: rollouts.num_prompts)
        counted(growth, "derived", lambda _, __, share, *___: share.own.num_prompts)
        counted(measured, "unit_gradients", lambda _, share, *__: share.own.num_prompts)
        return run_probe(checkpoint_path(), config(target_se=1e-9, max_prompts=11))


def test_scores_alone_are_computed_twice(grown: ProbeReport, passes: list[tuple[str, int]]) -> None:
    """4, then 8, then 11 prompts of E, and 3 of U; sampling is tried again with two of them and two seeds at once. What
    stands beside scores at θ + ηv is scored with the same rows at once."""
    assert [look.num_prompts for look in grown.resolution.looks] == [4, 8, 11]
    assert grown.batch.num_prompts == 11
    found = {name: [n for of, n in passes if of == name] for name, _ in passes}
    assert found == {
        "_sampled": [4, 3, 4, 4, 3],
        "score": [4, 3, 8, 11],
        "unit_gradients": [3, 11],
        "derived": [4, 4, 3],
    }


def test_rewards_that_compare_a_batch_are_asked_again_as_they_were(grown: ProbeReport) -> None:
    """Of 4, 4 and 3 prompts: all at once the mean is another, and so is who is above it."""
    assert grown.evidence is not None
    again, recorded = grown.evidence.facts["inputs"]["e"]["rewards"], grown.evidence.arrays["e.rewards"].tolist()
    assert [again[str(n)] for n in range(11)] == recorded


def test_a_grown_batch_is_the_batch(grown: ProbeReport, tmp_path: Path) -> None:
    """Written to a file and measured at once, it has every figure to 1e-9 of the largest; derivatives by differences,
    whose step is another, to 1e-6."""
    evidence = grown.evidence
    assert evidence is not None
    for which in ("e", "u"):
        ids, starts, lengths = (evidence.arrays[f"{which}.{name}"] for name in ("ids", "prompt_lens", "gen_lens"))
        rewards = evidence.arrays[f"{which}.rewards"].tolist()
        lines = []
        for n, of_prompt in enumerate(rewards):
            rows = range(3 * n, 3 * n + 3)
            responses = [ids[i, starts[i] : starts[i] + lengths[i]].tolist() for i in rows]
            prompt = ids[3 * n, : starts[3 * n]].tolist()
            lines.append(json.dumps({"prompt_ids": prompt, "response_ids": responses, "rewards": of_prompt}))
        (tmp_path / f"{which}.jsonl").write_text("\n".join(lines) + "\n")
    at_once = run_probe(checkpoint_path(), config(), tmp_path / "e.jsonl", tmp_path / "u.jsonl")
    for section in ("entropy", "first_order", "two_batch", "update"):
        pairs = zip(
            numbers(getattr(grown, section).model_dump()), numbers(getattr(at_once, section).model_dump()), strict=True
        )
        for (name, one), (_, other) in pairs:
            relative = 1e-6 if "curvature" in name or "eta_star" in name else 1e-9
            assert one == pytest.approx(other, rel=relative, abs=1e-9), f"{section}{name}"
    for one, other in zip(grown.entropy_change, at_once.entropy_change, strict=True):
        assert one.delta_h_per_token_pd == pytest.approx(other.delta_h_per_token_pd, rel=1e-7, abs=1e-12)
    assert grown.resolution.per_token == pytest.approx(at_once.resolution.per_token, rel=1e-6)
    assert at_once.resolution.next_step is None  # the update is a given one
    assert worst(audit(grown.model_dump(mode="json"), evidence)).difference <= LIMIT / 10


def numbers(values: Any, path: str = "") -> list[tuple[str, float]]:
    if isinstance(values, dict):
        return list(itertools.chain(*(numbers(value, f"{path}.{key}") for key, value in values.items())))
    if isinstance(values, list | tuple):
        return list(itertools.chain(*(numbers(value, f"{path}[{i}]") for i, value in enumerate(values))))
    is_number = isinstance(values, int | float) and not isinstance(values, bool)
    return [(path, float(values))] if is_number else []


def test_the_first_prompts_are_those_without_a_target(grown: ProbeReport) -> None:
    """Prompts, responses and rewards: the batch grows at its end."""
    plain = run_probe(checkpoint_path(), config())
    assert plain.evidence is not None
    assert grown.evidence is not None
    for name in ("e.rewards", "e.gen_lens", "e.prompt_lens", "u.gen_lens"):
        few, many = plain.evidence.arrays[name], grown.evidence.arrays[name]
        assert (many[: len(few)] == few).all(), name
    rows, wide = plain.evidence.arrays["e.ids"], grown.evidence.arrays["e.ids"]
    assert (wide[: len(rows), : rows.shape[1]] == rows).all()
    assert plain.resolution.looks == []
    assert plain.resolution.target_se is plain.resolution.reached is None


def test_it_is_said_what_the_noise_resolves(grown: ProbeReport) -> None:
    resolution, step = grown.resolution, grown.next_step
    assert resolution.per_token == 2 * step.predicted_per_token_se
    assert resolution.per_response == pytest.approx(2 * step.predicted_se, rel=1e-12)
    ratio = resolution.per_token / abs(step.predicted_per_token)
    assert resolution.prompts_needed == math.ceil(11 * ratio**2)
    low, high = resolution.next_step
    assert (low + high) / 2 == pytest.approx(step.predicted_per_token, rel=1e-9)
    said = [line for line in headline(grown).splitlines() if not line.startswith(FIRST)]
    assert max(map(len, said)) <= 80
    text = " ".join(" ".join(said).split())
    assert f"resolves {resolution.per_token:.2g} nats/token (2 standard errors)" in text
    assert ("prompts would decide" in text) == (ratio > 1)
    assert "the standard error of 1e-09 that was asked for was not reached with 11 prompts" in text
    assert "with another update batch: " in text


def test_a_target_is_reached_and_the_batch_stops(grown: ProbeReport) -> None:
    enough = run_probe(checkpoint_path(), config(target_se=1e3, max_prompts=11))
    assert enough.batch.num_prompts == 4
    assert enough.resolution.reached
    assert "was reached with 4 prompts" in " ".join(headline(enough).split())
    assert enough.resolution.looks[0] == grown.resolution.looks[0]


def test_half_of_the_change_is_that_of_the_update_batch() -> None:
    report = run_probe(checkpoint_path(), config(target_se="2se", max_prompts=5))
    assert report.evidence is not None
    terms = report.evidence.arrays["target.terms"]
    assert report.resolution.target_se == pytest.approx(report.update.lr * abs(terms.mean()) / 2, rel=1e-12)
    assert worst(audit(report.model_dump(mode="json"), report.evidence)).difference <= LIMIT / 10


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"target_se": 0.1}, "batch.target_se: the E batch is read from a file, to which no prompts can be added"),
        ({"target_se": 0.1, "max_prompts": 3}, "batch.target_se: batch.max_prompts is 3, and batch.num_prompts is 4"),
        ({"target_se": 0.0}, "`batch.target_se`: 0.0 is not a standard error: give nats per token above 0, or 2se"),
        ({"target_se": "3se"}, "'3se' is not a standard error"),
        ({"target_se": True}, "true is not a standard error"),
        ({"target_se": math.inf}, "inf is not a standard error"),
    ],
)
def test_a_target_that_cannot_be_is_one_line(batch: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = models.random_rollouts(tmp_path / "e.jsonl", prompts=3, responses=3, seed=1) if "file" in said else None
    with pytest.raises(ProbeError) as error:
        run_probe(checkpoint_path(), config(**batch), file)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_nucleus_or_one_update_prompt_has_no_target(tmp_path: Path) -> None:
    generation = {**SMALL["generation"], "top_p": 0.9}
    cut = ProbeConfig.from_mapping({**SMALL, "generation": generation, "batch": {**BATCH, "target_se": 0.1}})
    with pytest.raises(ProbeError, match=r"batch\.target_se: generation\.top_p is below 1"):
        run_probe(checkpoint_path(), cut)
    one = tmp_path / "u.jsonl"
    one.write_text(json.dumps({"prompt_ids": [5, 6], "response_ids": [[7, 8], [9]], "rewards": [0, 1]}) + "\n")
    with pytest.raises(ProbeError, match="2se needs an update batch of two prompts or more"):
        run_probe(checkpoint_path(), config(target_se="2se"), update_rollouts=one)


def test_without_a_next_step_there_is_no_target(tmp_path: Path) -> None:
    path = models.adapter_checkpoint(tmp_path / "ckpt", "llama")
    trained = [p for p in load_checkpoint(path).model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3, momentum=0.9)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    with pytest.raises(ProbeError, match=r"batch\.target_se: needs the next step: "):
        run_probe(path, config(target_se=0.1))


def test_further_prompts_are_others_and_always_the_same() -> None:
    pool = [Prompt(f"q{n}", None) for n in range(20)]
    drawn = draw_prompts(pool, 6, seed=3, with_replacement=False)
    more = further_prompts(pool, 6, 100, seed=3, with_replacement=False)
    assert {p.text for p in drawn} | {p.text for p in more} == {p.text for p in pool}
    assert len(more) == 14
    assert further_prompts(pool, 6, 5, seed=3, with_replacement=False) == more[:5]
    assert further_prompts(pool, 6, 14, seed=4, with_replacement=False) != more
    again = draw_prompts(pool, 30, seed=3, with_replacement=True)
    assert further_prompts(pool, 6, 24, seed=3, with_replacement=True) == again[6:]


@pytest.mark.parametrize(
    ("size", "se", "most", "more"),
    [
        (16, 1.0, 256, 0),  # reached
        (16, 1.2, 256, 10),  # 16·1.1·1.44 = 25.3
        (16, 1.001, 256, 2),  # at least 10 % more
        (16, 9.0, 256, 16),  # no more than twice
        (200, 9.0, 256, 56),
        (256, 9.0, 256, 0),
    ],
)
def test_how_many_prompts_more(size: int, se: float, most: int, more: int) -> None:
    assert prompts_to_draw(size, se, 1.0, most) == more


def test_prompts_needed_and_the_interval() -> None:
    assert prompts_needed(16, 0.001, 0.001) == 64
    assert prompts_needed(16, -0.001, 0.0005) == 16
    assert prompts_needed(16, 0.0, 0.001) is None
    low, high = next_step_interval(1.0, 0.3, 0.0, 16)
    assert (low, high) == pytest.approx((1 - 2.1314495 * 0.3, 1 + 2.1314495 * 0.3), abs=1e-6)
    wide = next_step_interval(1.0, 0.3, 0.2, 16)[1] - 1
    assert wide == pytest.approx(2.1314495 * math.sqrt(0.09 + 2 * 0.04), abs=1e-6)


def test_the_gradient_per_token_is_that_of_the_slope(grown: ProbeReport) -> None:
    update = grown.update
    parts = [update.slope_of_v0_per_token, *update.slope_by_unit_per_token]
    size = math.fsum(map(abs, parts))
    assert math.fsum(parts) == pytest.approx(update.delta_h1_per_lr_per_token, abs=1e-10 * size)
    spread = torch.tensor(update.slope_by_unit_per_token, dtype=torch.float64)
    expected: Tensor = update.lr * (3 * spread.var()).sqrt()
    assert update.spread_over_batches_per_token == pytest.approx(float(expected), rel=1e-12)
