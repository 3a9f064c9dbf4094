"""The realised change on tiny models: its grid of η, what it costs, and what is done where weights are of no use."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from entropy_probe import ProbeConfig, ProbeReport, load_checkpoint, run_probe
from entropy_probe.errors import MeasurementError
from entropy_probe.estimators.slope import PromptMean
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.stages import entropy_change
from entropy_probe.stages.batches import resample
from entropy_probe.stages.rollouts import Rollouts, redrawn, sample_rollouts
from entropy_probe.stages.scores import Scores, score
from entropy_probe.stages.slopes import directional_derivatives
from entropy_probe.stages.tasks import Prompt
from entropy_probe_checks.criteria import CRITERIA
from test_rollouts import OneToken


def config_of(**true_delta_h: Any) -> ProbeConfig:
    generation = {"num_return_sequences": 8, "max_new_tokens": 6}
    return ProbeConfig.from_mapping({"true_delta_h": true_delta_h, "generation": generation})


class Sampled:
    """Responses of a tiny Llama itself, and a direction."""

    def __init__(self) -> None:
        self.bound = bind(models.tiny_model("llama"), torch.float64)
        prompts = [Prompt(chr(97 + n) * (1 + n % 3)) for n in range(24)]
        self.rollouts: Rollouts = sample_rollouts(self.bound, OneToken(), prompts, config_of().generation, seed=4)
        generator = torch.Generator().manual_seed(6)
        self.v = {
            name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
            for name, p in self.bound.registry.trainable.items()
        }
        self.scores: Scores = score(self.bound, self.rollouts, config_of())

    def override(self, eta: float) -> dict[str, torch.Tensor]:
        return theta_plus_eta_v(self.bound.registry, self.v, eta, self.bound.dtype)


@pytest.fixture(scope="module")
def sampled() -> Sampled:
    return Sampled()


# The grid


@pytest.mark.parametrize("limit", [0.5, 0.8])
@pytest.mark.parametrize("lr", [1e-9, 1e3])
def test_auto_grid_ends_where_the_weights_do(sampled: Sampled, lr: float, limit: float) -> None:
    """±η, two a decade down from min(lr, η_ess), with 0 and lr; where lr is huge, ESS/N measured at the end is within
    0.15 of the limit, and three times as far below it by more than that."""
    config = config_of(min_ess_fraction=limit)
    d_seq_logp = directional_derivatives(sampled.bound, sampled.rollouts, sampled.v, config).d_seq_logp
    grid = entropy_change.grid(config, lr, d_seq_logp)
    end = min(lr, math.sqrt(-math.log(limit) / float(d_seq_logp.var())))
    assert (end == lr) == (lr == 1e-9)
    assert grid == sorted(set(grid))
    assert {0.0, lr, end, -end} <= set(grid)
    inner = [eta for eta in grid if eta != lr or lr == end]
    assert inner == [-eta for eta in reversed(inner)]
    assert len(inner) == 11
    assert max(inner) == end
    positive = [eta for eta in inner if eta > 0]
    assert [b / a for a, b in itertools.pairwise(positive)] == pytest.approx([math.sqrt(10)] * 4)
    if lr == end:
        return
    after = score(sampled.bound, sampled.rollouts, config, sampled.override(end))
    change = entropy_change.change_at(sampled.scores, after, end, config)
    assert change.ess_fraction == pytest.approx(limit, abs=0.15)
    doubled = score(sampled.bound, sampled.rollouts, config, sampled.override(3 * end))
    assert entropy_change.change_at(sampled.scores, doubled, end, config).ess_fraction < limit - 0.15


def test_grid_without_a_derivative_or_with_given_steps() -> None:
    """No D_vS, or one that does not vary: lr alone sets the end. Given η stand as they are, with 0 and lr."""
    for d_seq_logp in (None, torch.zeros(3, 2, dtype=torch.float64)):
        grid = entropy_change.grid(config_of(), 1e-3, d_seq_logp)
        assert (len(grid), max(grid), min(grid)) == (11, 1e-3, -1e-3)
    assert entropy_change.grid(config_of(etas=[0.2, -0.1]), 1e-3) == [-0.1, 0.0, 1e-3, 0.2]


# Cost


def test_each_step_costs_one_pass_and_no_copy_is_kept(sampled: Sampled, monkeypatch: pytest.MonkeyPatch) -> None:
    """K values of η: (K+1)·N rows through the model, of which N at θ; while one θ + ηv is scored, no other lives."""
    etas = [-0.01, 0.0, 0.003, 0.01]
    rows = {"θ": 0, "θ + ηv": 0}
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    called, build = BoundModel._called, entropy_change.theta_plus_eta_v

    def counting(self: BoundModel, ids: torch.Tensor, mask: Any, keep: slice, mapping: Any, *rest: Any) -> Any:
        rows["θ + ηv" if mapping else "θ"] += len(ids)
        if mapping:
            gc.collect()
            alive.append(sum(ref() is not None for ref in made))
        return called(self, ids, mask, keep, mapping, *rest)

    def building(*args: Any) -> dict[str, torch.Tensor]:
        mapping = build(*args)
        made.extend(map(weakref.ref, mapping.values()))
        return mapping

    monkeypatch.setattr(BoundModel, "_called", counting)
    monkeypatch.setattr(entropy_change, "theta_plus_eta_v", building)
    found = entropy_change.entropy_change_two_batch_vector(
        sampled.bound, sampled.rollouts, update_vector_named=sampled.v, etas=etas, config=config_of()
    )
    size = len(sampled.rollouts.gen_lens)
    assert rows == {"θ": size, "θ + ηv": len(etas) * size}
    assert set(alive) == {len(sampled.v)}
    assert found["deltaH_true_list"][1] == 0.0
    gc.collect()
    assert all(ref() is None for ref in made)


def test_the_last_copy_goes_before_the_next_is_made(sampled: Sampled, monkeypatch: pytest.MonkeyPatch) -> None:
    """One θ + ηv at a time: when the next one is made, none is left."""
    made: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []
    build = entropy_change.theta_plus_eta_v

    def building(*args: Any) -> dict[str, torch.Tensor]:
        gc.collect()
        left.append(sum(ref() is not None for ref in made))
        mapping = build(*args)
        made.extend(map(weakref.ref, mapping.values()))
        return mapping

    monkeypatch.setattr(entropy_change, "theta_plus_eta_v", building)
    entropy_change.sweep(sampled.bound, sampled.rollouts, sampled.scores, sampled.v, [0.0, 1e-3, 2e-3], config_of())
    assert left == [0, 0, 0]


# Fallbacks


def test_sampling_at_eta_zero_is_sampling(sampled: Sampled) -> None:
    """The override of η = 0 draws the very same responses as none; a long step draws others, from its own policy."""
    config, tokenizer = config_of(), OneToken()
    prompts = [Prompt(chr(97 + n) * (1 + n % 3)) for n in range(24)]
    plain = sample_rollouts(sampled.bound, tokenizer, prompts, config.generation, seed=9)

    def drawn(eta: float) -> Rollouts:
        override = sampled.override(eta)
        return redrawn(sampled.bound, sampled.rollouts, tokenizer, config.generation, seed=9, override=override)

    same, other = drawn(0.0), drawn(0.3)
    assert torch.equal(same.ids, plain.ids)
    assert torch.equal(same.gen_lens, plain.gen_lens)
    assert other.ids.shape != plain.ids.shape or not torch.equal(other.ids, plain.ids)
    assert bool(same.rewards.isnan().all())
    assert same.source == "resampled"


def test_redrawn_prompts_are_those_of_the_batch(sampled: Sampled) -> None:
    """The same prompts, with as many responses, at a seed that is not that of E."""
    fresh = resample(sampled.bound, sampled.rollouts, None, config_of(), sampled.override(0.0))
    assert torch.equal(fresh.prompt_lens, sampled.rollouts.prompt_lens)
    assert fresh.rewards.shape == sampled.rollouts.rewards.shape
    for i, length in enumerate(fresh.prompt_lens.tolist()):
        assert torch.equal(fresh.ids[i, :length], sampled.rollouts.ids[i, :length])
    assert fresh.ids.shape != sampled.rollouts.ids.shape or not torch.equal(fresh.ids, sampled.rollouts.ids)


def test_stop_strings_cannot_be_found_without_a_tokenizer(sampled: Sampled) -> None:
    generation = ProbeConfig.from_mapping({"generation": {"stop": ["x"], "max_new_tokens": 3}}).generation
    with pytest.raises(MeasurementError, match=r"generation\.stop: needs a tokenizer"):
        redrawn(sampled.bound, sampled.rollouts, None, generation, seed=1, override={})


def at_end(sampled: Sampled, eta: float, prompts: int, **true_delta_h: Any) -> entropy_change.EntropyChange:
    config = config_of(**true_delta_h)
    after = score(sampled.bound, sampled.rollouts, config, sampled.override(eta))
    kept = torch.arange(prompts)
    return entropy_change.change_at(sampled.scores.of_prompts(kept), after.of_prompts(kept), eta, config)


def test_smoothing_where_it_is_needed(sampled: Sampled) -> None:
    """N = 192: `psis` takes smoothed weights beyond the limit and none within; ESS is that of the plain weights."""
    plain, smooth = (at_end(sampled, 0.3, 24, fallback=f) for f in ("none", "psis"))
    assert plain.ess_fraction < 0.5
    assert (plain.method, smooth.method) == ("snis", "psis")
    assert (plain.ess, plain.pareto_k) == (smooth.ess, smooth.pareto_k)
    assert smooth.rb.value != plain.rb.value
    assert math.isfinite(smooth.rb.value)
    assert at_end(sampled, 1e-4, 24, fallback="psis").method == "snis"


def test_smoothing_needs_64_responses(sampled: Sampled) -> None:
    """N = 56: no tail can be fitted, the weights stay as they are and say so."""
    plain, asked = (at_end(sampled, 0.3, 7, fallback=f) for f in ("none", "psis"))
    assert plain.ess_fraction < 0.5
    assert asked.method == "snis"
    assert asked.rb.value == plain.rb.value


def test_responses_within_bounds_are_not_drawn_again(sampled: Sampled) -> None:
    """`resample` is called where the weights are out of bounds, once for each such η, and nowhere else."""
    asked: list[dict[str, torch.Tensor]] = []

    def redraw(override: Any) -> Rollouts:
        asked.append(override)
        return resample(sampled.bound, sampled.rollouts, None, config_of(), override)

    arguments = (sampled.bound, sampled.rollouts, sampled.scores, sampled.v, [0.0, 1e-4, 0.3])
    found = entropy_change.sweep(*arguments, config_of(fallback="resample"), None, redraw)
    assert [change.method for change in found] == ["snis", "snis", "resample"]
    assert len(asked) == 1
    entropy_change.sweep(*arguments, config_of(), None, redraw)
    assert len(asked) == 1


LR = 0.3


class Files:
    def __init__(self, folder: Path) -> None:
        self.checkpoint = models.adapter_checkpoint(folder / "ckpt", "llama")
        self.e = models.random_rollouts(folder / "e.jsonl", prompts=5, responses=3, seed=1)
        self.u = models.random_rollouts(folder / "u.jsonl", prompts=5, responses=3, seed=2)

    def run(self, fallback: str, seed: int = 0, lr: float = LR) -> ProbeReport:
        mapping = {
            "true_delta_h": {"fallback": fallback, "etas": []},
            "first_order": {"lr": lr},
            "generation": {"max_new_tokens": 6},
            "batch": {"seed": seed},
        }
        return run_probe(self.checkpoint, ProbeConfig.from_mapping(mapping), self.e, self.u)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("change"))


def test_resampling_end_to_end(files: Files) -> None:
    """A checkpoint without tokenizer, rollouts given, a huge lr: the row at lr comes from fresh responses, with finite
    numbers; criteria of the weights are not applicable; the live model is what it was; the same seed gives the same
    numbers and another seed others."""
    assert load_checkpoint(files.checkpoint).tokenizer is None
    report, again, other = files.run("resample"), files.run("resample"), files.run("resample", seed=1)
    zero, row = report.entropy_change
    assert (zero.eta, zero.method, row.eta, row.method) == (0.0, "snis", LR, "resample")
    numbers = [value for value in row.model_dump().values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers))
    assert row.ess_fraction < 0.5
    assert row.delta_h_rb_se > 0
    verdicts = {name: CRITERIA[name](report).status for name in ("ess", "pareto_k", "live_model_unmodified")}
    assert verdicts == {"ess": "not_applicable", "pareto_k": "not_applicable", "live_model_unmodified": "pass"}
    assert report.integrity.checksum_before == report.integrity.checksum_after
    assert again.entropy_change == report.entropy_change
    assert other.entropy_change[0] == zero
    assert other.entropy_change[1].delta_h_rb != row.delta_h_rb
    assert other.entropy_change[1].ess == row.ess


def test_resampling_on_sampled_batches(files: Files, tmp_path: Path) -> None:
    """With a tokenizer: E and U sampled, a stop string, and fresh responses at lr."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("\n".join(f'{{"prompt": "{"abcdefgh"[n]}"}}' for n in range(8)))
    config = ProbeConfig.from_mapping(
        {
            "true_delta_h": {"fallback": "resample", "etas": []},
            "first_order": {"lr": LR},
            "generation": {"max_new_tokens": 4, "num_return_sequences": 3, "stop": ["7 "]},
            "batch": {"num_prompts": 4, "num_update_prompts": 4},
        }
    )
    checkpoint = replace(load_checkpoint(files.checkpoint), tokenizer=OneToken())
    report = run_probe(checkpoint, config, prompts=prompts)
    assert report.entropy_change[-1].method == "resample"
    assert math.isfinite(report.entropy_change[-1].delta_h_rb)


def test_no_fallback_leaves_the_verdict_open(files: Files) -> None:
    report = files.run("none")
    assert [row.method for row in report.entropy_change] == ["snis", "snis"]
    assert CRITERIA["ess"](report).status == "inconclusive"
    assert report.entropy_change[1].in_range is False


# Prediction


def test_where_prediction_and_realisation_are_compared(sampled: Sampled) -> None:
    """Up to η*/10 where curvature is decided, and within bounds; per token, without curvature, where ESS/N ≥ 0.99."""
    change = entropy_change.change_at(sampled.scores, sampled.scores, 1.0, config_of())
    steady = PromptMean(torch.ones(24, dtype=torch.float64))  # spread 0: its mean is decided

    def in_range(eta: float, ess_fraction: float, curvature: PromptMean | None) -> bool:
        at = replace(change, eta=eta, ess_fraction=ess_fraction)
        return entropy_change.predict(at, steady, curvature, config_of()).in_range

    assert in_range(0.2, 0.6, steady)  # η* = 2
    assert not in_range(0.21, 0.6, steady)
    assert not in_range(0.1, 0.4, steady)
    noise = PromptMean(torch.tensor([-1.0, 1.2] * 12, dtype=torch.float64))
    assert in_range(5.0, 0.6, noise)
    assert in_range(5.0, 0.991, None)
    assert not in_range(5.0, 0.98, None)


@pytest.mark.parametrize("normalize", ["per_sequence", "per_token"])
def test_the_notes_verb_speaks_of_one_entropy(sampled: Sampled, normalize: str) -> None:
    """`H_upd` − `H_orig` is ΔH, per response or per token; `H_orig` is the entropy of the same kind."""
    config = config_of(normalize=normalize)
    result = entropy_change.entropy_change_two_batch_vector(
        sampled.bound, sampled.rollouts, update_vector_named=sampled.v, etas=[0.0, 1e-4], config=config
    )
    total, tokens = float(sampled.scores.rb_sum.sum()), int(sampled.rollouts.gen_lens.sum())
    responses = len(sampled.rollouts.gen_lens)
    assert result["H_orig"] == pytest.approx(total / (tokens if normalize == "per_token" else responses), rel=1e-12)
    for after, change in zip(result["H_upd_list"], result["deltaH_true_list"], strict=True):
        assert after - result["H_orig"] == pytest.approx(change, abs=1e-12)
