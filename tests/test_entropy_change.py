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
from entropy_probe.errors import ConfigError, MeasurementError
from entropy_probe.estimators import prediction
from entropy_probe.estimators.performance_difference import Expansion, slopes_per_token
from entropy_probe.estimators.slope import PromptMean, per_token_slope
from entropy_probe.model.forward import BoundModel, bind
from entropy_probe.model.overrides import theta_plus_eta_v
from entropy_probe.stages import entropy_change
from entropy_probe.stages.batches import _seed, redraw_for
from entropy_probe.stages.derivatives import directional_derivatives
from entropy_probe.stages.responses.prompts import Prompt
from entropy_probe.stages.responses.rollouts import Rollouts
from entropy_probe.stages.responses.sampled_rollouts import redrawn, sample_rollouts
from entropy_probe.stages.scores import Scores, score
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
        self.share = models.alone(self.bound, self.rollouts)

    def override(self, eta: float) -> dict[str, torch.Tensor]:
        return theta_plus_eta_v(self.bound.registry, self.v, eta, self.bound.dtype)


@pytest.fixture(scope="module")
def sampled() -> Sampled:
    return Sampled()


# The grid


@pytest.mark.parametrize("limit", [0.5, 0.8])
@pytest.mark.parametrize("lr", [1e-9, 1e3])
@pytest.mark.parametrize(("etas", "ratios"), [("auto", [math.sqrt(10)] * 2), ("fine", [math.sqrt(10)] * 4)])
def test_auto_grid_ends_where_the_weights_do(
    sampled: Sampled, lr: float, limit: float, etas: str, ratios: list[float]
) -> None:
    """± three or five η of min(lr, η_ess), two a decade down from it, with 0 and lr; where lr is huge, ESS/N at the
    end is within 0.15 of the limit, and three times as far below it by more than that."""
    config = config_of(min_ess_fraction=limit, etas=etas)
    d_seq_logp = directional_derivatives(sampled.bound, sampled.rollouts, sampled.v, config).d_seq_logp
    grid = entropy_change.grid(config, lr, d_seq_logp)
    end = min(lr, math.sqrt(-math.log(limit) / float(d_seq_logp.var())))
    assert (end == lr) == (lr == 1e-9)
    assert grid == sorted(set(grid))
    assert {0.0, lr} <= set(grid)
    inner = [eta for eta in grid if eta != lr or lr == end]
    assert inner == [-eta for eta in reversed(inner)]
    assert len(inner) == 2 * len(ratios) + 3
    assert max(inner) == end
    positive = [eta for eta in inner if eta > 0]
    assert [b / a for a, b in itertools.pairwise(positive)] == pytest.approx(ratios)
    if lr == end:
        return
    after = score(sampled.bound, sampled.rollouts, config, sampled.override(end))
    change = entropy_change.change_at(sampled.scores, after, end, config)
    assert change.weights.ess_fraction == pytest.approx(limit, abs=0.15)
    doubled = score(sampled.bound, sampled.rollouts, config, sampled.override(3 * end))
    assert entropy_change.change_at(sampled.scores, doubled, end, config).weights.ess_fraction < limit - 0.15


def test_the_grid_holds_what_prediction_reaches() -> None:
    """± the reach of slope and curvature, where all other η are beyond it; given η stand as they are."""
    for reach in (1e-7, 1e-3):
        assert len(entropy_change.grid(config_of(), 1e-3, None, reach)) == (9 if reach == 1e-7 else 7)
    assert {1e-7, -1e-7} < set(entropy_change.grid(config_of(), 1e-3, None, 1e-7))
    assert len(entropy_change.grid(config_of(), 1e-3, None, 0.0)) == 7
    assert entropy_change.grid(config_of(etas=[0.2]), 1e-3, None, 1e-7) == [0.0, 1e-3, 0.2]


def test_grid_without_a_derivative_or_with_given_steps() -> None:
    """No D_vS, or one that does not vary: lr alone sets the end. Given η stand as they are, with 0 and lr."""
    for d_seq_logp in (None, torch.zeros(3, 2, dtype=torch.float64)):
        grid = entropy_change.grid(config_of(), 1e-3, d_seq_logp)
        assert (len(grid), max(grid), min(grid)) == (7, 1e-3, -1e-3)
    assert entropy_change.grid(config_of(etas=[0.2, -0.1]), 1e-3) == [-0.1, 0.0, 1e-3, 0.2]


# Cost


def test_each_step_costs_one_pass_and_no_copy_is_kept(sampled: Sampled, monkeypatch: pytest.MonkeyPatch) -> None:
    """K values of η: K+1 times the B prompts and N responses go through the model, once at θ; while one θ + ηv is
    scored, no other lives."""
    etas = [-0.01, 0.0, 0.003, 0.01]
    rows = {"θ": 0, "θ + ηv": 0}
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    called, build = BoundModel._called, entropy_change.moved

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
    monkeypatch.setattr(entropy_change, "moved", building)
    found = entropy_change.entropy_change_two_batch_vector(
        sampled.bound, sampled.rollouts, update_vector_named=sampled.v, etas=etas, config=config_of()
    )
    size = sampled.rollouts.num_prompts + len(sampled.rollouts.gen_lens)
    assert rows == {"θ": size, "θ + ηv": len(etas) * size}
    assert set(alive) == {len(sampled.v)}
    assert found["deltaH_true_list"][1] == 0.0
    gc.collect()
    assert all(ref() is None for ref in made)


def test_the_last_copy_goes_before_the_next_is_made(sampled: Sampled, monkeypatch: pytest.MonkeyPatch) -> None:
    """One θ + ηv at a time: when the next one is made, none is left."""
    made: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []
    build = entropy_change.moved

    def building(*args: Any) -> dict[str, torch.Tensor]:
        gc.collect()
        left.append(sum(ref() is not None for ref in made))
        mapping = build(*args)
        made.extend(map(weakref.ref, mapping.values()))
        return mapping

    monkeypatch.setattr(entropy_change, "moved", building)
    entropy_change.sweep(sampled.bound, sampled.share, sampled.scores, sampled.v, [0.0, 1e-3, 2e-3], config_of())
    assert left == [0, 0, 0]


# Fallbacks


def test_sampling_at_eta_zero_is_sampling(sampled: Sampled) -> None:
    """The override of η = 0 draws the very same responses as none; a long step draws others, from its own policy."""
    config, tokenizer = config_of(), OneToken()
    prompts = [Prompt(chr(97 + n) * (1 + n % 3)) for n in range(24)]
    plain = sample_rollouts(sampled.bound, tokenizer, prompts, config.generation, seed=9)

    def drawn(eta: float) -> Rollouts:
        override = sampled.override(eta)
        return redrawn(sampled.bound, sampled.rollouts, tokenizer, config.generation, seeds=[9], override=override)[0]

    same, other = drawn(0.0), drawn(0.3)
    assert torch.equal(same.ids, plain.ids)
    assert torch.equal(same.gen_lens, plain.gen_lens)
    assert other.ids.shape != plain.ids.shape or not torch.equal(other.ids, plain.ids)
    assert bool(same.rewards.isnan().all())
    assert same.source == "resampled"


def redrawn_at(sampled: Sampled, eta: float, rollouts: Rollouts | None = None) -> Rollouts:
    share = models.alone(sampled.bound, rollouts or sampled.rollouts)
    redraw = redraw_for(sampled.bound, share, None, config_of(fallback="resample"))
    assert redraw is not None
    return redraw(sampled.override(eta))


def test_redrawn_prompts_are_those_of_the_batch(sampled: Sampled) -> None:
    """The same prompts, with as many responses."""
    fresh = redrawn_at(sampled, 0.0)
    assert torch.equal(fresh.prompt_lens, sampled.rollouts.prompt_lens)
    assert fresh.rewards.shape == sampled.rollouts.rewards.shape
    for i, length in enumerate(fresh.prompt_lens.tolist()):
        assert torch.equal(fresh.ids[i, :length], sampled.rollouts.ids[i, :length])
    assert fresh.ids.shape != sampled.rollouts.ids.shape or not torch.equal(fresh.ids, sampled.rollouts.ids)


@pytest.mark.parametrize(
    ("lengths", "cut", "limit"),
    [
        ([3, 5, 4], [], 6),  # none was cut: the configuration's limit
        ([3, 9, 4], [], 9),  # none was cut, one is longer than the configuration allows
        ([3, 4, 4], [1, 2], 4),
        ([3, 9, 4], [1], 9),
        ([3, 5, 4], [2], None),  # cut at 4, and 5 tokens long
        ([3, 5, 4], [1, 2], None),
    ],
)
def test_fresh_responses_have_the_limit_of_the_given_ones(
    sampled: Sampled, lengths: list[int], cut: list[int], limit: int | None
) -> None:
    """An entropy per response depends on where responses are cut: a rollouts file says where, or it is one line."""
    size = max(lengths)
    ids = torch.tensor([[7] + [9] * size for _ in lengths])
    for i, length in enumerate(lengths):
        ids[i, length] = 9 if i in cut else models.EOS
    rollouts = replace(
        sampled.rollouts,
        ids=ids,
        prompt_lens=torch.ones(len(lengths), dtype=torch.long),
        gen_lens=torch.tensor(lengths),
        rewards=torch.zeros(1, len(lengths), dtype=torch.float64),
        source="file.jsonl",
    )
    if limit is None:
        with pytest.raises(MeasurementError, match=r"file.jsonl: responses without EOS .*; set true_delta_h\.fallback"):
            redrawn_at(sampled, 0.0, rollouts)
        return
    asked: list[int] = []
    config = config_of(fallback="resample")

    def redrawn_with(bound: Any, rollouts: Rollouts, tokenizer: Any, generation: Any, **_: Any) -> list[Rollouts]:
        asked.append(generation.max_new_tokens)
        return [rollouts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("entropy_probe.stages.batches.redrawn", redrawn_with)
        redraw = redraw_for(sampled.bound, models.alone(sampled.bound, rollouts), None, config)
        assert redraw is not None
        redraw({})
    assert asked == [limit]


def test_fresh_responses_share_the_noise_of_the_batch(sampled: Sampled) -> None:
    """A batch that was sampled comes again at θ, and after a small step most of it: the change has a fraction of the SE
    that responses of their own noise give."""
    config = config_of(fallback="resample")
    seed = _seed("E", config.batch.seed)
    prompts = [Prompt(chr(97 + n) * (1 + n % 3)) for n in range(24)]
    e = sample_rollouts(sampled.bound, OneToken(), prompts, config.generation, seed=seed)
    assert torch.equal(redrawn_at(sampled, 0.0, e).ids, e.ids)
    scores = score(sampled.bound, e, config)
    eta = 0.01
    after = score(sampled.bound, e, config, sampled.override(eta))
    change = entropy_change.change_at(scores, after, eta, config)

    def se(fresh: Rollouts) -> float:
        at = score(sampled.bound, fresh, config, sampled.override(eta))
        return entropy_change.resampled(change, scores, at, config).rb.se

    own = redrawn(sampled.bound, e, None, config.generation, seeds=[seed + 1], override=sampled.override(eta))[0]
    assert se(redrawn_at(sampled, eta, e)) < se(own) / 2


def test_stop_strings_cannot_be_found_without_a_tokenizer(sampled: Sampled) -> None:
    generation = ProbeConfig.from_mapping({"generation": {"stop": ["x"], "max_new_tokens": 3}}).generation
    with pytest.raises(MeasurementError, match=r"generation\.stop: needs a tokenizer"):
        redrawn(sampled.bound, sampled.rollouts, None, generation, seeds=[1], override={})


def at_end(sampled: Sampled, eta: float, prompts: int, **true_delta_h: Any) -> entropy_change.EntropyChange:
    config = config_of(**true_delta_h)
    after = score(sampled.bound, sampled.rollouts, config, sampled.override(eta))
    kept = torch.arange(prompts)
    return entropy_change.change_at(sampled.scores.of_prompts(kept), after.of_prompts(kept), eta, config)


def test_smoothing_where_it_is_needed(sampled: Sampled) -> None:
    """N = 192: `psis` takes smoothed weights beyond the limit and none within; ESS is that of the plain weights."""
    plain, smooth = (at_end(sampled, 0.3, 24, fallback=f) for f in ("none", "psis"))
    assert plain.weights.ess_fraction < 0.5
    assert (plain.weights.method, smooth.weights.method) == ("snis", "psis")
    assert (plain.weights.ess, plain.weights.pareto_k) == (smooth.weights.ess, smooth.weights.pareto_k)
    assert smooth.rb.value != plain.rb.value
    assert math.isfinite(smooth.rb.value)
    assert at_end(sampled, 1e-4, 24, fallback="psis").weights.method == "snis"


def test_smoothing_needs_64_responses(sampled: Sampled) -> None:
    """N = 56: no tail can be fitted, the weights stay as they are and say so."""
    plain, asked = (at_end(sampled, 0.3, 7, fallback=f) for f in ("none", "psis"))
    assert plain.weights.ess_fraction < 0.5
    assert asked.weights.method == "snis"
    assert asked.rb.value == plain.rb.value


def test_responses_within_bounds_are_not_drawn_again(sampled: Sampled) -> None:
    """They are drawn where the weights are out of bounds, once for each such η, and nowhere else; without the fallback
    there is nothing that could draw them."""
    asked: list[dict[str, torch.Tensor]] = []

    def redraw(override: Any) -> Rollouts:
        asked.append(override)
        return redrawn_at(sampled, 0.3)

    arguments = (sampled.bound, sampled.share, sampled.scores, sampled.v, [0.0, 1e-4, 0.3])
    found = entropy_change.sweep(*arguments, config_of(fallback="resample"), None, redraw)
    assert [change.weights.method for change in found] == ["snis", "snis", "resample"]
    assert [change.weights.reliable for change in found] == [True, True, True]
    assert len(asked) == 1
    assert [change.weights.reliable for change in entropy_change.sweep(*arguments, config_of())] == [True, True, False]
    for fallback in ("none", "psis"):
        assert redraw_for(sampled.bound, sampled.share, None, config_of(fallback=fallback)) is None


def test_clipping_hides_nothing(sampled: Sampled) -> None:
    """Clipped weights have a high ESS; whether they are to be believed is decided by those before clipping, and none of
    them may have been clipped."""
    far, near = (at_end(sampled, eta, 24, clip_log_weight=clip) for eta, clip in ((0.3, 0.05), (1e-3, 1e-4)))
    assert far.weights.ess_fraction > 0.9 > 0.5 > far.weights.unclipped_ess_fraction
    assert far.weights.unclipped_ess_fraction == at_end(sampled, 0.3, 24).weights.ess_fraction
    assert far.weights.pareto_k == at_end(sampled, 0.3, 24).weights.pareto_k
    assert near.weights.unclipped_ess_fraction > 0.99
    assert near.weights.clip_fraction > 0
    assert [far.weights.reliable, near.weights.reliable] == [False, False]
    assert at_end(sampled, 1e-3, 24, clip_log_weight=1.0).weights.reliable


def test_smoothed_weights_are_believed_as_far_as_their_tail(sampled: Sampled) -> None:
    """ESS/N below its limit, k̂ within or beyond its own."""
    k = at_end(sampled, 0.3, 24).weights.pareto_k
    assert k is not None
    for limit in (k - 0.01, k + 0.01):
        change = at_end(sampled, 0.3, 24, fallback="psis", max_pareto_k=limit, min_ess_fraction=0.99)
        assert (change.weights.method, change.weights.reliable) == ("psis", limit > k)


LR = 0.3


class Files:
    def __init__(self, folder: Path) -> None:
        self.checkpoint = models.adapter_checkpoint(folder / "ckpt", "llama")
        self.e = models.random_rollouts(folder / "e.jsonl", prompts=5, responses=3, seed=1, truncate=False)
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
    assert (row.reliable, row.in_range) == (True, False)  # measured, and too far for second order
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


def test_how_far_slope_and_curvature_reach() -> None:
    """η*/10; without end where curvature is not decided; by 2 SE of a slope that is smaller than they are."""
    steady = PromptMean(torch.ones(24, dtype=torch.float64))  # spread 0: its mean is decided
    noise = PromptMean(torch.tensor([-1.0, 1.2] * 12, dtype=torch.float64))
    assert (prediction.eta_star(steady, steady), prediction.reach(steady, steady)) == (2.0, 0.2)
    assert (prediction.eta_star(steady, noise), prediction.reach(steady, noise)) == (None, math.inf)
    assert prediction.reach(noise, steady) == pytest.approx(0.4 * noise.se)
    assert prediction.eta_star(noise, steady) == pytest.approx(0.2)


@pytest.mark.parametrize("mode", ["exact", "block"])
@pytest.mark.parametrize("normalize", ["per_sequence", "per_token"])
def test_one_batch_is_predicted_by_the_cross_fitted_slope(files: Files, mode: str, normalize: str) -> None:
    """Per response or per token, with prompts or blocks of them for units: the SE of the difference is that of numbers
    which share their prompts, far below two independent ones, and in range is what `reach` says."""
    mapping = {
        "true_delta_h": {"normalize": normalize},
        "first_order": {"lr": 1e-4, "mode": mode, "num_blocks": 4},
        "precision": models.FLOAT64,
    }
    report = run_probe(files.checkpoint, ProbeConfig.from_mapping(mapping), files.e)
    assert report.batch.same_batch
    of_response = report.update.delta_h1_per_lr_cross
    assert of_response is not None
    row = next(row for row in report.entropy_change if 0 < row.eta < 1e-4)
    curvature = report.update.curvature_per_token if normalize == "per_token" else report.update.curvature
    assert curvature is not None
    assert row.predicted is not None
    slope = (row.predicted - 0.5 * row.eta**2 * curvature) / row.eta
    if normalize == "per_sequence":
        assert slope == pytest.approx(of_response, rel=1e-9)
    else:  # h' = (H' − h·E[T]')/E[T]: of the same size as H'/E[T], and another number
        mean_length = report.batch.num_tokens / 15
        assert abs(slope) < 30 * abs(of_response) / mean_length
        assert slope != pytest.approx(report.update.delta_h1_per_lr_per_token, rel=1e-3)
    assert row.difference_se is not None
    assert row.predicted_se is not None
    assert row.difference == pytest.approx(row.delta_h_pd - row.predicted)
    assert row.ratio == pytest.approx(row.delta_h_pd / row.predicted)
    assert row.in_range


def test_per_token_derivatives_have_their_influence() -> None:
    """Each prompt's term is the value plus the derivative of the estimator in that prompt's weight, h, s and T̄
    included: taken by counting the prompt a thousandth more and less often."""
    generator = torch.Generator().manual_seed(0)
    tables = [torch.rand(5, 2, generator=generator, dtype=torch.float64) for _ in range(5)]
    lengths = torch.randint(1, 9, (5, 2), generator=generator).double()

    def both(counts: torch.Tensor | None = None) -> list[PromptMean]:
        rows = torch.arange(5) if counts is None else torch.arange(5).repeat_interleave(counts)
        r, *derivatives = (table[rows] for table in tables)
        t = lengths[rows]
        of_change = Expansion(torch.stack(derivatives[:2]), torch.stack(derivatives[2:]))
        return [per_token_slope(r, t, *derivatives[:2]), *slopes_per_token(of_change, r, t)]

    for k, estimate in enumerate(both()):
        for n in range(5):
            more, less = torch.full((5,), 1000), torch.full((5,), 1000)
            more[n], less[n] = 1001, 999
            derivative = (both(more)[k].value - both(less)[k].value) / 2 * 5000
            assert float(estimate.per_prompt[n]) - estimate.value == pytest.approx(derivative, rel=1e-5, abs=1e-8)


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


def test_the_notes_verb_below_top_p_and_its_fallbacks(sampled: Sampled) -> None:
    """At top_p < 1 `H_orig` is of the restricted policy, weighted as ΔH is; fresh responses need `run_probe`."""
    config = ProbeConfig.from_mapping({"generation": {"top_p": 0.9, "num_return_sequences": 4, "max_new_tokens": 6}})
    e = sample_rollouts(sampled.bound, OneToken(), [Prompt("a"), Prompt("bb")], config.generation, seed=3)
    arguments = {"update_vector_named": sampled.v, "etas": [1e-4]}
    result = entropy_change.entropy_change_two_batch_vector(sampled.bound, e, config=config, **arguments)
    scores = score(sampled.bound, e, config)
    weights = torch.softmax((scores.seq_logp - scores.seq_logq).flatten(), 0)
    expected = float((weights * scores.rb_sum.flatten()).sum())
    assert result["H_orig"] == pytest.approx(expected, rel=1e-12)
    assert expected != pytest.approx(float(scores.rb_sum.mean()), rel=1e-7)
    assert result["snis_diagnostics"][0]["method"] == "snis"
    with pytest.raises(ConfigError, match=r"true_delta_h\.fallback: `resample` is not offered here"):
        entropy_change.entropy_change_two_batch_vector(
            sampled.bound, e, config=config_of(fallback="resample"), **arguments
        )
